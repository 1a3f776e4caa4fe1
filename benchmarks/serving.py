"""`lpclip serve` under load: images a second beside the engine alone, hostile requests, and a replica that is killed.

    python benchmarks/serving.py                          # lite, photos of 500x375
    python benchmarks/serving.py --encoder ViT-B-32       # random weights

The engine's own images a second are those of `Classifier` in this process, given the same bytes, 64 at a time, as many
as it takes at once: it decodes them, then encodes them with all CPUs. The tower's are those of the forward passes
alone. Both have passes of eight images, as `lpclip predict` has; the server's replicas have passes of one.

Then come the hostile requests, a twentieth of all: truncated JPEGs, PNGs that say they are huge, texts, bodies beyond
the limit, and bodies that stop half-way. Each must get the status that is meant for it, and each good image its own
answer. At last a replica is killed while requests come in.

The server and its clients share this machine's CPUs. `CPU ms` is what an image costs of them, without the clients: it
tells more than images a second where other work runs as well. Ray gives its workers a low priority, which matters
there: RAY_worker_niceness=0 in the environment measures without.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from encoding import CORES, generate, make_weights

import lpclip
from lpclip.images.pixels import decode_image
from lpclip.images.render import weak_view
from lpclip.jobs.cli import OPTIONS
from lpclip.method.probe import zero_shot_probe
from lpclip.report.tables import format_table
from lpclip.serving.classifier import IMAGES_AT_ONCE, Classifier

CLASSES = ("tennis ball", "stop sign", "traffic cone", "fire truck", "red fox")
CONCURRENT = (1, 8, 32)
MAX_BYTES = 2_000_000
BODY_TIMEOUT = 2.0
CLOSE = 0.01
"""How much a probability may differ: a pass of other images may be rounded otherwise."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure serving beside the engine alone."""

    encoder: str = "lite"
    """lite or an open_clip model with random weights, which are as fast."""
    images: int = 256
    """Different images that are sent."""
    seconds: float = 10.0
    """How long each arm is measured in a turn."""
    turns: int = 3
    """Turns of all arms."""
    requests: int = 10_000
    """Requests among which are hostile ones."""
    hostile: float = 0.05
    """Share of hostile ones among them."""
    folder: str = "runs/serving-benchmark"
    """Folder for weights and probes."""
    port: int = 8765
    """Port of the server."""
    json: str | None = None
    """File to write the numbers to."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request, and the status that it must get."""

    kind: str
    status: int
    body: bytes
    content_type: str = "image/jpeg"
    stops_at: int | None = None
    """The client sends so many bytes of the body and no more."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The server's answer to a request."""

    status: int
    headers: dict[str, str]
    told: Any
    seconds: float


class Client:
    """One connection, which is opened again when the server has closed it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, case: Case) -> Answered:
        """Send a request and read its answer."""
        began = time.perf_counter()
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        assert self.reader is not None
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: {case.content_type}\r\n"
        self.writer.write(f"{head}Content-Length: {len(case.body)}\r\n\r\n".encode())
        self.writer.write(case.body[: case.stops_at])
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        told = json.loads(await self.reader.readexactly(int(headers["content-length"])))
        if headers.get("connection") == "close":
            self.writer.close()
            self.writer = None
        return Answered(
            status=int(lines[0].split()[1]),
            headers=headers,
            told=told,
            seconds=time.perf_counter() - began,
        )


def good(image: bytes) -> Case:
    """A request with an image."""
    return Case(kind="good", status=200, body=image)


def hostile_cases(images: Sequence[bytes]) -> list[Case]:
    """One request of each hostile kind."""
    photo = images[0]
    return [
        Case(kind="truncated", status=422, body=photo[: len(photo) // 2]),
        Case(kind="bomb", status=422, body=_png_header(60_000, 60_000), content_type="image/png"),
        Case(kind="wrong type", status=415, body=photo, content_type="text/plain"),
        Case(kind="huge", status=413, body=photo + bytes(MAX_BYTES)),
        Case(kind="slow", status=408, body=photo, stops_at=100),
    ]


def _png_header(width: int, height: int) -> bytes:
    """A PNG of the given size of which hardly anything is there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1_000_000))) + chunk(b"IEND", b"")
    )


# The server


