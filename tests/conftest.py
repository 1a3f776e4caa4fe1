"""What the tests share: caches and a database of their own, one small Ray, and images that take no time."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shlex
import signal
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As lpclip does, but before torch is imported here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image, ImageDraw

from lpclip.config import (
    EncodeJob,
    EvaluateJob,
    ExportJob,
    PredictJob,
    PretrainJob,
    ReviewJob,
    SelftrainJob,
    ServeJob,
    SuggestJob,
    TuneJob,
    UiJob,
)
from lpclip.images.source import ROWS, Reader
from lpclip.jobs.cli import main
from lpclip.jobs.encode import encode_job
from lpclip.jobs.evaluate import evaluate_job
from lpclip.jobs.export import export_job
from lpclip.jobs.predict import predict_job
from lpclip.jobs.pretrain import pretrain_job
from lpclip.jobs.process import start_ray
from lpclip.jobs.review import review_job
from lpclip.jobs.selftrain import selftrain_job
from lpclip.jobs.serve import serve_job
from lpclip.jobs.suggest import suggest_job
from lpclip.jobs.tune import tune_job
from lpclip.jobs.ui import ui_job

ROOT = Path(__file__).parent.parent
CLASSES = ("tennis ball", "stop sign", "traffic cone")
PEAK = """
def peak():
    # The most memory so far, in bytes. getrusage counts what the process had that started this one.
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024

"""
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees or changes the user's caches, MLflow runs or cluster."""
    folder = tmp_path_factory.mktemp("session")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPCLIP_CACHE", str(folder / "cache"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.delenv("RAY_ADDRESS", raising=False)
        # The keys of the tests' own object store. Ray's workers have the environment that Ray was started in.
        patch.setenv("AWS_ACCESS_KEY_ID", "reader")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield


@pytest.fixture(scope="session")
def cluster(environment: None) -> Iterator[None]:
    """A private Ray of two CPUs, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
        start_ray()
    yield
    ray.shutdown()


MAKE_LITE = f"""
from lpclip.config import EncoderConfig
from lpclip.encoders.on_cpu import describe_on_cpu
from lpclip.encoders.prompts import templates
for names in ({CLASSES}, {(*CLASSES, "fire truck")}):
    for kind in ("default", "simple"):
        describe_on_cpu(EncoderConfig(), names, templates(kind))
"""


def needs_lite(item: pytest.Item) -> bool:
    return "lite_map" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Test files that need no lite encoder come first: it is made meanwhile."""
    later = {item.path for item in items if needs_lite(item)}
    items.sort(key=lambda item: item.path in later)


@pytest.fixture(scope="session", autouse=True)
def lite_in_the_making(environment: None, request: pytest.FixtureRequest) -> subprocess.Popen[bytes] | None:
    """The process that makes lite's text map, its network and the tests' zero-shot heads, if a test needs them."""
    if not any(map(needs_lite, request.session.items)):
        return None
    # One thread: the other processor is for the tests.
    return subprocess.Popen(
        [sys.executable, "-c", MAKE_LITE], env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="session")
def lite_map(lite_in_the_making: subprocess.Popen[bytes]) -> None:
    """The lite encoder as jobs find it in the cache folder after the first one: made once, for all tests."""
    assert lite_in_the_making.wait() == 0


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums of a few thousand rows are slower in many threads than in one, above all on a busy machine."""
    with _one_thread():
        yield


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`selftrain.py --data ...` as from a shell, in this process; the job's summary. A %20 is a space in a flag."""
    job, *flags = shlex.split(command)
    jobs: dict[str, Any] = {
        "encode.py": (encode_job, EncodeJob),
        "evaluate.py": (evaluate_job, EvaluateJob),
        "export.py": (export_job, ExportJob),
        "predict.py": (predict_job, PredictJob),
        "pretrain.py": (pretrain_job, PretrainJob),
        "selftrain.py": (selftrain_job, SelftrainJob),
        "serve.py": (serve_job, ServeJob),
        "tune.py": (tune_job, TuneJob),
        "ui.py": (ui_job, UiJob),
        "review.py": (review_job, ReviewJob),
        "suggest.py": (suggest_job, SuggestJob),
    }
    results: list[dict[str, Any]] = []
    function, config_type = jobs[job]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [job, *(flag.replace("%20", " ") for flag in flags)])
        main(lambda config: results.append(function(config)), config_type)
    return results[0]


