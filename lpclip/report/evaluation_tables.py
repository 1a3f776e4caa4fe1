"""The evaluation's tables: from results to rows of text and numbers, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lpclip.evaluation.results import (
    MEAN,
    ZERO_SHOT,
    Direction,
    Interval,
    Kind,
    Recall,
    Result,
    RetrievalResult,
)

SCORE_NAMES = {
    "msp": "maximal softmax probability",
    "max_logit": "maximal logit",
    "energy": "energy",
    "mcm": "MCM",
}
DETECTION_NAMES = {
    "auroc": "AUROC",
    "aupr_in": "AUPR in",
    "aupr_out": "AUPR out",
    "fpr95_in": "FPR95 in",
    "fpr95_out": "FPR95 out",
}
CLASSIFICATION_COLUMNS = {
    "accuracy %": "accuracy",
    "top 5 %": "top5_accuracy",
    "mean recall %": "mean_recall",
    "ECE %": "ece",
    "adaptive ECE %": "adaptive_ece",
    "NLL": "nll",
    "Brier": "brier",
    "AURC": "aurc",
    "AUGRC": "augrc",
}


def overview_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each set and each severity's mean over corruptions: every classifier's accuracy and ECE."""
    places: dict[str, dict[str, Any]] = {}
    for found in results:
        if found.metric not in ("accuracy", "ece") or found.corruption not in (None, MEAN):
            continue
        title = found.set
        if found.corruption == MEAN:
            level = f"severity {found.severity}" if found.severity else "all severities"
            title += f", mean of corruptions, {level}"
        elif found.kind == "shift":
            title += " (shift)"
        place = places.setdefault(title, {"images": title})
        place[f"{found.probe} {'ECE' if found.metric == 'ece' else 'acc'} %"] = found.value
    return [_grouped(row) for row in places.values()]


def _grouped(row: dict[str, Any]) -> dict[str, Any]:
    """Accuracies before calibration errors."""
    return dict(sorted(row.items(), key=lambda item: (item[0] != "images", item[0].endswith("ECE %"))))


def classification_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each classifier: all metrics on the clean images."""
    values: dict[str, dict[str, float | None]] = {}
    for found in results:
        if found.kind == "clean":
            values.setdefault(found.probe, {})[found.metric] = found.value
    return [
        {
            "classifier": name,
            **{column: metrics[metric] for column, metric in CLASSIFICATION_COLUMNS.items()},
        }
        for name, metrics in values.items()
    ]


def gain_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Where and by how much each probe is ahead of zero-shot on the same images, with its 95% interval."""
    places: dict[tuple[str, str | None, int | None], dict[str, Any]] = {}
    for found in results:
        if found.metric != "accuracy_gain":
            continue
        assert found.value is not None
        assert found.interval is not None
        mean_of_all = found.corruption == MEAN and found.severity is None
        severity = "all" if mean_of_all else str(found.severity or "")
        title = {"images": found.set, "corruption": found.corruption or "none", "severity": severity}
        low, high = (100 * end for end in found.interval)
        mark = "" if low <= 0 <= high else " *"
        text = f"{100 * found.value:+.1f} ({low:+.1f} to {high:+.1f}){mark}"
        places.setdefault((found.set, found.corruption, found.severity), title)[found.probe] = text
    return list(places.values())


def corruption_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Mean accuracy over severities, and corruption error relative to zero-shot's, by corruption and classifier."""
    places: dict[tuple[str, str], dict[str, Any]] = {}
    values: dict[tuple[str, str, str], list[float]] = {}
    for found in results:
        if found.corruption in (None, MEAN):
            continue
        assert found.corruption is not None
        if found.metric == "accuracy":
            assert found.value is not None
            values.setdefault((found.set, found.corruption, found.probe), []).append(found.value)
        elif found.metric.startswith("corruption_error"):
            place = places.setdefault((found.set, found.corruption), {})
            reference = "AlexNet" if found.metric.endswith("alexnet") else ZERO_SHOT
            place[f"{found.probe} error / {reference}'s"] = found.value
    table = []
    for name, corruption in dict.fromkeys((key[0], key[1]) for key in values):
        row: dict[str, Any] = {"images": name, "corruption": corruption}
        for key, accuracies in values.items():
            if key[:2] == (name, corruption):
                row[f"{key[2]} acc %"] = float(np.mean(accuracies))
        table.append({**row, **places.get((name, corruption), {})})
    return table


