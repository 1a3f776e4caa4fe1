"""From command-line flags to a job, and from a job's errors to one line and an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import tyro
from tyro import conf

from lpclip import files
from lpclip.config import to_dict
from lpclip.errors import UserError

Config = TypeVar("Config")

# A disk may be full wherever something is written, in libraries too.
FULL = (errno.ENOSPC, errno.EDQUOT)
OPTIONS = (conf.OmitArgPrefixes, conf.OmitSubcommandPrefixes, conf.FlagCreatePairsOff, conf.DisallowNone)


def main(run: Callable[[Config], object], config_type: type[Config]) -> None:
    """Parse the flags into `config_type` and run the job with them.

    The flags are the dataclass's fields, nested stages merged. The process exits with 2 on wrong flags, with
    1 and `error: ...` on a UserError or a full disk, here or in a Ray worker, with 130 on Ctrl-C. Anything else is
    a fault of the program: it keeps its traceback and asks to be reported. LPCLIP_TRACEBACK=1 shows tracebacks
    of UserErrors too.
    """
    config = tyro.cli(config_type, config=OPTIONS)
    try:
        _refuse_secrets(config)
        run(config)
    except KeyboardInterrupt:
        print("\ninterrupted: finished work is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        mistake = users_mistake(error)
        if mistake is None:
            error.add_note("This is a fault of lpclip. Please report it with the traceback and the command.")
        if mistake is None or os.environ.get("LPCLIP_TRACEBACK") == "1":
            raise
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(1)


def _refuse_secrets(config: object) -> None:
    for name, value in to_dict(config).items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                files.refuse_secrets(text, what=f"--{name.replace('_', '-')}")


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
    return _mistake_in_traceback(str(error))


def _is_ray(error: BaseException) -> bool:
    # Ray makes classes that are both its own and the cause's, so the first base would not do.
    return any(base.__module__.split(".")[0] == "ray" for base in type(error).__mro__)


def _wrapped(error: BaseException) -> Iterator[BaseException]:
    """What a Ray exception carries: a task's cause, a controller's or workers' failures, a worker's error."""
    failures = getattr(error, "worker_failures", {})
    names = ("cause", "controller_failure", "_base_exc")
    for inner in [*failures.values(), *(getattr(error, name, None) for name in names)]:
        if isinstance(inner, BaseException):
            yield inner


def _mistake_in_traceback(text: str) -> str | None:
    """The user's mistake in a traceback: all that Ray Data and a dead actor keep of the exception itself."""
    errors = re.findall(r"^([\w.]*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    own = [(name, message) for name, message in errors if not name.startswith("ray.")]
    if not own:
        return None
    name, message = own[-1]
    is_mistake = name == f"{UserError.__module__}.{UserError.__name__}" or "[Errno 28]" in message
    return message.strip() if is_mistake else None
