"""Results: one number each, about some images and one classifier or encoder. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

ZERO_SHOT = "zero-shot"
MEAN = "mean"
"""The corruption of a result that is a mean over corruptions."""

Kind = Literal["clean", "corrupted", "published corruption", "shift", "ood"]
Interval = tuple[float, float]
"""The lower and the upper end of a 95% percentile bootstrap interval."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The images of a result: a set as it is, or a set's images under one corruption at one severity."""

    set: str
    kind: Kind
    corruption: str | None = None
    severity: int | None = None

    def result(
        self, probe: str, metric: str, value: float | None, interval: Iterable[float] | None = None
    ) -> Result:
        """One number about these images."""
        ends = None
        if interval is not None:
            low, high = interval
            ends = (float(low), float(high))
        return Result(
            set=self.set,
            kind=self.kind,
            corruption=self.corruption,
            severity=self.severity,
            probe=probe,
            metric=metric,
            value=value,
            interval=ends,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """One metric of one classifier on the images of a cell."""

    set: str
    kind: Kind
    corruption: str | None
    severity: int | None
    probe: str
    """The name of the classifier, which may be ZERO_SHOT."""
    metric: str
    value: float | None
    """None where the metric is not defined, as top-5 accuracy is not for five classes."""
    interval: Interval | None

    @property
    def place(self) -> str:
        """Set, corruption and severity, as far as they are given, as text."""
        return " ".join(str(part) for part in (self.set, self.corruption, self.severity) if part is not None)

    def to_json(self) -> dict[str, Any]:
        """The result as it is written to summary.json."""
        ends = None if self.interval is None else list(self.interval)
        return {**vars(self), "interval": ends}


def worse_than_zero_shot(results: Sequence[Result]) -> list[Result]:
    """The gains over zero-shot whose interval lies below zero, on sets and on single corruptions of them."""
    gains = [found for found in results if found.metric == "accuracy_gain" and found.corruption != MEAN]
    return [gain for gain in gains if gain.interval is not None and gain.interval[1] < 0]


class Recall(NamedTuple):
    """The share of queries whose rank is at most `at`."""

    at: int
    value: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Direction:
    """Recalls and median rank of one direction of retrieval."""

    recalls: tuple[Recall, ...]
    median_rank: float

    def recall(self, at: int) -> float:
        """The share of queries whose rank is at most `at`, which must be one of those measured."""
        (found,) = [recall.value for recall in self.recalls if recall.at == at]
        return found

    def numbers(self) -> dict[str, float]:
        """All numbers by name, without intervals."""
        return {**{f"recall_{r.at}": r.value for r in self.recalls}, "median_rank": self.median_rank}

    def to_json(self) -> dict[str, Any]:
        """The direction as it is written to summary.json."""
        return {**self.numbers(), "intervals": {f"recall_{r.at}": list(r.interval) for r in self.recalls}}


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Image-text retrieval on one set, in both directions."""

    image_to_text: Direction
    """Images are the queries, all texts the candidates."""
    text_to_image: Direction

    def directions(self) -> dict[str, Direction]:
        """Both directions by name."""
        return {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Retrieval on one set, and how much the set holds."""

    set: str
    images: int
    texts: int
    quarantined: int
    """Images that could not be read, or have no text."""
    retrieval: Retrieval
