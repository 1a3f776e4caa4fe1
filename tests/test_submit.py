"""The job on a real Ray head, submitted as the README says, with token authentication."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, descendants
from PIL import Image

RAY = [str(Path(sys.executable).parent / "ray")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node of its own, with its own token; yields the job server's address and the environment."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    environment.pop("RAY_ADDRESS", None)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    ports = [free_port() for _ in range(3)]
    options = ["--port", "--dashboard-port", "--dashboard-agent-listen-port"]
    flags = [f"{option}={port}" for option, port in zip(options, ports, strict=True)]
    command = [*RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", *flags]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{ports[1]}", environment
    finally:
        # By hand: `ray stop` would stop every Ray on this machine, and a signal to the group misses some.
        for pid in (*descendants(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=20)


def submit(address: str, environment: dict[str, str], *job: str) -> subprocess.CompletedProcess[str]:
    """Submit a job and wait for it; again while the head is not ready for jobs, a minute at most."""
    command = [*RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *job]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        text = done.stdout + done.stderr
        not_ready = any(t in text for t in ("No available agent", "Failed to connect", "ConnectionError"))
        if not not_ready or time.monotonic() > deadline:
            return done
        time.sleep(2)


def test_a_submitted_job_ends_with_a_probe(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = head
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    for number in range(24):
        folder = tmp_path / "photos" / ("red", "green", "blue")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        color = [40 + number] * 3
        color[number % 3] = 255
        Image.new("RGB", (40, 40), tuple(color)).save(folder / f"{number}.png")
    relative = submit(address, environment, "python", "jobs/selftrain.py", "--data", str(tmp_path / "photos"))
    assert relative.returncode != 0
    assert "give an absolute path" in relative.stdout + relative.stderr

    out = tmp_path / "out"
    done = submit(
        address,
        environment,
        *(
            "python",
            "jobs/selftrain.py",
            "--data",
            str(tmp_path / "photos"),
            "--out",
            str(out),
            "--rounds",
            "2",
        ),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == {"encoded": 24, "quarantined": 0, "eval_quarantined": None}
    assert len(pq.read_table(out / "pseudo_labels.parquet")) == 24
    assert (out / "probe" / "probe.safetensors").exists()
