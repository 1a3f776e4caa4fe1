"""A command's process: when it began, the Ray that starts while modules are imported, and a quick end.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import logging.handlers
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NoReturn

from lpclip.config import UserError

# What of Ray's own messages goes to the terminal. An error that ends an execution of Ray Data is raised as well, and
# main prints it in one sentence. A trial whose machine is lost runs again, and one that failed has a record that says
# why.
_SHOWN = {"ray": logging.ERROR, "ray.data": logging.CRITICAL, "ray.tune": logging.CRITICAL}
# Ray's warnings, which wait here until there is a file for them.
_warnings = logging.handlers.MemoryHandler(capacity=1)

TOO_LATE = "timed out during startup"
"""Words of Ray's exception, which has no class of its own."""

_BEGAN = time.monotonic()
# Set while a command runs; a job called from a notebook or a test begins when it is called.
_starting: Future[None] | None = None
_spilled: str | None = None


def begin_command() -> None:
    """Start Ray in a thread, while the command's modules are imported and its inputs are opened."""
    global _starting
    _make_spill_folder()  # here, so that `leave` knows of it whenever it comes
    _starting = Future()
    # Linux ends Ray's processes with the thread that started them, so the thread lives as long as this process.
    threading.Thread(target=_start_and_stay, args=(_starting,), daemon=True).start()


def job_began() -> float:
    """When a job began, on the clock `time.monotonic`: a command's with its process, any other job now."""
    return _BEGAN if _starting else time.monotonic()


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, as in a submitted job, or start a private one on this machine.

    Where `begin_command` did so already, wait for it. Raises UserError when no cluster answers there, the path of the
    temporary folder is too long, or the machine is too busy.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with _starts_explained():
        if _starting is not None:
            _starting.result()
        else:
            _init()
    if threading.current_thread() is threading.main_thread():
        # Ray's own answer to SIGTERM is a list of C++ addresses.
        signal.signal(signal.SIGTERM, on_sigterm)
    import ray.data

    for name in _SHOWN:
        _hush(name)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray would walk each worker's memory map once a second, which stalls the page faults of a busy encoder.
    context.memory_usage_poll_interval_s = None


@contextlib.contextmanager
def _starts_explained() -> Iterator[None]:
    """Explain what keeps Ray from starting: its sockets lie in the temporary folder, and it waits for 30 seconds."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and "AF_UNIX" in str(error):
            raise UserError(
                "the path of the temporary folder is too long for Ray's sockets: set RAY_TMPDIR (or TMPDIR) to a short "
                "path, such as /tmp"
            ) from error
        if TOO_LATE in str(error):
            raise UserError(
                "Ray did not start within the 30 seconds that it waits: this machine is busy; run the command again "
                "when less runs on it, or name a running cluster in RAY_ADDRESS"
            ) from error
        raise


@contextlib.contextmanager
def ray_log(path: str) -> Iterator[None]:
    """Append Ray's warnings and errors of this process to a local file, which is made with the first."""
    file = logging.FileHandler(path, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    _warnings.setTarget(file)
    _warnings.flush()
    try:
        yield
    finally:
        _warnings.setTarget(None)
        file.close()


def _hush(name: str) -> None:
    """Keep one of Ray's loggers, which is set up by its import, from the terminal."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.WARNING)
    logger.propagate = False  # to a logger that shows more
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(_SHOWN[name])
    logger.addHandler(_warnings)


def leave(code: int, *, in_order: bool = True) -> NoReturn:
    """End this process at once: everything is on disk, and a private Ray ends with it.

    Taking Ray and Python down in order would take seconds, for nothing. A cluster is told, if `in_order`.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # closed by the shell before the start
            continue
        try:
            stream.flush()
        except OSError:
            code = code or 120  # as Python does itself
    is_private = _spilled is not None
    if is_private and sys.platform == "linux":
        # The kernel ends some of Ray's processes with this one. Its agents would stay for another minute.
        for child in list(_descendants(os.getpid())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    elif in_order and _starting is not None and _starting.done() and not _starting.exception():
        sys.modules["ray"].shutdown()
    if _spilled is not None:
        shutil.rmtree(_spilled, ignore_errors=True)
    os._exit(code)


def _descendants(pid: int) -> Iterator[int]:
    """The processes that a process started, each before those that it started itself. Linux alone tells."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for child in file.read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def _start_and_stay(started: Future[None]) -> None:
    try:
        _init()
    except BaseException as error:
        started.set_exception(error)
    else:
        started.set_result(None)
    threading.Event().wait()


def _init() -> None:
    here = os.getcwdb()
    if here.decode(errors="replace") != os.getcwd():
        raise UserError(f"Ray cannot start in {here!r}, whose name is not UTF-8: run the command elsewhere")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Train takes one report of its workers each time that it asks after them, by itself every 2 seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address := os.environ.get("RAY_ADDRESS"):
        _reach(address)
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        _make_spill_folder()
        with _no_dashboard():
            # "auto" would wait minutes for a dead cluster whose files are still there.
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                object_spilling_directory=_spilled,
            )


@contextlib.contextmanager
def _no_dashboard() -> Iterator[None]:
    """Tell the Ray that is started meanwhile, but not this process, that no dashboard answers.

    Ray Train asks a dashboard whether its controller is alive. Without an address it waits for one that never comes, 12
    seconds for each training, or asks that of another Ray on this machine, which calls the controller dead.
    """
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = "http://127.0.0.1:1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _reach(address: str) -> None:
    """One quick connection: Ray itself tries for minutes, and cannot be interrupted meanwhile.

    Raises UserError when nobody answers, or the address is that of a dashboard.
    """
    scheme, _, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise UserError(
            f"RAY_ADDRESS is {address}, where `ray job submit` sends jobs to: submit the command with it, or unset it "
            "to run on this machine"
        )
    host, _, port = rest.partition("?")[0].rpartition(":")
    if not host or not port.isdigit():  # such as "auto" and "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS {address} ({error}): start it, or unset RAY_ADDRESS to run on this "
            "machine"
        ) from error


def _make_spill_folder() -> None:
    """Make a private Ray's folder on disk: Ray empties its own when it is taken down in order, as `leave` does not."""
    global _spilled
    if _spilled is None and not os.environ.get("RAY_ADDRESS"):
        _spilled = tempfile.mkdtemp(prefix="lpclip-spilled-", dir=os.environ.get("RAY_TMPDIR"))
        # For a process that ends otherwise than by `leave`.
        atexit.register(shutil.rmtree, _spilled, ignore_errors=True)
