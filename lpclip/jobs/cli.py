"""The commands: from flags to a job, and from a job's errors to one line and an exit code.

Flags are parsed before any heavy library is imported, so that --help and wrong flags are answered at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro
from tyro import conf

from lpclip.config import (
    EncodeJob,
    EvaluateJob,
    ExportJob,
    PredictJob,
    PretrainJob,
    ReviewJob,
    SelftrainJob,
    ServeJob,
    StoreAwayError,
    SuggestJob,
    TuneJob,
    UiJob,
    UserError,
    did_you_mean,
    to_dict,
)
from lpclip.jobs.process import begin_command, leave

Config = TypeVar("Config")

# The job `name` is the function `name_job` of the module lpclip.jobs.name.
COMMANDS: dict[str, type] = {
    "encode": EncodeJob,
    "selftrain": SelftrainJob,
    "evaluate": EvaluateJob,
    "tune": TuneJob,
    "predict": PredictJob,
    "pretrain": PretrainJob,
    "export": ExportJob,
    "serve": ServeJob,
    "ui": UiJob,
    "suggest": SuggestJob,
    "review": ReviewJob,
}
LATER = ("export", "serve", "ui", "suggest", "review")
"""Commands that need no Ray, or start it by themselves."""
DESCRIPTION = "Train linear probes on CLIP without labels, and measure them."
EPILOG = """\
lpclip COMMAND --help explains the flags of a command.

An error that you can mend is one line, `error: ...`, and the exit code 1. With LPCLIP_TRACEBACK=1 in the environment,
its traceback is shown as well. Ctrl-C keeps the finished work, and the same command resumes from there."""

# Libraries that write files meet a full disk as well, and raise their own OSError.
FULL = (errno.ENOSPC, errno.EDQUOT)
OPTIONS = (conf.OmitArgPrefixes, conf.OmitSubcommandPrefixes, conf.FlagCreatePairsOff, conf.DisallowNone)


SIGTERM_SECONDS = 20.0
"""After SIGTERM, what a job puts away may take so long. Kubernetes kills after 30 seconds."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and `kill` send it: the work ends as with Ctrl-C."""


def entry() -> None:
    """Run the command line of `lpclip`: a command's name, then its flags."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        run_command(words[0], prog=f"lpclip {words[0]}", args=words[1:])
        return
    if words and not words[0].startswith("-"):
        print(
            f"error: lpclip has no command {words[0]}{did_you_mean(words[0], COMMANDS) or ';'} "
            f"the commands are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        sys.exit(2)
    # No command: tyro shows the list of commands or refuses what was given, and exits.
    with _quiet_where_nothing_reads():
        try:
            tyro.extras.subcommand_cli_from_dict(
                {**COMMANDS}, prog="lpclip", description=DESCRIPTION, args=words or ["--help"], config=OPTIONS
            )
        except SystemExit as end:
            if not end.code:
                print(EPILOG)
            raise


def run_command(name: str, *, prog: str | None = None, args: Sequence[str] | None = None) -> None:
    """Run one command with `args`, the process's own arguments by default, and end the process. See `main`."""

    def run(job: Any) -> None:
        if name not in LATER:
            begin_command()
        module = importlib.import_module(f"lpclip.jobs.{name}")
        getattr(module, f"{name}_job")(job)

    try:
        main(run, COMMANDS[name], prog=prog, args=args)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(0)


