"""Faults that befall long encodings, each really injected into the job: is every row there once, as without it?

    python benchmarks/faults.py                                  # all of them
    python benchmarks/faults.py --faults driver-killed full-disk --json runs/faults.json

Each fault meets jobs/encode.py in a process of its own, with real Ray, in the middle of its work; where it ends the
job, the same command is given again. Images are generated: tars of small PNGs, some of them damaged, and a Parquet file
for the faults of many images. The features of a job that nothing befell say what the others have to be.

"lost" are rows that are neither encoded nor quarantined, "doubled" those that are there more than once, "encoded again"
those of parts that were committed before the fault and written anew: all must be 0. Rows that were in flight may be
encoded again. "same bytes" compares ids and features, of all views, with the undisturbed ones. "ended" has the exit
codes of the jobs, one after the other, and what tells best how it went. Whatever did not hold is told below the table,
and the program exits with 1.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from encoding import generate, psutil
from PIL import Image
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_tasks

from lpclip.features.store import Store, matrix
from lpclip.features.store_writer import Part, list_parts
from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.runtime import versions
from lpclip.report.tables import format_table

ROOT = Path(__file__).resolve().parent.parent
NUM_TARS, TAR_IMAGES = 32, 32
MIDDLE = 4  # committed parts, one a tar, when the fault comes
WAIT_SECONDS = 900
FULL_BYTES = 64 << 10  # less than a part has
MOST_BYTES = 2 << 30
KILLED = -signal.SIGKILL

Parts = Mapping[Part, int]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Inject faults into the encode job, and see whether each row is there once, as without them."""

    faults: tuple[str, ...] = ()
    """Faults to inject, by their names in the table; all by default."""
    num_images: int = 5000
    """Images of bad-1%, bad-60% and hostile."""
    json: str | None = None
    """File to write the rows to."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of the rows of one fault's job."""

    rows_in: int | None = None
    encoded: int | None = None
    quarantined: int | None = None
    lost: int | None = None
    doubled: int | None = None
    encoded_again: int | None = None
    same_bytes: str = "-"
    seconds: int | None = None
    ended: str = "not"
    wrong: tuple[str, ...] = ()
    """What did not hold, in words."""


