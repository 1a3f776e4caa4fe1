"""The linear classifier: every head, student, trial and probe is one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 16_384


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

    def logits(self, features: Tensor | np.ndarray) -> Tensor:
        """(N, d) features of any float dtype to (N, K) float32 logits."""
        rows = torch.as_tensor(features)
        # A float32 copy of all features would double the memory, so rows are converted block by block.
        pieces = [piece.float() @ self.weight.T + self.bias for piece in rows.split(BLOCK_ROWS)]
        return torch.cat(pieces) if pieces else torch.empty(0, len(self.bias))

    def predict(self, features: Tensor | np.ndarray) -> np.ndarray:
        """(N, d) features of any float dtype to (N,) int64 class indices."""
        return self.logits(features).argmax(dim=1).numpy()
