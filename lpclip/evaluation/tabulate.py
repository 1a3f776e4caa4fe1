"""Judgements become results: every metric of every classifier, and each probe beside zero-shot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from lpclip.evaluation.bootstrap import mean_interval
from lpclip.evaluation.detection import auroc_interval, detection_metrics
from lpclip.evaluation.evidence import ForeignScores, Judgement, Judgements
from lpclip.evaluation.judge import Labelled, accuracy_among
from lpclip.evaluation.results import MEAN, ZERO_SHOT, Cell, Result
from lpclip.evaluation.shift import ALEXNET_ERRORS, FITS, corruption_error, effective_robustness
from lpclip.method.probe import Probe

MEAN_METRICS = ("accuracy", "ece", "nll", "brier", "aurc")


def labelled_results(cell: Cell, judgements: Judgements, *, seed: int) -> list[Result]:
    """All metrics of a cell, and each probe's gain over zero-shot: paired, on the same images."""
    results = []
    for name, judgement in judgements.items():
        for metric, value in judgement.metrics.items():
            results.append(cell.result(name, metric, value, judgement.intervals.get(metric)))
        if name != ZERO_SHOT:
            results.append(_gain(cell, name, judgement.correct, judgements[ZERO_SHOT].correct, seed=seed))
    return results


def _gain(cell: Cell, name: str, correct: np.ndarray, reference: np.ndarray, *, seed: int) -> Result:
    """The mean difference of two (N,) scores on the same images; resampling images keeps them paired."""
    difference = correct.astype(np.float64) - reference
    interval = mean_interval(torch.from_numpy(difference), seed=seed).tolist()
    return cell.result(name, "accuracy_gain", float(difference.mean()), interval)


def corruption_results(
    clean: Judgements | None,
    cells: Mapping[Cell, Judgements],
    *,
    alexnet: bool,
    seed: int,
    same_images: bool = True,
) -> list[Result]:
    """Means over corruptions, at each severity and overall, and corruption errors, of the cells of one set.

    Corruption error is the sum of errors over severities relative to zero-shot's; with `alexnet`, for ImageNet-C's
    corruptions that are there in all five severities, to AlexNet's as well, which is defined on its published files
    alone (Hendrycks and Dietterich 2019). The mean of these is the mCE where all 15 are there. `clean` judgements give
    the share of clean accuracy that is kept. `same_images` says that all cells' rows are the same images in the same
    order; otherwise corruptions, not images, are resampled.
    """
    results: list[Result] = []
    any_cell = next(iter(cells))
    severities = sorted({cell.severity for cell in cells if cell.severity is not None})
    for severity in (*severities, None):
        chosen = [found for cell, found in cells.items() if severity in (None, cell.severity)]
        mean = Cell(set=any_cell.set, kind=any_cell.kind, corruption=MEAN, severity=severity)
        results += _means(mean, chosen, clean, seed=seed, same_images=same_images)
    for name in next(iter(cells.values())):
        results += _corruption_errors(cells, name, alexnet=alexnet)
    return results


def _means(
    mean: Cell, chosen: Sequence[Judgements], clean: Judgements | None, *, seed: int, same_images: bool
) -> list[Result]:
    """Each classifier's means over the chosen cells."""
    results = []
    reference = _per_image([found[ZERO_SHOT] for found in chosen], same_images=same_images)
    for name in chosen[0]:
        values = {key: _mean(found[name].metrics[key] for found in chosen) for key in MEAN_METRICS}
        correct = _per_image([found[name] for found in chosen], same_images=same_images)
        accuracy_interval = mean_interval(torch.from_numpy(correct), seed=seed).tolist()
        for key, value in values.items():
            interval = accuracy_interval if key == "accuracy" else None
            results.append(mean.result(name, key, value, interval))
        if name != ZERO_SHOT:
            results.append(_gain(mean, name, correct, reference, seed=seed))
        if mean.kind == "corrupted" and clean is not None and clean[name].correct.any():
            kept = values["accuracy"] / float(clean[name].correct.mean())
            results.append(mean.result(name, "retained_accuracy", kept))
    return results


