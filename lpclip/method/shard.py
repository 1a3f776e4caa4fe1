"""A worker's rows, and the whitening of all workers' rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lpclip.method.gaussian import Whitening, make_whitening, row_moments
from lpclip.method.pseudo_labels import AllReduce, alone

CPU = torch.device("cpu")

# Workers get whole chunks, so that sums over chunks do not depend on the number of workers.
CHUNK_ROWS = 4096

# A GPU works on so many chunks at a time, or on fewer if a matrix of so many cells is exceeded.
CHUNKS_AT_ONCE = 8
CHUNK_CELLS = 1 << 25

# Features stay on a GPU that has this share of its memory free for them; else they travel to it in every round.
RESIDENT_SHARE = 0.5


def compute_device() -> torch.device:
    """The first GPU that this process sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A worker's rows: a run of the order of all rows."""

    features: np.ndarray
    """(n, d) float16 or float32, unit norm: what the teacher sees."""
    strong: tuple[np.ndarray, ...] = ()
    """Strong views, each (n, d) float16. The gradient solver's students see them instead of the base view, the gaussian
    solver's last student sees them beside it."""
    first_row: int = 0
    """Place of the shard's first row among all rows."""
    num_rows: int = 0
    """Rows of all shards."""
    neighbours: Tensor | None = None
    """(n, k) int32: places among all rows of each row's nearest neighbours; None uses no neighbours."""
    zero_shot: Tensor | None = None
    """(n, K) float32 zero-shot logits, where the features are only a part of what gives them."""
    device: torch.device = CPU
    """Where the rows are worked on. Sums are taken in float64 everywhere, products in float32."""

    @property
    def stop_row(self) -> int:
        """Place of the row behind the shard's last one."""
        return self.first_row + len(self.features)

    def zero_shot_logits(self, rows: slice, features: Tensor, *, head: Tensor) -> Tensor:
        """(m, K) of the chunk `rows`, whose features (m, d) are given; `head` (K, d) is in units of logits."""
        if self.zero_shot is not None:
            return self.zero_shot[rows].to(self.device)
        return features @ head.T

    def views(self, rows: slice, features: Tensor, *, strong: bool) -> list[Tensor]:
        """The base view (m, d) of the chunk `rows`, which is given, and its strong views, if wanted."""
        shown = self._tensors[1:] if strong else ()
        return [features, *(view[rows].to(self.device).float() for view in shown)]

    def chunks(self, *, width: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Row slices and their features (m, d) as float32, on the device.

        A slice has one chunk of CHUNK_ROWS, or several where `chunks_at_once` says so.
        """
        step = CHUNK_ROWS * self.chunks_at_once(width)
        for start in range(0, len(self.features), step):
            rows = slice(start, min(start + step, len(self.features)))
            yield rows, self._tensors[0][rows].to(self.device).float()

    def chunks_at_once(self, width: int) -> int:
        """Number of chunks to work on at a time, with matrices of `width` columns.

        A GPU takes several: with one, starting its kernels would take longer than the kernels themselves.
        """
        if self.device.type != "cuda":
            return 1
        return max(1, min(CHUNKS_AT_ONCE, CHUNK_CELLS // (CHUNK_ROWS * max(1, width))))

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        """The features, then the strong views: on the device if they have room there."""
        tensors = tuple(torch.from_numpy(rows) for rows in (self.features, *self.strong))
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if sum(tensor.nbytes for tensor in tensors) <= RESIDENT_SHARE * free:
                return tuple(tensor.to(self.device) for tensor in tensors)
        return tensors


def product_sum(left: Tensor, right: Tensor) -> Tensor:
    """left' right (K, d) float64 of rows (m, K) and (m, d): float32 products of whole chunks, added in float64."""
    pieces = zip(left.split(CHUNK_ROWS), right.split(CHUNK_ROWS), strict=True)
    return sum((a.T @ b).double() for a, b in pieces)


@dataclass(frozen=True, kw_only=True)
class Whitenings:
    """The whitenings of Gaussian students; `base` serves the search for neighbours too.

    They depend on the features alone, so trainings can share them."""

    base: Whitening
    last: Whitening | None
    """Whitening of all views, for the last student; None without strong views."""


def fit_whitenings(shard: Shard, *, all_reduce: AllReduce = alone) -> Whitenings:
    """The whitenings of all shards' features."""
    last = fit_whitening(shard, all_reduce=all_reduce, strong=True) if shard.strong else None
    return Whitenings(base=fit_whitening(shard, all_reduce=all_reduce), last=last)


def fit_whitening(shard: Shard, *, all_reduce: AllReduce = alone, strong: bool = False) -> Whitening:
    """The whitening of all shards' base features, or of all their views."""
    dim = shard.features.shape[1]
    total = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=shard.device)
    for rows, features in shard.chunks():
        views = shard.views(rows, features, strong=strong)
        for pieces in zip(*(view.split(CHUNK_ROWS) for view in views), strict=True):
            total += sum(row_moments(piece) for piece in pieces) / len(views)
    return make_whitening(all_reduce(total.cpu()))
