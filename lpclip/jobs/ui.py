"""The ui command: MLflow's pages for this machine, and addresses that open where runs are compared."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

from lpclip.config import UiJob, UserError, check
from lpclip.credentials import redact
from lpclip.jobs import tracking

# Each experiment shows so many of its latest sweeps and evaluations.
LATEST = 3


def ui_job(job: UiJob) -> None:
    """Serve the pages of a database until Ctrl-C, and print the addresses of the charts of every experiment.

    A server that runs already is not started: its addresses are printed. Raises UserError when there are no
    runs, when the port is taken, and when MLflow does not start.
    """
    check(job)
    uri = f"sqlite:///{job.database}" if job.database else tracking.tracking_uri()
    if uri.startswith(("http://", "https://")):
        print(_addresses(uri, server=uri))
        return
    database = tracking.database_of(uri)
    if database is not None and not database.is_file():
        raise UserError(f"there are no runs in {database} yet: `make demo`, for one, begins it")
    server = f"http://127.0.0.1:{job.port}"
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("127.0.0.1", job.port))
        except OSError as error:
            raise UserError(f"port {job.port} is taken: choose another one with --port") from error
    print("MLflow starts, which takes some seconds", flush=True)
    addresses = _addresses(uri, server=server)
    with contextlib.suppress(KeyboardInterrupt), _served(uri, server, port=job.port) as process:
        print(f"\n{addresses}\n\nCtrl-C ends MLflow.", flush=True)
        process.wait()


def _addresses(uri: str, *, server: str) -> str:
    """A line for the charts of each experiment that has runs, and for those of its latest sweeps and evaluations."""
    lines = []
    with tracking.explained(uri):
        client = tracking.connect(uri)
        for experiment in client.search_experiments():
            key = experiment.experiment_id
            if client.search_runs([key], max_results=1):
                lines.append((experiment.name, tracking.charts(server, key)))
            nested = client.search_runs([key], f"tags.`{tracking.PARENT_TAG}` != ''", max_results=1000)
            parents = dict.fromkeys(run.data.tags[tracking.PARENT_TAG] for run in nested)
            for parent in list(parents)[:LATEST]:
                name = f"  in {client.get_run(parent).info.run_name}"
                lines.append((name, tracking.charts(server, key, parent=parent)))
    if not lines:
        raise UserError(f"there are no runs at {redact(uri)} yet: `make demo`, for one, makes one")
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {address}" for name, address in lines)


@contextlib.contextmanager
def _served(uri: str, server: str, *, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server for the length of the block, which begins when it answers."""
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": uri,  # as an argument, other users of the machine would see its password
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a process of its own for language models
    }
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers=1",
    ]
    with tempfile.TemporaryFile() as log:
        # In a group of its own: what starts the server does not end it on a signal.
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            while not _answers(server):
                if process.poll() is not None:
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
                    raise UserError(f"MLflow did not start: {redact(last)}")
                time.sleep(0.2)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _answers(server: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{server}/health", timeout=5).close()
        return True
    return False
