"""Jobs on three hosts of which one is cut off, killed or back again, and whose packets are late or lost.

    sudo .venv/bin/python benchmarks/hosts.py                         # all jobs, all faults: most of an hour
    sudo .venv/bin/python benchmarks/hosts.py --jobs encode --faults killed --json runs/hosts.json

The hosts are network namespaces of this machine: each has an address, a Ray node and a temporary folder of its own, and
no way to anything but the others. A fourth namespace is the user's machine: jobs are submitted from it, with the token
of the cluster. This program carries the packets between them, so it can hold back, lose or stop them on any kernel.

The folder of data and results is the same everywhere, as a shared file system would be. Processors, memory and the
clock are shared too. So this shows what becomes of the work, and not how fast it is.

Each job's fault comes in the middle of its work. The same command on one host, which nothing befell, says what must
come out: features, pseudo-labels, probes and trials are compared byte by byte. The columns are those of faults.py; rows
are images for encode, pseudo-labels for selftrain and trials for tune.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import random
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tyro
from encoding import psutil
from faults import (
    WAIT_SECONDS,
    Data,
    Job,
    Lab,
    Row,
    Trial,
    is_alive,
    kill,
    read_features,
    show,
    titled,
    wait_for,
)

from lpclip.jobs.cli import OPTIONS

SUBNET = "198.18.77"  # of the addresses that are reserved for measurements
HEAD, USER = 1, 4
HOSTS = (HEAD, 2, 3)
CPUS = dict.fromkeys(HOSTS, 1)  # two workers are on two hosts
MTU = 1500
STORE_BYTES = 200_000_000
DELAY, LOSS = 0.05, 0.05
AT_WORK = ("ray::MapWorker", "ray::RayTrainWorker", "ray::ImplicitFunc")
RAY = (sys.executable, str(Path(sys.executable).with_name("ray")))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run jobs on three hosts, befall the hosts with faults, and see whether the results are those of one host."""

    jobs: tuple[str, ...] = ()
    """Jobs to run: encode, selftrain, tune; all by default."""
    faults: tuple[str, ...] = ()
    """Faults to inject, by their names in the table; all by default."""
    num_images: int = 4500
    """Images of selftrain and tune."""
    cut: float = 15
    """Seconds of cut-short."""
    json: str | None = None
    """File to write the rows to."""


# The network


class Link:
    """Delays packets, or drops them."""

    def __init__(self) -> None:
        self.cut: frozenset[int] = frozenset()
        """Hosts that no packet leaves or reaches."""
        self.delay = self.loss = 0.0
        """Seconds on the way, and the share of packets that is lost."""
        self.lost = 0
        self._chance = random.Random(0)
        self._under_way = collections.deque[tuple[float, int, bytes]]()

    def take(self, packet: bytes, *, source: int, now: float) -> None:
        """Put an IPv4 packet on its way. Others go nowhere."""
        target = packet[19]
        if packet[0] >> 4 != 4:
            return
        if {source, target} & self.cut or self._chance.random() < self.loss:
            self.lost += 1
        else:
            self._under_way.append((now + self.delay, target, packet))

    def arrived(self, now: float) -> Iterator[tuple[int, bytes]]:
        """The packets that have arrived, with the hosts that they are for, in the order in which they were sent."""
        while self._under_way and self._under_way[0][0] <= now:
            _, target, packet = self._under_way.popleft()
            yield target, packet

    def wait(self, now: float) -> float:
        """Seconds until the next packet arrives, a tenth at most."""
        return min(0.1, max(0.0, self._under_way[0][0] - now)) if self._under_way else 0.1


