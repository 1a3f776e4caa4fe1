"""Ten minutes of faults at random moments, on jobs that run one after the other: is every result the undisturbed one?

    python benchmarks/random_kills.py
    python benchmarks/random_kills.py --seconds 60 --seed 7 --json runs/kills.json

encode, selftrain and tune run in turn on a cluster of three Ray nodes of this machine. Each has a third of the time for
faults, as often as it ends, and is then brought to its end without them. Every few seconds a seeded generator chooses a
fault. SIGKILL ends the job's own process, one of Ray's workers, or a whole node, which then starts again. Or no worker
can write a file of a part's size for a while, as on a full disk.
A job that ended with an error is given again, the same command. In the end, features, pseudo-labels, the probe and
trials must be those of jobs that nothing befell, byte by byte. What the moments hit depends on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from faults import FULL_BYTES, Job, Lab, Trial, cluster, kill, processes_of, titled
from hosts import WORKS

from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.runtime import versions
from lpclip.report.tables import format_table

SHORTEST, LONGEST = 2.0, 15.0
"""Seconds between two faults."""
CPUS = 2
"""Of each of the two nodes that work."""
AT_WORK = ("ray::Map", "ray::RayTrainWorker", "ray::ImplicitFunc", "ray::TrainController")
"""Titles of workers, as Ray gives them."""
FAULTS = ("driver", "worker", "node", "disk")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Let faults befall jobs at random moments."""

    seconds: float = 600
    """In which faults come."""
    seed: int = 0
    num_images: int = 600
    """Images of selftrain and tune."""
    json: str | None = None
    """File to write the rows to."""


class Chaos:
    """The nodes of a cluster, and what befalls them."""

    def __init__(self, machines: Any, *, seed: int) -> None:
        self._machines, self._chance = machines, random.Random(seed)
        self._nodes = [machines.add_node(num_cpus=CPUS) for _ in range(2)]

    def pause(self) -> float:
        """Seconds until the next fault."""
        return self._chance.uniform(SHORTEST, LONGEST)

    def strike(self, job: Job) -> str | None:
        """Let something befall the job. Returns what it was; None when nothing of its kind is at work yet."""
        fault = self._chance.choice(FAULTS)
        working = titled([p for node in self._nodes for p in processes_of(node)], *AT_WORK)
        if fault == "worker" and working:
            kill([self._chance.choice(working)])
        elif fault == "node":
            kill(processes_of(self._nodes.pop(self._chance.randrange(len(self._nodes)))))
            self._nodes.append(self._machines.add_node(num_cpus=CPUS))
        elif fault == "disk" and working:
            end = time.monotonic() + self._chance.uniform(1, 5)
            while time.monotonic() < end and job.runs:
                self._limit_files(FULL_BYTES)
                time.sleep(0.1)
            self._limit_files(resource.RLIM_INFINITY)
        elif fault == "driver":
            job.kill()
        else:
            return None
        return fault

    def _limit_files(self, num_bytes: int) -> None:
        """Let no worker write a larger file. Raylets may: a log that ends would end them."""
        for process in titled([p for node in self._nodes for p in processes_of(node)], "ray::"):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def outcome(name: str, out: Path) -> dict[str, bytes]:
    """All that a job must make again to the byte, by what it is."""
    found = list(WORKS[name].rows(out))
    assert len(found) == len(dict(found)), f"{name}: rows are there twice"
    probe = {f"probe/{file.name}": file.read_bytes() for file in (out / "probe").glob("*.safetensors")}
    return dict(found) | probe


def give(trial: Trial, name: str, *, address: str) -> Job:
    """Start the job, or start it again."""
    return trial.job(*WORKS[name].flags, address=address)


def main(options: Options) -> int:
    """Run the jobs with and without faults, print the table, write JSON. Returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    rows: dict[str, Counter[str]] = {name: Counter() for name in WORKS}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        os.environ["RAY_TMPDIR"] = place
        folder = Path(place)
        lab = Lab(folder, num_images=options.num_images)

        def trial_of(name: str, kind: str) -> Trial:
            command = (sys.executable, f"jobs/{name}.py")
            return Trial(WORKS[name].data(lab), folder / f"{name}-{kind}", command=command)

        undisturbed = {}
        with cluster(num_cpus=0) as machines:
            chaos = Chaos(machines, seed=options.seed)
            for name in WORKS:
                print(f"{name} without a fault", file=sys.stderr, flush=True)
                trial = trial_of(name, "undisturbed")
                with give(trial, name, address=machines.address) as job:
                    if job.ends():
                        raise RuntimeError(f"{name} failed without a fault:\n{job.told[-2000:]}")
                undisturbed[name] = outcome(name, trial.folder / "out")
            for name in WORKS:
                end = time.monotonic() + options.seconds / len(WORKS)
                while time.monotonic() < end:
                    trial = trial_of(name, str(rows[name]["jobs"]))
                    told, code = befall(trial, name, chaos=chaos, address=machines.address, end=end)
                    rows[name] += told
                    print(f"{name}: {dict(told)}", file=sys.stderr, flush=True)
                    found = outcome(name, trial.folder / "out") if not code else {}
                    rows[name]["lost"] += len(undisturbed[name].keys() - found.keys())
                    rows[name]["other bytes"] += sum(
                        value != undisturbed[name].get(key) for key, value in found.items()
                    )
                    held = {
                        f"ended with {code}": code == 0,
                        "not what the undisturbed job made": found == undisturbed[name],
                        "a traceback": "Traceback" not in trial.told,
                    }
                    wrong += [
                        f"{name} {rows[name]['jobs']}: {claim}:\n{trial.told[-3000:]}"
                        for claim, holds in held.items()
                        if not holds
                    ]
    columns = ("jobs", *FAULTS, "given again", "lost", "other bytes")
    shown = [{"job": name, **{column: row[column] for column in columns}} for name, row in rows.items()]
    print(format_table(shown))
    print(*wrong, sep="\n")
    if options.json:
        written = {"options": asdict(options), "versions": versions(), "rows": shown, "wrong": wrong}
        Path(options.json).write_text(json.dumps(written, indent=1))
    return int(bool(wrong))


def befall(trial: Trial, name: str, *, chaos: Chaos, address: str, end: float) -> tuple[Counter[str], int]:
    """Bring a job to its end, with faults at random moments. Returns these by kind, and the last exit code."""
    told = Counter(jobs=1)
    while True:
        with give(trial, name, address=address) as job:
            while job.runs and time.monotonic() < end:
                moment = time.monotonic() + chaos.pause()
                while job.runs and time.monotonic() < moment:
                    time.sleep(0.1)
                if job.runs and (fault := chaos.strike(job)):
                    told[fault] += 1
            code = job.ends()
        # An error without a fault left to blame is the job's own.
        if code == 0 or time.monotonic() > end + 300:
            return told, code
        told["given again"] += 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=OPTIONS)))