def main(
    run: Callable[[Config], object],
    config_type: type[Config],
    *,
    prog: str | None = None,
    args: Sequence[str] | None = None,
) -> None:
    """Parse the flags into `config_type` and run the job with them.

    The flags are the dataclass's fields, nested stages merged. The process exits with 2 on wrong flags, with
    1 and `error: ...` on a UserError or a full disk, here or in a Ray worker, with 130 on Ctrl-C, 143 on SIGTERM and
    141 where the output goes to a process that has ended.
    Anything else is a fault of the program: it keeps its traceback and asks to be reported. LPCLIP_TRACEBACK=1 shows
    the tracebacks of UserErrors too.
    """
    with _quiet_where_nothing_reads():
        config = tyro.cli(config_type, prog=prog, args=args, config=OPTIONS)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot show must not end a job.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _terminable(config):
            _refuse_texts(config)
            run(config)
    except KeyboardInterrupt as stop:
        # A second one ends the process at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        _print_end(config, what)
        sys.exit(code)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            print("error: nothing reads the output any more; finished work is kept", file=sys.stderr)
            sys.exit(141)
        mistake = users_mistake(error)
        if mistake is None:
            error.add_note("This is a fault of lpclip. Please report it with the traceback and the command.")
        if mistake is None or os.environ.get("LPCLIP_TRACEBACK") == "1":
            raise
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def _quiet_where_nothing_reads() -> Iterator[None]:
    """End without a word when the process that reads the help has ended, as `| head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python itself writes what is left once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


def _print_end(config: object, what: str) -> None:
    """Print what becomes of the work of a command that is interrupted or terminated."""
    if isinstance(config, ServeJob):
        print("\nended")  # there is no work to keep
    elif isinstance(config, ExportJob):
        print(f"\n{what}: no file is there by half", file=sys.stderr)
    else:
        print(f"\n{what}: finished work is kept, and the same command resumes from there", file=sys.stderr)


@contextlib.contextmanager
def _terminable(config: object) -> Iterator[None]:
    """Turn SIGTERM into Terminated, and end the process when the work does not end by that."""
    asked = threading.Event()

    def leave_at_once() -> None:
        _print_end(config, "terminated")
        leave(143, in_order=False)

    # Schedulers send SIGTERM to Ray's processes too. Then what is put away would wait a minute for their answers.
    late = threading.Timer(SIGTERM_SECONDS, leave_at_once)
    late.daemon = True

    def terminate(number: int, frame: object) -> None:
        if not asked.is_set():
            asked.set()
            late.start()
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        # Ray gives what interrupts its own waiting another name, and tells of processes that were ended as well.
        if asked.is_set():
            raise Terminated from error
        raise
    finally:
        late.cancel()
        signal.signal(signal.SIGTERM, before)


def _output_is_closed() -> bool:
    """Say whether the process that reads the output has ended, as `| head` does; a server may end a pipe too."""
    poll = select.poll()
    poll.register(1, 0)  # standard output
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _refuse_texts(config: object) -> None:
    """Raise UserError for flags with a secret, or with the bytes of a name that is not UTF-8: Ray takes none."""
    from lpclip import files  # imports pyarrow, which --help does without

    for name, value in to_dict(config).items():
        flag = f"--{name.replace('_', '-')}"
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str):
                continue
            files.refuse_secrets(text, what=flag)
            if re.search("[\udc80-\udcff]", text):
                raise UserError(f"{flag} {os.fsencode(text)!r}: the name is not UTF-8: rename it")


def users_mistake(error: BaseException) -> str | None:
    """The message of the UserError or the full disk at the bottom of an error, None when it is another.

    Ray wraps what a task, a Ray Data stage or a Train worker raised, sometimes several times.
    """
    if not _is_ray(error):
        is_mistake = isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in FULL)
        return " ".join(str(error).split()) if is_mistake else None
    for inner in _wrapped(error):
        if message := users_mistake(inner):
            return message
    return mistake_in_traceback(str(error))


def _is_ray(error: BaseException) -> bool:
    # Ray makes classes that are both its own and the cause's, so the first base would not do.
    return any(base.__module__.split(".")[0] == "ray" for base in type(error).__mro__)


def _wrapped(error: BaseException) -> Iterator[BaseException]:
    """Exceptions inside of a Ray exception: the cause of a task, failures of a controller or of workers."""
    failures = getattr(error, "worker_failures", {})
    names = ("cause", "controller_failure", "_base_exc")
    for inner in [*failures.values(), *(getattr(error, name, None) for name in names)]:
        if isinstance(inner, BaseException):
            yield inner


def mistake_in_traceback(text: str) -> str | None:
    """Find the user's mistake in the text of a traceback, all that Ray Data and a dead actor keep of an exception."""
    errors = re.findall(r"^([\w.]*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    own = [(name, message) for name, message in errors if not name.startswith("ray.")]
    if not own:
        return None
    name, message = own[-1]
    known = {f"{kind.__module__}.{kind.__name__}" for kind in (UserError, StoreAwayError)}
    is_mistake = name in known or "[Errno 28]" in message
    return message.strip() if is_mistake else None
