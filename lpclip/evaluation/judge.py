"""Classifiers judge images: their answers, metrics and scores. Labels are read here and nowhere near training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpclip.evaluation.detection import ood_scores
from lpclip.evaluation.evidence import Curves, Judgement, Judgements, Scores
from lpclip.evaluation.metrics import (
    classification_metrics,
    confusion_matrix,
    metric_intervals,
    per_class_recall,
    reliability_bins,
    risk_coverage,
)
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
    y = torch.from_numpy(images.labels)
    judgements = {}
    for name, probe in probes.items():
        p = probe.probabilities(images.features)
        confidence, predicted = p.max(dim=1)
        judgements[name] = Judgement(
            predicted=predicted.numpy(),
            confidence=confidence.numpy(),
            correct=(predicted == y).numpy(),
            metrics=classification_metrics(p, y),
            intervals=metric_intervals(p, y, seed=seed),
        )
    return judgements


def evaluate(probe: Probe, features: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """All `metrics.METRICS` of a probe on features (N, d) with class indices (N,), -1 for none."""
    return classification_metrics(probe.probabilities(features), torch.from_numpy(labels))


def probe_curves(probe: Probe, features: np.ndarray, labels: np.ndarray) -> Curves:
    """The curves of a probe on features (N, d) with class indices (N,); rows with a label below 0 are left out."""
    known = labels >= 0
    confidence, predicted = probe.probabilities(features[known]).max(dim=1)
    return _curves(predicted, confidence, torch.from_numpy(labels[known]), num_classes=len(probe.bias))


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
    rows = np.isin(images.labels, classes)
    logits = probe.logits(images.features[rows])[:, torch.from_numpy(classes)]
    return float((classes[logits.argmax(dim=1).numpy()] == images.labels[rows]).mean())


def foreign_scores(
    probe: Probe, *, inside: np.ndarray, outside: np.ndarray, cosine_temperature: float
) -> dict[str, Scores]:
    """All `detection.ood_scores` of features of familiar images (N, d) and of foreign ones (M, d), by score."""
    familiar, foreign = (
        ood_scores(
            probe.logits(features), temperature=probe.temperature, cosine_temperature=cosine_temperature
        )
        for features in (inside, outside)
    )
    return {name: Scores(familiar[name].numpy(), foreign[name].numpy()) for name in familiar}