class Network:
    """A namespace for each host, and the packets between them. At the end of a `with`, nothing of it is left."""

    def __init__(self) -> None:
        self.link, self._taps, self._ends = Link(), dict[int, int](), threading.Event()
        self._carrier = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> Network:
        try:
            for host in (*HOSTS, USER):
                self._taps[host] = self._join(host)
        except BaseException:
            self._remove()
            raise
        self._carrier.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._carrier.join()
        self._remove()

    def inside(self, host: int) -> list[str]:
        """The first words of a command, so that it runs on the host."""
        return ["ip", "netns", "exec", _namespace(host)]

    def processes(self, host: int) -> list[Any]:
        """All processes of the host."""
        found = _ip("netns", "pids", _namespace(host)).split()
        processes = []
        for pid in map(int, found):
            with contextlib.suppress(psutil().NoSuchProcess):
                processes.append(psutil().Process(pid))
        return processes

    def kill(self, host: int) -> None:
        """SIGKILL for all processes of the host."""

        def gone() -> bool:
            kill(there := [process for process in self.processes(host) if is_alive(process)])
            return not there

        wait_for(gone, f"the end of host {host}")

    def _join(self, host: int) -> int:
        """Make the host's namespace and its end of the network; the other end is the returned file."""
        tap, name = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK), f"hosts{os.getpid()}.{host}"[-15:]
        tunsetiff, packets_alone = 0x400454CA, 0x0001 | 0x1000
        fcntl.ioctl(tap, tunsetiff, struct.pack("16sH22x", name.encode(), packets_alone))
        namespace = _namespace(host)
        _ip("netns", "add", namespace)
        _ip("link", "set", name, "netns", namespace, "name", "eth0", "mtu", str(MTU))
        _ip("-n", namespace, "address", "add", f"{address(host)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", link, "up")
        return tap

    def _carry(self) -> None:
        source = {tap: host for host, tap in self._taps.items()}
        while not self._ends.is_set():
            for tap in select.select(list(source), [], [], self.link.wait(time.monotonic()))[0]:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        self.link.take(os.read(tap, 1 << 16), source=source[tap], now=time.monotonic())
            for target, packet in self.link.arrived(time.monotonic()):
                if target in self._taps:
                    # A full queue loses packets, as everywhere.
                    with contextlib.suppress(BlockingIOError):
                        os.write(self._taps[target], packet)

    def _remove(self) -> None:
        for host in (*HOSTS, USER):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(host)
                _ip("netns", "delete", _namespace(host))
        for tap in self._taps.values():
            os.close(tap)


def _namespace(host: int) -> str:
    return f"lpclip-{os.getpid()}-{host}"


def address(host: int) -> str:
    """The host's IP address."""
    return f"{SUBNET}.{host}"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


# The cluster

ASK = """
import sys, urllib.request
token = open(sys.argv[2]).read()
request = urllib.request.Request(sys.argv[1], headers={"Authorization": f"Bearer {token}"})
print(urllib.request.urlopen(request, timeout=10).read().decode())
"""


