"""The Hugging Face hub: what is cached is taken from there, what is not is downloaded, and what fails is explained.

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import huggingface_hub.constants
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from lpclip.config import UserError
from lpclip.credentials import redact

T = TypeVar("T")

HUB = "hf-hub:"
"""How a name begins that is one of a repository on the hub."""

PROBE_FILES = ("probe.json", "probe.safetensors")
"""All that is downloaded of a probe's repository."""

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""Names of repositories, OWNER/NAME."""

REACH_SECONDS = 5.0


def repository_of(name: str, *, what: str) -> str:
    """OWNER/NAME of hf-hub:OWNER/NAME.

    Raises UserError for another name. `what` is named there: "a probe" or "an encoder".
    """
    repository = name.removeprefix(HUB)
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"{name}: {what} on the hub is hf-hub:OWNER/NAME")
    return repository


def local_probe(name: str) -> str:
    """The folder of a probe: a folder's own name, or for `hf-hub:OWNER/NAME` where its files lie in the hub's cache.

    Raises UserError when the repository cannot be had, or holds no probe.
    """
    if not name.startswith(HUB):
        return name
    repository = repository_of(name, what="a probe")

    def download() -> list[Path]:
        try:
            return [Path(hf_hub_download(repository, file)) for file in PROBE_FILES]
        except RepositoryNotFoundError as error:
            raise UserError(
                f"--probe {name}: the hub has no such repository, or it is private and this machine has no token "
                "for it (hf auth login)"
            ) from error
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise UserError(
                f"--probe {name}: the repository holds no probe, which is {' and '.join(PROBE_FILES)}"
            ) from error

    first, second = cached_or_online(download, what=f"the probe {name}", instead="give --probe FOLDER")
    if first.parent != second.parent:
        raise UserError(
            f"--probe {name} was changed on the hub while it was downloaded: run the command again"
        )
    return str(first.parent)


def cached_or_online(
    action: Callable[[], T], *, what: str, instead: str = "pass a checkpoint file as --pretrained FILE"
) -> T:
    """Run an action on what is cached and, only if that fails, with the hub, which must answer in seconds.

    Left to itself the hub's client retries for most of a minute on a machine without a network. Where it cannot be
    reached, the UserError ends with what the user may do `instead`.
    """
    try:
        with _offline():
            return action()
    except OSError as error:
        endpoint = huggingface_hub.constants.ENDPOINT
        if huggingface_hub.constants.HF_HUB_OFFLINE or not reachable(endpoint, seconds=REACH_SECONDS):
            raise UserError(
                f"{what} is not in the Hugging Face cache and {redact(endpoint)} cannot be reached: connect to a"
                f" network, set HF_HOME to a cache that has it, or {instead}"
            ) from error
    try:
        return action()
    except OSError as error:
        raise UserError(f"cannot load {what}: {first_line(error)}") from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Make the hub's client use its cache alone."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def reachable(url: str, *, seconds: float) -> bool:
    """Say whether a server answers, with anything at all, within so many seconds. Proxies are honoured."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except urllib.error.URLError as error:
            answers.append(isinstance(error.reason, ssl.SSLError))
        except OSError:
            answers.append(False)

    # A name look-up has no timeout of its own, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return any(answers)


def first_line(error: BaseException) -> str:
    """The first line of an error, and the next if the first ends with a colon and says nothing without it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
