"""`lpclip review` as a user starts it: the page in a real browser, and what its server refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROOT, draw, refusal, run

from lpclip import files
from lpclip.config import SelftrainJob, to_dict
from lpclip.features.store import Store
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.jobs.corrections import NONE
from lpclip.method.probe import Probe

CLASSES = ("cat", "<b>dog</b>", "horse", *(f"bird {number}" for number in range(9)))
IDS = ("a/0.png", "<img src=x onerror=alert(1)>.png", "2.png", "3.png", "lost.png")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run of five images: the first four have files, the last one a thumbnail in the store alone."""
    folder, out = tmp_path / "photos", tmp_path / "run"
    (folder / "a").mkdir(parents=True)
    for place, name in enumerate(IDS[:4]):
        (folder / name).write_bytes(draw(place % 3, place))
    features = np.eye(len(CLASSES), dtype=np.float16)[: len(IDS)]
    writer = StoreWriter(
        str(out / "features" / "photos"),
        {
            "encoder": {"dim": len(CLASSES)},
            "views": ["weak"],
            "seed": None,
            "source": {"label_names": None},
        },
    )
    writer.begin()
    table = {
        "id": [*IDS],
        "weak": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), len(CLASSES)),
        "thumbnail": pa.array([None] * 4 + [THUMBNAIL], pa.binary()),
    }
    part = Part(unit=0, start=0, stop=len(IDS), last=True)
    writer.write_part(part, rows=pa.table(table), quarantine=[], content_digest=0)
    writer.finish(num_units=1, rate=None, known={})
    weight = torch.eye(len(CLASSES)) * 3
    Probe(weight=weight, bias=torch.zeros(len(CLASSES)), class_names=CLASSES).save(str(out / "probe"))
    config = to_dict(SelftrainJob(data=(str(folder),), out=str(out)))
    summary = {"config": config, "features": {"train": str(out / "features" / "photos"), "eval": None}}
    files.write_json(str(out / "summary.json"), summary)
    suggest(out, *IDS)
    return out


THUMBNAIL = b"\xff\xd8\xff a thumbnail"


