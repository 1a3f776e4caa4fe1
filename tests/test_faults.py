"""Faults that befall long encodings, each really injected: no row is lost or doubled, no feature differs."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import descendants, draw, write_tar

from lpclip.config import EncodeConfig, EncoderConfig, SourceConfig
from lpclip.encoders.head import EncoderInfo
from lpclip.features import find_or_encode
from lpclip.features.describe import describe_encoder
from lpclip.features.store import Store
from lpclip.features.store_writer import list_parts
from lpclip.images.open import open_source
from lpclip.images.source import Reader, Row, Source
from lpclip.images.views import parse_views

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lite_map")]
LITE = EncoderConfig()
NUM_TARS, TAR_IMAGES, BAD_TARS = 12, 24, (2, 5, 8)
IDS = {f"{tar:02d}.tar/{i:03d}" for tar in range(NUM_TARS) for i in range(TAR_IMAGES)}
BAD_IDS = {f"{tar:02d}.tar/007" for tar in BAD_TARS}
WAIT_SECONDS = 240

Parts = dict[str, tuple[int, bytes]]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tars, each a unit of work; three of them with an image that is none."""
    folder = tmp_path_factory.mktemp("faults") / "tars"
    folder.mkdir()
    for tar in range(NUM_TARS):
        images = {f"{i:03d}.png": draw(i % 3, 100 * tar + i) for i in range(TAR_IMAGES)}
        write_tar(folder / f"{tar:02d}.tar", images | ({"007.png": b"none"} if tar in BAD_TARS else {}))
    return folder


@pytest.fixture(scope="module")
def info() -> EncoderInfo:
    return describe_encoder(LITE, class_names=(), templates=())


@pytest.fixture(scope="module")
def undisturbed(
    tars: Path, cluster: None, info: EncoderInfo, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The features of a run without a fault, by id."""
    path = tmp_path_factory.mktemp("undisturbed") / "store"
    run(open_source(str(tars), config=SourceConfig()), info, path)
    return features(path)


def run(source: Source, info: EncoderInfo, path: Path, *, views: str = EncodeConfig().views) -> Store:
    encoding = find_or_encode.Encoding(info=info, encoder=LITE, folder=str(path.parent))
    return encoding.encode(source, views=parse_views(views), path=str(path))


def features(path: Path) -> dict[str, bytes]:
    """Bytes of all features by id; an id that is there twice fails."""
    found = Store.open(str(path)).features()
    views = zip(found.ids.tolist(), found.base, *found.strong.values(), strict=True)
    by_id = {name: b"".join(row.tobytes() for row in rows) for name, *rows in views}
    assert len(by_id) == len(found.ids), "doubled"
    return by_id


def parts(path: Path) -> Parts:
    """Time and bytes of the parts that are there."""
    names = [part.name for part in list_parts(str(path))]
    return {name: ((path / name).stat().st_mtime_ns, (path / name).read_bytes()) for name in names}


def assert_whole(path: Path, *, expected: dict[str, bytes], before: Parts) -> None:
    """Every row is there once, as without the fault, and what was committed before it was not encoded again."""
    manifest = Store.open(str(path)).manifest
    quarantined = pq.read_table(path / "quarantine.parquet")["id"].to_pylist()
    assert features(path) == expected
    assert (manifest.num_rows, manifest.num_quarantined) == (len(expected), len(quarantined))
    assert len(quarantined) == len(BAD_IDS)
    assert set(quarantined) == BAD_IDS == IDS - set(expected)
    assert len(expected) + len(quarantined) == len(IDS) == NUM_TARS * TAR_IMAGES
    after = parts(path)
    assert {name: after.get(name) for name in before} == before
    assert {p.name for p in path.iterdir()} == {
        *after,
        "identity.json",
        "manifest.json",
        "quarantine.parquet",
    }


def wait_for(condition: Callable[[], Any], what: str, *, told: Callable[[], str]) -> Any:
    """What the condition says when it first says something; the test fails when that takes too long."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not in {WAIT_SECONDS} s; so far:\n{told()}")
        time.sleep(0.02)
    return found


def encoders() -> list[int]:
    """Encoder actors on the tests' own Ray."""
    return [pid for pid, title in descendants(os.getpid()).items() if title.startswith("ray::MapWorker")]


