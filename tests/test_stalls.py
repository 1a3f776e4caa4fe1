"""Pipelines that really stand still are told of and begun again; healthy ones are not."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from conftest import descendants, draw, write_tar

from lpclip.config import SourceConfig, UserError
from lpclip.features.commit_stage import commit
from lpclip.features.pipeline import decode_units, fill_store
from lpclip.features.stalls import LIMITS, StallLimits, StallWatch
from lpclip.features.store import Store
from lpclip.features.store_writer import StoreWriter, list_parts
from lpclip.images.open import open_source
from lpclip.images.pixels import Preprocess
from lpclip.images.source import Reader, Row, Source
from lpclip.images.views import WEAK

pytestmark = pytest.mark.usefixtures("cluster")
PREPROCESS = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SHORT = StallLimits(tell=3, again=3, lose=15)


@dataclass(frozen=True, kw_only=True)
class SleepyReader(Reader):
    """Reads like another, but the first time that it comes to the last tar, it sleeps far too long."""

    reader: Reader
    mark: Path

    def rows(self, unit: str) -> Iterator[Row]:
        if "02.tar" in str(unit) and not self.mark.exists():
            self.mark.touch()
            time.sleep(600)
        yield from self.reader.rows(unit)


@dataclass(frozen=True, kw_only=True)
class PatientReader(Reader):
    """Reads like another, but the last tar only once a file is there."""

    reader: Reader
    mark: Path

    def rows(self, unit: str) -> Iterator[Row]:
        while "02.tar" in str(unit) and not self.mark.exists():
            time.sleep(0.1)
        yield from self.reader.rows(unit)


class Encoder:
    """Keeps tables as they are."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return table


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    """Three tars of four images."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in range(3):
        write_tar(folder / f"{tar:02d}.tar", {f"{i}.png": draw(i % 3, 10 * tar + i) for i in range(4)})
    # Workers cannot import a test.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield open_source(str(folder), config=SourceConfig())
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def fill(
    source: Source, path: Path, *, limits: StallLimits, with_actor: bool = False, num_gpus: int = 0
) -> Store:
    """Decode and commit, perhaps with an actor in between."""
    writer = StoreWriter(str(path), {"test": 1})

    def stages(todo: list[int], name: str) -> ray.data.Dataset:
        tables = decode_units(source, todo, views=(WEAK,), preprocess=PREPROCESS, seed=0, num_consumers=1)
        if with_actor:
            pool = ray.data.ActorPoolStrategy(size=1)
            tables = tables.map_batches(
                Encoder,
                batch_size=4 if num_gpus else None,
                batch_format="pyarrow",
                compute=pool,
                num_gpus=num_gpus,
                num_cpus=0 if num_gpus else 0.5,
                max_restarts=0,
                max_task_retries=0,
            )
        write = partial(commit, writer=writer, columns=("id",))
        return tables.map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=0)

    return fill_store(source, writer=writer, what="reading", stages=stages, limits=limits)


@pytest.mark.slow
def test_a_stage_that_sleeps_is_named_and_its_units_are_done_again(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sleepy = replace(source, reader=SleepyReader(reader=source.reader, mark=tmp_path / "slept"))
    store = fill(sleepy, tmp_path / "store", limits=SHORT)
    assert store.manifest.num_rows == 12
    out, err = capsys.readouterr()
    stages = r"decoding has 1 running and 0 waiting; committing has 0 running and 0 waiting"
    free = r"free are 0 of 0 GPUs and [\d.]+ of 2 CPUs"
    assert re.search(rf"^reading tars: nothing for \d+ s; {stages}; {free}$", err, re.MULTILINE), err
    assert "the work stood still, going on (1 of 2 times in a row)" in out
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < 2:
        assert time.monotonic() < deadline, "the sleeping task keeps its CPU"
        time.sleep(0.1)


@pytest.mark.slow
def test_encoders_that_find_no_gpu_are_named_and_end_the_work(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = StallLimits(tell=4, again=60, lose=8)
    with pytest.raises(
        UserError, match="the work stood still 3 times in a row, the last time with: Dataset exec"
    ):
        fill(source, tmp_path / "store", limits=limits, with_actor=True, num_gpus=1)
    line = next(line for line in capsys.readouterr().err.splitlines() if "nothing for" in line)
    assert (
        "Encoder has 0 running and 3 waiting, and 1 of its actors loads its model or waits for a GPU;" in line
    )


def test_an_actor_that_dies_between_two_tasks_is_replaced_at_once(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "store"
    patient = replace(source, reader=PatientReader(reader=source.reader, mark=mark))

    def kill() -> None:
        while not path.exists() or len(list_parts(str(path))) < 2:
            time.sleep(0.1)
        workers = [p for p, title in descendants(os.getpid()).items() if title.startswith("ray::MapWorker")]
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        mark.touch()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    store = fill(patient, path, limits=StallLimits(lose=60), with_actor=True)
    killer.join()
    assert store.manifest.num_rows == 12
    assert "an encoder was lost, going on (1 of 2 times in a row)" in capsys.readouterr().out


def test_a_healthy_pipeline_is_not_told_of(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fill(source, tmp_path / "store", limits=LIMITS).manifest.num_rows == 12
    assert "nothing for" not in capsys.readouterr().err


def test_a_slow_pipeline_is_told_of_only_when_it_is_slower_than_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch = StallWatch("encoding slow", StallLimits(tell=0.1, again=0.1, lose=1))
    time.sleep(0.6)
    watch.moved()  # the start is no measure
    time.sleep(0.3)
    watch.moved()
    time.sleep(0.4)
    watch.look()
    assert capsys.readouterr().err == ""
    time.sleep(0.6)
    watch.look()
    watch.look()
    assert capsys.readouterr().err.count("encoding slow: nothing for 1 s") == 1
