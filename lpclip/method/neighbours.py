"""Nearest neighbours by cosine among the rows of all workers: among all of them, or in the nearest cells.

Every worker searches its own rows alone. Blocks of rows go round, each worker names the nearest of its own to them,
and the best of all are kept. So a worker holds its own rows and a block, and what is found does not depend on the
number of workers: blocks and chunks are the same for every cut, and of equally near rows the first ones win.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lpclip.method.gaussian import Whitening
from lpclip.method.pseudo_labels import AllReduce, alone
from lpclip.method.shard import CHUNK_ROWS, Shard

EXACT_ROWS = {"cpu": 100_000, "cuda": 2_000_000}
"""Up to so many rows all are compared with all, by type of the device. Beyond, only the nearest cells are searched."""

# With twice the root of the rows as cells, finding a row's cells costs a third of searching them.
CELLS_PER_ROOT = 2
PROBES = 8
"""Cells that are searched for each row."""
ROWS_PER_CELL = 40
"""Rows from which a cell's centre is found: as few as Faiss takes without a warning."""
CLUSTERING_STEPS = 10

Show = Callable[[int], object]
Keep = Callable[[int, Tensor], object]


def comparison_dtype() -> torch.dtype:
    """The dtype to compare features in: bfloat16 on CPUs that compute in it, else float32."""
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def is_exact(shard: Shard) -> bool:
    """True where all rows are compared with all."""
    return shard.num_rows <= EXACT_ROWS[shard.device.type]


def nearest(
    shard: Shard,
    *,
    count: int,
    whitening: Whitening | None,
    dtype: torch.dtype,
    all_reduce: AllReduce = alone,
    exact: bool | None = None,
    show: Show = lambda done: None,
    known: Tensor | None = None,
    keep: Keep = lambda first_row, found: None,
) -> Tensor:
    """Places (n, count) int32, among all rows, of the nearest neighbours of a shard's n rows by cosine.

    Rows are compared in the whitened space; without a whitening, as they are. `exact` compares all N rows with all, in
    `dtype`; otherwise the rows of the nearest cells are compared. By default the number of rows decides. A row is not
    its own neighbour. Shards are runs of whole chunks, and all workers call this at the same time. `show` is called
    with the number of rows that are done.

    An interrupted search goes on: `keep` is called with the place of each of the shard's chunks and with what was found
    for it (m, count), and `known` (M, count) is what was found for the first M of all rows, whole chunks.

    Work of all workers is 2 N^2 d operations, or 12 N sqrt(N) d in cells; memory is that of the worker's own rows.
    """
    assert count < shard.num_rows
    num_known = 0 if known is None else len(known)
    show(num_known)
    if known is not None and num_known == shard.num_rows:
        return known[shard.first_row : shard.stop_row].clone().to(shard.device)
    exact = is_exact(shard) if exact is None else exact
    device = shard.device if exact else torch.device("cpu")
    whitening = whitening.to(device) if whitening is not None else None

    def block(start: int) -> Tensor:
        """The chunk of all rows (m, d) that begins at `start`: its owner has it, the others add zeros."""
        rows = torch.zeros(min(CHUNK_ROWS, shard.num_rows - start), shard.features.shape[1])
        if shard.first_row <= start < shard.stop_row:
            rows = torch.from_numpy(shard.features[start - shard.first_row :][: len(rows)]).float()
        return _white(all_reduce(rows).to(device), whitening)

    index: _Index = _All(dtype) if exact else _Cells(shard, block=block, all_reduce=all_reduce)
    for start in range(0, len(shard.features), CHUNK_ROWS):
        own = torch.from_numpy(shard.features[start : start + CHUNK_ROWS]).to(device).float()
        index.add(_white(own, whitening), first_row=shard.first_row + start)
    rank, num_workers = _rank(shard, all_reduce)
    found = torch.empty(len(shard.features), count, dtype=torch.int32, device=device)
    if known is not None:
        mine = known[shard.first_row : shard.stop_row]
        found[: len(mine)] = mine.to(device)
    for start in range(num_known, shard.num_rows, CHUNK_ROWS):
        rows = block(start)
        similarity = torch.zeros(num_workers, len(rows), count, device=device)
        places = torch.zeros(num_workers, len(rows), count, dtype=torch.int32, device=device)
        if len(shard.features):
            similarity[rank], places[rank] = index.search(rows, first_row=start, count=count)
        similarity, places = all_reduce(similarity), all_reduce(places)
        if shard.first_row <= start < shard.stop_row:
            _, best = _best(similarity.movedim(0, 1).flatten(1), places.movedim(0, 1).flatten(1), count=count)
            found[start - shard.first_row :][: len(rows)] = best
            keep(start, best)
        show(start + len(rows))
    return found.to(shard.device)


