"""Classifiers judge images: their answers, metrics and scores. Labels are read here and nowhere near training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpclip.evaluation.detection import SCORES, ood_scores
from lpclip.evaluation.evidence import Curves, Judgement, Judgements, Scores
from lpclip.evaluation.metrics import (
    Answers,
    answers,
    classification_metrics,
    confusion_matrix,
    metric_intervals,
    per_class_recall,
    reliability_bins,
    risk_coverage,
)
from lpclip.method.linear import Linear
from lpclip.method.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images to judge, each with its true class."""

    features: np.ndarray
    """(N, d) float16, unit norm."""
    labels: np.ndarray
    """(N,) int64 class indices."""


def judge(probes: Mapping[str, Probe], images: Labelled, *, seed: int) -> Judgements:
    """The judgement of every probe; `seed` draws the bootstrap's resamples."""
    judgements = {}
    for name, probe in probes.items():
        found = _answers(probe, images.features, images.labels)
        judgements[name] = Judgement(
            predicted=found.predicted.numpy(),
            confidence=found.confidence.numpy(),
            correct=found.correct.numpy(),
            metrics=classification_metrics(found),
            intervals=metric_intervals(found, seed=seed),
        )
    return judgements


def evaluate(probe: Probe, features: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """All `metrics.METRICS` of a probe on features (N, d) with class indices (N,), -1 for none."""
    return classification_metrics(_answers(probe, features, labels))


def accuracy(classifier: Linear, features: np.ndarray, labels: np.ndarray) -> float | None:
    """The accuracy on features (N, d) with class indices (N,), -1 for none; None without any."""
    known = labels >= 0
    return float((classifier.predict(features) == labels)[known].mean()) if known.any() else None


def probe_curves(probe: Probe, features: np.ndarray, labels: np.ndarray) -> Curves:
    """The curves of a probe on features (N, d) with class indices (N,); rows with a label below 0 are left out."""
    found = _answers(probe, features, labels)
    return _curves(found.predicted, found.confidence, found.labels, num_classes=found.num_classes)


def _answers(probe: Probe, features: np.ndarray, labels: np.ndarray) -> Answers:
    """The answers to the features (N, d) that have a label; probabilities (N, K) are never there as a whole."""
    rows = np.flatnonzero(labels >= 0)

    def work(block: slice) -> list[Tensor]:
        p = probe.probabilities(features[rows[block]])
        found = answers(p, torch.from_numpy(labels[rows[block]]))
        return [found.labels, found.predicted, found.confidence, found.scores]

    y, predicted, confidence, scores = probe.by_blocks(len(rows), work)
    return Answers(
        num_classes=len(probe.bias), labels=y, predicted=predicted, confidence=confidence, scores=scores
    )


def judgement_curves(judgement: Judgement, labels: np.ndarray, *, num_classes: int) -> Curves:
    """The curves of a judgement on the images with these class indices (N,)."""
    predicted, confidence = torch.from_numpy(judgement.predicted), torch.from_numpy(judgement.confidence)
    return _curves(predicted, confidence, torch.from_numpy(labels), num_classes=num_classes)


def _curves(predicted: Tensor, confidence: Tensor, labels: Tensor, *, num_classes: int) -> Curves:
    correct = predicted == labels
    coverage, risk, _ = risk_coverage(confidence, correct)
    return Curves(
        reliability=reliability_bins(confidence, correct),
        coverage=coverage.numpy(),
        risk=risk.numpy(),
        recall=per_class_recall(predicted, labels, num_classes=num_classes).numpy(),
        confusion=confusion_matrix(predicted, labels, num_classes=num_classes).numpy(),
    )


def accuracy_among(probe: Probe, images: Labelled, *, classes: np.ndarray) -> float:
    """Accuracy on the images of some classes (indices) when only these classes are chosen from."""
    chosen = Linear(weight=probe.weight[classes], bias=probe.bias[classes])
    places = np.full(len(probe.bias), -1)
    places[classes] = np.arange(len(classes))
    found = accuracy(chosen, images.features, places[images.labels])
    assert found is not None, "there are images of these classes"
    return found


def foreign_scores(
    probe: Probe, *, inside: np.ndarray, outside: np.ndarray, cosine_temperature: float
) -> dict[str, Scores]:
    """All `detection.ood_scores` of features of familiar images (N, d) and of foreign ones (M, d), by score."""

    temperatures = {"temperature": probe.temperature, "cosine_temperature": cosine_temperature}

    def scores(features: np.ndarray) -> list[Tensor]:
        return probe.by_blocks(
            len(features), lambda rows: [*ood_scores(probe.logits(features[rows]), **temperatures).values()]
        )

    sides = zip(SCORES, scores(inside), scores(outside), strict=True)
    return {name: Scores(familiar.numpy(), foreign.numpy()) for name, familiar, foreign in sides}
