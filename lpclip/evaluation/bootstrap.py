"""Bootstrap intervals of means over images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# This many resamples are held at once: for 50,000 rows 5 MB of counts.
BLOCK_RESAMPLES = 25


def bootstrap_blocks(
    num_rows: int, *, resamples: int = 1000, seed: int | tuple[int, ...] = 0
) -> Iterator[Tensor]:
    """Counts (B, N) float32 of B resamples, in blocks of up to 25: how often each of N rows is drawn.

    Every resample has N draws. A mean over resampled rows of a column (N,) is counts @ column / N.
    """
    random = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK_RESAMPLES):
        size = min(BLOCK_RESAMPLES, resamples - start)
        rows = random.integers(num_rows, size=(size, num_rows))
        rows += np.arange(size)[:, None] * num_rows
        counts = np.bincount(rows.ravel(), minlength=size * num_rows)
        yield torch.from_numpy(counts.astype(np.float32)).reshape(size, num_rows)


def mean_interval(values: Tensor, *, resamples: int = 1000, seed: int = 0) -> Tensor:
    """The 95% percentile bootstrap interval of the mean of values (N,) or (N, M): (2,) or (2, M) float64.

    The first row is the lower end. Columns are resampled together. For two classifiers on the same images take
    the differences of their correctness. Raises ValueError for NaN or no values.
    """
    if len(values) == 0 or values.isnan().any():
        raise ValueError("an interval of a mean needs at least one value, and no NaN")
    # In float64 sums of whole numbers are exact: no rounding may lift an interval's end over zero.
    exact = values.double()
    blocks = bootstrap_blocks(len(values), resamples=resamples, seed=seed)
    return percentiles(torch.cat([counts.double() @ exact for counts in blocks]) / len(values))


def percentiles(draws: Tensor) -> Tensor:
    """The 2.5% and 97.5% quantiles (2, ...) of draws (B, ...)."""
    return draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype), dim=0)