class _Index(Protocol):
    """A worker's rows, to be searched."""

    def add(self, rows: Tensor, *, first_row: int) -> None:
        """Add rows (m, d) float32 of unit norm, the first of which is at `first_row` among all rows."""

    def search(self, rows: Tensor, *, first_row: int, count: int) -> tuple[Tensor, Tensor]:
        """Similarities (m, count) float32 and places (m, count) int32 of the rows' nearest, the nearest first.

        Where fewer are found, the similarity is -inf and the place the row's own.
        """


class _All:
    """Compares with every row."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._chunks: list[tuple[int, Tensor]] = []

    def add(self, rows: Tensor, *, first_row: int) -> None:
        self._chunks.append((first_row, rows.to(self._dtype)))

    def search(self, rows: Tensor, *, first_row: int, count: int) -> tuple[Tensor, Tensor]:
        compared, similarities, places = rows.to(self._dtype), [], []
        for place, chunk in self._chunks:
            similarity = (compared @ chunk.T).float()
            if place == first_row:
                similarity.fill_diagonal_(-torch.inf)
            top = similarity.topk(min(count, len(chunk)), dim=1)
            similarities.append(top.values)
            places.append((top.indices + place).int())
        return _best(torch.cat(similarities, dim=1), torch.cat(places, dim=1), count=count, own=first_row)


class _Cells:
    """Compares with the rows of the nearest cells: Faiss's inverted file, with cells that k-means finds."""

    def __init__(self, shard: Shard, *, block: Callable[[int], Tensor], all_reduce: AllReduce) -> None:
        import faiss  # loaded where it is needed alone, beside PyTorch it takes 100 MB

        num_rows, dim = shard.num_rows, shard.features.shape[1]
        num_cells = max(1, min(round(CELLS_PER_ROOT * num_rows**0.5), num_rows // ROWS_PER_CELL))
        # Each worker's own k-means might end at other centres, so the first worker's serves all. The order of the rows
        # says nothing: the first ones are a sample.
        is_first = shard.first_row == 0 < shard.stop_row
        sample: list[Tensor] = []
        for start in range(0, num_cells * ROWS_PER_CELL, CHUNK_ROWS):
            rows = block(start)
            if is_first:
                sample.append(rows)
        centres = torch.zeros(num_cells, dim)
        if is_first:
            means = faiss.Kmeans(
                dim,
                num_cells,
                niter=CLUSTERING_STEPS,
                spherical=True,
                max_points_per_centroid=2 * ROWS_PER_CELL,
                min_points_per_centroid=1,
            )
            means.train(torch.cat(sample).numpy())
            centres = torch.from_numpy(means.centroids)
        del sample
        centres = all_reduce(centres)
        self._quantizer = faiss.IndexFlatIP(dim)
        self._quantizer.add(centres.numpy())
        kind = faiss.ScalarQuantizer.QT_fp16
        self._index = faiss.IndexIVFScalarQuantizer(
            self._quantizer, dim, num_cells, kind, faiss.METRIC_INNER_PRODUCT, False
        )
        self._index.train(centres.numpy())  # nothing is learnt for float16, and no index takes rows before
        self._index.nprobe = min(PROBES, num_cells)

    def add(self, rows: Tensor, *, first_row: int) -> None:
        self._index.add_with_ids(rows.numpy(), np.arange(first_row, first_row + len(rows)))

    def search(self, rows: Tensor, *, first_row: int, count: int) -> tuple[Tensor, Tensor]:
        # The row itself is found as well, if it is among the worker's.
        similarity, places = map(torch.from_numpy, self._index.search(rows.numpy(), count + 1))
        own = torch.arange(first_row, first_row + len(rows))[:, None]
        similarity[(places < 0) | (places == own)] = -torch.inf
        return _best(similarity, places.int(), count=count, own=first_row)


def _white(rows: Tensor, whitening: Whitening | None) -> Tensor:
    if whitening is not None:
        rows = (rows - whitening.mean.float()) @ whitening.whitener.float()
    return torch.nn.functional.normalize(rows, dim=1)


def _best(similarity: Tensor, places: Tensor, *, count: int, own: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `count` of candidates (m, c) in the order of their similarity; of equal ones, those that come first.

    With `own`, the place of the first row, what is missing is filled with the row itself, infinitely far.
    """
    order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :count]
    similarity, places = similarity.gather(1, order), places.gather(1, order)
    missing = count - similarity.shape[1]
    if missing > 0:
        similarity = torch.nn.functional.pad(similarity, (0, missing), value=-torch.inf)
        places = torch.nn.functional.pad(places, (0, missing))
    if own is not None:
        rows = torch.arange(own, own + len(places), dtype=places.dtype, device=places.device)[:, None]
        places = torch.where(similarity == -torch.inf, rows, places)
    return similarity, places


def _rank(shard: Shard, all_reduce: AllReduce) -> tuple[int, int]:
    """The shard's place in the order of the shards that have rows, and their number."""
    starts = torch.zeros(-(-shard.num_rows // CHUNK_ROWS))
    if len(shard.features):
        starts[shard.first_row // CHUNK_ROWS] = 1
    starts = all_reduce(starts)
    return int(starts[: shard.first_row // CHUNK_ROWS].sum()), int(starts.sum())