@contextlib.contextmanager
def served(probe: str, *, port: int) -> Iterator[subprocess.Popen[str]]:
    """`lpclip serve` for the length of the block, which begins when it answers."""
    flags = ["--port", str(port), "--max-bytes", str(MAX_BYTES), "--body-timeout", str(BODY_TIMEOUT)]
    command = [sys.executable, "jobs/serve.py", "--probe", probe, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready"):
                break
        else:
            raise RuntimeError("lpclip serve ended")
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def serve_processes(server: int) -> dict[int, str]:
    """The processes of Ray Serve below a process, each with its name."""
    found, todo = {}, [server]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{pid}/task").glob("*/children"):
                todo += map(int, file.read_text().split())
            name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            if name.startswith("ray::") and ("Serve" in name or "Proxy" in name):
                found[pid] = name.removeprefix("ray::")
    return found


def memory(server: int) -> dict[str, float]:
    """MB of each of Ray Serve's processes, without what it shares in Ray's object store."""
    found: dict[str, float] = {}
    for pid, name in serve_processes(server).items():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        size = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        short = name.split(":")[0].split("#")[0]
        found[short] = found.get(short, 0) + (size["RssAnon"] + size["RssFile"]) / 1024
    return found


def cpu_seconds(server: int) -> float:
    """Seconds that Ray Serve's processes have computed for."""
    total = 0
    for pid in serve_processes(server):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


# Arms


def rate_of_classifier(classifier: Classifier, images: Sequence[bytes], *, seconds: float) -> float:
    """Images a second of the engine on encoded images."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        some = [images[(count + i) % len(images)] for i in range(IMAGES_AT_ONCE)]
        assert all(answer.error is None for answer in classifier(some))
        count += len(some)
    return count / (time.perf_counter() - began)


def rate_of_tower(classifier: Classifier, images: Sequence[bytes], *, seconds: float) -> float:
    """Images a second of the forward passes."""
    preprocess = classifier.info.preprocess
    decoded = [
        decode_image(image, max_pixels=10**8, max_bytes=10**8, size=preprocess.size)
        for image in images[:IMAGES_AT_ONCE]
    ]
    pixels = np.stack([weak_view(image, preprocess) for image in decoded])
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += len(classifier.features(pixels))
    return count / (time.perf_counter() - began)


async def load(
    port: int, images: Sequence[bytes], *, concurrent: int, seconds: float
) -> tuple[float, list[float]]:
    """Images a second, and the seconds of each request, with so many clients that ask one after the other."""
    ends, latencies = time.perf_counter() + seconds, []

    async def client(number: int) -> None:
        one, place = Client(port), number * 7
        while time.perf_counter() < ends:
            answered = await one.ask(good(images[place % len(images)]))
            assert answered.status == 200, answered
            latencies.append(answered.seconds)
            place += 1

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(concurrent)))
    return len(latencies) / (time.perf_counter() - began), latencies


# What can go wrong


async def ask_hostile(
    server: int, images: Sequence[bytes], *, expected: Sequence[tuple[str, float]], options: Options
) -> dict[str, Any]:
    """Send all requests, hostile ones among them, and compare each answer. Returns counts, and MB at both ends."""
    rng, kinds = random.Random(0), hostile_cases(images)
    cases: list[tuple[Case, int | None]] = []
    for number in range(options.requests):
        if rng.random() < options.hostile:
            cases.append((kinds[number % len(kinds)], None))
        else:
            cases.append((good(images[number % len(images)]), number % len(images)))
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    todo = iter(cases)
    sizes: list[dict[str, float]] = []

    async def client() -> None:
        one = Client(options.port)
        for case, place in todo:
            if sum(counts.values()) in (options.requests // 10, options.requests // 2):
                sizes.append(memory(server))
            try:
                answered = await one.ask(case)
            except (OSError, EOFError, ValueError) as error:
                counts[f"{case.kind}: lost"] += 1
                wrong.append(f"{case.kind}: {error!r}")
                one = Client(options.port)
                continue
            counts[f"{case.kind}: {answered.status}"] += 1
            if answered.status != case.status:
                wrong.append(f"{case.kind}: {answered}")
            elif place is not None and not _is(answered.told, expected[place]):
                wrong.append(f"{answered.told} in place of {expected[place]}")

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONCURRENT[-1])))
    sizes.append(memory(server))
    return {
        "counts": dict(sorted(counts.items())),
        "wrong": wrong,
        "MB": sizes,
        "seconds": time.perf_counter() - began,
    }


def _is(told: dict[str, Any], expected: tuple[str, float]) -> bool:
    name, probability = expected
    at = told["labels"].index(name)
    # Two classes may be equally probable but for the rounding.
    return abs(told["probabilities"][at] - probability) < CLOSE and told["probability"] < probability + CLOSE


async def kill_a_replica(server: int, images: Sequence[bytes], *, port: int) -> dict[str, Any]:
    """Kill a replica while eight clients ask. Returns counts of statuses, and the seconds without an answer 200."""
    counts: Counter[str] = Counter()
    times: list[float] = []
    ends = asyncio.Event()

    async def client(number: int) -> None:
        one, place = Client(port), number
        while not ends.is_set():
            answered = await one.ask(good(images[place % len(images)]))
            hint = "" if answered.status == 200 else f", retry after {answered.headers.get('retry-after')}"
            counts[f"{answered.status}{hint}"] += 1
            if answered.status == 200:
                times.append(time.perf_counter())
            place += 1

    async def killer() -> None:
        await asyncio.sleep(3)
        (pid,) = [pid for pid, name in serve_processes(server).items() if name.startswith("ServeReplica")]
        os.kill(pid, signal.SIGKILL)
        killed = time.perf_counter()
        while not times or times[-1] < killed + 1:
            await asyncio.sleep(0.1)
        await asyncio.sleep(3)
        ends.set()

    await asyncio.gather(killer(), *(client(number) for number in range(CONCURRENT[1])))
    gap = max(after - before for before, after in itertools.pairwise(times))
    return {"counts": dict(counts), "seconds without an answer": gap}


def make_probe(options: Options) -> str:
    """A zero-shot probe of the encoder, in the folder."""
    pretrained = None if options.encoder == "lite" else make_weights(options.encoder, folder=options.folder)
    head = lpclip.zero_shot_head(CLASSES, encoder=options.encoder, pretrained=pretrained)
    probe = zero_shot_probe(
        torch.tensor(head.weight),
        temperature=1.0,
        class_names=head.class_names,
        encoder={**head.encoder, "views": "weak"},
    )
    folder = f"{options.folder}/{options.encoder}"
    probe.save(folder)
    return folder


def main(options: Options) -> None:
    """Measure, print tables, write JSON."""
    probe = make_probe(options)
    images = [generate("photo", number) for number in range(options.images)]
    engine = Classifier.load(probe)
    answers = Classifier.load(probe, pass_size=1)(images, top_k=1)
    expected = [(answer.labels[0], answer.probabilities[0]) for answer in answers]
    print(f"{options.encoder}, {engine.info.engine}, {CORES} cores, photos of 500x375", flush=True)
    rates: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    latencies: dict[str, list[float]] = {}
    with served(probe, port=options.port) as process:
        asyncio.run(load(options.port, images, concurrent=8, seconds=2))
        for _ in range(options.turns):
            for name, measure in (("tower alone", rate_of_tower), ("engine alone", rate_of_classifier)):
                began, wall = time.process_time(), time.perf_counter()
                rates.setdefault(name, []).append(measure(engine, images, seconds=options.seconds))
                share = (time.process_time() - began) / (time.perf_counter() - wall)
                costs.setdefault(name, []).append(share / rates[name][-1])
            for concurrent in CONCURRENT:
                name = f"served, {concurrent} clients"
                computed = cpu_seconds(process.pid)
                rate, some = asyncio.run(
                    load(options.port, images, concurrent=concurrent, seconds=options.seconds)
                )
                costs.setdefault(name, []).append((cpu_seconds(process.pid) - computed) / len(some))
                rates.setdefault(name, []).append(rate)
                latencies.setdefault(name, []).extend(some)
        rows = [
            _row(name, found, rates["engine alone"], costs[name], latencies.get(name))
            for name, found in rates.items()
        ]
        print(format_table(rows), flush=True)
        hostile = asyncio.run(ask_hostile(process.pid, images, expected=expected, options=options))
        print(json.dumps({**hostile, "wrong": hostile["wrong"][:5]}, indent=1), flush=True)
        killed = asyncio.run(kill_a_replica(process.pid, images, port=options.port))
        print(json.dumps(killed, indent=1))
    if options.json:
        found = {"rates": rates, "costs": costs, "rows": rows, "hostile": hostile, "killed": killed}
        Path(options.json).write_text(json.dumps(found, indent=1))


def _row(
    name: str,
    found: Sequence[float],
    engine: Sequence[float],
    cost: Sequence[float],
    latencies: Sequence[float] | None,
) -> dict[str, Any]:
    """A row of the table. The share is the median of the turns', each beside the engine of the same turn."""
    shares = [rate / beside for rate, beside in zip(found, engine, strict=True)]
    row = {
        "arm": name,
        "images/s": f"{np.median(found):.1f}",
        "of the engine": f"{np.median(shares):.2f}",
        "CPU ms": f"{1000 * np.median(cost):.2f}",
    }
    p50, p99 = np.percentile(latencies, (50, 99)) * 1000 if latencies else (np.nan, np.nan)
    return {**row, "p50 ms": f"{p50:.0f}" if latencies else "", "p99 ms": f"{p99:.0f}" if latencies else ""}


if __name__ == "__main__":
    main(tyro.cli(Options, config=OPTIONS))
