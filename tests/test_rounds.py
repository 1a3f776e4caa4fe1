"""The rounds' files give probe and pseudo-labels of the same round, also where an earlier run left files of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lpclip.config import SelfTrainingConfig
from lpclip.encoders.head import Head
from lpclip.features.store import Store
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.method.priors import PRIORS
from lpclip.training.rounds import make_work, read_pseudo_labels, run_rounds

DIM, CLASSES = 8, 3


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """60 rows around three directions."""
    rows = np.eye(DIM)[np.arange(60) % CLASSES] + np.random.default_rng(0).normal(0, 0.2, (60, DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    identity: dict[str, Any] = {"encoder": {"dim": DIM}, "views": ["weak"], "seed": None, "source": {}}
    writer = StoreWriter(str(tmp_path / "store"), identity)
    writer.begin()
    flat = pa.array(rows.astype(np.float16).reshape(-1))
    columns = {
        "id": pa.array([str(i) for i in range(60)]),
        "label": pa.array([-1] * 60, pa.int32()),
        "weak": pa.FixedSizeListArray.from_arrays(flat, DIM),
    }
    writer.write_part(
        Part(unit=0, start=0, stop=60, last=True), rows=pa.table(columns), quarantine=[], content_digest=0
    )
    return writer.finish(num_units=1, rate=None)


@pytest.mark.usefixtures("cluster")
def test_rounds_beyond_the_last_one_are_forgotten(store: Store, tmp_path: Path) -> None:
    weight = np.eye(CLASSES, DIM, dtype=np.float32)
    folder = tmp_path / "rounds"
    work = make_work(
        store_path=store.path,
        fingerprint=store.manifest.fingerprint,
        head=Head(class_names=("a", "b", "c"), weight=weight, temperature=0.1),
        prior=PRIORS["weak"],
        # With neighbours an interrupted training begins again with its first round.
        config=SelfTrainingConfig(neighbours=3),
        folder=str(folder),
    )
    rounds = run_rounds(work, storage=str(tmp_path / "ray"))
    labels, last = read_pseudo_labels(str(folder)), len(rounds)
    # A run that was interrupted had gone further, and not so well.
    for ending in ("json", "safetensors"):
        shutil.copy(folder / f"round-001.{ending}", folder / f"round-{last + 1:03d}.{ending}")
    text = (folder / "round-001.json").read_text().replace('"round": 1', f'"round": {last + 1}')
    (folder / f"round-{last + 1:03d}.json").write_text(text)
    (folder / "finished.json").unlink()
    again = run_rounds(work, storage=str(tmp_path / "ray"))
    assert [state.round for state in again] == [state.round for state in rounds]
    assert torch.equal(again[-1].weight, rounds[-1].weight)
    assert read_pseudo_labels(str(folder)) == labels
