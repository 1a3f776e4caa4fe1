"""The rounds' files give probe and pseudo-labels of the same round, and an interrupted training goes on from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from lpclip.config import SelfTrainingConfig, UserError
from lpclip.encoders.head import Head
from lpclip.features.store import Store
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.method.priors import PRIORS
from lpclip.method.shard import CHUNK_ROWS
from lpclip.method.state import State
from lpclip.training import round_files
from lpclip.training.round_files import RoundFiles, Search
from lpclip.training.rounds import Work, make_work, run_rounds

DIM, CLASSES = 8, 3
FEW, MANY = 60, 2 * CHUNK_ROWS + 500
FIT = Callable[..., Work]

pytestmark = pytest.mark.usefixtures("cluster")


def make_store(folder: Path, *, num_rows: int) -> Store:
    """Rows with two views around three directions."""
    rng = np.random.default_rng(0)
    identity: dict[str, Any] = {
        "encoder": {"dim": DIM},
        "views": ["weak", "strong"],
        "seed": None,
        "source": {},
    }
    writer = StoreWriter(str(folder), identity)
    writer.begin()
    columns = {
        "id": pa.array([str(i) for i in range(num_rows)]),
        "label": pa.array([-1] * num_rows, pa.int32()),
    }
    for view in identity["views"]:
        rows = np.eye(DIM)[np.arange(num_rows) % CLASSES] + rng.normal(0, 0.5, (num_rows, DIM))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        flat = pa.array(rows.astype(np.float16).reshape(-1))
        columns[view] = pa.FixedSizeListArray.from_arrays(flat, DIM)
    part = Part(unit=0, start=0, stop=num_rows, last=True)
    writer.write_part(part, rows=pa.table(columns), quarantine=[], content_digest=0)
    return writer.finish(num_units=1, rate=None)


@pytest.fixture
def work_of(tmp_path: Path) -> FIT:
    """Makes the work of a training in a folder of its own."""
    weight = np.eye(CLASSES, DIM, dtype=np.float32) + 0.3 * np.roll(np.eye(CLASSES, DIM), 1, axis=1)
    head = Head(class_names=("a", "b", "c"), weight=weight.astype(np.float32), temperature=0.1)

    def make(name: str, *, num_rows: int = FEW, **config: Any) -> Work:
        folder = tmp_path / f"store-{num_rows}"
        store = Store.find(str(folder)) or make_store(folder, num_rows=num_rows)
        training = SelfTrainingConfig(**config)
        return make_work(
            store=store, head=head, prior=PRIORS["weak"], config=training, folder=str(tmp_path / name)
        )

    return make


def files_of(work: Work) -> dict[str, bytes]:
    """The contents of all files of a training's folder but for the note of how far the search is."""
    return {
        path.name: path.read_bytes() for path in Path(work.folder).iterdir() if path.name != "search.json"
    }


def train(work: Work, told: list[str] | None = None) -> list[State]:
    return run_rounds(work, storage=f"{work.folder}-ray", tell=[].append if told is None else told.append)


def interrupt(work: Work, *, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a round is written, and no longer."""
    write = RoundFiles.write_state

    def write_and_stop(there: RoundFiles, state: State) -> None:
        write(there, state)
        if state.round == after:
            raise UserError("the power fails")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the power fails"):
        patch.setattr(RoundFiles, "write_state", write_and_stop)
        train(work)


def test_rounds_beyond_the_last_one_are_forgotten(work_of: FIT) -> None:
    work = work_of("rounds", neighbours=3)
    rounds, found = train(work), files_of(work)
    # A run that was interrupted had gone further, and not so well.
    folder, last = Path(work.folder), len(rounds)
    for ending in ("json", "safetensors"):
        shutil.copy(folder / f"round-001.{ending}", folder / f"round-{last + 1:03d}.{ending}")
    text = (folder / "round-001.json").read_text().replace('"round": 1', f'"round": {last + 1}')
    (folder / f"round-{last + 1:03d}.json").write_text(text)
    (folder / "finished.json").unlink()
    again = train(work)
    assert [state.round for state in again] == [state.round for state in rounds]
    assert torch.equal(again[-1].weight, rounds[-1].weight)
    assert files_of(work) == found


@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
@pytest.mark.parametrize("neighbours", [0, 3])
@pytest.mark.parametrize(("stop", "start"), [(1, 0), (2, 1), (3, 2), (5, 4), (6, 5)])
def test_an_interrupted_training_goes_on_and_ends_the_same(
    work_of: FIT, monkeypatch: pytest.MonkeyPatch, stop: int, start: int, neighbours: int, solver: str
) -> None:
    options: dict[str, Any] = {"neighbours": neighbours, "rounds": 5, "solver": solver}
    whole = work_of("whole", **options)
    last = len(train(whole))
    stop, start = min(stop, last), min(start, last - 1)
    interrupt(cut := work_of("cut", **options), after=stop, monkeypatch=monkeypatch)
    assert len(RoundFiles(cut.folder).names()) == stop
    # The targets that the first round's teacher has seen are not kept.
    start = 0 if neighbours and start == 1 else start
    before = {path: path.stat().st_mtime_ns for path in Path(cut.folder).glob("round-*")}
    told: list[str] = []
    train(cut, told)
    assert files_of(cut) == files_of(whole)
    how = f"goes on after round {start}" if start else "begins again with round 1"
    assert any(line.endswith(f"this one {how}") for line in told)
    assert not neighbours or any(f"; {FEW} have them already" in line for line in told)
    untouched = {path for path, time in before.items() if path.stat().st_mtime_ns == time}
    assert untouched == {path for path in before if int(path.name[6:9]) <= start}


@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_more_workers(
    work_of: FIT, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"num_rows": MANY, "neighbours": 3, "rounds": 4}
    rounds = train(work_of("whole", **options))
    interrupt(cut := work_of("cut", **options), after=3, monkeypatch=monkeypatch)
    told: list[str] = []
    again = train(work_of("cut", **options, num_workers=2), told)
    assert f"; {MANY:,} have them already" in told[0]
    assert told[1].endswith("this one goes on after round 2")
    assert [state.round for state in again] == [state.round for state in rounds]
    for one, other in zip(again, rounds, strict=True):
        assert torch.allclose(one.weight, other.weight, rtol=1e-5, atol=1e-6)
    labels = [RoundFiles(f"{Path(cut.folder).parent}/{name}").pseudo_labels() for name in ("cut", "whole")]
    assert labels[0].drop(["confidence"]) == labels[1].drop(["confidence"])


def test_an_interrupted_search_for_neighbours_goes_on(work_of: FIT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_files, "WRITE_SECONDS", 0.0)
    options: dict[str, Any] = {"num_rows": MANY, "neighbours": 3, "rounds": 1}
    whole = work_of("whole", **options)
    train(whole)
    keep, kept = Search.keep, list[int]()

    def keep_and_stop(search: Search, first_row: int, places: Tensor) -> None:
        keep(search, first_row, places)
        kept.append(first_row)
        if kept == [0, CHUNK_ROWS]:
            raise UserError("the power fails")

    monkeypatch.setattr(Search, "keep", keep_and_stop)
    cut, told = work_of("cut", **options), list[str]()
    with pytest.raises(UserError, match="the power fails"):
        train(cut)
    train(cut, told)
    assert kept == [0, CHUNK_ROWS, 2 * CHUNK_ROWS]
    assert any(f"of {MANY:,} images gets its 3 nearest neighbours; 8,192 have them" in line for line in told)
    assert files_of(cut) == files_of(whole)
