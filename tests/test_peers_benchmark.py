"""benchmarks/peers.py: its own arithmetic, and what it says of mistakes; the comparison itself takes an hour."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import peer_arms
import peers
import pytest
from conftest import ROOT
from peers import Options, Run

from lpclip.config import UserError

pytestmark = pytest.mark.slow


def run(arm: str, turn: int, seconds: float, *, images: int = 100, equal: float | None = None) -> Run:
    numbers = {"processor": 2 * seconds, "others": 1.0, "peak_mb": 1000.0}
    return Run(arm=arm, images=images, turn=turn, seconds=seconds, equal=equal, classes=2, **numbers)


def test_ratios_are_of_one_turn_and_the_least_agreement_is_told() -> None:
    turns = [(1, 10.0, 20.0, 0.99), (2, 30.0, 20.0, 0.98), (3, 40.0, 20.0, 1.0)]
    runs = [run("lpclip auto", t, ours, equal=share) for t, ours, _, share in turns]
    runs += [run("plain loop", t, theirs) for t, _, theirs, _ in turns]
    ours, theirs = peers.size_rows(runs)
    assert ours["to loop"] == pytest.approx(1.5)
    assert ours["to CLIP_benchmark"] is None
    assert (ours["seconds"], ours["images/s"], ours["equal %"]) == ("30.0", "3.3", 0.98)
    assert theirs["equal %"] is None


def test_the_line_has_the_start_and_the_time_of_an_image() -> None:
    (row,) = peers.line_rows([run("plain loop", 1, 7 + 0.015 * n, images=n) for n in (250, 1000, 4000)])
    assert (row["start s"], row["ms an image"]) == ("7.0", "15.0")
    assert (row["processor start s"], row["processor ms an image"]) == ("14.0", "30.0")


def test_a_run_is_measured_whole_and_a_failing_one_is_told_in_a_sentence(tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    # Half a second of one core in a process below the one that is started, and memory that is seen once a second.
    busy = "import time\nheld = b'x' * (50 << 20)\nwhile time.process_time() < 0.5: pass\ntime.sleep(2.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    found = peers.measure(([sys.executable, "-c", code], {}), folder, arm="busy")
    assert found["seconds"] >= 0.5
    assert found["processor"] >= 0.5
    assert found["peak_mb"] > 50
    with pytest.raises(UserError, match="broken ended with exit code 3 .the reason.; all that it printed"):
        peers.measure(
            ([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], {}), folder, arm="broken"
        )


def test_a_peer_that_pip_cannot_install_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peer_arms.PINS, "CLIP_benchmark", ("--no-index no-such-package==1",))
    with pytest.raises(UserError, match=r"CLIP_benchmark could not be installed \(ERROR: .*no-such-package"):
        peer_arms.install("CLIP_benchmark", tmp_path)
    assert not (tmp_path / "CLIP_benchmark" / "pins.txt").exists()


def test_images_are_taken_again_until_there_are_enough_and_a_tar_has_their_labels(tmp_path: Path) -> None:
    (given := tmp_path / "given").mkdir()
    for name in "ab":
        (given / f"{name}.jpg").write_bytes(name.encode())
    options = Options(images=str(given), folder=str(tmp_path / "made"))
    photos = peers.make_photos(options, 3)
    assert [path.read_bytes() for path in sorted(photos.iterdir())] == [b"a", b"b", b"a"]
    work = peers.Work(
        encoder="",
        checkpoint="",
        classes="",
        batch_size=1,
        photos=photos,
        cache=tmp_path,
        environments=tmp_path,
        out=tmp_path,
        labels={"000001.jpg": 5},
    )
    peer_arms.write_tar(work, tmp_path / "test" / "0.tar")
    with tarfile.open(tmp_path / "test" / "0.tar") as tar:
        found = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    assert found["000001.jpg"] == b"b"
    assert [found[f"00000{i}.cls"] for i in range(3)] == [b"0", b"5", b"0"]
    with pytest.raises(UserError, match="has no .jpg or .jpeg files"):
        peers.make_photos(Options(images=str(tmp_path / "test"), folder=str(tmp_path)), 1)


def test_an_unknown_arm_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--arms", "open_clip"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: --arms knows no open_clip: the arms are {', '.join(peer_arms.ARMS)}\n"
