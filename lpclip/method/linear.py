"""The linear classifier: every head, student, trial and probe is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A run of rows has at most so many, and so few that its logits take 4 MB.
BLOCK_ROWS = 16_384
BLOCK_CELLS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear classifier of K classes: logits = features . weight' + bias."""

    weight: Tensor
    """(K, d) float32."""
    bias: Tensor
    """(K,) float32."""

    def to(self, device: torch.device) -> Linear:
        """The same on another device."""
        return Linear(weight=self.weight.to(device), bias=self.bias.to(device))

    def by_blocks(self, num_rows: int, work: Callable[[slice], Sequence[Tensor]]) -> list[Tensor]:
        """Call `work` on runs of rows, and join its results to tensors (N, ...) of all rows.

        So logits of all rows, which can be larger than the features, are never there. The results are written into
        arrays of their own: small ones kept from each run would lie between the large ones that are freed, and the
        memory of these could not be used again. Without rows there is one empty run.
        """
        step = max(1, min(BLOCK_ROWS, BLOCK_CELLS // len(self.bias)))
        found: list[Tensor] = []
        for start in range(0, max(1, num_rows), step):
            rows = slice(start, min(start + step, num_rows))
            pieces = work(rows)
            found = found or [piece.new_empty(num_rows, *piece.shape[1:]) for piece in pieces]
            for whole, piece in zip(found, pieces, strict=True):
                whole[rows] = piece
        return found

    def logits(self, features: Tensor | np.ndarray) -> Tensor:
        """(N, d) features of any float dtype to (N, K) float32 logits."""
        rows = torch.as_tensor(features)
        # A float32 copy of all features would double the memory, so rows are converted block by block.
        (found,) = self.by_blocks(len(rows), lambda block: [rows[block].float() @ self.weight.T + self.bias])
        return found

    def predict(self, features: Tensor | np.ndarray) -> np.ndarray:
        """(N, d) features of any float dtype to (N,) int64 class indices."""
        (found,) = self.by_blocks(len(features), lambda block: [self.logits(features[block]).argmax(dim=1)])
        return found.numpy()