def _per_image(judgements: Sequence[Judgement], *, same_images: bool) -> np.ndarray:
    """Share of the corruptions under which each image is classified right, (N,), or each corruption's accuracy."""
    if not same_images:
        return np.array([found.correct.mean() for found in judgements])
    return np.mean([found.correct for found in judgements], axis=0)


def _mean(values: Iterable[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _corruption_errors(cells: Mapping[Cell, Judgements], name: str, *, alexnet: bool) -> list[Result]:
    any_cell = next(iter(cells))
    errors = _errors(cells, name)
    found: dict[str, dict[str, float | None]] = {}
    if name != ZERO_SHOT:
        found["corruption_error"] = corruption_error(errors, reference=_errors(cells, ZERO_SHOT))
    of_imagenet_c = {c: v for c, v in errors.items() if c in ALEXNET_ERRORS and len(v) == 5}
    if alexnet and of_imagenet_c:
        found["corruption_error_alexnet"] = corruption_error(of_imagenet_c, reference=ALEXNET_ERRORS)
    results = []
    for metric, by_corruption in found.items():
        for corruption, value in by_corruption.items():
            cell = Cell(set=any_cell.set, kind=any_cell.kind, corruption=corruption)
            results.append(cell.result(name, metric, value))
        known = [value for value in by_corruption.values() if value is not None]
        mean = Cell(set=any_cell.set, kind=any_cell.kind, corruption=MEAN)
        is_mce = metric == "corruption_error_alexnet" and len(by_corruption) == len(ALEXNET_ERRORS)
        results.append(
            mean.result(name, "mce" if is_mce else metric, float(np.mean(known)) if known else None)
        )
    return results


def _errors(cells: Mapping[Cell, Judgements], name: str) -> dict[str, list[float]]:
    """A classifier's errors by corruption, one for each severity."""
    errors: dict[str, list[float]] = {}
    for cell, found in cells.items():
        if cell.corruption is not None:
            errors.setdefault(cell.corruption, []).append(float(1 - found[name].correct.mean()))
    return errors


def shift_results(
    cell: Cell, probes: Mapping[str, Probe], *, clean: Labelled, shifted: Labelled
) -> list[Result]:
    """The share of clean accuracy that a shifted set keeps, both among the classes that occur in both sets.

    For a set named as one of `shift.FITS`, effective robustness as well (Taori et al. 2020): what it has beyond the
    accuracy that ImageNet models of the same clean accuracy have there. It is left out where classes are missing, as in
    a few images of each set: accuracies among fewer classes are higher, and the published line is not theirs.
    """
    results = []
    common = np.intersect1d(clean.labels, shifted.labels)
    if not len(common):
        return []
    for name, probe in probes.items():
        before, after = (accuracy_among(probe, images, classes=common) for images in (clean, shifted))
        results.append(cell.result(name, "clean_accuracy_of_classes", before))
        results.append(cell.result(name, "accuracy_of_classes", after))
        results.append(cell.result(name, "retained_accuracy", after / before if before else None))
        if cell.set in FITS and len(common) == FITS[cell.set].num_classes:
            beyond = effective_robustness(after, accuracy=before, fit=cell.set)
            results.append(cell.result(name, "effective_robustness", beyond))
    return results


def ood_results(cell: Cell, scores: ForeignScores, *, seed: int) -> list[Result]:
    """Detection of foreign images by each score of each classifier."""
    results = []
    for name, by_score in scores.items():
        for score, sides in by_score.items():
            inside, outside = (torch.from_numpy(side) for side in sides)
            interval = auroc_interval(inside, outside, seed=seed)
            for metric, value in detection_metrics(inside, outside).items():
                own = interval if metric == "auroc" else None
                results.append(cell.result(name, f"{metric}_{score}", value, own))
    return results
