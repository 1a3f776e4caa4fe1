"""What classifiers make of labelled, corrupted, shifted and foreign images, each beside zero-shot: rows of numbers.

A row says set, kind, corruption, severity, probe, metric, value and, where it is known, a 95% interval. Labels are
read here and nowhere near training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from lpclip.evaluation.bootstrap import mean_interval
from lpclip.evaluation.detection import auroc_interval, detection_metrics, ood_scores
from lpclip.evaluation.metrics import (
    classification_metrics,
    confusion_matrix,
    metric_intervals,
    reliability_bins,
)
from lpclip.evaluation.shift import ALEXNET_ERRORS, FITS, corruption_error, effective_robustness
from lpclip.method.probe import Probe

ZERO_SHOT = "zero-shot"
Kind = Literal["clean", "corrupted", "published corruption", "shift", "ood"]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Which images: a set as it is, or a set's images under one corruption at one severity."""

    set: str
    kind: Kind
    corruption: str | None = None
    severity: int | None = None

    def row(self, probe: str, metric: str, value: float | None, interval: Any = None) -> Row:
        """One number about these images."""
        return {
            "set": self.set,
            "kind": self.kind,
            "corruption": self.corruption,
            "severity": self.severity,
            "probe": probe,
            "metric": metric,
            "value": value,
            "interval": None if interval is None else [float(end) for end in interval],
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one classifier makes of a cell's labelled images."""

    predicted: np.ndarray
    """(N,) int64."""
    confidence: np.ndarray
    """(N,) float32: the probability of the predicted class."""
    correct: np.ndarray
    """(N,) bool."""
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]


Outcomes = Mapping[str, Outcome]
"""By the probe's name."""


def judge(probes: Mapping[str, Probe], features: np.ndarray, labels: np.ndarray, *, seed: int) -> Outcomes:
    """Every probe on features (N, d) with class indices (N,), all known; `seed` is the bootstrap's."""
    y = torch.from_numpy(labels)
    outcomes = {}
    for name, probe in probes.items():
        p = probe.probabilities(features)
        confidence, predicted = p.max(dim=1)
        outcomes[name] = Outcome(
            predicted=predicted.numpy(),
            confidence=confidence.numpy(),
            correct=(predicted == y).numpy(),
            metrics=classification_metrics(p, y),
            intervals=metric_intervals(p, y, seed=seed),
        )
    return outcomes


def labelled_rows(cell: Cell, outcomes: Outcomes, *, seed: int) -> list[Row]:
    """All metrics of a cell, and each probe's gain over zero-shot: paired, on the same images."""
    rows = []
    for name, outcome in outcomes.items():
        for metric, value in outcome.metrics.items():
            rows.append(cell.row(name, metric, value, outcome.intervals.get(metric)))
        if name != ZERO_SHOT:
            rows.append(_gain(cell, name, outcome.correct, outcomes[ZERO_SHOT].correct, seed=seed))
    return rows


def _gain(cell: Cell, name: str, correct: np.ndarray, reference: np.ndarray, *, seed: int) -> Row:
    """The mean difference of two (N,) scores on the same images; resampling images keeps them paired."""
    difference = correct.astype(np.float64) - reference
    interval = mean_interval(torch.from_numpy(difference), seed=seed)
    return cell.row(name, "accuracy_gain", float(difference.mean()), interval)


def corruption_rows(
    clean: Outcomes | None,
    cells: Mapping[Cell, Outcomes],
    *,
    alexnet: bool,
    seed: int,
    same_images: bool = True,
) -> list[Row]:
    """Means over corruptions, at each severity and overall, and corruption errors, of the cells of one set.

    Corruption error is the sum of errors over severities relative to zero-shot's; with `alexnet`, where all five
    severities are there, to AlexNet's as well, which is defined on ImageNet-C's published files alone (Hendrycks
    and Dietterich 2019). `clean` outcomes give the share of clean accuracy that is kept. `same_images` says that all
    cells' rows are the same images in the same order; otherwise corruptions, not images, are resampled.
    """
    rows: list[Row] = []
    any_cell = next(iter(cells))
    severities = sorted({cell.severity for cell in cells if cell.severity is not None})
    for severity in (*severities, None):
        chosen = [found for cell, found in cells.items() if severity in (None, cell.severity)]
        mean = Cell(set=any_cell.set, kind=any_cell.kind, corruption="mean", severity=severity)
        reference = _per_image([found[ZERO_SHOT] for found in chosen], same_images=same_images)
        for name in chosen[0]:
            values = {key: _mean(found[name].metrics[key] for found in chosen) for key in MEAN_METRICS}
            correct = _per_image([found[name] for found in chosen], same_images=same_images)
            for key, value in values.items():
                interval = mean_interval(torch.from_numpy(correct), seed=seed) if key == "accuracy" else None
                rows.append(mean.row(name, key, value, interval))
            if name != ZERO_SHOT:
                rows.append(_gain(mean, name, correct, reference, seed=seed))
            if any_cell.kind == "corrupted" and clean is not None and clean[name].correct.any():
                kept = values["accuracy"] / float(clean[name].correct.mean())
                rows.append(mean.row(name, "retained_accuracy", kept))
    for name in next(iter(cells.values())):
        rows += _corruption_errors(cells, name, alexnet=alexnet)
    return rows


