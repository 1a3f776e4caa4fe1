"""Locks of folders, on local disks and in an object store: real processes that hold, die, sleep and lose them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CLASSES, draw, refusal, start, write_tar

from lpclip import files, locks
from lpclip.features.store import Store
from lpclip.features.store_writer import StoreWriter, list_parts

HOLD = """
import os, sys
from lpclip import locks
if "ELSEWHERE" in os.environ:
    locks._machine = lambda: "another"
try:
    with locks.hold(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""
Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that holds a folder until its input ends, and says so."""
    processes = []

    def begin(folder: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that is not there yet, on a local disk and in a bucket."""
    if request.param == "local":
        return str(tmp_path / "folder")
    return f"s3://bucket/{tmp_path.name}{request.getfixturevalue('options')}"


@pytest.fixture
def bucket(tmp_path: Path, options: str) -> str:
    """A folder in a bucket, that is not there yet."""
    return f"s3://bucket/{tmp_path.name}{options}"


def claims(folder: str) -> list[str]:
    """The claims in a folder."""
    return [files.join(folder, ".claims", name) for name in files.list_names(files.join(folder, ".claims"))]


def test_a_folder_is_one_process_s_and_the_others_learn_whose(
    folder: str, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = hold(folder)
    monkeypatch.setenv("LPCLIP_LOCK_SECONDS", "10")
    with pytest.raises(locks.LockedError, match=f"of .* on .*, process {process.pid}, since 20"):
        locks.hold(folder).__enter__()
    told: list[str] = []
    waiting = threading.Thread(target=lambda: wait_for(folder, told))
    waiting.start()
    while len(told) < 2:
        assert waiting.is_alive()
        time.sleep(0.05)
    process.communicate()
    waiting.join()
    assert all(f"process {process.pid}" in text for text in told)
    with locks.hold(folder):
        pass
    assert claims(folder) == []


def wait_for(folder: str, told: list[str]) -> None:
    """Hold a folder for a moment, as soon as that is possible."""
    with locks.hold(folder, wait=told.append, tell_seconds=0):
        pass


def test_the_lock_of_a_killed_process_is_free_at_once(
    folder: str, hold: Hold, capsys: pytest.CaptureFixture[str]
) -> None:
    process = hold(folder)
    process.kill()
    process.wait()
    with locks.hold(folder):
        pass
    if "://" in folder:
        assert f"process {process.pid}, since" in (said := capsys.readouterr().err)
        assert said.endswith("which has ended\n")


def test_a_claim_that_is_not_renewed_is_broken_by_its_age_and_its_holder_ends(
    bucket: str, hold: Hold, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LPCLIP_LOCK_SECONDS", "2")
    process = hold(bucket)
    process.send_signal(signal.SIGSTOP)
    with locks.hold(bucket, wait=lambda who: None):
        said = capsys.readouterr().err
        assert f"process {process.pid}, since" in said
        assert "which had not been renewed for" in said
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert "has lost its lock" in process.stdout.readline()
        assert process.wait() == 0
        assert len(claims(bucket)) == 1


@pytest.mark.slow
def test_a_claim_of_another_machine_is_waited_for_until_it_lives_or_is_broken(
    bucket: str, hold: Hold, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LPCLIP_LOCK_SECONDS", "10")
    process = hold(bucket, ELSEWHERE="1")
    with pytest.raises(locks.LockedError, match=f"process {process.pid}, since"):
        locks.hold(bucket).__enter__()
    process.kill()
    process.wait()
    capsys.readouterr()
    with locks.hold(bucket):
        said = capsys.readouterr().err
    assert f"{bucket}: waiting for a sign of life of" in said
    assert "which had not been renewed for" in said


def test_a_holder_that_slept_keeps_a_claim_that_nobody_broke(bucket: str, hold: Hold) -> None:
    process = hold(bucket, LPCLIP_LOCK_SECONDS="2")
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    time.sleep(1)
    assert process.communicate() == ("", None)


def test_a_holder_whose_claim_was_removed_ends_with_a_sentence(bucket: str, hold: Hold) -> None:
    process = hold(bucket, LPCLIP_LOCK_SECONDS="2")
    files.delete(*claims(bucket))
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"{bucket}: this job has lost its lock")
    assert "the same command goes on" in line
    assert process.wait() == 0


def test_of_those_that_claim_at_the_same_moment_one_at_a_time_has_the_folder(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPCLIP_LOCK_SECONDS", "30")
    inside, most = 0, []

    def work() -> None:
        nonlocal inside
        with locks.hold(bucket, wait=lambda who: None):
            inside += 1
            time.sleep(0.3)
            most.append(inside)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_a_file_system_without_the_kernel_s_locks_has_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks, "_lock_file", refuse)
    folder = str(tmp_path / "folder")
    with locks.hold(folder):
        assert len(claims(folder)) == 1
        with pytest.raises(locks.LockedError, match=f"process {os.getpid()}"):
            locks.hold(folder).__enter__()
    assert claims(folder) == []


def test_a_second_job_on_an_output_folder_in_a_bucket_is_refused(
    photos: Path, bucket: str, hold: Hold, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = hold(bucket)
    for command in (f"encode.py --data {photos}", f"selftrain.py --data {photos} --classes a,b"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        message = refusal(f"{command} --out {bucket}", monkeypatch, capsys)
        assert message.startswith(f"another job is writing to {bucket} (")
        assert f", process {process.pid}, since" in message
        assert message.endswith("wait for it, or choose another --out")


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve tars, each a unit of work."""
    folder = tmp_path_factory.mktemp("locks") / "tars"
    folder.mkdir()
    for number in range(12):
        write_tar(
            folder / f"{number:02d}.tar",
            {f"{i}.png": draw(i % len(CLASSES), 100 * number + i) for i in range(8)},
        )
    return folder


def stores(folder: str) -> list[str]:
    """The stores in a folder, complete or not."""
    return [files.join(folder, name) for name in files.list_folders(folder)]


def written(folder: str) -> tuple[str, dict[str, bytes]]:
    """The one store in a folder: its path, and the bytes of its parts."""
    (path,) = stores(folder)
    return path, {part.name: files.read_bytes(files.join(path, part.name)) for part in list_parts(path)}


@pytest.fixture
def begin() -> Iterator[Hold]:
    """Starts a job, of which nothing is left at the end of the test."""
    processes = []

    def begin(command: str) -> subprocess.Popen[str]:
        processes.append(start(command))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], Any], *processes: subprocess.Popen[str]) -> None:
    """Wait for a condition while these processes run."""
    while not condition():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tars: Path, lite_map: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts that a job alone writes."""
    out = tmp_path_factory.mktemp("alone")
    process = start(f"encode.py --data {tars} --out {out}")
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return written(f"{out}/features")[1]


@pytest.mark.slow
def test_of_two_jobs_that_want_the_same_features_one_encodes_them_and_the_other_waits(
    folder: str, tars: Path, alone: dict[str, bytes], tmp_path: Path, begin: Hold
) -> None:
    command = f"encode.py --data {tars} --features {folder} --out {tmp_path}"
    first = begin(f"{command}/first")
    # Stopped while the features are half made, so that the other meets them so.
    wait_until(lambda: any("identity.json" in files.list_names(path) for path in stores(folder)), first)
    first.send_signal(signal.SIGSTOP)
    second = begin(f"{command}/second")
    told = read_until(second, "waiting for another job, which makes them in")
    assert f"process {first.pid}, since" in told
    first.send_signal(signal.SIGCONT)
    for process in (first, second):
        stdout, stderr = process.communicate()
        told += stdout
        assert process.returncode == 0, stdout + stderr
    assert "found in" in stdout
    path, parts = written(folder)
    assert parts == alone
    summaries = [files.read_json(f"{tmp_path}/{name}/summary.json") for name in ("first", "second")]
    assert [summary["images"] for summary in summaries] == [96, 96]
    assert [summary["rates"]["encode"] is None for summary in summaries] == [False, True]
    assert len(set(Store.open(path).ids())) == 96


@pytest.mark.slow
def test_where_the_job_dies_that_makes_the_features_the_other_goes_on(
    tars: Path, alone: dict[str, bytes], tmp_path: Path, begin: Hold
) -> None:
    features = tmp_path / "features"
    command = f"encode.py --data {tars} --features {features} --out {tmp_path}"
    first = begin(f"{command}/first")
    wait_until(lambda: list(features.glob("*/part-*.parquet")), first)
    first.send_signal(signal.SIGSTOP)
    second = begin(f"{command}/second")
    read_until(second, "waiting for another job, which makes them in")
    before = {path.name: path.stat().st_mtime_ns for path in features.glob("*/part-*.parquet")}
    first.kill()
    first.communicate()
    stdout, stderr = second.communicate()
    assert second.returncode == 0, stdout + stderr
    assert written(str(features))[1] == alone
    after = {path.name: path.stat().st_mtime_ns for path in features.glob("*/part-*.parquet")}
    assert after.items() >= before.items()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What a process says up to the line with this text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines) + process.communicate()[1])


def test_parts_that_another_process_removed_are_missed_in_a_sentence(tmp_path: Path) -> None:
    writer = StoreWriter(str(tmp_path), {"test": 1})
    writer.begin()
    with pytest.raises(ValueError, match="1 unit is missing in .*; the same command encodes what is missing"):
        writer.finish(num_units=1, rate=None)
