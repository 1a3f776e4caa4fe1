"""Evidence: the arrays that metrics are computed from and pictures are drawn from. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lpclip.evaluation.results import Interval, Result, RetrievalResult


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The answers of one classifier to a cell's labelled images, and their metrics."""

    predicted: np.ndarray
    """(N,) int64."""
    confidence: np.ndarray
    """(N,) float32: the probability of the predicted class."""
    correct: np.ndarray
    """(N,) bool."""
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Interval]


Judgements = Mapping[str, Judgement]
"""By the classifier's name."""


class Scores(NamedTuple):
    """One detection score of familiar and of foreign images; a larger one means more familiar."""

    inside: np.ndarray
    """(N,) float64, of familiar images."""
    outside: np.ndarray
    """(M,) float64, of foreign images."""


ForeignScores = Mapping[str, Mapping[str, Scores]]
"""By the classifier's name, then by the score's."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """The images in 15 bins of confidence of equal width; an empty bin has a mean of 0."""

    confidence: np.ndarray
    """(15,) float64: the mean confidence of each bin's images."""
    accuracy: np.ndarray
    """(15,) float64."""
    count: np.ndarray
    """(15,) int64."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The arrays behind the pictures of one classifier on N labelled images of K classes."""

    reliability: Reliability
    coverage: np.ndarray
    """(N,) float64, rising: the share of images kept, the most confident ones first."""
    risk: np.ndarray
    """(N,) float64: the share of errors among the images kept at each coverage."""
    recall: np.ndarray
    """(K,) float64: the share of each class' images that are recognised, NaN for a class without images."""
    confusion: np.ndarray
    """(K, K) int64 counts: rows are true classes, columns predicted ones."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that an evaluation has found: numbers for tables, arrays for pictures."""

    results: Sequence[Result]
    classes: tuple[str, ...]
    """Names of the K classes."""
    curves: Mapping[str, Curves]
    """On the clean images, by the classifier's name."""
    scores: Mapping[str, ForeignScores]
    """By the name of the set of foreign images."""
    retrieval: Sequence[RetrievalResult] = ()
