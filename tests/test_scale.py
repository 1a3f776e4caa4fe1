"""Encoding on other hardware than one machine of CPUs: GPUs, and several nodes; the store is the same everywhere."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import draw, write_tar
from ray.util.state import list_actors, list_nodes, list_tasks
from test_submit import RAY, ROOT, descendants, free_port

from lpclip import files, store

UNITS, VIEWS = 16, "weak,strong"


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unit of work for each of 16 tars, the last of which holds a bad image."""
    folder = tmp_path_factory.mktemp("tars")
    for tar in range(UNITS):
        images = {f"{i}.png": draw(i % 3, 10 * tar + i) for i in range(4)}
        write_tar(
            folder / f"{tar:02d}.tar", images if tar < UNITS - 1 else {**images, "bad.png": b"no image"}
        )
    return folder


@pytest.fixture(scope="module")
def expected(tars: Path, lite_map: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one machine of CPUs makes of the tars."""
    out = tmp_path_factory.mktemp("expected")
    return encode(tars, out, environment=dict(os.environ))


def encode(tars: Path, out: Path, *, environment: dict[str, str]) -> dict[str, Any]:
    """The command as the user gives it; the manifest and all rows of the store that it makes."""
    flags = ["--data", str(tars), "--views", VIEWS, "--batch-size", "8", "--out", str(out)]
    command = [sys.executable, "jobs/encode.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = files.read_json(str(out / "summary.json"))
    manifest = store.read_manifest(summary["features"])
    assert manifest is not None
    parts = store.read_parts(summary["features"], ["id", *VIEWS.split(",")])
    rows = pa.concat_tables(parts).sort_by("id")
    return {"manifest": {**manifest, "images_per_second": None}, "rows": rows, "said": done.stdout}


@contextlib.contextmanager
def ray_nodes(tmp_path: Path, nodes: Sequence[Sequence[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of its own with a head and further nodes, each of its own flags, all on this machine.

    Yields the address of its state and the environment of jobs on it.
    """
    # Tokens are the submit test's subject. An encoder that starts late would find the work done, and be nowhere.
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "240",
    }
    port, dashboard = free_port(), free_port()
    address = f"127.0.0.1:{port}"
    place = ["--head", f"--port={port}", f"--dashboard-port={dashboard}"]
    state = f"http://127.0.0.1:{dashboard}"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for flags in nodes:
            agent = f"--dashboard-agent-listen-port={free_port()}"
            command = [*RAY, "start", *place, "--block", "--disable-usage-stats", agent, *flags]
            with (tmp_path / f"node-{len(processes)}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
            place = [f"--address={address}"]
            wait_for_nodes(state, len(processes))
        yield state, {**environment, "RAY_ADDRESS": address}
    finally:
        # By hand: `ray stop` would stop every Ray on this machine.
        pids = [pid for process in processes for pid in (*descendants(process.pid), process.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.wait(timeout=20)


def wait_for_nodes(state: str, count: int) -> None:
    """Until this many nodes have joined, two minutes at most."""
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(Exception):  # nobody listens at first
            if len(list_nodes(address=state, filters=[("state", "=", "ALIVE")])) >= count:
                return
        assert time.monotonic() < deadline, f"{count} nodes did not come up"
        time.sleep(1)


def tasks(state: str) -> dict[str, list[Any]]:
    """The finished tasks of each stage, with node and process, as Ray recorded them."""
    found = list_tasks(
        address=state, detail=True, limit=10_000, filters=[("state", "=", "FINISHED")], timeout=60
    )
    return {
        stage: [task for task in found if name in task.name and task.type != "ACTOR_CREATION_TASK"]
        for stage, name in {
            "decode": "(_decode_unit)",
            "encode": "(_Encode)).submit",
            "commit": "(_commit)",
        }.items()
    }


def test_each_gpu_has_an_encoder_and_the_store_is_that_of_cpus(
    tars: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Ray places actors on GPUs that torch does not see: they encode on CPUs, as the same bytes show.
    with ray_nodes(tmp_path, [["--num-cpus=2", "--num-gpus=2"]]) as (state, environment):
        found = encode(tars, tmp_path / "out", environment=environment)
        actors = [actor for actor in list_actors(address=state, detail=True) if "_Encode" in actor.class_name]
        done = tasks(state)
    assert "2 encoder actors, 1 GPU each" in found["said"]
    assert found["manifest"] == expected["manifest"]
    assert found["rows"] == expected["rows"]
    assert [actor.required_resources for actor in actors] == [{"GPU": 1}] * 2
    encoders = {actor.pid for actor in actors}
    # How much each of them gets of so little work is a matter of time.
    assert {task.worker_pid for task in done["encode"]} <= encoders
    assert len(encoders) == 2
    assert len(done["decode"]) == UNITS
    for stage in ("decode", "commit"):
        assert done[stage]
        assert not {task.worker_pid for task in done[stage]} & encoders


def test_two_nodes_share_the_work_and_make_the_store_of_one(
    tars: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with ray_nodes(tmp_path, [["--num-cpus=2"], ["--num-cpus=2"]]) as (state, environment):
        found = encode(tars, tmp_path / "out", environment=environment)
        nodes = {node.node_id for node in list_nodes(address=state)}
        actors = [actor for actor in list_actors(address=state, detail=True) if "_Encode" in actor.class_name]
        done = tasks(state)
    assert "2 encoder actors, 2 CPU threads each" in found["said"]
    assert found["manifest"] == expected["manifest"]
    assert found["rows"] == expected["rows"]
    assert len(nodes) == 2
    assert {actor.node_id for actor in actors} == nodes
    assert {task.node_id for stage in done.values() for task in stage} == nodes