@pytest.fixture(autouse=True)
def no_encoder_is_left() -> Iterator[None]:
    """A failed pipeline's encoder lives while its error does: the CPUs that it holds would be missed by other tests."""
    yield
    gc.collect()
    wait_for(lambda: not encoders(), "the end of the encoders", told=lambda: str(descendants(os.getpid())))


class Encoding(threading.Thread):
    """encode() beside the test, on the tests' own Ray."""

    def __init__(self, source: Source, info: EncoderInfo, path: Path) -> None:
        super().__init__(daemon=True)
        self.error: Exception | None = None
        self._arguments, self._path = (source, info, path), path
        self._killed = set(encoders())  # of a test before, perhaps still ending
        self.start()

    def run(self) -> None:
        try:
            run(*self._arguments)
        except Exception as error:
            self.error = error

    def waits_for_parts(self, number: int) -> None:
        """Until there are so many."""
        there = partial(list_parts, str(self._path))
        wait_for(lambda: len(there()) >= number, f"{number} parts", told=lambda: str(self.error))

    def encoder(self) -> int:
        """The encoder actor, when there is one that was not killed."""

        def find() -> int | None:
            assert self.is_alive(), self.error
            return next((pid for pid in encoders() if pid not in self._killed), None)

        return int(wait_for(find, "an encoder", told=lambda: str(descendants(os.getpid()))))

    def kill(self, encoder: int) -> None:
        """SIGKILL."""
        self._killed.add(encoder)
        os.kill(encoder, signal.SIGKILL)

    def ends(self) -> None:
        self.join(WAIT_SECONDS)
        assert not self.is_alive(), f"no end in {WAIT_SECONDS} s: {descendants(os.getpid())}"


def test_a_lost_encoder_is_replaced(
    tars: Path,
    undisturbed: dict[str, bytes],
    info: EncoderInfo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoding = Encoding(open_source(str(tars), config=SourceConfig()), info, tmp_path)
    encoding.waits_for_parts(3)
    before = parts(tmp_path)
    encoding.kill(encoding.encoder())
    assert len(before) < NUM_TARS
    encoding.ends()
    assert encoding.error is None
    assert "an encoder was lost, going on (1 of 2 times in a row)" in capsys.readouterr().out
    assert_whole(tmp_path, expected=undisturbed, before=before)


def test_encoders_that_are_lost_between_finished_units_do_not_end_the_job(
    tars: Path,
    undisturbed: dict[str, bytes],
    info: EncoderInfo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoding = Encoding(open_source(str(tars), config=SourceConfig()), info, tmp_path)
    for _ in range(4):
        # What an encoder finished before it was lost may be committed after that: the next one's part counts.
        encoder = encoding.encoder()
        encoding.waits_for_parts(len(parts(tmp_path)) + 1)
        before = parts(tmp_path)
        assert len(before) < NUM_TARS
        encoding.kill(encoder)
    encoding.ends()
    assert encoding.error is None
    assert capsys.readouterr().out.count("an encoder was lost, going on (1 of 2 times in a row)") == 4
    assert_whole(tmp_path, expected=undisturbed, before=before)


@pytest.mark.usefixtures("cluster")
def test_encoders_that_die_again_and_again_end_the_job(tars: Path, info: EncoderInfo, tmp_path: Path) -> None:
    encoding = Encoding(open_source(str(tars), config=SourceConfig()), info, tmp_path)
    for _ in range(3):
        encoding.kill(encoding.encoder())
    encoding.ends()
    assert isinstance(encoding.error, ValueError)
    assert str(encoding.error).startswith(
        "an encoder died 3 times in a row, the last time with: The actor died"
    )
    assert "what is encoded is kept, the same command goes on" in str(encoding.error)


@dataclass(frozen=True, kw_only=True)
class DeadlyReader(Reader):
    """Reads like another, and takes its process down in the middle of the sixth tar: `times` times."""

    reader: Reader
    folder: Path
    times: int

    def rows(self, unit: str) -> Iterator[Row]:
        for number, row in enumerate(self.reader.rows(unit)):
            if row.id.startswith("05.tar") and number == TAR_IMAGES // 2:
                deaths = len(list(self.folder.iterdir()))
                if deaths < self.times:
                    (self.folder / str(deaths)).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            yield row


@pytest.fixture
def deadly(tars: Path, tmp_path: Path) -> Iterator[Callable[[int], Source]]:
    """The tars, with a reader that dies so many times."""
    (tmp_path / "deaths").mkdir()
    # Workers cannot import a test.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def make(times: int) -> Source:
        source = open_source(str(tars), config=SourceConfig())
        reader = DeadlyReader(reader=source.reader, folder=tmp_path / "deaths", times=times)
        return replace(source, reader=reader)

    yield make
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_decoding_process_that_dies_is_replaced(
    deadly: Callable[[int], Source],
    undisturbed: dict[str, bytes],
    info: EncoderInfo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoding = Encoding(deadly(1), info, tmp_path / "store")
    encoding.ends()
    assert encoding.error is None
    assert len(list((tmp_path / "deaths").iterdir())) == 1
    assert "was lost" not in capsys.readouterr().out  # Ray's own retry of one unit is enough
    assert_whole(tmp_path / "store", expected=undisturbed, before={})


@pytest.mark.usefixtures("cluster")
def test_images_that_kill_their_decoder_again_and_again_end_the_job(
    deadly: Callable[[int], Source], undisturbed: dict[str, bytes], info: EncoderInfo, tmp_path: Path
) -> None:
    encoding = Encoding(deadly(3), info, tmp_path / "store")
    encoding.ends()
    assert isinstance(encoding.error, ValueError)
    assert "a process that reads and decodes images died 3 times over the same ones" in str(encoding.error)
    # The encoder's CPUs are free while the error lives: the same command goes on in the same process.
    again = Encoding(deadly(3), info, tmp_path / "store")
    again.ends()
    assert again.error is None
    assert_whole(tmp_path / "store", expected=undisturbed, before={})


ASKED: Counter[str] = Counter()
OVER = threading.Event()


class Unreliable(BaseHTTPRequestHandler):
    """Serves one image under many names, which say what goes wrong how often before it goes well."""

    image = draw(0, 0)

    def do_GET(self) -> None:
        ASKED[self.path] += 1
        fault, times, _ = self.path.strip("/").split("-")
        if ASKED[self.path] > int(times):
            fault = "none"
        if fault == "silent":
            OVER.wait()
        elif fault == "invalid":
            self.wfile.write(b"NOT HTTP\r\n\r\n")
        elif fault.isdecimal():
            self.send_error(int(fault))
        elif fault != "closed":
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.image)))
            self.end_headers()
            self.wfile.write(self.image[: 100 if fault == "cut" else 1 if fault == "trickle" else None])
            while fault == "trickle" and not OVER.wait(0.1):
                self.wfile.write(b"0")

    def log_message(self, *_: object) -> None:
        """Not into the tests' output."""


