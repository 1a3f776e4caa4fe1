"""Probes and data on the Hugging Face hub, which a server on this machine stands in for."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, ROOT, draw, write_tar
from huggingface_hub import constants

from lpclip.config import EncoderConfig, UserError, to_dict
from lpclip.encoders.hub import local_probe
from lpclip.encoders.zero_shot import load_noting
from lpclip.method.probe import Probe
from lpclip.serving.classifier import Classifier

TOKEN = "hf_NoTokenOfAnyone0123456789"
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """Files by repository, such as `datasets/owner/name`, and path in it; and what was asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""


def entry(path: str, data: bytes | None) -> dict[str, object]:
    """What the hub tells of a file, or of a folder."""
    if data is None:
        return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}


def listed(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    """Files and folders below a folder."""
    start = f"{folder}/" if folder else ""
    found: dict[str, bytes | None] = {}
    for path, data in files.items():
        if not path.startswith(start):
            continue
        parts = path.removeprefix(start).split("/")
        for depth in range(1, len(parts)):
            found[start + "/".join(parts[:depth])] = None
        found[path] = data
    return [entry(p, d) for p, d in found.items() if recursive or "/" not in p.removeprefix(start)]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if path == "/":
            self.answer(b"")
            return
        api = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(.*))?", path)
        name = api[1].removeprefix("models/") if api else ""
        found = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        name = found[1] if found else name
        files = self.hub.repositories.get(name)
        if files is None:
            self.refuse("RepoNotFound")
        elif found:
            self.send_file(files.get(found[2]))
        else:
            assert api is not None
            self.tell(name, api[2] or "", files, query, body)

    def tell(self, name: str, what: str, files: dict[str, bytes], query: str, body: str) -> None:
        kind, _, rest = what.partition("/")
        if kind in ("", "revision"):
            self.answer(
                json.dumps({"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": []}).encode()
            )
        elif kind == "tree":
            folder = rest.partition("/")[2]
            recursive = "recursive=true" in query.lower()
            there = listed(files, folder, recursive=recursive)
            if there:
                self.answer(json.dumps(there).encode())
            else:
                self.refuse("EntryNotFound")
        elif kind == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            everything = {str(one["path"]): one for one in listed(files, "", recursive=True)}
            self.answer(json.dumps([everything[p] for p in paths if p in everything]).encode())
        else:
            raise AssertionError(self.path)

    def send_file(self, data: bytes | None) -> None:
        if data is None:
            self.refuse("EntryNotFound")
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part:
            start, stop = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            self.answer(data[start : stop + 1], status=206, **headers)
        else:
            self.answer(data, **headers)

    def refuse(self, code: str) -> None:
        self.answer(b"", status=404, **{"X-Error-Code": code, "X-Error-Message": "not here"})

    def answer(self, data: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: tests look at what was asked."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on this machine."""
    hub = Hub()
    handler = type("OwnHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """That of a process which takes the stand-in for the hub, and has a cache of its own and a token."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": TOKEN}


def told(hub: Hub, folder: Path, code: str) -> list[str]:
    """The lines that Python prints in a process that takes the stand-in for the hub."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(hub, folder),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_probe_on_the_hub_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    known = {
        "config": {"encoder": "ViT-B-32", "pretrained": "openai"},
        "identity": {"name": "ViT-B-32", "pretrained": "openai", "weights": "0" * 32, "precision": "float32"},
        "views": "weak",
    }
    probe = Probe(weight=torch.eye(3), bias=torch.zeros(3), class_names=CLASSES, encoder=known)
    probe.save(str(tmp_path / "made"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    files |= {"README.md": b"card", "large.bin": b"0"}
    hub.repositories = {"owner/pets": files, "owner/none": {"README.md": b"card"}}
    *_, first, again, no_probe, absent, unnamed, above = told(
        hub,
        tmp_path,
        f"""
from lpclip.config import ExportJob, UserError
from lpclip.encoders.hub import local_probe
from lpclip.jobs.evaluate_probes import load_probes
from lpclip.jobs.export import export_job
assert load_probes(("mine=hf-hub:owner/pets",)).by_name["mine"].class_names == {CLASSES}
export_job(ExportJob(probe="hf-hub:owner/pets", out={str(tmp_path / "again")!r}))
for name in ("owner/pets", "owner/pets", "owner/none", "owner/absent", "owner", "owner/../name"):
    try:
        print(local_probe("hf-hub:" + name))
    except UserError as error:
        print(error)
""",
    )
    assert first == again
    assert (tmp_path / "again" / "probe.json").read_bytes() == files["probe.json"]
    assert {path.name: path.read_bytes() for path in Path(first).iterdir()} == {
        name: files[name] for name in ("probe.json", "probe.safetensors")
    }
    assert [line for line in hub.asked if line.startswith("GET /owner/pets")] == [
        "GET /owner/pets/resolve/main/probe.json",
        "GET /owner/pets/resolve/main/probe.safetensors",
    ]
    assert "holds no probe" in no_probe
    assert "no such repository" in absent
    assert "is hf-hub:OWNER/NAME" in unnamed
    assert "is hf-hub:OWNER/NAME" in above


def test_a_hub_that_is_away_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached.*or give --probe FOLDER"):
        local_probe("hf-hub:owner/pets")


def test_data_on_a_hub_that_is_away_is_waited_for_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPCLIP_PATIENCE", "0.5")
    (line,) = told(
        Hub(url="http://127.0.0.1:9"),
        tmp_path,
        """
from lpclip import files
from lpclip.config import StoreAwayError
try:
    files.exists("hf://datasets/owner/photos/train")
except StoreAwayError as error:
    print(error)
""",
    )
    assert "hf://datasets/owner/photos/train: the store is busy or away" in line


READ = """
from lpclip import files
from lpclip.config import SourceConfig, UserError
from lpclip.features.data import open_data
paths = ("photos/train", "photos@main/train", "table/data/*.parquet", "table/list.csv", "table/1.tar")
for path in (*paths, "photos/absent", "../photos"):
    try:
        source = open_data((f"hf://datasets/owner/{path}",), config=SourceConfig(), split="test", limit=None).source
    except UserError as error:
        print(error)
        continue
    rows = [row for unit in source.units for row in source.reader.rows(unit)]
    names = source.label_names or range(9)
    print([(row.id, names[row.label], len(row.image or b"")) for row in rows])
print(files.size_and_time("hf://datasets/owner/photos/train/cat/0.jpg"))
for write in (files.make_folder, lambda path: files.write_bytes(path, b"")):
    try:
        write("hf://datasets/owner/photos/out")
    except UserError as error:
        print(error)
"""


def test_data_on_the_hub_is_read_as_files_are(hub: Hub, tmp_path: Path) -> None:
    images = [draw(0, 0), draw(1, 0), draw(2, 0)]
    table = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": ["x", "y", "x"]}), table)
    photos = {f"train/{name}/{i}.jpg": images[i] for name in ("cat", "dog") for i in range(2)}
    write_tar(tmp_path / "1.tar", {"a.jpg": images[0], "a.cls": b"1"})
    manifest = b"path,label\nimages/1.jpg,cat\n"
    hub.repositories = {
        "datasets/owner/photos": photos,
        "datasets/owner/table": {
            "data/train-0.parquet": table.getvalue(),
            "list.csv": manifest,
            "1.tar": (tmp_path / "1.tar").read_bytes(),
            "images/1.jpg": images[2],
        },
    }
    folder, pinned, parquet, listed, tar, absent, wrong, first, *refused = told(hub, tmp_path, READ)
    rows = [(f"{name}/{i}.jpg", name, len(images[i])) for name in ("cat", "dog") for i in range(2)]
    assert folder == pinned == str(rows)
    assert parquet == str([(f"train-0.parquet:{i}", "xyx"[i], len(image)) for i, image in enumerate(images)])
    assert listed == str([("images/1.jpg", "cat", len(images[2]))])
    assert tar == str([("1.tar/a", 1, len(images[0]))])
    assert "no such path" in absent
    assert "is hf://datasets/OWNER/NAME/PATH" in wrong
    assert all("nothing is written to the hub" in line for line in refused)
    assert len(refused) == 2
    assert not [line for line in hub.asked if line.startswith("POST") and "paths-info" not in line]
    # The hub tells no time of change: another content of the same size is noticed all the same.
    photos["train/cat/0.jpg"] = images[0][:-1] + b"\0"
    *_, second, _, _ = told(hub, tmp_path, READ)
    assert second != first
    assert second.partition(",")[0] == first.partition(",")[0]


@pytest.mark.slow
def test_images_on_the_hub_are_labelled_with_a_probe_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    encoder, info = load_noting(EncoderConfig(precision="float32"), device="cpu")
    pixels = {f"{i}.jpg": draw(i, i) for i in range(3)}
    known = {
        "config": to_dict(EncoderConfig(precision="float32")),
        "identity": info.identity,
        "views": "weak",
    }
    torch.manual_seed(0)
    weight = 5 * torch.randn(len(CLASSES), encoder.dim)
    Probe(weight=weight, bias=torch.zeros(len(CLASSES)), class_names=CLASSES, encoder=known).save(
        str(tmp_path / "made")
    )
    names = ("probe.json", "probe.safetensors")
    hub.repositories["owner/pets"] = {name: (tmp_path / "made" / name).read_bytes() for name in names}
    hub.repositories["datasets/owner/photos"] = pixels
    flags = "--probe hf-hub:owner/pets --data hf://datasets/owner/photos --out labels.parquet --engine torch"
    done = subprocess.run(
        [sys.executable, ROOT / "jobs/predict.py", *flags.split()],
        env={**environment(hub, tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    answers = Classifier.load(str(tmp_path / "made"), engine="torch", num_threads=1)(list(pixels.values()))
    labels = pq.read_table(tmp_path / "labels.parquet").to_pylist()
    assert [(row["id"], row["label"]) for row in labels] == [
        (name, answer.labels[0]) for name, answer in zip(pixels, answers, strict=True)
    ]
    np.testing.assert_allclose(
        [row["probability"] for row in labels], [answer.probabilities[0] for answer in answers], atol=1e-4
    )
