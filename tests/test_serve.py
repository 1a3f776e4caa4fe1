"""`lpclip serve` as a user starts it: real Ray Serve, real requests, friendly and hostile ones."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, ROOT, descendants, draw, refusal, start
from PIL import Image

import lpclip
from lpclip.method.probe import zero_shot_probe
from lpclip.serving.batches import IN_WORK
from lpclip.serving.classifier import Answer, Classifier

MAX_BYTES, MAX_PIXELS, MAX_IMAGES, MAX_WAITING, BATCH = 100_000, 1_000_000, 4, 8, 4
BODY_TIMEOUT = 2


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that answers, and the plan that it printed."""

    process: subprocess.Popen[str]
    port: int
    probe: str
    plan: str

    def ask(
        self, body: bytes | None = None, *, path: str = "/classify", kind: str | None = "image/png"
    ) -> tuple[int, Any, dict[str, str]]:
        """The status, the JSON and the headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": kind} if kind and body is not None else {}
        connection.request("GET" if body is None else "POST", path, body=body, headers=headers)
        answer = connection.getresponse()
        found = answer.status, json.load(answer), {k.lower(): v for k, v in answer.getheaders()}
        connection.close()
        return found

    def replica(self) -> int:
        """The process of the replica."""
        titles = descendants(self.process.pid)
        # While one is killed and another starts, there is none.
        return next((pid for pid, title in titles.items() if title.startswith("ray::ServeReplica")), 0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def probe(lite_map: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Zero-shot as a probe: no training is needed."""
    head = lpclip.zero_shot_head(CLASSES)
    found = zero_shot_probe(
        torch.tensor(head.weight),
        temperature=1.0,
        class_names=head.class_names,
        encoder={**head.encoder, "views": "weak"},
    )
    folder = str(tmp_path_factory.mktemp("probe") / "probe")
    found.save(folder)
    return folder


@pytest.fixture(scope="module")
def served(probe: str) -> Iterator[Served]:
    """One server for all tests. The last one ends it."""
    port = free_port()
    process = start(
        f"serve.py --probe {probe} --port {port} --max-bytes {MAX_BYTES} --max-pixels {MAX_PIXELS} --max-images "
        f"{MAX_IMAGES} --max-waiting {MAX_WAITING} --batch-size {BATCH} --body-timeout {BODY_TIMEOUT} --top-k 2"
    )
    assert process.stdout is not None
    assert process.stderr is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready"):
            break
    else:
        pytest.fail(process.stderr.read())
    yield Served(process=process, port=port, probe=probe, plan="".join(lines))
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.communicate()


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    found = [draw(place, seed) for seed in range(4) for place in range(3)]
    buffer = io.BytesIO()
    Image.open(io.BytesIO(found[0])).resize((300, 200)).save(buffer, "JPEG")
    return [*found, buffer.getvalue()]


@pytest.fixture(scope="module")
def expected(probe: str, images: list[bytes]) -> list[Answer]:
    return Classifier.load(probe, pass_size=1)(images, top_k=3)


def is_of(told: dict[str, Any], answer: Answer, *, k: int) -> bool:
    """Whether this was answered for the image, with k labels."""
    assert told.keys() == {"label", "probability", "labels", "probabilities"}
    assert (told["label"], told["probability"]) == (told["labels"][0], told["probabilities"][0])
    return told["labels"] == list(answer.labels[:k]) and told["probabilities"] == pytest.approx(
        answer.probabilities[:k], abs=1e-6
    )


def test_the_plan_names_probe_encoder_classes_and_address(served: Served) -> None:
    for text in (served.probe, "lite, 160 px", *CLASSES, f"http://127.0.0.1:{served.port}"):
        assert text in served.plan
    assert "warning" not in served.plan


def test_answers_are_those_of_the_classifier_whatever_they_were_batched_with(
    served: Served, images: list[bytes], expected: list[Answer]
) -> None:
    assert len({answer.labels[0] for answer in expected}) > 1
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(served.ask, images * 3))
    for (status, told, _), answer in zip(found, expected * 3, strict=True):
        assert status == 200
        assert is_of(told, answer, k=2)
    status, told, _ = served.ask(images[0], path="/classify?top_k=1", kind=None)
    assert status == 200
    assert is_of(told, expected[0], k=1)


