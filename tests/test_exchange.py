"""Workers that read other parts each end with the rows that they would have had of the whole store."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
import torch.multiprocessing as mp

from lpclip.features.store import Features, row_order
from lpclip.training.exchange import exchange

WORKERS, DIM = 3, 4
CASES = {"even": (30, 1), "chunks": (50, 8), "one chunk": (20, 100), "few": (1, 1), "none": (0, 1)}
"""Rows and rows of a chunk."""


def whole(num_rows: int) -> Features:
    """Rows in their row order; ids of several lengths and letters."""
    ids = np.array([f"{'ü' * (row % 4)}{row}" for row in range(num_rows)], dtype=object)
    ids = ids[row_order(ids)]
    base, strong = np.random.default_rng(num_rows).normal(size=(2, num_rows, DIM)).astype(np.float16)
    return Features(ids=ids, labels=np.zeros(num_rows, np.int32), base=base, strong={"strong": strong})


def share(num_rows: int, rank: int) -> Features:
    """The rows whose ids have a length of the worker's own, so that one has many and one hardly any."""
    found = whole(num_rows)
    mine = np.array([len(text) % WORKERS == rank for text in found.ids], bool)
    return Features(
        ids=found.ids[mine],
        labels=found.labels[mine],
        base=found.base[mine],
        strong={"strong": found.strong["strong"][mine]},
    )


def work(rank: int, folder: str) -> None:
    """One worker."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORKERS)
    results = {}
    for name, (num_rows, chunk) in CASES.items():
        results[name] = exchange(partial(share, num_rows, rank), chunk=chunk)
    Path(folder, f"found-{rank}").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


def test_each_worker_has_its_run_of_the_row_order(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORKERS)
    found = [pickle.loads((tmp_path / f"found-{rank}").read_bytes()) for rank in range(WORKERS)]
    for name, (num_rows, chunk) in CASES.items():
        expected, runs = whole(num_rows), [item[name] for item in found]
        assert np.concatenate([run.ids for run in runs]).tolist() == expected.ids.tolist()
        for values, wanted in (
            ([run.base for run in runs], expected.base),
            ([run.strong["strong"] for run in runs], expected.strong["strong"]),
        ):
            assert np.array_equal(np.concatenate(values).view(np.uint16), wanted.view(np.uint16))
        starts = np.cumsum([0, *(len(run.ids) for run in runs)])[:-1].tolist()
        assert [run.first_row for run in runs] == starts
        assert all(run.num_rows == num_rows and (run.labels == -1).all() for run in runs)
        assert all(start % chunk == 0 or start == num_rows for start in starts)
