"""Nearest neighbours of whitened features: exact, in blocks, a worker's rows against all rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpclip.method.gaussian import Whitening
from lpclip.method.shard import CPU

BLOCK_ROWS = 1024


def comparison_dtype() -> torch.dtype:
    """The dtype to compare features in: bfloat16 on CPUs that compute in it, else float32."""
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def nearest(
    rows: np.ndarray,
    *,
    among: np.ndarray,
    first_row: int,
    whitening: Whitening | None,
    count: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> Tensor:
    """Places (n, count) int64, among all rows, of the nearest neighbours by cosine in the whitened space.

    Without a whitening, rows are compared by cosine as they are.

    `rows` (n, d) are the rows of `among` (N, d) from `first_row` on; a row is not its own neighbour. Work is
    n N d products; memory is N d elements of `dtype` beside blocks.
    """
    assert count < len(among)
    whitening = whitening.to(device) if whitening is not None else None
    everything = torch.cat([_whitened(block, whitening, device).to(dtype) for block in _blocks(among)])
    found = []
    for start in range(0, len(rows), BLOCK_ROWS):
        last = min(start + BLOCK_ROWS, len(rows))
        place = torch.arange(first_row + start, first_row + last, device=device)
        similarity = (everything[place] @ everything.T).float()
        similarity[torch.arange(len(place), device=device), place] = -torch.inf
        found.append(similarity.topk(count, dim=1).indices)
    return torch.cat(found) if found else torch.empty(0, count, dtype=torch.int64, device=device)


def _blocks(features: np.ndarray) -> list[np.ndarray]:
    return [features[start : start + BLOCK_ROWS] for start in range(0, len(features), BLOCK_ROWS)]


def _whitened(block: np.ndarray, whitening: Whitening | None, device: torch.device) -> Tensor:
    z = torch.from_numpy(block).to(device).float()
    if whitening is not None:
        z = (z - whitening.mean.float()) @ whitening.whitener.float()
    return torch.nn.functional.normalize(z, dim=1)
