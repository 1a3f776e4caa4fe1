"""Bootstrap intervals of means over images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

# This many resamples are held at once, and fewer of many rows: 2 MB of counts.
BLOCK_RESAMPLES = 25
BLOCK_COUNTS = 1 << 19


def bootstrap_blocks(
    num_rows: int, *, resamples: int = 1000, seed: int | tuple[int, ...] = 0, beside: int = 0
) -> Iterator[Tensor]:
    """Counts (B, N) float32 of B resamples, in blocks of up to 25: how often each of N rows is drawn.

    Every resample has N draws. A mean over resampled rows of a column (N,) is counts @ column / N. `beside` is the
    number of other rows that are resampled along with these, which makes blocks smaller and changes no draw.
    """
    random = np.random.default_rng(seed)
    at_once = max(1, min(BLOCK_RESAMPLES, BLOCK_COUNTS // max(1, num_rows + beside)))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
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
    return percentiles(
        collect((counts.double() @ exact for counts in blocks), resamples=resamples) / len(values)
    )


def collect(blocks: Iterable[Tensor], *, resamples: int) -> Tensor:
    """The draws (resamples, ...) of blocks (B, ...), written into one array.

    Small arrays kept from each block would lie between the large ones that are freed, and the memory of these could
    not be used again.
    """
    start, found = 0, torch.empty(0)
    for block in blocks:
        if not start:
            found = block.new_empty(resamples, *block.shape[1:])
        found[start : start + len(block)] = block
        start += len(block)
    return found


def percentiles(draws: Tensor) -> Tensor:
    """The 2.5% and 97.5% quantiles (2, ...) of draws (B, ...)."""
    return draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype), dim=0)
