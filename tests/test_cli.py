"""Flags become a configuration, and errors one line and an exit code, in real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
from conftest import ROOT, descendants, start
from PIL import Image

from lpclip.config import EncodeJob, EvaluateJob, PredictJob, SelftrainJob, UserError, to_dict
from lpclip.jobs.cli import entry, main, users_mistake


def parse(flags: str, config_type: type, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(sys, "argv", ["job.py", *flags.split()])
    main(lambda config: seen.append(to_dict(config)), config_type)
    return seen[0]


@pytest.mark.parametrize("config_type", [EncodeJob, SelftrainJob])
def test_no_flags_is_the_default_configuration(config_type: type, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("", config_type, monkeypatch) == to_dict(config_type())


def test_fields_of_every_stage_are_plain_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--encoder ViT-B-32 --views weak,strong --limit 60 --supervised --max_bad_fraction 0.1 --rounds 3"
    config = parse(flags, SelftrainJob, monkeypatch)
    changed = {key: value for key, value in config.items() if value != to_dict(SelftrainJob())[key]}
    assert changed == {
        "encoder": "ViT-B-32",
        "views": "weak,strong",
        "limit": 60,
        "supervised": True,
        "max_bad_fraction": 0.1,
        "rounds": 3,
    }


def test_flags_of_many_values_take_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (
        "--probe a b=c --data d --ood x=1 y=2 --corruptions fog,snow --severities 1,5 --max-bad-fraction 0.1"
    )
    config = parse(flags, EvaluateJob, monkeypatch)
    assert config == to_dict(EvaluateJob(probe=("a", "b=c"), data=("d",))) | {
        "ood": ("x=1", "y=2"),
        "corruptions": "fog,snow",
        "severities": "1,5",
        "max_bad_fraction": 0.1,
    }


@pytest.mark.parametrize(
    ("flags", "word"), [("--bogus 3", "--bogus"), ("--rounds many", "--rounds"), ("--solver x", "--solver")]
)
def test_wrong_flags_are_named_and_exit_with_2(
    flags: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(flags, SelftrainJob, monkeypatch)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


def test_a_required_flag_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--data photos", PredictJob, monkeypatch)
    assert stop.value.code == 2
    assert "--probe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        (SelftrainJob(), "Column with the unique name of each row"),
        (EvaluateJob(probe=("p",), data=("d",)), "about which a classifier should not be sure"),
    ],
)
def test_help_explains_every_flag(
    job: object, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help", type(job), monkeypatch)
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    flags = [f"--{name.replace('_', '-')}" for name in to_dict(job)]
    assert [flag for flag in flags if not re.search(rf"{flag}\b", help_text)] == []
    assert sentence in " ".join(re.sub("[│╭╮╰╯]", "", help_text).split())


JOB = """
import os, signal, sys, time
from dataclasses import dataclass
from lpclip.config import UserError
from lpclip.jobs import cli
from lpclip.jobs.cli import main

@dataclass(frozen=True, kw_only=True)
class Job:
    end: str = "well"

