"""Seconds and requests until a feature store on S3 is read, on a stand-in that takes 25 ms to answer.

    python benchmarks/object_store.py                  # 5,000 parts of 256 images, as ImageNet's training images have
    python benchmarks/object_store.py --parts 500 --delay 0.1

The stand-in keeps its objects in memory, in a process of its own, and answers any number of requests at a time, each
after the delay. Features are random and short: what is measured are requests that wait for each other, not bandwidth.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pyarrow as pa

from lpclip.features.store import Store
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.report.tables import format_table

PAGE = 1000
"""Names in one answer to a listing, as S3 has them."""


@dataclass
class StandIn:
    """As much of S3 as pyarrow needs to write, list and read objects below 10 MB."""

    delay: float
    objects: dict[str, bytes] = field(default_factory=dict)
    num_requests: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, target, _ = head[0].split(" ")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                if headers.get("expect") == "100-continue":
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                if headers.get("transfer-encoding") == "chunked":
                    body = await _read_chunks(reader)
                else:
                    body = await reader.readexactly(int(headers.get("content-length", 0)))
                if "aws-chunked" in headers.get("content-encoding", ""):
                    body = _unchunk(body)
                if target != "/requests":
                    self.num_requests += 1
                    await asyncio.sleep(self.delay)
                status, more, data = self.answer(method, target, headers, body)
                size = more.pop("content-length", len(data))
                lines = [f"HTTP/1.1 {status} -", *(f"{k}: {v}" for k, v in more.items())]
                writer.write("\r\n".join([*lines, f"content-length: {size}", "", ""]).encode() + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, Any], bytes]:
        """Status, headers and body of one answer."""
        path, _, query = target.partition("?")
        key = urllib.parse.unquote(path).lstrip("/")
        options = dict(urllib.parse.parse_qsl(query))
        if key == "requests":
            return 200, {}, str(self.num_requests).encode()
        if method == "PUT":
            self.objects[key] = body
            return 200, {"etag": '"0"'}, b""
        if method == "DELETE":
            self.objects.pop(key, None)
            return 204, {}, b""
        if "list-type" in options:
            return 200, {}, self._listing(key.rstrip("/"), options).encode()
        if "/" not in key:
            return 200, {}, b""
        if key not in self.objects:
            return 404, {}, b"" if method == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>"
        data = self.objects[key]
        about = {"etag": '"0"', "last-modified": "Fri, 27 Nov 2026 00:00:00 GMT", "accept-ranges": "bytes"}
        if method == "HEAD":
            return 200, {**about, "content-length": len(data)}, b""
        if "range" not in headers:
            return 200, about, data
        first, last = headers["range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1]
        return 206, {**about, "content-range": f"bytes {first}-{last}/{len(data)}"}, part

    def _listing(self, bucket: str, options: dict[str, str]) -> str:
        prefix, after = options.get("prefix", ""), options.get("continuation-token", "")
        count = min(PAGE, int(options.get("max-keys", PAGE)))
        start = f"{bucket}/{prefix}"
        names = sorted(n[len(bucket) + 1 :] for n in self.objects if n.startswith(start))
        names = [n for n in names if n > after]
        page = [n for n in names[:count] if "/" not in n[len(prefix) :] or "delimiter" not in options]
        more = len(names) > count
        found = "".join(
            f"<Contents><Key>{escape(n)}</Key><Size>{len(self.objects[f'{bucket}/{n}'])}</Size>"
            "<LastModified>2026-11-27T00:00:00.000Z</LastModified></Contents>"
            for n in page
        )
        token = f"<NextContinuationToken>{escape(names[count - 1])}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(page)}</KeyCount>"
            f"{token}{found}</ListBucketResult>"
        )


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """A body in HTTP's chunks."""
    data = b""
    while size := int(await reader.readline(), 16):
        data += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return data


def _unchunk(body: bytes) -> bytes:
    """The data of a body in AWS's own chunks: a length in hexadecimal, the bytes, and so on until a length of 0."""
    data, place = b"", 0
    while True:
        end = body.index(b"\r\n", place)
        size = int(body[place:end].split(b";")[0], 16)
        if size == 0:
            return data
        data += body[end + 2 : end + 2 + size]
        place = end + 2 + size + 2


async def stand_in(delay: float) -> None:
    """Serve until the process is ended. Prints the port."""
    server = await asyncio.start_server(StandIn(delay).serve, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def part_rows(unit: int, *, num_rows: int, dim: int) -> pa.Table:
    """Random rows of one part."""
    rows = np.random.default_rng(unit).normal(size=(num_rows, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return pa.table(
        {
            "id": [f"n{unit:05d}/image-{unit}-{row}.JPEG" for row in range(num_rows)],
            "label": pa.array(np.full(num_rows, unit % 1000, np.int32)),
            "weak": pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(np.float16).reshape(-1)), dim),
        }
    )


def measure(endpoint: str, *, num_parts: int, num_rows: int, dim: int) -> list[dict[str, Any]]:
    """A row for each step between the first part and features in memory."""
    path = f"s3://bucket/store?endpoint_override={endpoint}&scheme=http"
    identity: dict[str, Any] = {"encoder": {"dim": dim}, "views": ["weak"], "seed": None, "source": {}}
    writer = StoreWriter(path, identity)
    writer.begin()
    rows: list[dict[str, Any]] = []

    def requests() -> int:
        with urllib.request.urlopen(f"http://{endpoint}/requests") as response:
            return int(response.read())

    def step(name: str, work: Callable[[], Any]) -> Any:
        before, begin = requests(), time.monotonic()
        found = work()
        seconds = time.monotonic() - begin
        rows.append({"step": name, "seconds": round(seconds, 1), "requests": requests() - before})
        print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        return found

    def write(unit: int) -> tuple[str, Any]:
        part = Part(unit=unit, start=0, stop=num_rows, last=True)
        table = part_rows(unit, num_rows=num_rows, dim=dim)
        return part.name, writer.write_part(part, rows=table, quarantine=[], content_digest=unit)

    with ThreadPoolExecutor(16) as threads:
        known = step("write the parts", lambda: dict(threads.map(write, range(num_parts))))
    step("finish, parts known", lambda: writer.finish(num_units=num_parts, rate=None, known=known))
    step("finish, parts of an earlier run", lambda: writer.finish(num_units=num_parts, rate=None))
    store = step("open", lambda: Store.open(path))
    features = step("ids, labels and features", store.features)
    ids, _ = step("ids and labels, without features", Store.open(path).ids_and_labels)
    assert len(ids) == len(features.base) == num_parts * num_rows
    return rows


def main() -> None:
    """Serve, or measure against a server that is started for it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=256, help="images in a part")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.025, help="seconds before each answer")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(stand_in(args.delay))
    command = [sys.executable, __file__, "--serve", "--delay", str(args.delay)]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        endpoint = f"127.0.0.1:{server.stdout.readline().strip()}"
        rows = measure(endpoint, num_parts=args.parts, num_rows=args.rows, dim=args.dim)
    finally:
        server.kill()
        server.wait()
    print(format_table(rows))
    print(f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB of memory")


if __name__ == "__main__":
    main()