def shift_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Accuracy on each shifted set and on the clean one, among the same classes, a row for each classifier."""
    before = plain_values(results, "shift", "clean_accuracy_of_classes")
    kept = plain_values(results, "shift", "retained_accuracy")
    beyond = plain_values(results, "shift", "effective_robustness")
    return [
        {
            "images": name,
            "classifier": probe,
            "clean acc %": before[name][probe],
            "shifted acc %": value,
            "kept %": kept[name][probe],
            "effective robustness %": beyond.get(name, {}).get(probe),
        }
        for name, found in plain_values(results, "shift", "accuracy_of_classes").items()
        for probe, value in found.items()
    ]


def ood_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Detection of foreign images, a row for each set, score and classifier."""
    places: dict[tuple[str, str, str], dict[str, Any]] = {}
    names = {f"{metric}_{score}": (metric, score) for score in SCORE_NAMES for metric in DETECTION_NAMES}
    for found in results:
        if found.kind != "ood":
            continue
        metric, score = names[found.metric]
        place = places.setdefault(
            (found.set, score, found.probe),
            {"foreign": found.set, "score": score, "classifier": found.probe},
        )
        place[f"{DETECTION_NAMES[metric]} %"] = found.value
        if found.interval is not None:
            place["interval"] = _points(found.interval)
    scores = list(SCORE_NAMES)
    return sorted(places.values(), key=lambda place: scores.index(place["score"]))


def retrieval_table(sets: Sequence[RetrievalResult]) -> list[dict[str, Any]]:
    """Two rows a set, one for each direction, recalls in per cent with their 95% intervals."""

    def text(recall: Recall) -> str:
        return f"{100 * recall.value:.1f} ({_points(recall.interval)})"

    def row(item: RetrievalResult, query: str, direction: Direction) -> dict[str, Any]:
        return {
            "retrieval": item.set,
            "query": query,
            "images": item.images,
            "texts": item.texts,
            "quarantined": item.quarantined,
            **{f"recall@{recall.at}": text(recall) for recall in direction.recalls},
            "median rank": f"{direction.median_rank:g}",
        }

    return [
        row(item, query, direction)
        for item in sets
        for query, direction in (
            ("image", item.retrieval.image_to_text),
            ("text", item.retrieval.text_to_image),
        )
    ]


def _points(interval: Interval) -> str:
    return "{:.1f} to {:.1f}".format(*(100 * end for end in interval))


def corruption_curves(results: Sequence[Result], name: str) -> dict[str, dict[str, dict[int, float]]]:
    """Accuracy on a set by corruption, classifier and severity, as the figures take it; empty without corruptions."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for found in results:
        if found.set == name and found.metric == "accuracy" and found.corruption not in (None, MEAN):
            assert found.corruption is not None
            assert found.severity is not None
            assert found.value is not None
            curves.setdefault(found.corruption, {}).setdefault(found.probe, {})[found.severity] = found.value
    return curves


def plain_values(results: Sequence[Result], kind: Kind, metric: str) -> dict[str, dict[str, float]]:
    """Values of a metric on the sets of a kind, by set and classifier, without corruptions."""
    values: dict[str, dict[str, Any]] = {}
    for found in results:
        if found.kind == kind and found.metric == metric and found.corruption is None:
            values.setdefault(found.set, {})[found.probe] = found.value
    return values
