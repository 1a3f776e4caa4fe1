"""Time the same sweep with an MLflow server and with an SQLite file.

    python benchmarks/sweep_tracking.py                                  # 500 trials over 300 pictures, made here
    python benchmarks/sweep_tracking.py --data runs/a/features/photos-0123 --trials 100 --times 3

The sweeps take turns, so that other work on the machine meets both. The server is on this machine, and takes its share
of the processors.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from PIL import Image, ImageDraw

from lpclip.jobs.cli import OPTIONS
from lpclip.report.tables import format_table

ROOT = Path(__file__).parent.parent
SPACE = """from ray import tune
SPACE = {
    "temperature_factor": tune.loguniform(0.7, 1.8),
    "threshold": tune.uniform(0.0, 0.5),
    "rounds": tune.choice([20]),
}
"""
NAMES = ("yellow circle", "red square", "blue triangle")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time sweeps with and without an MLflow server."""

    data: str | None = None
    """Images or a feature store. The default are pictures that are drawn here."""
    trials: int = 500
    """Trials of a sweep."""
    times: int = 1
    """Sweeps of each kind."""
    json: str | None = None
    """File for the seconds of each sweep."""


def draw_pictures(folder: Path, *, count: int = 300) -> None:
    """Pictures of three shapes in noise, a folder for each."""
    random = np.random.default_rng(0)
    for number in range(count):
        name = NAMES[number % 3]
        image = Image.fromarray(random.integers(60, 200, (64, 64, 3), dtype=np.uint8))
        pen, left = ImageDraw.Draw(image), int(random.integers(4, 20))
        box = (left, left, left + 36, left + 36)
        if name == "blue triangle":
            pen.regular_polygon((left + 18, left + 18, 20), 3, fill="blue")
        else:
            (pen.ellipse if name == "yellow circle" else pen.rectangle)(box, fill=name.split()[0])
        path = folder / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A server of this machine's own, with its runs in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield address
        finally:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            server.terminate()
            server.wait()
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"the server took {spent:.0f} s of processor time, its start with it", flush=True)


def sweep(
    out: Path, options: Options, *, data: str, features: Path, space: Path, uri: str
) -> dict[str, float]:
    """Seconds of one sweep, of the trials and in all."""
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), "--data", data, "--features", str(features)]
    command += ["--space", str(space), "--trials", str(options.trials), "--out", str(out), "--prior", "weak"]
    begin = time.monotonic()
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the sweep failed:\n{done.stderr[-2000:]}")
    seconds = time.monotonic() - begin
    return {"seconds": seconds, "trials": json.loads((out / "summary.json").read_text())["timings"]["trials"]}


def main(options: Options) -> None:
    """Time the sweeps and print the ratio."""
    found: dict[str, list[dict[str, float]]] = {"file": [], "server": []}
    with tempfile.TemporaryDirectory() as name, mlflow_server(Path(name)) as server:
        folder = Path(name)
        data = options.data or str(folder / "pictures")
        if options.data is None:
            draw_pictures(folder / "pictures")
        (folder / "space.py").write_text(SPACE)
        for number in range(options.times):
            for kind, uri in (("file", f"sqlite:///{folder}/mlflow{number}.db"), ("server", server)):
                seconds = sweep(
                    folder / f"{kind}{number}",
                    options,
                    data=data,
                    features=folder / "features",
                    space=folder / "space.py",
                    uri=uri,
                )
                found[kind].append(seconds)
                print(
                    f"{kind}: {seconds['seconds']:.0f} s, {seconds['trials']:.0f} of them trials", flush=True
                )
    file, on_server = (median(row["trials"] for row in rows) for rows in found.values())
    print(format_table([{"trials": options.trials, "server / file": f"{on_server / file:.2f}"}]))
    if options.json:
        Path(options.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main(tyro.cli(Options, config=OPTIONS))