MEAN_METRICS = ("accuracy", "ece", "nll", "brier", "aurc")


def _per_image(outcomes: Sequence[Outcome], *, same_images: bool) -> np.ndarray:
    """Share of the corruptions under which each image is classified right, (N,), or each corruption's accuracy."""
    if not same_images:
        return np.array([found.correct.mean() for found in outcomes])
    return np.mean([found.correct for found in outcomes], axis=0)


def _mean(values: Iterable[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _corruption_errors(cells: Mapping[Cell, Outcomes], name: str, *, alexnet: bool) -> list[Row]:
    any_cell = next(iter(cells))
    corruptions = list(dict.fromkeys(cell.corruption for cell in cells if cell.corruption is not None))
    errors: dict[str, dict[str, Sequence[float]]] = {
        probe: {
            corruption: [
                float(1 - found[probe].correct.mean())
                for cell, found in cells.items()
                if cell.corruption == corruption
            ]
            for corruption in corruptions
        }
        for probe in (name, ZERO_SHOT)
    }
    references: dict[str, Mapping[str, Sequence[float]]] = {}
    if name != ZERO_SHOT:
        references["corruption_error"] = errors[ZERO_SHOT]
    if alexnet and all(len(v) == 5 and c in ALEXNET_ERRORS for c, v in errors[name].items()):
        references["corruption_error_alexnet"] = ALEXNET_ERRORS
    rows = []
    for metric, reference in references.items():
        found = corruption_error(errors[name], reference=reference)
        known = [value for value in found.values() if value is not None]
        for corruption, value in found.items():
            cell = Cell(set=any_cell.set, kind=any_cell.kind, corruption=corruption)
            rows.append(cell.row(name, metric, value))
        mean = Cell(set=any_cell.set, kind=any_cell.kind, corruption="mean")
        rows.append(mean.row(name, metric, float(np.mean(known)) if known else None))
    return rows


def accuracy_among(probe: Probe, features: np.ndarray, labels: np.ndarray, *, classes: np.ndarray) -> float:
    """Accuracy on the images of some classes (indices) when only these are chosen from."""
    rows = np.isin(labels, classes)
    logits = probe.logits(features[rows])[:, torch.from_numpy(classes)]
    return float((classes[logits.argmax(dim=1).numpy()] == labels[rows]).mean())


def shift_rows(
    cell: Cell,
    probes: Mapping[str, Probe],
    *,
    clean: tuple[np.ndarray, np.ndarray],
    shifted: tuple[np.ndarray, np.ndarray],
) -> list[Row]:
    """The share of clean accuracy that a shifted set keeps, both over the classes that occur in it.

    For a set named as one of `shift.FITS`, effective robustness as well (Taori et al. 2020): what it has beyond the
    accuracy that ImageNet models of the same clean accuracy have there. `clean` and `shifted` are features and labels.
    """
    rows = []
    present = np.unique(shifted[1])
    if not np.isin(clean[1], present).any():
        return []
    for name, probe in probes.items():
        before, after = (accuracy_among(probe, x, y, classes=present) for x, y in (clean, shifted))
        rows.append(cell.row(name, "clean_accuracy_of_classes", before))
        rows.append(cell.row(name, "accuracy_of_classes", after))
        rows.append(cell.row(name, "retained_accuracy", after / before if before else None))
        if cell.set in FITS:
            beyond = effective_robustness(after, accuracy=before, fit=cell.set)
            rows.append(cell.row(name, "effective_robustness", beyond))
    return rows


def ood_rows(
    cell: Cell,
    scores: Mapping[str, tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]],
    *,
    seed: int,
) -> list[Row]:
    """Detection of foreign images by each score, from each probe's scores inside and outside."""
    rows = []
    for name, (inside, outside) in scores.items():
        for score in inside:
            interval = auroc_interval(inside[score], outside[score], seed=seed)
            for metric, value in detection_metrics(inside[score], outside[score]).items():
                rows.append(
                    cell.row(name, f"{metric}_{score}", value, interval if metric == "auroc" else None)
                )
    return rows


def detection_scores(
    probe: Probe, features: np.ndarray, *, cosine_temperature: float
) -> dict[str, torch.Tensor]:
    """A probe's OOD scores of features (N, d), each (N,), larger where an image looks familiar."""
    return ood_scores(
        probe.logits(features), temperature=probe.temperature, cosine_temperature=cosine_temperature
    )


def evaluate(probe: Probe, features: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """All `metrics.METRICS` of a probe on features (N, d) with class indices (N,), -1 for none."""
    return classification_metrics(probe.probabilities(features), torch.from_numpy(labels))


def pictures(probe: Probe, features: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What the confusion matrix and the reliability diagram are drawn from."""
    p, y = probe.probabilities(features), torch.from_numpy(labels)
    matrix = confusion_matrix(p.argmax(dim=1), y, num_classes=p.shape[1])
    return {"confusion": matrix.numpy(), "reliability": reliability_bins(p, y)}