class Hosts:
    """Ray on three hosts, its own on each, joined by docs/deployment.md. At the end of a `with`, none of it is left."""

    def __init__(self, network: Network, folder: Path, *, cpus: Mapping[int, int] = CPUS) -> None:
        self.network, self._folder, self._cpus, self._starts = network, folder, cpus, 0

    def __enter__(self) -> Hosts:
        try:
            for host in HOSTS:
                self.start(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for host in (*HOSTS, USER):
            self.network.kill(host)

    def start(self, host: int) -> None:
        """`ray start` on a host. It is part of the cluster when this returns."""
        before = self.nodes()  # the host's last node is among them until Ray has missed it
        self._starts += 1
        mine = (
            ["--head", "--port=6379", f"--dashboard-host={address(HEAD)}"]
            if host == HEAD
            else [f"--address={address(HEAD)}:6379"]
        )
        flags = [f"--node-ip-address={address(host)}", f"--temp-dir={self._folder / str(host)}"]
        more = [f"--num-cpus={self._cpus[host]}", f"--object-store-memory={STORE_BYTES}", "--block"]
        with (self._folder / f"start-{self._starts}-host-{host}.log").open("w") as log:
            command = [*self.network.inside(host), *RAY, "start", *mine, *flags, *more]
            ray = subprocess.Popen(command, stdout=log, stderr=log)

        def joined() -> bool:
            if ray.poll() is not None:
                raise RuntimeError(f"Ray on host {host} did not start:\n{Path(log.name).read_text()[-2000:]}")
            return any(there == host for node, there in self.nodes().items() if node not in before)

        wait_for(joined, f"host {host}")

    def given_up(self, host: int) -> int:
        """Wait until Ray has given the host up. Returns the seconds."""
        begin = time.monotonic()
        wait_for(lambda: host not in self.alive(), f"that Ray gives host {host} up")
        return round(time.monotonic() - begin)

    def revive(self, host: int) -> None:
        """Bring a given-up host back, which is reached again: its own Ray ends by itself, and starts again."""
        wait_for(lambda: not titled(self.network.processes(host), "ray::"), f"the end of host {host}'s Ray")
        self.network.kill(host)
        self.start(host)

    def alive(self) -> set[int]:
        """The hosts that Ray knows and has not given up."""
        return set(self.nodes().values())

    def nodes(self) -> dict[str, int]:
        """The same by the ids of their nodes, from Ray's dashboard."""
        time.sleep(0.5)  # to ask takes a process, which this machine's hosts would miss
        url = f"http://{address(HEAD)}:8265/api/v0/nodes?limit=1000"
        words = [sys.executable, "-c", ASK, url, os.environ["RAY_AUTH_TOKEN_PATH"]]
        done = subprocess.run(
            [*self.network.inside(USER), *words], capture_output=True, text=True, check=False
        )
        if done.returncode:  # it is not up yet
            return {}
        nodes = json.loads(done.stdout)["data"]["result"]["result"]
        living = [node for node in nodes if node["state"] == "ALIVE"]
        return {node["node_id"]: int(node["node_ip"].rpartition(".")[2]) for node in living}

    def at_work(self) -> list[int]:
        """The hosts that have an actor or a worker of the job."""
        return [host for host in HOSTS if titled(self.network.processes(host), *AT_WORK)]

    def working(self) -> int:
        """A host beside the head that is at work."""
        wait_for(lambda: max(self.at_work(), default=HEAD) != HEAD, "an actor beside the head")
        return max(self.at_work())


# Jobs


@dataclass(frozen=True, kw_only=True)
class Work:
    """A job's data, flags and results."""

    data: Callable[[Lab], Data]
    flags: tuple[str, ...] = ()
    middle: tuple[str, int]
    """A pattern of files in the output folder, and how many there are when the fault comes."""
    rows: Callable[[Path], Iterator[tuple[str, bytes]]]
    """The rows of an output folder, by name."""


def pseudo_labels(out: Path) -> Iterator[tuple[str, bytes]]:
    """Each image's label, confidence and round."""
    for row in pq.read_table(out / "pseudo_labels.parquet").to_pylist():
        yield row["id"], repr(row).encode()


def trials(out: Path) -> Iterator[tuple[str, bytes]]:
    """Each trial's rounds and classifier."""
    for path in sorted((out / "trials").glob("*.json")):
        record = json.loads(path.read_text())
        del record["seconds"]
        # A trial that failed, as one that kept no label, has none.
        weights = path.with_suffix(".safetensors")
        yield path.stem, json.dumps(record).encode() + (weights.read_bytes() if weights.exists() else b"")


COLOURS = ("--classes", "red,green,blue,yellow,grey", "--prior", "uniform")
WORKS = {
    "encode": Work(
        data=lambda lab: lab.few,
        middle=("features/*/part-*.parquet", 4),
        rows=lambda out: read_features(next((out / "features").glob("*"))),
    ),
    "selftrain": Work(
        data=lambda lab: lab.many,
        flags=(*COLOURS, "--num-workers", "2"),
        middle=("rounds/round-*.json", 1),
        rows=pseudo_labels,
    ),
    "tune": Work(
        data=lambda lab: lab.many,
        flags=(*COLOURS, "--space", "quick", "--trials", "12"),
        middle=("trials/*.json", 2),
        rows=trials,
    ),
}
"""By the name of the job."""


class Run:
    """A job on the hosts, in the middle of its work."""

    def __init__(
        self, job: Job, hosts: Hosts, *, out: Path, middle: tuple[str, int], short_cut: float
    ) -> None:
        self.job, self.hosts, self.short_cut = job, hosts, short_cut
        self._out, self._middle = out, middle

    def reach_the_middle(self) -> None:
        """Return when some of the work is done, and most is not."""
        pattern, count = self._middle

        def enough() -> bool:
            self._check_is_under_way()
            return len(list(self._out.glob(pattern))) >= count

        wait_for(enough, "the middle of the job")

    def cut(self, *hosts: int) -> None:
        """Cut these hosts off, and no others."""
        self.hosts.network.link.cut = frozenset(hosts)
        if hosts:
            self._check_is_under_way()

    def kill(self, host: int) -> None:
        """Kill every process on a host with SIGKILL."""
        self.hosts.network.kill(host)
        self._check_is_under_way()

    def _check_is_under_way(self) -> None:
        if not self.job.runs or (self._out / "summary.json").exists():
            raise RuntimeError("the job ended before the fault")


# Faults


def nothing(run: Run) -> str:
    """Nothing befalls the hosts."""
    return f"{len(run.hosts.at_work())} of {len(run.hosts.alive())} hosts at work"


def cut_short(run: Run) -> str:
    """No packet leaves or reaches a host, for less time than it takes Ray to give it up."""
    run.cut(run.hosts.working())
    time.sleep(run.short_cut)
    run.cut()
    return f"{run.short_cut:.0f} s cut off"


def cut_long(run: Run) -> str:
    """Cut a host off until Ray has given it up. Its own Ray then ends by itself, and starts again."""
    run.cut(host := run.hosts.working())
    seconds = run.hosts.given_up(host)
    run.cut()
    run.hosts.revive(host)
    return f"given up after {seconds} s"


def killed(run: Run) -> str:
    """Kill every process on a host. Its Ray starts again when the cluster has noticed the loss."""
    run.kill(host := run.hosts.working())
    seconds = run.hosts.given_up(host)
    run.hosts.start(host)
    return f"given up after {seconds} s"


def late(run: Run) -> str:
    """Each packet arrives late, until the job ends."""
    run.hosts.network.link.delay = DELAY
    return f"{DELAY * 1000:.0f} ms late"


def dropped(run: Run) -> str:
    """Some packets never arrive, until the job ends."""
    run.hosts.network.link.loss = LOSS
    return f"{LOSS:.0%} of the packets lost"


FAULTS: dict[str, Callable[[Run], str]] = {
    "nothing": nothing,
    "cut-short": cut_short,
    "cut-long": cut_long,
    "killed": killed,
    "late": late,
    "dropped": dropped,
}


class Bench:
    """Data, and what comes of each job on one host that nothing befalls."""

    def __init__(self, folder: Path, network: Network, *, num_images: int, short_cut: float) -> None:
        self._folder, self._network, self._short_cut = folder, network, short_cut
        self._lab = Lab(folder, num_images=num_images)
        self._undisturbed: dict[str, Path] = {}

    def inject(self, job: str, fault: str) -> Row:
        """The row of a job and a fault; one without numbers when it did not come so far."""
        work, data = WORKS[job], self._data(job)
        alone = self._undisturbed.get(job) or self._alone(job, data)
        folder = self._folder / f"{job}-{fault}"
        command = [*self._network.inside(USER), *RAY, "job", "submit", "--working-dir", ".", "--", "python"]
        trial = Trial(data, folder, command=[*command, f"jobs/{job}.py"])
        self._network.link = Link()
        try:
            server = f"http://{address(HEAD)}:8265"
            with Hosts(self._network, folder) as hosts, trial.job(address=server) as started:
                out = folder / "out"
                run = Run(started, hosts, out=out, middle=work.middle, short_cut=self._short_cut)
                run.reach_the_middle()
                before = trial.parts()
                note = FAULTS[fault](run)
                started.ends()
        except Exception as error:
            text = f"{type(error).__name__}: {error}; what was printed last:\n{trial.told[-2000:]}"
            return Row(wrong=(text,))
        if job == "encode":
            return trial.row(before, exits=(0,), note=note)
        return compare(alone, folder / "out", rows=work.rows, trial=trial, note=note)

    def _data(self, job: str) -> Data:
        data = WORKS[job].data(self._lab)
        # What follows the encoding is their part, so all but encode share the features.
        features = self._lab.folder / f"undisturbed-{data.path.name}" / "out" / "features"
        shared = () if job == "encode" else ("--features", str(features))
        return replace(data, flags=(*data.flags, *shared, *WORKS[job].flags))

    def _alone(self, job: str, data: Data) -> Path:
        if job != "encode":
            print(f"  {job} without a fault", file=sys.stderr, flush=True)
            trial = Trial(data, self._folder / f"{job}-alone", command=[sys.executable, f"jobs/{job}.py"])
            trial.run()
            self._undisturbed[job] = trial.folder / "out"
        return self._undisturbed.get(job, self._folder)


def compare(
    alone: Path, out: Path, *, rows: Callable[[Path], Iterator[tuple[str, bytes]]], trial: Trial, note: str
) -> Row:
    """Compare the rows and the probe of a job with those of the same job on one host."""
    expected, found = dict(rows(alone)), list(rows(out))
    counts = Counter(name for name, _ in found)
    probe = Path("probe") / "probe.safetensors"
    same = dict(found) == expected and (out / probe).read_bytes() == (alone / probe).read_bytes()
    exits = trial.exits
    row = Row(
        rows_in=len(expected),
        encoded=len(found),
        lost=len(expected.keys() - counts.keys()),
        doubled=counts.total() - len(counts),
        same_bytes="yes" if same else "no",
        seconds=round(trial.seconds),
        ended=f"exit {', '.join(map(str, exits))}: {note}",
    )
    held = {
        "no row is lost or doubled": not row.lost and not row.doubled,
        "rows and probe are those of one host": same,
        "the job ends with 0": exits == (0,),
        "no traceback is printed": "Traceback" not in trial.told,
    }
    return replace(row, wrong=tuple(claim for claim, holds in held.items() if not holds))


def can_make_hosts() -> bool:
    """Return True where network namespaces can be made. Elsewhere, print an error that says what is missing."""
    can = os.geteuid() == 0 and shutil.which("ip") is not None
    if not can:
        print("error: network namespaces need root and `ip`: install iproute2, and use sudo", file=sys.stderr)
    return can


def environment(folder: Path) -> dict[str, str]:
    """Write a token for the hosts into the folder. Returns the environment variables of all hosts and jobs."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": str(WAIT_SECONDS),  # this machine may be busy
        "RAY_TMPDIR": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def main(options: Options) -> int:
    """Inject the faults, print the table, write JSON. Returns the exit code."""
    for name, asked, there in (("jobs", options.jobs, WORKS), ("faults", options.faults, FAULTS)):
        if unknown := set(asked) - set(there):
            raise ValueError(f"--{name} {' '.join(unknown)}: there are {', '.join(there)}")
    if not can_make_hosts():
        return 1
    # What is asked to end has to clear away its hosts first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ.pop("RAY_ADDRESS", None)
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Network() as network:
        os.environ |= environment(Path(folder))
        bench = Bench(Path(folder), network, num_images=options.num_images, short_cut=options.cut)
        for job in options.jobs or WORKS:
            for fault in options.faults or FAULTS:
                name = f"{job}, {fault}"
                print(name, file=sys.stderr, flush=True)
                rows[name] = bench.inject(job, fault)
                print(f"  {rows[name].ended}", *rows[name].wrong, sep="\n  ", file=sys.stderr, flush=True)
    return show(rows, options=options)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=OPTIONS)))
