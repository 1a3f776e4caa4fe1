"""`lpclip ui` as a user starts it: MLflow's own server, and addresses that it answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import ROOT, descendants, refusal
from mlflow import MlflowClient

from lpclip.config import TrackingConfig
from lpclip.jobs.tracking import track


def ui(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from lpclip.jobs.cli import entry; entry()", "ui", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_addresses_land_on_the_charts_of_runs_and_ctrl_c_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with track(TrackingConfig(experiment="probes"), name="pets", params={}):
        pass
    config = TrackingConfig(experiment="sweeps")
    with track(config, name="tune", params={}) as sweep, track(config, name="a", params={}, parent=sweep):
        pass
    MlflowClient().create_experiment("empty")
    # Of two places the flag wins.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = ui("--database", f"{tmp_path}/mlflow.db", "--port", str(port))
    assert process.stdout is not None
    addresses = {}
    for line in process.stdout:
        if line.startswith("Ctrl-C"):
            break
        name, _, address = line.partition("http")
        addresses[name.strip()] = f"http{address}".strip()
    served = descendants(process.pid)
    try:
        assert {"probes", "sweeps", "in tune"} == {
            name for name in addresses if "MLflow" not in name and name
        }
        client = MlflowClient(f"http://127.0.0.1:{port}")
        for name in ("probes", "sweeps", "in tune"):
            url = urlsplit(addresses[name])
            assert urllib.request.urlopen(f"{url.scheme}://{url.netloc}/", timeout=20).status == 200
            page = urlsplit(url.fragment)
            query = parse_qs(page.query)
            assert (query["workflowType"], query["compareRunsMode"]) == (["machine_learning"], ["CHART"])
            runs = client.search_runs([page.path.split("/")[2]], query.get("searchFilter", [""])[0])
            expected = {"probes": {"pets"}, "sweeps": {"tune", "a"}, "in tune": {"a"}}[name]
            assert {run.info.run_name for run in runs} == expected
    finally:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert served
    assert not [pid for pid in served if Path(f"/proc/{pid}").exists()]


def test_what_cannot_be_shown_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = refusal(f"ui.py --database {tmp_path}/mlflow.db", monkeypatch, capsys)
    assert nothing.startswith(f"there are no runs in {tmp_path}/mlflow.db yet")
    assert not list(tmp_path.iterdir())
    with track(TrackingConfig(), name="pets", params={}), socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "--port" in refusal(f"ui.py --port {port}", monkeypatch, capsys)
