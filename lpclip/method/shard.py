"""A worker's rows, and the whitening of all workers' rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpclip.method.gaussian import Whitening, make_whitening, row_moments
from lpclip.method.pseudo_labels import AllReduce, alone

# Workers get whole chunks, so that sums over chunks do not depend on the number of workers.
CHUNK_ROWS = 4096


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
    """(n, k) int64: places among all rows of each row's nearest neighbours; None uses no neighbours."""
    zero_shot: Tensor | None = None
    """(n, K) float32 zero-shot logits, where the features are only a part of what gives them."""

    def zero_shot_logits(self, rows: slice, features: Tensor, *, head: Tensor) -> Tensor:
        """(m, K) of the chunk `rows`, whose features (m, d) are given; `head` (K, d) is in units of logits."""
        return features @ head.T if self.zero_shot is None else self.zero_shot[rows]

    def views(self, rows: slice, features: Tensor, *, strong: bool) -> list[Tensor]:
        """The base view (m, d) of the chunk `rows`, which is given, and its strong views, if wanted."""
        return [features, *(torch.from_numpy(view[rows]).float() for view in self.strong if strong)]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Row slices and their features (m, d) as float32."""
        for start in range(0, len(self.features), CHUNK_ROWS):
            rows = slice(start, min(start + CHUNK_ROWS, len(self.features)))
            yield rows, torch.from_numpy(self.features[rows]).float()


@dataclass(frozen=True, kw_only=True)
class Whitenings:
    """The whitenings that the gaussian solver needs. They depend on the features alone, so trainings can share them."""

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
    total = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)
    for rows, features in shard.chunks():
        views = shard.views(rows, features, strong=strong)
        total += sum(row_moments(view) for view in views) / len(views)
    return make_whitening(all_reduce(total))