def suggest(out: Path, *ids: str, **labels: str) -> None:
    with (out / "suggested.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("id", "label", "guess", "confidence", "why"))
        table.writerows((name, labels.get(name, ""), "cat", "0.5", "near a border") for name in ids)


def answers(out: Path) -> dict[str, str]:
    with (out / "corrections.csv").open(newline="") as file:
        return {row["id"]: row["label"] for row in csv.DictReader(file)}


@contextmanager
def review(out: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The running command and its port."""
    command = [
        sys.executable,
        "-c",
        "from lpclip.jobs.cli import entry; entry()",
        "review",
        "--run",
        str(out),
    ]
    process = subprocess.Popen(
        [*command, "--port", "0", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        # Tests that run in the background hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        addresses = (re.search(r"http://127\.0\.0\.1:(\d+)/", line) for line in process.stdout)
        found = next(filter(None, addresses), None)
        assert found is not None, process.communicate()
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


def ask(port: int, method: str, path: str, *, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body=body, headers=named)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def token_of(port: int) -> str:
    page = ask(port, "GET", "/")[1].decode()
    found = re.search('const token = "(.+?)"', page)
    assert found
    return found[1]


def test_only_the_page_itself_reads_and_writes(out: Path) -> None:
    with review(out) as (process, port):
        token = token_of(port)
        own = {"X_Token": token, "Origin": f"http://127.0.0.1:{port}", "Content_Type": "application/json"}
        answer = json.dumps({"place": 1, "label": "horse"}).encode()
        for status, changed, body in (
            (403, {"Host": "evil.example"}, answer),
            (403, {"Host": f"evil.example:{port}"}, answer),
            (403, {"Origin": "http://evil.example"}, answer),
            (403, {"Origin": "null"}, answer),
            (403, {"X_Token": "other"}, answer),
            (403, {"X_Token": "\xff"}, answer),
            (413, {"Content_Length": "99999999999999"}, b""),
            (413, {"Content_Length": "-1"}, b""),
            (400, {}, b"{"),
            (400, {}, b"[" * 9000),
            (400, {}, b"[1]"),
            (400, {}, json.dumps({"place": 5, "label": "horse"}).encode()),
            (400, {}, json.dumps({"place": True, "label": "horse"}).encode()),
            (400, {}, json.dumps({"place": -1, "label": "horse"}).encode()),
            (400, {}, json.dumps({"place": 1, "label": "unicorn"}).encode()),
            (400, {}, json.dumps({"place": 1, "label": ["horse"]}).encode()),
        ):
            assert ask(port, "POST", "/answer", body=body, **{**own, **changed})[0] == status, (changed, body)
        for path in ("/../etc/passwd", "/image/5", "/image/-1", "/image/a", "/image/0/..", "/probe"):
            assert ask(port, "GET", path)[0] == 404
        assert ask(port, "GET", "/", Host="evil.example")[0] == 403
        assert ask(port, "GET", "/state")[0] == 403
        assert not (out / "corrections.csv").exists()
        assert ask(port, "POST", "/answer", body=answer, **own) == (200, b"{}")
        assert answers(out) == {IDS[1]: "horse"}
        state = json.loads(ask(port, "GET", "/state", X_Token=token)[1])
        assert [question["id"] for question in state["questions"]] == [*IDS]
        assert [question["answer"] for question in state["questions"]] == [None, "horse", None, None, None]
        guesses = state["questions"][2]["guesses"]
        assert (len(guesses), guesses[0][0]) == (9, "horse")
        assert ask(port, "GET", "/image/0")[1].startswith(b"\xff\xd8\xff")
        assert ask(port, "GET", "/image/4") == (200, THUMBNAIL)
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", port))
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"1 of 5 images answered, in {out}/corrections.csv" in printed
    assert f"--labels {out}/corrections.csv --features {out}/features" in printed


def test_rows_of_other_hands_stay_and_those_filled_in_are_taken_over(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = out / "mine.csv"
    file.write_text('label,id,note\nhorse,elsewhere.png,"seen, twice"\ncat,2.png,\n')
    suggest(out, *IDS, **{"2.png": "horse", "3.png": NONE})
    with review(out, "--labels", str(file)) as (process, port):
        own = {"X_Token": token_of(port), "Origin": f"http://localhost:{port}"}
        for label in ("<b>dog</b>", "horse"):
            body = json.dumps({"place": 0, "label": label}).encode()
            assert ask(port, "POST", "/answer", body=body, Host=f"localhost:{port}", **own)[0] == 200
        taken = refusal(f"review.py --run {out} --port {port}", monkeypatch, capsys)
        assert taken.startswith(f"port {port} cannot be listened at")
        process.send_signal(signal.SIGINT)
        assert "3 of 5 images answered" in process.communicate(timeout=120)[0]
    assert file.read_text() == (
        f'label,id,note\nhorse,elsewhere.png,"seen, twice"\ncat,2.png,\n{NONE},3.png,\nhorse,a/0.png,\n'
    )


def test_what_cannot_be_asked_is_one_sentence(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(**flags: object) -> str:
        words = " ".join(f"--{name} {value}" for name, value in {"run": out, **flags}.items())
        return refusal(f"review.py {words}", monkeypatch, capsys)

    assert "holds no finished run of lpclip selftrain" in said(run=tmp_path / "nowhere")
    assert "--port must be between" in said(port=70000)
    suggest(out, "elsewhere.png")
    assert "elsewhere.png is no image of this run" in said()
    suggest(out, IDS[0], **{IDS[0]: "unicorn"})
    assert "unicorn is no class of this run, nor none of these" in said()
    suggest(out)
    assert "names no image" in said()
    (out / "suggested.csv").write_text("name\na\n")
    assert "has no column id: its first line must name id and label" in said()
    suggest(out, *IDS)
    (out / "corrections.csv").write_bytes(b"\xff\xfe\0")
    assert "is not UTF-8 text" in said()
    probe = Probe.load(str(out / "probe"))
    Probe(weight=probe.weight, bias=probe.bias, class_names=(NONE, *CLASSES[1:])).save(str(out / "probe"))
    assert 'a class is called "none of these"' in said()


class Browser:
    """Debian's Chromium, without a window, by the WebDriver protocol."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}/session"
        options = {
            "args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"]
        }
        wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
        self._address += "/" + self._call("POST", "", {"capabilities": wanted})["sessionId"]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self._address + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def wait(self, script: str) -> None:
        """Until the expression is true."""
        stop = time.monotonic() + 300
        while not self.run(f"return Boolean({script})"):
            assert time.monotonic() < stop, (script, self.text())
            time.sleep(0.05)

    def type(self, keys: str) -> None:
        """Press these keys, one after the other, where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def text(self) -> str:
        found: str = self.run("return document.body.innerText")
        return found

    def resize(self, width: int, height: int) -> None:
        self._call(
            "POST", "/goog/cdp/execute",
            {
                "cmd": "Emulation.setDeviceMetricsOverride",
                "params": {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
            },
        )  # fmt: skip

    def end(self) -> None:
        self._call("DELETE", "")


@pytest.fixture
def browser() -> Iterator[Browser]:
    command = ["chromedriver", "--port=0"]
    try:
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        pytest.fail("this test drives Chromium: apt-get install chromium chromium-driver")
    assert driver.stdout is not None
    port = next(
        found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
    )
    try:
        opened = Browser(int(port))
        yield opened
        opened.end()
    finally:
        driver.kill()
        driver.communicate()


TITLE = "document.getElementById('title').textContent"


@pytest.mark.slow
def test_a_person_answers_by_keys_corrects_and_goes_on_later(out: Path, browser: Browser) -> None:
    title = TITLE
    with review(out) as (_, port):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait(f"{title} === 'Image 1 of 5'")
        # The first image's likely labels are the cat, then others; all names are text.
        browser.type("1")
        browser.wait(f"{title} === 'Image 2 of 5'")
        assert answers(out) == {IDS[0]: "cat"}
        browser.wait("document.getElementById('picture').naturalWidth > 0")
        assert IDS[1] in browser.text()
        assert "<b>dog</b>" in browser.text()
        assert browser.run("return document.querySelectorAll('main b').length + document.images.length") == 1
        browser.type("0")
        browser.wait(f"{title} === 'Image 3 of 5'")
        browser.type("u")
        browser.wait(f"{title} === 'Image 2 of 5'")
        assert f"Your answer: {NONE}" in browser.text()
        browser.type("1")
        browser.wait(f"{title} === 'Image 3 of 5'")
        assert answers(out) == {IDS[0]: "cat", IDS[1]: "<b>dog</b>"}
        browser.type("s")
        browser.wait(f"{title} === 'Image 4 of 5'")
        # Another class is chosen by typing its name, also one with the digits and letters of the keys.
        browser.run("document.getElementById('other').focus()")
        browser.type("us 1")
        browser.type("\ue007")
        browser.wait("!document.getElementById('trouble').hidden")
        assert "No class is called us 1." in browser.text()
        browser.run("document.getElementById('other').value = ''")
        browser.type("Bird 8\ue007")
        browser.wait(f"{title} === 'Image 5 of 5'")
        assert answers(out)[IDS[3]] == "bird 8"
        assert "3 of 5 answered" in browser.text()
        for width in (1280, 390):
            browser.resize(width, 800)
            assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth"), width
    # The server has ended: the answer is not taken for written.
    browser.type("1")
    browser.wait("!document.getElementById('trouble').hidden")
    assert "This answer is not written" in browser.text()
    assert len(answers(out)) == 3
    with review(out) as (process, port):
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait(f"{title} === 'Image 3 of 5'")
        browser.type("\ue003")
        browser.wait(f"{title} === 'Image 2 of 5'")
        assert "Your answer: <b>dog</b>" in browser.text()
        browser.type(" ")
        browser.wait(f"{title} === 'Image 3 of 5'")
        browser.type("1")
        browser.wait(f"{title} === 'Image 5 of 5'")
        browser.type(" ")
        browser.wait(f"{title} === 'All images seen'")
        assert "; 1 skipped." in browser.text()
        assert f"--labels {out}/corrections.csv" in browser.text()
        browser.run("document.getElementById('again').click()")
        browser.wait(f"{title} === 'Image 5 of 5'")
        browser.type("1")
        browser.wait(f"{title} === 'All images answered'")
        process.send_signal(signal.SIGINT)
        assert "5 of 5 images answered" in process.communicate(timeout=120)[0]
    assert list(answers(out).items()) == [
        *zip(IDS[:2], CLASSES, strict=False), (IDS[3], "bird 8"), (IDS[2], "horse"), (IDS[4], "bird 1"),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_loop_of_the_readme_raises_the_accuracy_with_a_minute_of_answers(
    cluster: None, tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "--data fashion-mnist --limit 1500 --eval-limit 500 --views weak,mirror"
    first = run(f"selftrain.py {flags} --out {tmp_path}/first", monkeypatch)
    with review(tmp_path / "first") as (process, port):
        names, suggested = first["classes"], tmp_path / "first" / "suggested.csv"
        browser.open(f"http://127.0.0.1:{port}/")
        with suggested.open(newline="") as file:
            asked = [row["id"] for row in csv.DictReader(file)]
        assert len(set(asked)) == 50
        ids, labels = Store.open(first["features"]["train"]).ids_and_labels()
        truth = dict(zip(ids.tolist(), labels.tolist(), strict=True))
        for place, name in enumerate(asked[:30], 1):
            browser.wait(f"{TITLE} === 'Image {place} of 50'")
            browser.run("document.getElementById('other').focus()")
            browser.type(f"{names[truth[name]]}\ue007")
        browser.wait(f"{TITLE} === 'Image 31 of 50'")
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
    assert "30 of 50 images answered" in printed
    # The command is run as it was printed.
    command = re.search(r"next +\S+ (\S*selftrain\S* .*)", printed)
    assert command is not None, printed
    second = run(f"selftrain.py {command[1].split('selftrain', 1)[1].split(' ', 1)[1]}", monkeypatch)
    assert second["labels"]["images"] == 30
    assert second["probe"]["accuracy"] > first["probe"]["accuracy"] + 0.03