# Images


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a job encodes."""

    path: Path
    images: Mapping[str, bytes]
    """By id."""
    bad: frozenset[str]
    """Ids that must be quarantined."""
    flags: tuple[str, ...]
    features: Mapping[str, bytes]
    """By id, all views of it, as they are without a fault."""

    def damaged(self, name: str, *, bad: Iterable[slice]) -> Data:
        """The same with some images cut in the middle, beside it."""
        ids = frozenset(key for part in bad for key in list(self.images)[part])
        images = {k: v[: len(v) // 2] if k in ids else v for k, v in self.images.items()}
        path = self.path.with_name(name)
        (write_parquet if path.suffix else write_tars)(path, images)
        return replace(self, path=path, images=images, bad=ids)


class Lab:
    """Generated data in a folder, made when asked for, with the features that nothing befell."""

    def __init__(self, folder: Path, *, num_images: int) -> None:
        self.folder, self._num_images = folder / "data", num_images
        self.folder.mkdir()

    @cached_property
    def few(self) -> Data:
        """Tars, each a small unit of work, with a damaged image here and there."""
        return self._make("tars", NUM_TARS * TAR_IMAGES, bad=[slice(77, None, 150)], views="weak,strong")

    @cached_property
    def few_in_torch(self) -> Data:
        """The same, encoded with PyTorch, as encoders with a GPU do: OpenVINO's features differ in their last bits."""
        options: dict[str, Any] = {"bad": [slice(77, None, 150)], "views": "weak,strong"}
        return self._make("tars-torch", NUM_TARS * TAR_IMAGES, **options, more=("--engine", "torch"))

    @cached_property
    def many(self) -> Data:
        """As many images as are asked for, in Parquet, without damage."""
        return self._make("whole.parquet", self._num_images, bad=[], views="weak")

    @cached_property
    def hostile(self) -> Data:
        """The same images as files of a folder, with hostile ones among them, one for each hundred."""
        names = {name: f"{name.partition('.')[0]}/{name.partition('/')[2]}.png" for name in self.many.images}
        path = self.folder / "hostile-files"
        for name, image in self.many.images.items():
            place = path / names[name]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(image)
        bad = set()
        for number in range(len(names) // 100):
            kind = list(HOSTILE)[number % len(HOSTILE)]
            place = path / "000" / f"{number} {kind}.jpg"
            make = HOSTILE[kind]
            if isinstance(make, bytes):
                place.write_bytes(make)
            else:
                make(place)
            bad.add(str(place.relative_to(path)))
        return replace(
            self.many,
            path=path,
            images={names[name]: image for name, image in self.many.images.items()} | dict.fromkeys(bad, b""),
            bad=frozenset(bad),
            features={names[name]: feature for name, feature in self.many.features.items()},
        )

    def _make(
        self, name: str, count: int, *, bad: Iterable[slice], views: str, more: Sequence[str] = ()
    ) -> Data:
        ids = [f"{i // TAR_IMAGES:03d}.tar/{i % TAR_IMAGES:02d}" for i in range(count)]
        images = {key: generate("small", i) for i, key in enumerate(ids)}
        flags = ("--views", views, *more)
        data = Data(path=self.folder / name, images=images, bad=frozenset(), flags=flags, features={})
        data = data.damaged(name, bad=bad)
        print(f"  {name} without a fault", file=sys.stderr, flush=True)
        trial = Trial(data, self.folder / f"undisturbed-{name}")
        trial.run()
        return replace(data, features=dict(read_features(trial.store)))


def _many_scans() -> bytes:
    """A JPEG of which every pixel would be gone over two thousand times."""
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + 2000 * data[data.rindex(b"\xff\xda") : -2] + data[-2:]


def _png(width: int, height: int) -> bytes:
    """The start of a PNG that says it is so large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def _sparse(path: Path) -> None:
    path.write_bytes(b"\xff\xd8")
    os.truncate(path, 1 << 40)


def _socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


HOSTILE: dict[str, bytes | Callable[[Path], None]] = {
    "empty": b"",
    "a few bytes": b"\xff\xd8\xff",
    "noise": random.Random(0).randbytes(100_000),
    "web page": b"<!doctype html><title>404</title>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zip": b"PK\x03\x04" + bytes(1000),
    "PDF": b"%PDF-1.7\n",
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(100),
    "many scans": _many_scans(),
    "a bomb": _png(100_000, 100_000) + bytes(100),
    "no pixels": _png(0, 0),
    "only a header": _png(640, 480),
    "damaged TIFF": b"II*\0\x08\0\0\0\xff\xff" + random.Random(1).randbytes(5000),
    "terabyte": _sparse,
    "FIFO": lambda path: os.mkfifo(path),
    "socket": _socket,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
}
"""Files that no image is in, or that would take all memory or time."""


def write_tars(path: Path, images: Mapping[str, bytes]) -> None:
    """A folder of tars: ids are a tar's name and the image's name in it."""
    path.mkdir()
    for tar_name, group in itertools.groupby(images, key=lambda name: name.split("/")[0]):
        with tarfile.open(path / tar_name, "w") as tar:
            for name in group:
                info = tarfile.TarInfo(f"{name.split('/')[1]}.png")
                info.size = len(images[name])
                tar.addfile(info, io.BytesIO(images[name]))


def write_parquet(path: Path, images: Mapping[str, bytes]) -> None:
    """A row an image."""
    pq.write_table(pa.table({"id": list(images), "image": list(images.values())}), path)


def read_features(path: Path) -> Iterator[tuple[str, bytes]]:
    """Ids of a complete store, and the bytes of all views of each."""
    store = Store.open(str(path))
    views, dim = store.manifest.views, store.manifest.dim
    for table in store.tables(["id", *views]):
        rows = zip(*(matrix(table, view, dim) for view in views), strict=True)
        for name, row in zip(table["id"].to_pylist(), rows, strict=True):
            yield name, b"".join(feature.tobytes() for feature in row)


# Jobs


class Job:
    """A job in a process of its own. At the end of a `with`, nothing of it is left."""

    def __init__(self, command: list[str], log: Path, *, address: str) -> None:
        where = {"RAY_ADDRESS": address} if address else {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
        self._log, self._left = log, list[Any]()
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **where}, stdout=file, stderr=file
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        kill([*self._left, *self.below(), self._process])
        self._process.wait()

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def told(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def below(self) -> list[Any]:
        """The processes of its private Ray."""
        return below(self._process.pid)

    def kill(self) -> None:
        """SIGKILL for the job's process alone: its Ray has to end by itself."""
        self._left = self.below()
        agents = titled(self._left, "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # stay for a minute
        self._process.kill()
        wait_for(lambda: not any(map(is_alive, {*self._left} - {*agents})), "the end of a killed job's Ray")

    def stop(self) -> None:
        """Let the job's process stand still."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def ends(self) -> int:
        """Its exit code."""
        return self._process.wait(timeout=WAIT_SECONDS)


class Trial:
    """Jobs of the same command, one after the other, on which a fault is tried."""

    def __init__(
        self, data: Data, folder: Path, *, command: Sequence[str] = (sys.executable, "jobs/encode.py")
    ) -> None:
        folder.mkdir()
        self.data, self.folder, self._command, self._jobs = data, folder, command, list[Job]()
        self._begin = time.monotonic()

    @property
    def store(self) -> Path:
        """The feature store, once it is begun."""
        return next((self.folder / "out" / "features").glob("*"), self.folder)

    @property
    def told(self) -> str:
        """What all jobs have printed."""
        return "\n".join(job.told for job in self._jobs)

    @property
    def exits(self) -> tuple[int, ...]:
        """The exit codes of all jobs."""
        return tuple(job.ends() for job in self._jobs)

    @property
    def seconds(self) -> float:
        """Since its begin."""
        return time.monotonic() - self._begin

    def job(self, *flags: str, address: str = "", out: str = "out") -> Job:
        """Give the command, with further flags, to a cluster or a private Ray."""
        words = ["--data", str(self.data.path), "--out", str(self.folder / out), *self.data.flags, *flags]
        log = self.folder / f"job-{len(self._jobs)}.log"
        self._jobs.append(Job([*self._command, *words], log, address=address))
        return self._jobs[-1]

    def run(self, *flags: str, address: str = "") -> None:
        """Give the command and wait for its end."""
        with self.job(*flags, address=address) as job:
            job.ends()

    def parts(self) -> Parts:
        """When each part that is there was written."""
        found = list_parts(str(self.store))
        return {part: (self.store / part.name).stat().st_mtime_ns for part in found}

    def reach_the_middle(self) -> Parts:
        """The parts that are there, as soon as there are some, with most of the work still to do."""

        def enough() -> bool:
            if not self._jobs[-1].runs:
                raise RuntimeError("the job ended before the fault")
            return len(list_parts(str(self.store))) >= MIDDLE

        wait_for(enough, "the middle of the job")
        return self.parts()

    def row(
        self, before: Parts, *, exits: tuple[int, ...], says: str = "", note: str = "", in_a_row: int = 1
    ) -> Row:
        """What has become of the rows, `before` being the parts at the fault.

        The jobs must have ended with these exit codes. One of them must have said `says`, or the fault has a note. So
        many losses may have been counted `in_a_row`.
        """
        seconds, images = self.seconds, self.data.images
        encoded = list(read_features(self.store))
        quarantine = pq.read_table(self.store / "quarantine.parquet").to_pylist()
        counts = Counter([*(name for name, _ in encoded), *(row["id"] for row in quarantine)])
        after, ended = self.parts(), self.exits
        again = sum(part.stop - part.start for part, when in before.items() if after.get(part) != when)
        same = all(self.data.features.get(name) == feature for name, feature in encoded)
        said = note or next((line for line in self.told.splitlines() if says and says in line), "")
        said = said.replace(f"{self.folder.parent}/", "")
        row = Row(
            rows_in=len(images),
            encoded=len(encoded),
            quarantined=len(quarantine),
            lost=len(images.keys() - counts.keys()),
            doubled=counts.total() - len(counts),
            encoded_again=again,
            same_bytes="yes" if same else "no",
            seconds=round(seconds),
            ended=f"exit {', '.join(map(str, ended))}: {said[:99]}{'…' * (len(said) > 99)}",
        )
        held = {
            "no row is lost, doubled or, once committed, encoded again": not (
                row.lost or row.doubled or again
            ),
            "all features are the undisturbed ones": same,
            "all bad images, and no others, are quarantined, each with a reason": (
                {row["id"] for row in quarantine if row["error"]} == self.data.bad
            ),
            f"the exit codes are {exits}": ended == exits,
            f"it says {says!r}" if says else "the fault took effect": bool(said),
            f"{in_a_row} in a row are counted at most": f"({in_a_row + 1} of" not in self.told,
            "no traceback is printed": "Traceback" not in self.told,
        }
        return replace(row, wrong=tuple(claim for claim, holds in held.items() if not holds))


# Processes


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until the condition holds. Raises TimeoutError when that takes too long."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} has not come in {WAIT_SECONDS} s")
        time.sleep(0.02)


def below(pid: int) -> list[Any]:
    """All processes below one."""
    try:
        return psutil().Process(pid).children(recursive=True)
    except psutil().NoSuchProcess:
        return []


def is_alive(process: Any) -> bool:
    """Whether a process has neither ended nor waits to be buried."""
    try:
        return process.is_running() and process.status() != psutil().STATUS_ZOMBIE
    except psutil().NoSuchProcess:
        return False


def titled(processes: Iterable[Any], *titles: str) -> list[Any]:
    """Those whose titles begin with one of these: Ray's workers have the name of what they do in theirs."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil().Error):
            found += [process] if " ".join(process.cmdline()).startswith(titles) else []
    return found


def kill(processes: Iterable[Any]) -> None:
    """SIGKILL for all of them."""
    for process in processes:
        with contextlib.suppress(psutil().NoSuchProcess):
            process.kill()


@contextlib.contextmanager
def cluster(**head: Any) -> Iterator[Cluster]:
    """A cluster of this machine's processes, to which nodes can be added; nothing of it is left."""
    machines = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    try:
        yield machines
    finally:
        processes = below(os.getpid())
        machines.shutdown()
        kill(processes)
        wait_for(lambda: not any(map(is_alive, processes)), "the end of the cluster")


def processes_of(machine: Any) -> list[Any]:
    """A node's raylet and all below it."""
    pid = machine.all_processes["raylet"][0].process.pid
    return [psutil().Process(pid), *below(pid)]


# Faults


def driver_killed(trial: Trial) -> Row:
    """SIGKILL of the job's process; its Ray has to end by itself."""
    with trial.job() as job:
        trial.reach_the_middle()
        job.kill()
    before = trial.parts()
    trial.run()
    return trial.row(before, exits=(KILLED, 0), says="going on after")


def encoder_killed(trial: Trial) -> Row:
    """SIGKILL of the encoder actor's process; the job goes on by itself."""
    with trial.job() as job:
        before = trial.reach_the_middle()
        kill(titled(job.below(), "ray::MapWorker"))
        job.ends()
    return trial.row(before, exits=(0,), says="an encoder was lost, going on")


def two_jobs(trial: Trial) -> Row:
    """A second job begins in the middle of the first, with the same --features: it waits, and takes what is there."""
    shared = ("--features", str(trial.folder / "out" / "features"))
    with trial.job(*shared) as first:
        before = trial.reach_the_middle()
        # The first stands still until the second has met it.
        first.stop()
        with trial.job(*shared, out="other") as second:
            wait_for(lambda: "waiting for another job" in second.told or not second.runs, "the second job")
            first.go_on()
            first.ends()
            second.ends()
    return trial.row(before, exits=(0, 0), says="waiting for another job")


def machine_lost(trial: Trial) -> Row:
    """SIGKILL of all processes of a node that has an encoder; there are a head without CPUs and two such nodes."""
    with cluster(num_cpus=0) as machines:
        nodes = [machines.add_node(num_cpus=2) for _ in range(2)]
        with trial.job(address=machines.address) as job:
            before = trial.reach_the_middle()
            kill(next(p for p in map(processes_of, nodes) if titled(p, "ray::MapWorker")))
            job.ends()
    return trial.row(before, exits=(0,), says="was lost, going on")


def machines_lost(trial: Trial) -> Row:
    """Ten times, a node of eight is killed and another one joins: as soon as a part was written, after four seconds."""
    chance, kills = random.Random(0), 0

    def went_on() -> bool:
        return not job.runs or len(trial.parts()) > len(parts)

    with cluster(num_cpus=0) as machines:
        nodes = [machines.add_node(num_cpus=1) for _ in range(8)]
        with trial.job(address=machines.address) as job:
            before = parts = trial.reach_the_middle()
            while job.runs and kills < 10:
                node = nodes.pop(chance.randrange(len(nodes)))
                kill(processes_of(node))
                kills += 1
                nodes.append(machines.add_node(num_cpus=1))
                time.sleep(4)
                wait_for(went_on, "a part")
                parts = trial.parts()
            job.ends()
    note = f"{kills} machines killed, {job.told.count('was lost')} losses told of"
    return trial.row(before, exits=(0,), note=note, in_a_row=2)


def machine_joins(trial: Trial) -> Row:
    """A node of two CPUs joins a head of one, and has to take part."""
    busy: set[int] = set()

    def ended() -> bool:
        busy.update(process.pid for process in titled(processes_of(node), "ray::MapBatches"))
        return not job.runs

    with cluster(num_cpus=1) as machines, trial.job(address=machines.address) as job:
        before = trial.reach_the_middle()
        node = machines.add_node(num_cpus=2)
        wait_for(ended, "the end of the job")
    note = f"{len(busy)} processes of the machine took part"
    return trial.row(before, exits=(0,), note=note if busy else "")


def full_disk(trial: Trial) -> Row:
    """From the middle on, no process of Ray can write a file of a part's size, which fails as a full disk does."""

    def ended() -> bool:
        # Again and again, as there may be new ones. Not the raylet: its log would end it.
        for process in titled(job.below(), "ray::"):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))
        return not job.runs

    with trial.job() as job:
        trial.reach_the_middle()
        wait_for(ended, "the end of the job")
    before = trial.parts()
    trial.run()
    return trial.row(before, exits=(1, 0), says="error: cannot write")


