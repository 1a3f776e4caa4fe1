"""Shared by all jobs: one job for each output folder, its identity, seconds and versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lpclip
from lpclip import files, locks
from lpclip.config import UserError, counted
from lpclip.jobs.process import job_began, ray_log

RAY_LOG = "ray.log"
PACKAGES = ("ray", "torch", "open_clip_torch", "pyarrow", "mlflow", "numpy", "timm", "transformers")


def in_submitted_job() -> bool:
    """True if `ray job submit` started this process."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextlib.contextmanager
def output_folder(out: str) -> Iterator[str]:
    """Create and lock the output folder, so that a second job on it is refused. Yields an absolute path or URI.

    Ray's warnings go to ray.log in it; with a URI they come there at the end.
    Raises UserError when it cannot be written or is in use, and for a relative path in a submitted job, whose
    working directory is a temporary copy that is deleted later.
    """
    if "://" in out:
        with (
            _alone_in(out),
            tempfile.TemporaryDirectory() as here,
            ray_log(log := f"{here}/{RAY_LOG}"),
        ):
            try:
                yield files.add_suffix(out, "")
            finally:
                if Path(log).exists():
                    files.write_bytes(files.join(out, RAY_LOG), Path(log).read_bytes())
        return
    if in_submitted_job() and not Path(out).expanduser().is_absolute():
        raise UserError(
            f"--out {out} is relative to the job's temporary copy of the working directory: give an absolute "
            "path, or a URI that all nodes reach"
        )
    path = files.absolute(out)
    is_new = not Path(path).exists()
    with _alone_in(path):
        try:
            with ray_log(str(Path(path) / RAY_LOG)):
                yield path
        finally:
            # A command that is refused leaves nothing behind.
            left = [Path(path, name) for name in (RAY_LOG, locks.FILE)]
            if Path(path).exists() and {*Path(path).iterdir()} <= {*left}:
                for file in left:
                    file.unlink(missing_ok=True)
                if is_new:
                    Path(path).rmdir()


@contextlib.contextmanager
def _alone_in(out: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.hold(out))
        except locks.LockedError as who:
            raise UserError(
                f"another job is writing to {out} ({who}): wait for it, or choose another --out"
            ) from who
        yield


def claim(out: str, identity: dict[str, Any], *, mark: bool = True, shared: str = "features") -> None:
    """Mark the output folder with the identity of this work.

    With `mark` off, only look: `identity` may be the part of it that is known so far. `shared` names the folder in it,
    and the flag, that spares other work reading the images again. Raises UserError when the folder holds the results
    of other work.
    """
    path = files.join(out, "job.json")
    if not files.exists(path):
        if mark:
            files.write_json(path, identity)
        return
    found = files.read_json(path)
    compared = {*found, *identity} if mark else set(identity)
    changed = sorted(k for k in compared if found.get(k) != identity.get(k))
    if changed:
        folder = files.join(out, shared)
        hint = f". --{shared} {folder} shares the {shared}" if files.exists(folder) else ""
        raise UserError(
            f"{out} holds the results of other work (it differs in {', '.join(changed)}); choose another --out{hint}"
        )


def check_workers(num_workers: int) -> None:
    """Refuse more Ray Train workers than this machine has CPUs, or GPUs if it has any: they would wait forever.

    A cluster may grow, so there a line says that it has to.
    """
    import ray

    there = ray.cluster_resources()
    name = "GPU" if there.get("GPU", 0) >= 1 else "CPU"
    count = int(there.get(name, 0))
    if num_workers <= count:
        return
    here = f"each takes a {name}, and {{}} {counted(count, name)}"
    if not os.environ.get("RAY_ADDRESS") and len(ray.nodes()) == 1:
        raise UserError(f"--num-workers {num_workers}: {here.format('this machine has')}")
    waiting = counted(num_workers, "Ray Train worker")
    text = f"{waiting} must wait until the cluster has grown: {here.format('there are')}"
    print(text, file=sys.stderr, flush=True)


class Stopwatch:
    """Seconds of a job by stage. A command's first stage begins with its process, so that no second is left out."""

    def __init__(self) -> None:
        self._last = job_began()
        self._seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """All time since the last lap went into this stage."""
        now = time.monotonic()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, to milliseconds."""
        return {stage: round(value, 3) for stage, value in self._seconds.items()}


def make_place(out: str, *, kind: str = "file") -> None:
    """Make the folder in which a file `out` will be written, so that a place that cannot be written is found at once.

    Raises UserError when it cannot be made, or `out` is a folder.
    """
    if "://" not in out and Path(out).expanduser().is_dir():
        raise UserError(f"--out {out} is a folder, and a {kind} is written: name a file in it")
    files.make_folder(files.split(files.absolute(out))[0])


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found = {"lpclip": lpclip.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
