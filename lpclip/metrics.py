"""Metrics of class probabilities against true labels. Labels serve evaluation alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

NUM_BINS = 15


def classification_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Accuracy, ECE (15 equal-width bins, L1, top label) and NLL (nats) of (N, K) against (N,) int64 labels.

    Rows with a label below 0 have none and are left out; with no label at all every value is None.
    """
    known = labels >= 0
    if not known.any():
        return {"accuracy": None, "ece": None, "nll": None}
    p, y = probabilities[known], labels[known]
    error = multiclass_calibration_error(p, y, num_classes=p.shape[1], n_bins=NUM_BINS, norm="l1")
    return {
        "accuracy": float((p.argmax(dim=1) == y).double().mean()),
        "ece": float(error),
        "nll": float(-p.gather(1, y[:, None]).double().clamp_min(1e-12).log().mean()),
    }


def confusion_matrix(predicted: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    """Counts (K, K) int64: rows are true classes, columns predicted ones. Rows without a label are left out."""
    known = labels >= 0
    cells = labels[known] * num_classes + predicted[known]
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def reliability_bins(probabilities: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Mean confidence, accuracy and count of the top label in each of 15 equal-width bins of confidence."""
    known = labels >= 0
    confidence, predicted = probabilities[known].double().max(dim=1)
    correct = (predicted == labels[known]).double()
    index = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    count = torch.bincount(index, minlength=NUM_BINS)
    filled = count.clamp_min(1)
    return {
        "confidence": (torch.bincount(index, confidence, minlength=NUM_BINS) / filled).tolist(),
        "accuracy": (torch.bincount(index, correct, minlength=NUM_BINS) / filled).tolist(),
        "count": count.tolist(),
    }
