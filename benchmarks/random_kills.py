"""Ten minutes of faults at random moments, on jobs that run one after the other: is every result the undisturbed one?

    sudo .venv/bin/python benchmarks/random_kills.py
    sudo .venv/bin/python benchmarks/random_kills.py --seconds 60 --seed 7 --json runs/kills.json

encode, selftrain and tune run in turn on the three hosts of hosts.py: a head without work, on which the job's own
process runs, and two that work. Each has a third of the time for faults, as often as it ends, and is then brought to
its end without them. Every few seconds a seeded generator chooses a fault:

- driver, worker, node: SIGKILL ends the job's own process, one of Ray's workers, or all processes of a host, whose Ray
  then starts again;
- disk: no worker can write a file of a part's size for some seconds, as on a full disk;
- cut short, cut long: no packet leaves or reaches a host, for 1 to 20 s, or until Ray has given it up, after a minute.

Ray asks after silent connections every 10 s here, and not every five minutes: jobs would stand still for most of the
time (docs/deployment.md, "Three hosts").

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
from faults import FULL_BYTES, Job, Lab, Trial, kill, titled
from hosts import HEAD, HOSTS, WORKS, Hosts, Network, address, can_make_hosts, environment

from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.runtime import versions
from lpclip.report.tables import format_table

SHORTEST, LONGEST = 2.0, 15.0
"""Seconds between two faults."""
WORKING = tuple(host for host in HOSTS if host != HEAD)
CPUS = {HEAD: 0, **dict.fromkeys(WORKING, 2)}
AT_WORK = ("ray::Map", "ray::RayTrainWorker", "ray::ImplicitFunc", "ray::TrainController")
"""Titles of workers, as Ray gives them."""
FAULTS = ("driver", "worker", "node", "disk", "cut short", "cut long")
OFTEN = (4, 4, 4, 4, 4, 1)
"""How often each fault is chosen, beside the others."""


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
    """Chooses faults by a seed, and injects them into a job and its hosts."""

    def __init__(self, hosts: Hosts, *, seed: int) -> None:
        self._hosts, self._chance = hosts, random.Random(seed)

    def pause(self) -> float:
        """Seconds until the next fault."""
        return self._chance.uniform(SHORTEST, LONGEST)

    def strike(self, job: Job) -> str | None:
        """Let something befall the job. Returns what it was; None when nothing of its kind is at work yet."""
        fault = self._chance.choices(FAULTS, OFTEN)[0]
        host = self._chance.choice(WORKING)
        working = titled(self._processes(), *AT_WORK)
        if fault == "driver":
            job.kill()
        elif fault == "node":
            self._hosts.network.kill(host)
            self._hosts.start(host)
        elif fault == "cut short":
            self._cut(host)
            time.sleep(self._chance.uniform(1, 20))
            self._cut()
        elif fault == "cut long":
            self._cut(host)
            self._hosts.given_up(host)
            self._cut()
            self._hosts.revive(host)
        elif not working:
            return None
        elif fault == "worker":
            kill([self._chance.choice(working)])
        else:
            self._fill_disks(job, seconds=self._chance.uniform(1, 5))
        return fault

    def _processes(self) -> list[Any]:
        return [process for host in WORKING for process in self._hosts.network.processes(host)]

    def _cut(self, *hosts: int) -> None:
        """Cut these hosts off, and no others."""
        self._hosts.network.link.cut = frozenset(hosts)

    def _fill_disks(self, job: Job, *, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and job.runs:
            self._limit_files(FULL_BYTES)
            time.sleep(0.1)
        self._limit_files(resource.RLIM_INFINITY)

    def _limit_files(self, num_bytes: int) -> None:
        """Let no worker write a larger file. Raylets may: a log that ends would end them."""
        for process in titled(self._processes(), "ray::"):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def outcome(name: str, out: Path) -> dict[str, bytes]:
    """All that a job must make again to the byte, by what it is."""
    found = list(WORKS[name].rows(out))
    assert len(found) == len(dict(found)), f"{name}: rows are there twice"
    probe = {f"probe/{file.name}": file.read_bytes() for file in (out / "probe").glob("*.safetensors")}
    return dict(found) | probe


def give(trial: Trial, name: str) -> Job:
    """Start the job, or start it again."""
    return trial.job(*WORKS[name].flags, address=f"{address(HEAD)}:6379")


def main(options: Options) -> int:
    """Run the jobs with and without faults, print the table, write JSON. Returns the exit code."""
    if not can_make_hosts():
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ.pop("RAY_ADDRESS", None)
    rows: dict[str, Counter[str]] = {name: Counter() for name in WORKS}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place, Network() as network:
        folder = Path(place)
        os.environ |= environment(folder) | {"RAY_grpc_client_keepalive_time_ms": "10000"}
        lab = Lab(folder, num_images=options.num_images)

        def trial_of(name: str, kind: str) -> Trial:
            command = (*network.inside(HEAD), sys.executable, f"jobs/{name}.py")
            return Trial(WORKS[name].data(lab), folder / f"{name}-{kind}", command=command)

        undisturbed = {}
        with Hosts(network, folder, cpus=CPUS) as hosts:
            chaos = Chaos(hosts, seed=options.seed)
            for name in WORKS:
                print(f"{name} without a fault", file=sys.stderr, flush=True)
                trial = trial_of(name, "undisturbed")
                with give(trial, name) as job:
                    if job.ends():
                        raise RuntimeError(f"{name} failed without a fault:\n{job.told[-2000:]}")
                undisturbed[name] = outcome(name, trial.folder / "out")
            for name in WORKS:
                end = time.monotonic() + options.seconds / len(WORKS)
                while time.monotonic() < end:
                    trial = trial_of(name, str(rows[name]["jobs"]))
                    told, code = befall(trial, name, chaos=chaos, end=end)
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


def befall(trial: Trial, name: str, *, chaos: Chaos, end: float) -> tuple[Counter[str], int]:
    """Bring a job to its end, with faults at random moments. Returns these by kind, and the last exit code."""
    told = Counter(jobs=1)
    while True:
        with give(trial, name) as job:
            while job.runs and time.monotonic() < end:
                moment = time.monotonic() + chaos.pause()
                while job.runs and time.monotonic() < moment:
                    time.sleep(0.1)
                if job.runs and (fault := chaos.strike(job)):
                    told[fault] += 1
            code = job.ends()
            if code > 0:
                print(f"{name} ended by itself:", *job.told.splitlines()[-1:], file=sys.stderr, flush=True)
        # An error without a fault left to blame is the job's own.
        if code == 0 or time.monotonic() > end + 300:
            return told, code
        told["given again"] += 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=OPTIONS)))