def run(job):
    if job.end == "value":
        raise UserError("no such path: photos\\nreally")
    if job.end == "file":
        open("photos/missing")
    if job.end == "bug":
        raise KeyError("bug")
    if job.end == "accent":
        print("a caf\\xe9")
    if job.end == "unread":
        print("a table", flush=True)
    if job.end == "interrupt":
        # A process that was started in the background may have been told to ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
    if job.end == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if job.end in ("renamed", "broken", "late"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            if job.end == "renamed":
                raise KeyboardInterrupt from None
            if job.end == "broken":
                raise RuntimeError("the cluster is gone") from None
            time.sleep(600)

cli.SIGTERM_SECONDS = 0.5
main(run, Job)
"""
REPORT_IT = "This is a fault of lpclip. Please report it with the traceback and the command."


@pytest.mark.parametrize(
    ("end", "code", "last_lines"),
    [
        ("well", 0, [""]),
        ("value", 1, ["error: no such path: photos really"]),
        ("file", 1, ["FileNotFoundError: [Errno 2] No such file or directory: 'photos/missing'", REPORT_IT]),
        ("bug", 1, ["KeyError: 'bug'", REPORT_IT]),
        ("interrupt", 130, ["interrupted: finished work is kept, and the same command resumes from there"]),
        *(
            (end, 143, ["terminated: finished work is kept, and the same command resumes from there"])
            # Ray's own waiting ends with another interrupt, or with a loss, or not before a minute.
            for end in ("terminate", "renamed", "broken", "late")
        ),
    ],
)
def test_how_a_job_ends(end: str, code: int, last_lines: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", JOB, "--end", end]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.strip().split("\n")[-len(last_lines) :] == last_lines
    assert ("Traceback" in done.stderr) == (end in ("file", "bug"))
    traced = subprocess.run(
        command, env={**environment, "LPCLIP_TRACEBACK": "1"}, capture_output=True, text=True, check=False
    )
    assert ("Traceback" in traced.stderr) == (end in ("value", "file", "bug"))


def test_an_export_that_is_interrupted_promises_nothing() -> None:
    code = JOB.replace("main(run, Job)", "from lpclip.config import ExportJob; main(stop, ExportJob)")
    code = code.replace("def run(job):", "def stop(job):\n    raise KeyboardInterrupt\n\ndef run(job):")
    done = subprocess.run(
        [sys.executable, "-c", code, "--probe", "probe", "--out", "model.onnx"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "\ninterrupted: no file is there by half\n")


def test_a_letter_that_the_terminal_does_not_have_ends_no_job() -> None:
    done = subprocess.run(
        [sys.executable, "-c", JOB, "--end", "accent"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "a caf\\xe9\n")


def test_output_that_nothing_reads_any_more_ends_a_job_in_one_sentence() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-c", JOB, "--end", "unread"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writes)
    assert done.stderr.splitlines()[0] == "error: nothing reads the output any more; finished work is kept"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["--help", "selftrain --help"])
def test_help_that_nothing_reads_to_its_end_is_no_fault(words: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-c", "from lpclip.jobs.cli import entry; entry()", *words.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [("selftrian", "selftrian, did you mean selftrain? the"), ("bogus", "bogus; the commands are encode, ")],
)
def test_a_command_that_there_is_not_is_answered_with_those_that_there_are(
    word: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lpclip", word])
    with pytest.raises(SystemExit) as stop:
        entry()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: lpclip has no command {sentence}")


WITH_RAY = """
import json, os, signal, sys
from lpclip.config import UserError
from lpclip.jobs import cli, encode, process

def job(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end = config.out
    if end != "early":
        process.start_ray()
    print(json.dumps(list(process._descendants(os.getpid()))))
    if end in ("early", "mistake"):
        raise UserError("no such class")
    if end == "bug":
        raise KeyError("bug")
    if end in ("SIGINT", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, end))

encode.encode_job = job
cli.run_command("encode", args=["--out", sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("end", "code", "sentence"),
    [
        pytest.param("well", 0, "", marks=pytest.mark.slow),
        pytest.param("mistake", 1, "error: no such class\n", marks=pytest.mark.slow),
        pytest.param("bug", 1, f"KeyError: 'bug'\n{REPORT_IT}\n", marks=pytest.mark.slow),
        # Ray is still starting then.
        ("early", 1, "error: no such class\n"),
        pytest.param(
            "SIGINT",
            130,
            "\ninterrupted: finished work is kept, and the same command resumes from there\n",
            marks=pytest.mark.slow,
        ),
        ("SIGTERM", 143, "\nterminated: finished work is kept, and the same command resumes from there\n"),
    ],
)
def test_a_command_ends_with_one_sentence_and_leaves_nothing_behind(
    end: str, code: int, sentence: str
) -> None:
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-c", WITH_RAY, end],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        left = [path.name for path in Path(folder).iterdir()]
    assert done.returncode == code
    if end == "bug":
        assert done.stderr.startswith("Traceback")
        assert done.stderr.endswith(sentence)
    else:
        assert done.stderr == sentence
    pids = json.loads(done.stdout)
    assert end == "early" or len(pids) > 3
    time.sleep(1)
    listing = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    living = {int(pid) for pid, stat in map(str.split, listing.splitlines()) if not stat.startswith("Z")}
    assert not living & set(pids)
    assert left in ([], ["ray"])


def test_a_temporary_folder_too_long_for_ray_s_sockets_is_told_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 107)
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    command = "from lpclip.jobs.cli import run_command; run_command('encode')"
    done = subprocess.run(
        [sys.executable, "-c", command, "--data", str(tmp_path), "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: the path of the temporary folder is too long for Ray's sockets: set RAY_TMPDIR (or TMPDIR) to a short "
        "path, such as /tmp\n"
    )


@pytest.mark.slow
def test_a_ray_that_starts_too_late_is_told_in_a_sentence(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    job = start(f"encode.py --data {tmp_path} --out {tmp_path / 'out'}", RAY_ADDRESS="")
    found: list[int] = []
    while not found and job.poll() is None:
        found = [pid for pid, words in descendants(job.pid).items() if "raylet/raylet" in words.split(" ")[0]]
        time.sleep(0.01)
    os.kill(found[0], signal.SIGSTOP)
    assert "error: Ray did not start within the 30 seconds that it waits" in job.communicate(timeout=240)[1]
    assert job.returncode == 1
    deadline = time.monotonic() + 30
    while Path(f"/proc/{found[0]}").exists():
        assert time.monotonic() < deadline, "Ray's process is still there"
        time.sleep(0.1)


def test_a_folder_that_ray_cannot_start_in_is_told_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    command = "from lpclip.jobs.cli import run_command; run_command('encode')"
    done = subprocess.run(
        [sys.executable, "-c", command, "--data", str(tmp_path), "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        rf"error: Ray cannot start in b'{tmp_path}/caf\xe9', whose name is not UTF-8: run the command elsewhere"
        "\n"
    )


def test_a_name_that_is_not_utf_8_is_no_part_of_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--data photos caf\udce9", SelftrainJob, monkeypatch)
    assert r"--data b'caf\xe9': the name is not UTF-8" in capsys.readouterr().err


@ray.remote(max_retries=0, num_cpus=0)
def raise_in_task(kind: str) -> None:
    if kind == "nested":
        ray.get(raise_in_task.remote("value"))
    raise {"value": UserError("no such class"), "bug": KeyError("bug")}[kind]


@ray.remote(num_cpus=0)
class Encoder:
    def __init__(self) -> None:
        raise UserError("no such model")

    def encode(self) -> None:
        pass


@pytest.mark.usefixtures("cluster")
def test_a_mistake_found_by_a_ray_worker_is_told_as_one_found_here() -> None:
    ray.data.DataContext.get_current().enable_progress_bars = False

    def raise_in_stage(batch: dict) -> dict:
        raise UserError("every image is bad")

    broken = {
        "no such class": lambda: ray.get(raise_in_task.remote("nested")),
        "no such model": lambda: ray.get(Encoder.remote().encode.remote()),
        "every image is bad": lambda: ray.data.range(3).map_batches(raise_in_stage).materialize(),
        None: lambda: ray.get(raise_in_task.remote("bug")),
    }
    for message, call in broken.items():
        with pytest.raises(Exception) as caught:
            call()
        assert users_mistake(caught.value) == message
