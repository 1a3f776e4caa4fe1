"""Remote stores that are busy or away: who says so, and how long lpclip asks again.

Whatever reads or writes through pyarrow.fs does so by `patiently`, mostly inside of lpclip/files.py.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from lpclip.config import StoreAwayError

# What pyarrow's S3, GCS and Azure, and the client of the Hugging Face hub, say when a store is busy or away. The S3
# has then asked 31 times within six seconds, the GCS for 15 minutes, the Azure four times.
_AWAY = re.compile(
    r"AWS Error (?:SLOW_DOWN|THROTTLING|NETWORK_CONNECTION|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|UNKNOWN \(HTTP status (?:429|5\d\d)\))"
    r"|google::cloud::Status\((?:UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL)\b"
    r"|Azure Error: \[\w*\] (?:429|5\d\d|(?!\d{3}\b))"
    r"|^(?:429 Client|5\d\d Server) Error\b"
)
PATIENCE_SECONDS = 300.0
MAX_WAIT_SECONDS = 30.0

T = TypeVar("T")


def is_away(error: BaseException) -> bool:
    """Say whether an error is that of a store that is busy or away. Any other error is about the file itself."""
    # The hub's client has one of two libraries for HTTP, whose errors are no OSErrors.
    kinds = {(kind.__module__.partition(".")[0].rstrip("2"), kind.__name__) for kind in type(error).__mro__}
    is_of_network = ("httpx", "TransportError") in kinds or isinstance(error, (ConnectionError, TimeoutError))
    return is_of_network or bool(_AWAY.search(str(error)))


def patiently(path: str, work: Callable[[], T]) -> T:
    """Call `work`, which reads or writes at `path`, again and again while the store is busy or away.

    The waits are random and grow to half a minute, so that many processes do not come back at once. Raises
    StoreAwayError after LPCLIP_PATIENCE seconds, by default 300, and every other error at once.
    """
    patience = float(os.environ.get("LPCLIP_PATIENCE", PATIENCE_SECONDS))
    end = time.monotonic() + patience
    for attempt in itertools.count():
        try:
            return work()
        except Exception as error:
            if not is_away(error):
                raise
            wait = random.uniform(0, min(MAX_WAIT_SECONDS, 2.0**attempt))
            if time.monotonic() + wait > end:
                raise StoreAwayError(
                    f"{path}: the store is busy or away, and was so for {patience:.0f} seconds ({error}); what was "
                    "finished before is kept, the same command goes on"
                ) from error
            _tell_of_waiting(path, error, patience)
            time.sleep(wait)
    raise AssertionError


_told = -float("inf")


def _tell_of_waiting(path: str, error: Exception, patience: float) -> None:
    """Say it once a minute, for all threads."""
    global _told
    now = time.monotonic()
    if now - _told >= 60:
        _told = now
        text = f"{path}: the store is busy or away ({error}), trying again for {patience:.0f} seconds"
        print(text, file=sys.stderr, flush=True)
