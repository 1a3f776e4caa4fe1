"""Evaluation of probes on labelled features, and the temperature that needs no labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lpclip.evaluation.metrics import classification_metrics, confusion_matrix, reliability_bins
from lpclip.method.probe import Probe

# Rows for the temperature: the first in row order, a fair sample.
CALIBRATION_ROWS = 20_000


def evaluate(probe: Probe, features: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """All `metrics.METRICS` of a probe on features (N, d) with class indices (N,), -1 for none."""
    return classification_metrics(probe.probabilities(features), torch.from_numpy(labels))


def pictures(probe: Probe, features: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What the confusion matrix and the reliability diagram are drawn from."""
    p, y = probe.probabilities(features), torch.from_numpy(labels)
    matrix = confusion_matrix(p.argmax(dim=1), y, num_classes=p.shape[1])
    return {"confusion": matrix.numpy(), "reliability": reliability_bins(p, y)}


def mean_confidence(probe: Probe, features: np.ndarray, *, temperature: float | None = None) -> float:
    """Mean maximal probability of a probe on features (N, d)."""
    logits = probe.logits(features) / (temperature or probe.temperature)
    return float(torch.softmax(logits, dim=1).amax(dim=1).double().mean())


def expected_accuracy(zero_shot_confidence: float) -> float:
    """A guess of a self-trained probe's accuracy from zero-shot's mean confidence c, in (0, 1): c's odds squared.

    c stands for zero-shot's accuracy. The unlabelled features are taken for a second witness that is as good and
    independent, and where such two agree their odds multiply: c^2 / (c^2 + (1 - c)^2). Never less than c itself.
    """
    c = min(max(zero_shot_confidence, 1e-6), 1 - 1e-6)
    return max(c, c**2 / (c**2 + (1 - c) ** 2))


def label_free_temperature(probe: Probe, *, zero_shot: Probe, features: np.ndarray) -> float:
    """The temperature at which the probe is as confident on the mean as it can be expected to be right.

    Labels play no part. Zero-shot's own confidence fits an accuracy that the probe exceeds; docs/method.md has
    what other guesses give.
    """
    sample = features[:CALIBRATION_ROWS]
    target = expected_accuracy(mean_confidence(zero_shot, sample))
    return temperature_at(probe.logits(sample), confidence=target)


def temperature_at(logits: Tensor, *, confidence: float) -> float:
    """The temperature that gives logits (N, K) this mean maximal probability, within 2^-8 to 2^8."""
    low, high = -8.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        too_sure = float(torch.softmax(logits / 2.0**middle, dim=1).amax(dim=1).double().mean()) > confidence
        low, high = (middle, high) if too_sure else (low, middle)
    return 2.0 ** ((low + high) / 2)


def supervised_probe(features: np.ndarray, labels: np.ndarray, *, like: Probe) -> Probe:
    """The ceiling: logistic regression on true labels, its regularisation chosen on a fifth of the rows.

    Features (N, d) in row order, class indices (N,) with -1 for none. Classes that never occur keep a logit
    far below all others. Raises ValueError with fewer than two classes or ten labelled rows.
    """
    known = labels >= 0
    x, y = features[known].astype(np.float32), labels[known]
    held = len(y) // 5
    if len(y) < 10 or len(np.unique(y[held:])) < 2:
        raise ValueError("--supervised needs at least ten labelled images of two classes in --data")
    scores = {}
    for strength in (1.0, 10.0, 100.0):
        model = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x[held:], y[held:])
        scores[strength] = model.score(x[:held], y[:held])
    best = max(scores, key=scores.__getitem__)
    model = LogisticRegression(C=best, max_iter=200, tol=1e-3).fit(x, y)
    weight, bias = torch.zeros(like.weight.shape), torch.full(like.bias.shape, -1e4)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])
    places = torch.from_numpy(model.classes_)
    weight[places], bias[places] = (
        torch.from_numpy(coefficients).float(),
        torch.from_numpy(intercepts).float(),
    )
    return Probe(
        weight=weight,
        bias=bias,
        class_names=like.class_names,
        encoder=like.encoder,
        summary={"method": "supervised", "C": best, "held_out_accuracy": scores[best]},
    )