def read_errors(trial: Trial, *, times: int) -> Row:
    """A server answers 503 to every 16th URI, so many times; three are tried."""
    images = trial.data.images
    faulty = frozenset(list(images)[::16])
    path = trial.folder / "manifest.csv"
    bad = trial.data.bad | (faulty if times >= 3 else frozenset())
    trial.data = replace(trial.data, path=path, bad=bad, flags=(*trial.data.flags, "--schemes", "https,http"))
    with serve(images, faulty=faulty, times=times) as (address, asked):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "uri"), *((name, f"{address}/{name}") for name in images)])
        trial.run()
    again = sum(asked[name] == min(times + 1, 3) for name in faulty)
    note = f"{again} URIs were tried {min(times + 1, 3)} times"
    return trial.row({}, exits=(0,), note=note if again == len(faulty) else "")


@contextlib.contextmanager
def serve(
    images: Mapping[str, bytes], *, faulty: frozenset[str], times: int
) -> Iterator[tuple[str, Counter[str]]]:
    """A server of images that fails the faulty ones so often; its address, and how often each was asked for."""
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path[1:]
            asked[name] += 1
            if name in faulty and asked[name] <= times:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(images[name])))
            self.end_headers()
            self.wfile.write(images[name])

        def log_message(self, *_: object) -> None:
            """Not between the lines of progress."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def few_bad(trial: Trial) -> Row:
    """A hundredth of many images is damaged: the job goes well."""
    trial.run()
    errors = Counter(pq.read_table(trial.store / "quarantine.parquet")["error"].to_pylist())
    return trial.row(
        {}, exits=(0,), note="; ".join(f"{n} times {error}" for error, n in errors.most_common())
    )


def hostile(trial: Trial) -> Row:
    """A hundredth of the files is hostile: the job goes well, in little memory."""
    most = 0
    with trial.job() as job:
        while job.runs:
            for process in titled(job.below(), "ray::"):
                with contextlib.suppress(psutil().Error):
                    most = max(most, process.memory_info().rss)
            time.sleep(0.2)
        job.ends()
    kinds = len(set(pq.read_table(trial.store / "quarantine.parquet")["error"].to_pylist()))
    note = f"at most {most >> 20} MB in a process, {kinds} different reasons"
    return trial.row({}, exits=(0,), note=note if most < MOST_BYTES else "")


def many_bad(trial: Trial) -> Row:
    """Three in five images are damaged: the job stops, and goes on from there when it is allowed to."""
    trial.run()
    before = trial.parts()
    trial.run("--max-bad-fraction", "0.7")
    return trial.row(before, exits=(1, 0), says="more than --max-bad-fraction 0.5 allows")


def two_gpus(trial: Trial) -> Row:
    """Each logical GPU has an encoder, which computes on CPUs, and no decoding is on them."""
    with cluster(num_cpus=2, num_gpus=2, include_dashboard=True) as machines:
        trial.run(address=machines.address)
        state = f"http://{machines.webui_url}"
        encoders = [a for a in list_actors(address=state, detail=True) if "EncodeStage" in a.class_name]
        tasks = list_tasks(address=state, detail=True, limit=10_000)
    decoding = [task for task in tasks if "decode_unit" in task.name]
    apart = not {task.worker_pid for task in decoding} & {actor.pid for actor in encoders}
    apart &= not any("GPU" in (task.required_resources or {}) for task in decoding)
    held = [actor.required_resources for actor in encoders] == [{"GPU": 1}] * 2
    note = f"2 encoders, 1 GPU each; {len(decoding)} decoding tasks, none on a GPU"
    return trial.row({}, exits=(0,), note=note if held and decoding and apart else "")


FAULTS: dict[str, tuple[Callable[[Trial], Row], Callable[[Lab], Data]]] = {
    "driver-killed": (driver_killed, lambda lab: lab.few),
    "encoder-killed": (encoder_killed, lambda lab: lab.few),
    "two-jobs": (two_jobs, lambda lab: lab.few),
    "machine-lost": (machine_lost, lambda lab: lab.few),
    "machines-lost": (machines_lost, lambda lab: lab.few),
    "machine-joins": (machine_joins, lambda lab: lab.few),
    "full-disk": (full_disk, lambda lab: lab.few),
    "read-errors-pass": (partial(read_errors, times=1), lambda lab: lab.few),
    "read-errors-stay": (partial(read_errors, times=99), lambda lab: lab.few),
    "bad-1%": (few_bad, lambda lab: lab.many.damaged("1.parquet", bad=[slice(7, None, 100)])),
    "bad-60%": (
        many_bad,
        lambda lab: lab.many.damaged("60.parquet", bad=[slice(i, None, 5) for i in range(3)]),
    ),
    "hostile": (hostile, lambda lab: lab.hostile),
    "two-gpus": (two_gpus, lambda lab: lab.few_in_torch),
}


def inject(fault: str, lab: Lab) -> Row:
    """The fault's row; one without numbers when it did not come so far."""
    run, data = FAULTS[fault]
    trial = Trial(data(lab), lab.folder / fault)
    try:
        return run(trial)
    except Exception as error:
        # The other faults have rows to come.
        return Row(wrong=(f"{type(error).__name__}: {error}; what was printed last:\n{trial.told[-2000:]}",))


