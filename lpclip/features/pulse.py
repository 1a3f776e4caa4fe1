"""The pulse of a running pipeline: its rate, and how many of its processes are at work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lpclip.features.stalls import seconds_at_work
from lpclip.progress import Progress

PULSE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """A pipeline between two moments."""

    images: int
    """Images that are done, bad ones among them, those of an interrupted run too."""
    quarantined: int
    """Bad ones, of this run."""
    images_per_second: float
    at_work: dict[str, float]
    """Processes at work on the mean, by stage, such as "decoding"; a process that waits for others is not at work."""


class PulseTaker:
    """Tells of a pipeline whenever it is looked at: what it did since the look before."""

    def __init__(self, progress: Progress, tell: Callable[[Pulse], object]) -> None:
        self._progress, self._tell = progress, tell
        self._time, self._images = time.monotonic(), progress.done
        self._at_work: dict[str, float] = {}

    def look(self) -> None:
        """Tell of what was done since the look before, if anything was."""
        now, images, at_work = time.monotonic(), self._progress.done, seconds_at_work()
        seconds = now - self._time
        if images <= self._images:
            return
        # A pipeline that was begun again counts from 0.
        since = {stage: total - min(self._at_work.get(stage, 0.0), total) for stage, total in at_work.items()}
        self._tell(
            Pulse(
                images=images,
                quarantined=self._progress.bad,
                images_per_second=(images - self._images) / seconds,
                at_work={stage: value / seconds for stage, value in since.items()},
            )
        )
        self._time, self._images, self._at_work = now, images, at_work
