"""Progress of long work, on one line of a terminal or as a line every few seconds of a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class Progress:
    """Counts images, or another unit, against the clock. `total` is None where it is unknown until the end."""

    def __init__(
        self,
        what: str,
        *,
        total: int | None,
        done: int = 0,
        unit: str = "images",
        stream: TextIO | None = None,
    ) -> None:
        self._what, self._total, self._first, self._unit = what, total, done, unit
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._start = self._shown = time.monotonic()
        self.done, self.bad = done, 0
        self._shown_done = -1

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Images a second since the start, those done before it left out."""
        return (self.done - self._first) / max(self.seconds, 1e-9)

    def advance(self, images: int, *, bad: int = 0) -> None:
        """Count images (bad ones among them) and show it, when the last line is old enough."""
        self.done += images
        self.bad += bad
        if time.monotonic() - self._shown >= (0.5 if self._tty else 5.0):
            self._show()

    def close(self) -> None:
        """Show the last line, unless it stands there already."""
        if self._shown_done != self.done:
            self._show()
        if self._tty:
            print(file=self._stream)

    def _show(self) -> None:
        self._shown, self._shown_done = time.monotonic(), self.done
        share = eta = ""
        if self._total:
            share = f" of {self._total:,} ({self.done / self._total:.0%})"
            if self.rate > 0 and self.done < self._total:
                eta = f", {clock((self._total - self.done) / self.rate)} left"
        bad = f", {self.bad:,} quarantined" if self.bad else ""
        line = f"{self._what}: {self.done:,}{share} {self._unit}, {self.rate:.0f} a second{bad}{eta}"
        print(
            f"\r{line:<100}" if self._tty else line,
            end="" if self._tty else "\n",
            file=self._stream,
            flush=True,
        )


class TrialProgress:
    """Counts trials against the clock, a line each: there are tens of them, and each is news."""

    def __init__(self, *, total: int, done: int) -> None:
        self._total, self._first, self._done, self._start = total, done, done, time.monotonic()

    def advance(self, text: str) -> None:
        """A trial has ended, of which `text` tells."""
        self._done += 1
        each = (time.monotonic() - self._start) / (self._done - self._first)
        left = f"; {clock((self._total - self._done) * each)} left" if self._done < self._total else ""
        print(f"trial {self._done} of {self._total}: {text}{left}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def watched(look: Callable[[], object], *, seconds: float) -> Iterator[None]:
    """Call `look` every so many seconds beside the work inside, and once at its end.

    It is for work whose own output would pass through Ray's logs, and twice.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            look()
        look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