def show(rows: Mapping[str, Row], *, options: Any) -> int:
    """Print the table and what did not hold, write JSON to `options.json`. Returns the exit code."""
    shown = [{"fault": fault, **asdict(row)} for fault, row in rows.items()]
    print(format_table([{k.replace("_", " "): v for k, v in row.items() if k != "wrong"} for row in shown]))
    for fault, row in rows.items():
        for claim in row.wrong:
            print(f"{fault}: it does not hold that {claim}" if row.rows_in else f"{fault}: {claim}")
    if options.json:
        written = {"options": asdict(options), "versions": versions(), "rows": shown}
        Path(options.json).write_text(json.dumps(written, indent=1))
    return int(any(row.wrong for row in rows.values()))


def main(options: Options) -> int:
    """Inject the faults, print the table, write JSON. Returns the exit code."""
    if unknown := set(options.faults) - FAULTS.keys():
        raise ValueError(f"--faults {' '.join(unknown)}: there are {', '.join(FAULTS)}")
    # What is asked to end has to clear away its clusters first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # A cluster of the user's is not one to kill.
    os.environ.pop("RAY_ADDRESS", None)
    # No token is needed where only this machine can call.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Ray notes the last cluster's address there, and would look for it after its end.
        os.environ["RAY_TMPDIR"] = folder
        lab = Lab(Path(folder), num_images=options.num_images)
        for fault in options.faults or FAULTS:
            print(fault, file=sys.stderr, flush=True)
            rows[fault] = inject(fault, lab)
            print(f"  {rows[fault].ended}", *rows[fault].wrong, sep="\n  ", file=sys.stderr, flush=True)
    return show(rows, options=options)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=OPTIONS)))
