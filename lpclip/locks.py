"""One job at a time in a folder, on local, shared and object storage.

    FOLDER/.lock            local and shared file systems: the kernel locks this file, and frees it when the holder dies
    FOLDER/.claims/*.json   object stores, and file systems without such locks: claims, which a holder keeps renewing

Object stores list whatever was written before. So a job writes a claim and then lists: of two jobs that do so, one at
least sees the other's claim, and who sees one steps back. Ages of claims are differences of the store's own times.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import itertools
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pyarrow import fs

from lpclip import files
from lpclip.config import UserError
from lpclip.patience import patiently

FILE = ".lock"
# A claim that was not renewed for so long is dead. Renewals come ten times as often.
DEAD_SECONDS = 300.0
TELL_SECONDS = 60.0
# Two jobs that begin at the same moment both step back, and try again after random waits.
ATTEMPTS = 5
NO_KERNEL_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


class LockedError(Exception):
    """Another job has the folder; the message is who."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that has a lock, or wants it."""

    job: str
    user: str
    host: str
    process: int
    machine: str
    """What says, together with the host, that two processes see each other; empty where nothing does."""
    began: str
    """When the process began, as the kernel counts: a later process may have the same number."""
    since: float
    dead_after: float
    """Seconds without a renewal after which others may break the lock."""

    @classmethod
    def of_this_process(cls) -> Holder:
        """What others are told of this process."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container may know no name
            user = f"user {os.getuid()}"
        words = [word for word in sys.argv[1:2] if not word.startswith("-")]
        return cls(
            job=" ".join([Path(sys.argv[0]).name, *words]),
            user=user,
            host=socket.gethostname(),
            process=os.getpid(),
            machine=_machine(),
            began=_began(os.getpid()),
            since=time.time(),
            dead_after=float(os.environ.get("LPCLIP_LOCK_SECONDS", DEAD_SECONDS)),
        )

    @classmethod
    def read(cls, text: bytes) -> Holder | None:
        """The holder of a lock or a claim, None when the text says nothing."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def text(self) -> bytes:
        """What `read` reads."""
        return json.dumps(asdict(self)).encode()

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        return f"{self.job} of {self.user} on {self.host}, process {self.process}, since {since}"

    def lives(self) -> bool | None:
        """Say whether a process of this machine lives; None of a process elsewhere."""
        if not self.machine or (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        return _began(self.process) == self.began


def _machine() -> str:
    """This start of the machine, and the name space of process numbers; empty where Linux does not tell."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(process: int) -> str:
    """When a living process began, in ticks; empty when it has ended."""
    try:
        # The name of the program, in brackets, may have spaces.
        state, *numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else numbers[18]


class _Lock(Protocol):
    """A lock that is not taken yet."""

    poll_seconds: float
    attempts: int
    is_sure: bool
    """Whether the one who has it is known to live."""

    def take(self) -> Holder | str | None:
        """Try to take it. Returns None when that succeeded, or else who has it."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep it in the block, and free it."""


@contextlib.contextmanager
def hold(
    folder: str, *, wait: Callable[[str], object] | None = None, tell_seconds: float = TELL_SECONDS
) -> Iterator[None]:
    """Have a folder, which is made, for this job alone in the block.

    While another job has it, `wait` is called with who that is, at once and every minute. Without it, LockedError is
    raised as soon as the other is known to live. A claim that is lost in the block ends it with a UserError.
    """
    files.make_folder(folder)
    filesystem, inner = files.resolve(folder)
    lock: _Lock = _KernelLock(inner) if isinstance(filesystem, fs.LocalFileSystem) else _Claim(folder)
    told = -float("inf")
    for attempt in itertools.count(1):
        try:
            rival = lock.take()
        except OSError as error:
            if error.errno not in NO_KERNEL_LOCK or isinstance(lock, _Claim):
                raise UserError(f"cannot lock {folder}: {error}") from error
            lock = _Claim(folder)
            continue
        if rival is None:
            break
        if wait is None and attempt >= lock.attempts and lock.is_sure:
            raise LockedError(str(rival))
        if wait is None and attempt == lock.attempts:
            text = f"{folder}: waiting for a sign of life of {rival}, until its lock can be broken"
            print(text, file=sys.stderr, flush=True)
        if wait is not None and time.monotonic() - told >= tell_seconds:
            told = time.monotonic()
            wait(str(rival))
        time.sleep(random.uniform(0.1, 1) * (lock.poll_seconds if wait else min(lock.poll_seconds, 2)))
    with lock.held():
        yield


class _KernelLock:
    """The kernel's lock of a file, which stays when it is free: not all of NFS survives that it goes."""

    poll_seconds = 1.0
    attempts = 1
    is_sure = True

    def __init__(self, folder: str) -> None:
        self._folder, self._file = Path(folder), -1

    def take(self) -> Holder | str | None:
        path = self._folder / FILE
        while True:
            # Who gives up a folder that was new removes it: then a file that was opened before is nobody's.
            self._folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock_file(file)
                if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                    break
            except BlockingIOError:
                holder = Holder.read(os.pread(file, 1 << 16, 0))
                os.close(file)
                return holder or "another process"
            except OSError:
                os.close(file)
                raise
            os.close(file)
        os.ftruncate(file, 0)
        os.pwrite(file, Holder.of_this_process().text(), 0)
        self._file = file
        return None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        try:
            yield
        finally:
            os.close(self._file)


def _lock_file(file: int) -> None:
    """Take the kernel's lock of an open file. Raises BlockingIOError when another has it."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class _LostClaim(KeyboardInterrupt):
    """A lost claim ends the work as Ctrl-C does, at whatever it is."""


class _Claim:
    """A claim in a folder of claims. Only `take` is patient with a store that is busy or away."""

    attempts = ATTEMPTS

    def __init__(self, folder: str) -> None:
        self._folder, self._name = folder, f"{uuid.uuid4().hex}.json"
        self._filesystem, self._claims = files.resolve(files.join(folder, ".claims"))
        self._holder = Holder.of_this_process()
        self._period = self._holder.dead_after / 10
        self.poll_seconds = min(5.0, self._period)
        self._lost = False
        # What the last look saw, and when it is time for the next.
        self._rivals: dict[str, Holder | str] = {}
        self._rival: Holder | str = "another process"
        self._look_again = 0.0
        # When each claim was written that was ever seen, at first sight.
        self._first: dict[str, float] = {}
        self.is_sure = False

    def take(self) -> Holder | str | None:
        return patiently(self._folder, self._take)

    def _take(self) -> Holder | str | None:
        if self._rivals and self._is_held_still():
            return self._rival
        self._filesystem.create_dir(self._claims, recursive=True)
        self._write()
        try:
            times = self._look()
            now = times.pop(self._name, None)
            if now is None:  # removed as dead: the store has taken minutes
                return self._rival
            living = {name: who for name, when in times.items() if (who := self._living(name, now - when))}
            if not living:
                return None
        except BaseException:
            self._delete(self._name)
            raise
        self._delete(self._name)
        self._rivals, self._look_again = living, time.monotonic() + 2 * self._period
        known = [who for who in living.values() if isinstance(who, Holder)]
        self._rival = min(known, key=lambda who: who.since, default="another process")
        self.is_sure |= True in self._lives()
        return self._rival

    def _is_held_still(self) -> bool:
        """Say so from the names of the claims alone: a claim of one's own is in the way of others."""
        if time.monotonic() > self._look_again or False in self._lives():
            return False
        is_held = self._rivals.keys() <= self._look().keys()
        self.is_sure |= True in self._lives()
        return is_held

    def _lives(self) -> list[bool | None]:
        """Say of each rival that is known whether it lives."""
        return [who.lives() for who in self._rivals.values() if isinstance(who, Holder)]

    def _look(self) -> dict[str, float]:
        """When each claim was written. One that is written again while others look on is of somebody who lives."""
        times = self._times()
        others = {name: when for name, when in times.items() if name != self._name}
        self.is_sure = any(self._first.setdefault(name, when) < when for name, when in others.items())
        return times

    def _living(self, name: str, age: float) -> Holder | str | None:
        """Who has made a claim that was renewed `age` seconds ago. A dead one is removed, and None returned."""
        try:
            with self._filesystem.open_input_file(f"{self._claims}/{name}") as stream:
                holder = Holder.read(stream.read())
        except FileNotFoundError:
            return None
        has_died = holder is not None and holder.lives() is False
        if not has_died and age <= (holder or self._holder).dead_after:
            return holder or "another process"
        self._delete(name)
        last = f"{age / 60:.0f} minutes" if age >= 120 else f"{age:.0f} seconds"
        why = "which has ended" if has_died else f"which had not been renewed for {last}"
        print(f"{self._folder}: broke the lock of {holder or 'a job'}, {why}", file=sys.stderr, flush=True)
        return None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        ended = threading.Event()
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGUSR2, _raise_lost) if is_main else None
        renewing = threading.Thread(target=self._keep, args=(ended, is_main), daemon=True)
        renewing.start()
        try:
            try:
                yield
            finally:
                ended.set()
                renewing.join()
            if self._lost:
                raise _LostClaim
        except BaseException as error:
            if not self._lost:
                raise
            raise UserError(
                f"{self._folder}: this job has lost its lock, because it could not renew it for "
                f"{self._holder.dead_after:.0f} seconds, or somebody removed it. Another job may be at work there; "
                "what was finished before is kept, and the same command goes on"
            ) from error
        finally:
            if is_main:
                signal.signal(signal.SIGUSR2, before)
            if not self._lost:
                # A claim that stays is dead with this process, and to other machines after some minutes.
                with contextlib.suppress(OSError):
                    self._delete(self._name)

    def _keep(self, ended: threading.Event, interrupts: bool) -> None:
        """Renew the claim until the end of the block. A store that is away is no loss: others cannot break it."""
        while not ended.wait(self._period):
            with contextlib.suppress(OSError):
                self._lost = not self._renew()
            if self._lost:
                if interrupts:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                return

    def _renew(self) -> bool:
        """Write the claim again. Returns False when it is lost."""
        before = self._times().get(self._name)
        if before is None:
            return False
        self._write()
        times = self._times()
        now = times.pop(self._name, None)
        if now is not None and (now - before <= self._holder.dead_after or not times):
            return True
        # It is late, and whoever takes it for dead may have been about to remove it when it was written again.
        self._delete(self._name)
        return False

    def _times(self) -> dict[str, float]:
        """When each claim was written, by the store's clock."""
        found = self._filesystem.get_file_info(fs.FileSelector(self._claims, allow_not_found=True))
        return {i.base_name: i.mtime.timestamp() for i in found if i.base_name.endswith(".json")}

    def _write(self) -> None:
        with self._filesystem.open_output_stream(f"{self._claims}/{self._name}") as stream:
            stream.write(self._holder.text())

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(f"{self._claims}/{name}")


def _raise_lost(number: int, frame: object) -> None:
    raise _LostClaim