def refusal(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command, monkeypatch)
    assert stop.value.code == 1
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def start(command: str, **environment: str) -> subprocess.Popen[str]:
    """A job as a user starts it, in a session of its own. A %20 is a space in a flag."""
    job, *flags = command.split()
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / job), *(flag.replace("%20", " ") for flag in flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that run in the background hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def descendants(pid: int) -> dict[int, str]:
    """Titles of all living processes below one."""
    command = ["ps", "-eo", "pid=,ppid=,stat=,args=", "-ww"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in listing.splitlines()]
    found = [pid]
    for above in found:
        found += [int(child) for child, parent, *_ in rows if int(parent) == above]
    titles = {int(child): title for child, _, stat, title in rows if not stat.startswith("Z")}
    return {child: titles[child] for child in found[1:] if child in titles}


def draw(place: int, seed: int) -> bytes:
    """A picture of the class at `place` as PNG: a yellow-green disc, a red octagon or an orange triangle."""
    random = np.random.default_rng([place, seed])
    image = Image.new("RGB", (48, 48), tuple(random.integers(90, 200, 3).tolist()))
    corner, size = random.integers(2, 14), random.integers(24, 32)
    shape = ImageDraw.Draw(image)
    circle = (int(corner + size / 2), int(corner + size / 2), int(size / 2))
    if place == 0:
        shape.ellipse((corner, corner, corner + size, corner + size), fill=(200, 230, 50))
    else:
        shape.regular_polygon(
            circle, 8 if place == 1 else 3, fill=(200, 20, 30) if place == 1 else (250, 120, 0)
        )
    pixels = np.asarray(image) + random.normal(0, 6, (48, 48, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def read_unit(reader: Reader, unit: str) -> pa.Table:
    """A unit of a source as one table."""
    return pa.concat_tables([ROWS.empty_table(), *reader.tables(unit)])


def write_tar(path: Path, images: dict[str, bytes]) -> None:
    """A WebDataset tar: a unit of work for each tar, however small."""
    with tarfile.open(path, "w") as tar:
        for name, data in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 images with a subfolder for each of three classes."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    for place, name in enumerate(CLASSES):
        (folder / name.replace(" ", "_")).mkdir(parents=True)
        for seed in range(100, 110):
            (folder / name.replace(" ", "_") / f"{seed}.png").write_bytes(draw(place, seed))
    return folder


@pytest.fixture(scope="session")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled.parquet and unlabelled.parquet: the same 60 images, with and without labels."""
    folder = tmp_path_factory.mktemp("lake")
    places = [i % 3 for i in range(60)]
    table = pa.table(
        {
            "id": [f"row-{i}" for i in range(60)],
            "image": [draw(place, i) for i, place in enumerate(places)],
            "label": places,
        }
    )
    pq.write_table(table, folder / "labelled.parquet")
    pq.write_table(table.drop_columns(["label"]), folder / "unlabelled.parquet")
    return folder


@dataclass(frozen=True, kw_only=True)
class Training:
    """A whole run of the main job, with one thread. The features lie beside its output folder."""

    out: Path
    summary: dict[str, Any]


def _train(out: Path, flags: str) -> Training:
    words = ",".join(CLASSES).replace(" ", "%20")
    command = f"selftrain.py {flags} --classes {words} --features {out.parent}/features --out {out}"
    with pytest.MonkeyPatch.context() as patch, _one_thread():
        return Training(out=out, summary=run(command, patch))


@pytest.fixture(scope="session")
def trained(
    cluster: None, lite_map: None, lake: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Training:
    """Trained on 60 labelled images in Parquet, which only the ceiling reads, and tested on 30 others in a folder."""
    folder = tmp_path_factory.mktemp("work")
    return _train(folder / "trained", f"--data {lake}/labelled.parquet --eval-data {photos} --supervised")


@pytest.fixture(scope="session")
def blind(cluster: None, lite_map: None, lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Trained on the same images without labels, encoded for itself."""
    return _train(tmp_path_factory.mktemp("work") / "blind", f"--data {lake}/unlabelled.parquet")


class Throttle:
    """Stands before a server and refuses a share of the requests with 503, as S3 does when there are too many."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._random = random.Random(0)
        self.share = 0.0
        self.only = ""
        """Requests for paths without this are never refused."""
        self.refused = 0
        self.methods: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.methods.append(environ["REQUEST_METHOD"])
        if self.only not in environ["PATH_INFO"] or self._random.random() >= self.share:
            return self._app(environ, start_response)
        self.refused += 1
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        start_response(
            "503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        )
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    @contextlib.contextmanager
    def refusing(self, share: float, *, only: str = "") -> Iterator[None]:
        """Refuse this share of the requests in the block."""
        self.share, self.only = share, only
        try:
            yield
        finally:
            self.share, self.only = 0.0, ""


@pytest.fixture(scope="session")
def server(environment: None) -> Iterator[tuple[str, Throttle]]:
    """A server with an empty bucket: host:port, and what throttles it. The keys are in every test's environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    assert server._server is not None
    throttle = server._server.app = Throttle(server._server.app)
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
    yield f"{host}:{port}", throttle
    server.stop()


@pytest.fixture(scope="session")
def endpoint(server: tuple[str, Throttle]) -> str:
    """host:port of the server."""
    return server[0]


@pytest.fixture(scope="session")
def throttle(server: tuple[str, Throttle]) -> Throttle:
    """What stands before the server."""
    return server[1]


@pytest.fixture(scope="session")
def options(endpoint: str) -> str:
    """What follows a URI that names its server itself."""
    return f"?endpoint_override={endpoint}&scheme=http"