def test_the_page_says_how_to_ask(
    served: Served, images: list[bytes], expected: list[Answer], tmp_path: Path
) -> None:
    (command,) = re.findall("^curl .*classify$", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE)
    (tmp_path / "photo.jpg").write_bytes(images[-1])
    words = shlex.split(command.replace(":8000", f":{served.port}"))
    done = subprocess.run([*words, "--silent"], cwd=tmp_path, capture_output=True, check=True)
    assert is_of(json.loads(done.stdout), expected[-1], k=2)


def in_json(*images: Any, **others: Any) -> bytes:
    texts = [base64.b64encode(image).decode() if isinstance(image, bytes) else image for image in images]
    return json.dumps({"images": texts, **others}).encode()


def test_json_has_an_answer_or_an_error_for_each_image(
    served: Served, images: list[bytes], expected: list[Answer], tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(images[1])
    body = in_json(images[0], b"no image", str(secret), images[1], top_k=3)
    status, told, _ = served.ask(body, kind="application/json; charset=utf-8")
    assert status == 200
    assert is_of(told[0], expected[0], k=3)
    assert is_of(told[3], expected[1], k=3)
    assert told[1] == {"error": "not an image that can be decoded"}
    assert "paths and URIs are not followed" in told[2]["error"]
    status, told, _ = served.ask(in_json(f"file://{secret}"), kind="application/json")
    assert (status, told[0].keys()) == (200, {"error"})


def png(width: int, height: int) -> bytes:
    """A PNG that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


PHOTO = draw(0, 0)


@pytest.mark.parametrize(
    ("body", "kind", "status", "sentence"),
    [
        (PHOTO[:300], "image/png", 422, "truncated"),
        (b"\xff\xd8\xff" + bytes(100), "image/jpeg", 422, "not an image"),
        (b"<html>", "application/octet-stream", 422, "a web page"),
        (png(50_000, 50_000), "image/png", 422, "more than 1000000 pixels"),
        (PHOTO, "text/plain", 415, "text/plain"),
        (PHOTO, "application/x-www-form-urlencoded", 415, "Content-Type image/jpeg"),
        (bytes(MAX_BYTES + 1), "image/png", 413, "100,000 bytes"),
        (b"", "image/png", 400, "the body is empty"),
        (b"{\n  x", "application/json", 400, "the body is not JSON: see line 2, column 3"),
        (b'["\xff"]', "application/json", 400, "the body is not JSON: its text is not UTF-8 at byte 3"),
        (b"[" * 50_000, "application/json", 400, "the JSON is nested too deeply"),
        (b"9" * 5_000, "application/json", 400, "the JSON has a number with too many digits"),
        (b"[]", "application/json", 400, "must be"),
        (b'{"images": "a.png"}', "application/json", 400, "must be"),
        (in_json(), "application/json", 400, "at least one"),
        (in_json(*[PHOTO] * 5), "application/json", 400, "at most 4"),
        (in_json(PHOTO, top_k=0), "application/json", 400, "top_k"),
        (in_json(PHOTO, top_k=True), "application/json", 400, "top_k"),
        (in_json(PHOTO, top_k=10**30), "application/json", 400, "top_k must be a whole number from 1 to"),
        (in_json(PHOTO, paths=["a.png"]), "application/json", 400, "'paths'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    served: Served, body: bytes, kind: str, status: int, sentence: str
) -> None:
    found, told, _ = served.ask(body, kind=kind)
    assert (found, told.keys()) == (status, {"error"})
    assert sentence in told["error"]
    assert "\n" not in told["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/classify", None, 405, "takes POST alone"),
        ("/", b"x", 405, "takes GET and HEAD alone"),
        ("/docs", None, 404, "nothing at this path"),
        ("/-/nope", None, 404, "nothing at this path"),
        ("/classify?top_k=x", PHOTO, 400, "top_k must be a whole number from 1 to 999,999,999"),
        ("/classify?top_k=-1", PHOTO, 400, "top_k must be"),
        ("/classify?top_k=", PHOTO, 400, "top_k must be"),
        ("/classify?top_k=" + "9" * 5_000, PHOTO, 400, "top_k must be"),
        ("/classify?path=/etc/passwd", PHOTO, 400, "the only query that is known"),
        ("/classify?top_k=1&top_k=2", PHOTO, 400, "the only query that is known"),
    ],
)
def test_other_paths_methods_and_queries_are_refused(
    served: Served, path: str, body: bytes | None, status: int, sentence: str
) -> None:
    found, told, headers = served.ask(body, path=path)
    assert (found, told.keys()) == (status, {"error"})
    assert sentence in told["error"]
    allowed = {"/classify": "POST", "/": "GET, HEAD"}[path] if status == 405 else None
    assert headers.get("allow") == allowed


def test_a_query_beside_json_is_refused_and_not_ignored(served: Served) -> None:
    status, told, _ = served.ask(in_json(PHOTO), path="/classify?top_k=1", kind="application/json")
    assert (status, "send it without a query" in told["error"]) == (400, True)


def test_ray_serve_answers_its_own_paths(served: Served) -> None:
    for path, text in (("/-/healthz", b"success"), ("/-/routes", b'{"/":"lpclip"}')):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, text)
        connection.close()


def test_a_websocket_is_refused(served: Served) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
    connection.request(
        "GET", "/", headers={**headers, "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode()}
    )
    assert connection.getresponse().status == 403
    connection.close()


def received(connection: socket.socket) -> tuple[int, str]:
    """The status and the body of an answer, after which the server closes the connection."""
    data = b""
    while piece := connection.recv(65_536):
        data += piece
    head, _, body = data.decode().partition("\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_body_that_comes_too_slowly_is_refused_and_holds_nobody_up(
    served: Served, images: list[bytes]
) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9000\r\n\r\nabc"
    slow = [socket.create_connection(("127.0.0.1", served.port), timeout=120) for _ in range(40)]
    for connection in slow:
        connection.sendall(head)
    assert served.ask(images[0])[0] == 200
    for connection in slow:
        status, sentence = received(connection)
        assert (status, sentence) == (408, "the body was not complete after 2 seconds")
        connection.close()


def test_a_body_without_an_end_is_refused_at_the_limit(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=120) as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        piece, sent = b"4000\r\n" + bytes(0x4000) + b"\r\n", 0
        connection.settimeout(1)
        # It says no at once; what comes after that is dropped, for a while.
        while sent < 10 * MAX_BYTES:
            connection.sendall(piece)
            sent += 0x4000
        connection.settimeout(120)
        status, sentence = received(connection)
    assert (status, "100,000 bytes" in sentence) == (413, True)


def test_facts_health_and_description(served: Served) -> None:
    status, told, _ = served.ask(path="/")
    assert status == 200
    assert (told["encoder"], told["classes"]) == ("lite", list(CLASSES))
    assert told["probe"] == json.loads(Path(served.probe, "probe.json").read_text())["digest"]
    limits = (told["max_bytes"], told["max_pixels"], told["max_images"], told["max_waiting"])
    assert limits == (MAX_BYTES, MAX_PIXELS, MAX_IMAGES, MAX_WAITING)
    assert served.ask(path="/health")[:2] == (200, {"status": "ok"})
    status, told, _ = served.ask(path="/openapi.json")
    assert status == 200
    assert "://" not in json.dumps(told)
    for path, methods in told["paths"].items():
        (method,) = methods
        assert served.ask(None if method == "get" else PHOTO, path=path)[0] == 200


def test_when_too_much_waits_requests_are_told_to_come_again(served: Served, images: list[bytes]) -> None:
    replica = served.replica()
    os.kill(replica, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(40) as threads:
            found = [threads.submit(served.ask, images[0]) for _ in range(40)]
            # Batches are with the replica, and MAX_WAITING images wait.
            while sum(one.done() for one in found) < 40 - MAX_WAITING - IN_WORK * BATCH:
                time.sleep(0.05)
            os.kill(replica, signal.SIGCONT)
            answers = [one.result() for one in found]
    finally:
        os.kill(replica, signal.SIGCONT)
    assert {status for status, _, _ in answers} == {200, 503}
    for status, told, headers in answers:
        if status == 503:
            assert "ask again later" in told["error"]
            assert int(headers["retry-after"]) > 0
    assert sum(status == 200 for status, _, _ in answers) >= MAX_WAITING


def test_a_killed_replica_costs_no_more_than_the_requests_that_it_had(served: Served) -> None:
    statuses: list[int] = []
    ends = threading.Event()
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(buffer, "PNG")  # takes a while to decode
    large = buffer.getvalue()

    def client() -> None:
        while not ends.is_set():
            status, told, headers = served.ask(large)
            assert status == 200 or "ask again" in told["error"]
            assert status == 200 or int(headers["retry-after"]) > 0
            statuses.append(status)

    with ThreadPoolExecutor(6) as threads:
        clients = [threads.submit(client) for _ in range(6)]

        def until(found: Callable[..., bool]) -> None:
            while not found() and not any(one.done() for one in clients):
                time.sleep(0.05)

        until(lambda: len(statuses) >= 30)
        kills = 0
        # Ray Serve itself sends a request again that the replica had not taken yet.
        while 503 not in statuses and kills < 5:
            killed, kills = served.replica(), kills + 1
            os.kill(killed, signal.SIGKILL)
            until(lambda before=killed: served.replica() not in (before, 0))
            before = len(statuses)
            until(lambda least=before + 30: len(statuses) >= least)
        ends.set()
        for one in clients:
            one.result()
    assert set(statuses) == {200, 503}
    assert statuses.count(503) <= IN_WORK * BATCH * kills
    assert statuses[-20:] == [200] * 20


def test_a_second_server_needs_another_port(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"serve.py --probe {served.probe} --port {served.port}"
    assert "choose another one with --port" in refusal(command, monkeypatch, capsys)


def test_ctrl_c_ends_everything(served: Served) -> None:
    below = descendants(served.process.pid)
    served.process.send_signal(signal.SIGINT)
    _, stderr = served.process.communicate(timeout=120)
    assert (served.process.returncode, stderr) == (130, "")
    assert any(title.startswith("ray::ServeReplica") for title in below.values())
    deadline = time.monotonic() + 60
    while [pid for pid in below if Path(f"/proc/{pid}").exists()] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_ctrl_c_before_it_answers_promises_no_kept_work(probe: str) -> None:
    process = start(f"serve.py --probe {probe} --port {free_port()}")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Ray Serve starts"):
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout, stderr) == (130, "\nended\n", "")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--probe nowhere", "nowhere holds no probe"),
        ("--probe PROBE --host 192.0.2.1", "cannot be listened at on 192.0.2.1"),
        ("--probe PROBE --port 0", "--port must be between"),
        ("--probe PROBE --max-waiting 3", "no room"),
        ("--probe PROBE --pretrained nowhere.pt", "lite encoder carries its own weights"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    flags: str,
    sentence: str,
    probe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A command takes the last of two ports.
    command = f"serve.py --port {free_port()} {flags.replace('PROBE', probe)}"
    assert sentence in refusal(command, monkeypatch, capsys)


def test_without_ray_serve_a_sentence_says_what_to_install(probe: str, tmp_path: Path) -> None:
    # Ray itself is there without it.
    (tmp_path / "starlette.py").write_text("raise ImportError('No module named starlette')")
    command = [sys.executable, "jobs/serve.py", "--probe", probe]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: lpclip serve needs Ray Serve, pip install 'ray[serve]'")
    assert len(done.stderr.splitlines()) == 1


def test_a_pass_of_one_image_gives_the_features_of_a_pass_of_eight(probe: str, images: list[bytes]) -> None:
    alone, together = (
        Classifier.load(probe, pass_size=size, num_threads=1)(images, top_k=3) for size in (1, 8)
    )
    for one, other in zip(alone, together, strict=True):
        assert one.labels == other.labels
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.01)