@pytest.fixture
def server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    OVER.set()
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("cluster")
def test_read_errors_that_pass_are_retried_and_those_that_stay_are_quarantined(
    server: str, info: EncoderInfo, tmp_path: Path
) -> None:
    passing = [f"{fault}-2-{i}" for fault in ("503", "429", "closed", "cut", "invalid") for i in range(4)]
    staying = {
        "503-9-": "HTTP Error 503",
        "404-9-": "HTTP Error 404",
        "closed-9-": "closed connection without response",
        "cut-9-": f"the connection ended after 100 of {len(Unreliable.image)} bytes",
        "invalid-9-": "no valid answer (NOT HTTP)",
        "silent-9-": "timed out",
        "trickle-9-": "timed out after",
    }
    names = [*passing, *staying, *(f"none-0-{i}" for i in range(20))]
    pq.write_table(
        pa.table({"id": names, "uri": [f"{server}/{name}" for name in names]}), tmp_path / "l.parquet"
    )
    source = open_source(str(tmp_path / "l.parquet"), config=SourceConfig(read_timeout=3.0, schemes="http"))
    encoding = Encoding(source, info, tmp_path / "store")
    encoding.ends()
    assert encoding.error is None
    found = features(tmp_path / "store")
    assert set(found) == {*names} - {*staying}
    quarantine = pq.read_table(tmp_path / "store" / "quarantine.parquet").to_pylist()
    assert sorted(row["id"] for row in quarantine) == sorted(staying)
    for row in quarantine:
        assert row["stage"] == "read"
        assert staying[row["id"]] in row["error"]
    tries = {name: ASKED[f"/{name}"] for name in names}
    once = [name for name in names if name.startswith(("none", "404"))]
    assert tries == dict.fromkeys(names, 3) | dict.fromkeys(once, 1)
