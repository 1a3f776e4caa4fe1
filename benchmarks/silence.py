"""Calls to actors on a host that is cut off: when does the caller have their answers, or an error in their place?

    sudo .venv/bin/python benchmarks/silence.py
    sudo RAY_grpc_client_keepalive_time_ms=10000 .venv/bin/python benchmarks/silence.py --cut 25

The hosts are those of hosts.py. A process on the head calls actors on another host, all at the same time. Each answers
at a moment of its own, the first before the host is cut off, and the last when it is back. Ray's settings for
connections are taken from the environment, for all processes of all hosts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from hosts import HEAD, Hosts, Network, address, can_make_hosts, environment

from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.runtime import versions
from lpclip.report.tables import format_table

CALLED = 2
FIRST, STEP = 2.0, 4.0  # seconds from the call to the first answer, and between answers
BEFORE = 3.0  # seconds from the calls to the cut

CALL = """
import json, sys, time, ray
address, output, waits = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ray.init(address=address, log_to_driver=False)

@ray.remote(num_cpus=0.01)
class Actor:
    def answer(self, seconds):
        time.sleep(seconds)

actors = [Actor.remote() for _ in waits]
ray.get([actor.answer.remote(0) for actor in actors])
print("called", flush=True)
begin = time.monotonic()
left = {actor.answer.remote(wait): wait for actor, wait in zip(actors, waits)}
answers = []
while left:
    (done,), _ = ray.wait(list(left))
    try:
        ray.get(done)
        what = "answer"
    except ray.exceptions.RayError as error:
        what = type(error).__name__
    wait = left.pop(done)
    answers.append({"answered after": wait, "came as": what, "late, s": round(time.monotonic() - begin - wait, 1)})
with open(output, "w") as file:
    json.dump(answers, file)
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Cut off a host whose actors are about to answer."""

    cut: float = 25
    """Seconds."""
    json: str | None = None
    """File to write the rows to."""


def main(options: Options) -> int:
    """Call, cut, print the table, write JSON. Returns the exit code."""
    if not can_make_hosts():
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    settings = {name: value for name, value in os.environ.items() if name.startswith("RAY_grpc")}
    waits = [FIRST + STEP * number for number in range(int((options.cut + BEFORE) / STEP) + 2)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place, Network() as network:
        os.environ |= environment(Path(place))
        output = Path(place) / "answers.json"
        with Hosts(network, Path(place), cpus={HEAD: 0, CALLED: 1, 3: 0}):
            words = [sys.executable, "-c", CALL, f"{address(HEAD)}:6379", str(output), json.dumps(waits)]
            caller = subprocess.Popen([*network.inside(HEAD), *words], stdout=subprocess.PIPE, text=True)
            assert caller.stdout
            # Ray may print lines of its own.
            if "called\n" not in iter(caller.stdout.readline, ""):
                raise RuntimeError("the caller has ended")
            time.sleep(BEFORE)
            network.link.cut = frozenset({CALLED})
            time.sleep(options.cut)
            network.link.cut = frozenset()
            told = caller.stdout.read()
            if caller.wait():
                raise RuntimeError(f"the caller ended with {caller.returncode}: {told}")
        answers = json.loads(output.read_text())
    rows = sorted(answers, key=lambda row: row["answered after"])
    print(format_table(rows))
    if options.json:
        written = {"options": asdict(options), "settings": settings, "versions": versions(), "rows": rows}
        Path(options.json).write_text(json.dumps(written, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=OPTIONS)))
