"""The job on a real Ray head, submitted as docs/deployment.md says, with token authentication."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, descendants, refusal
from mlflow import MlflowClient
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
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
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


def submit(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submit a job and wait for it; again while the head is not ready for jobs, a minute at most."""
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


def documented(address: str, data: str) -> tuple[list[str], str]:
    """The `ray job submit` of docs/deployment.md for one machine, with `data` for /data, and the command after it."""
    section = (ROOT / "docs" / "deployment.md").read_text().split("## One machine")[1]
    lines = (
        section.split("```sh\n")[1]
        .split("```")[0]
        .replace("\\\n", " ")
        .replace("/data/", f"{data}/")
        .splitlines()
    )
    (command,) = [line for line in lines if line.startswith("ray job submit")]
    show = shlex.split(lines[lines.index(command) + 1], comments=True)
    return [*RAY, *shlex.split(command.replace("http://127.0.0.1:8265", address))[1:]], shlex.join(show)


def test_a_submitted_jobs_relative_output_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ray sets this variable in the jobs that it starts; that it does, the next test sees by where MLflow's runs are.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    for job in ("encode.py", "selftrain.py"):
        assert "give an absolute path" in refusal(f"{job} --data photos --out photos", monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("lite_map")
def test_a_submitted_job_ends_with_a_probe_and_its_run_is_found(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = head
    for number in range(24):
        folder = tmp_path / "photos" / ("red", "green", "blue")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        color = [40 + number] * 3
        color[number % 3] = 255
        Image.new("RGB", (40, 40), tuple(color)).save(folder / f"{number}.png")
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    command, show = documented(address, str(tmp_path))
    done = submit([*command, "--rounds", "2"], environment)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "runs" / "photos"
    assert str(out) == command[command.index("--out") + 1]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == {"encoded": 24, "quarantined": 0, "eval_quarantined": None}
    assert len(pq.read_table(out / "pseudo_labels.parquet")) == 24
    assert (out / "probe" / "probe.safetensors").exists()
    # The job itself says how its run is seen, as the page does.
    assert f"compare the runs: {show}\n" in done.stdout
    assert show == f"lpclip ui --database {tmp_path}/runs/mlflow.db"
    kept = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").get_run(summary["mlflow_run"])
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "photos")
    assert kept.info.artifact_uri.startswith(f"file://{tmp_path}/runs/mlruns/")
