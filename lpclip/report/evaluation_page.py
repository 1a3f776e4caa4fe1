"""The evaluation's tables and its page: from rows of results to what people read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lpclip.evaluation.judge import ZERO_SHOT, Outcomes, Row
from lpclip.evaluation.metrics import confusion_matrix, per_class_recall, reliability_bins, risk_coverage
from lpclip.evaluation.ranking import RECALLS
from lpclip.evaluation.shift import FITS
from lpclip.method.probe import Probe
from lpclip.report.evaluation_figures import (
    corruption_figure,
    effective_robustness_figure,
    ood_figure,
    risk_coverage_figure,
    severity_figures,
)
from lpclip.report.page import Example, Picture, Section, render_page
from lpclip.report.style import colours
from lpclip.report.training_figures import confusion_matrix_figure, reliability_figure

Scores = Mapping[str, tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]]
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
MAX_CLASS_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the page's pictures are drawn from."""

    probes: Mapping[str, Probe]
    clean: Outcomes
    features: np.ndarray
    """(N, d) float16, of the clean set."""
    labels: np.ndarray
    """(N,) int64, of the clean set."""
    scores: Mapping[str, Scores]
    """Of each OOD set, by probe: every score of the images inside and outside, (N,) and (M,)."""
    examples: Sequence[tuple[str, Sequence[Example]]]


def overview_table(results: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each set and each severity's mean over corruptions: every classifier's accuracy and ECE."""
    places: dict[str, dict[str, Any]] = {}
    for row in results:
        if row["metric"] not in ("accuracy", "ece") or (row["corruption"] or "mean") != "mean":
            continue
        title = row["set"]
        if row["corruption"] == "mean":
            level = f"severity {row['severity']}" if row["severity"] else "all severities"
            title += f", mean of corruptions, {level}"
        elif row["kind"] == "shift":
            title += " (shift)"
        place = places.setdefault(title, {"images": title})
        place[f"{row['probe']} {'ECE' if row['metric'] == 'ece' else 'acc'} %"] = row["value"]
    return [_grouped(row) for row in places.values()]


def _grouped(row: dict[str, Any]) -> dict[str, Any]:
    """Accuracies before calibration errors."""
    return dict(sorted(row.items(), key=lambda item: (item[0] != "images", item[0].endswith("ECE %"))))


def gain_table(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Where and by how much each probe is ahead of zero-shot on the same images, with its 95% interval."""
    places: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in results:
        if row["metric"] != "accuracy_gain":
            continue
        key = (row["set"], row["corruption"], row["severity"])
        mean_of_all = row["corruption"] == "mean" and row["severity"] is None
        severity = "all" if mean_of_all else str(row["severity"] or "")
        title = {"images": row["set"], "corruption": row["corruption"] or "none", "severity": severity}
        low, high = (100 * end for end in row["interval"])
        mark = "" if low <= 0 <= high else " *"
        text = f"{100 * row['value']:+.1f} ({low:+.1f} to {high:+.1f}){mark}"
        places.setdefault(key, title)[row["probe"]] = text
    return list(places.values())


def corruption_table(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean accuracy over severities, and corruption error relative to zero-shot's, by corruption and classifier."""
    places: dict[tuple[str, str], dict[str, Any]] = {}
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in results:
        if row["corruption"] in (None, "mean"):
            continue
        if row["metric"] == "accuracy":
            values.setdefault((row["set"], row["corruption"], row["probe"]), []).append(row["value"])
        elif row["metric"].startswith("corruption_error"):
            place = places.setdefault((row["set"], row["corruption"]), {})
            reference = "AlexNet" if row["metric"].endswith("alexnet") else ZERO_SHOT
            place[f"{row['probe']} error / {reference}'s"] = row["value"]
    table = []
    for name, corruption in dict.fromkeys((key[0], key[1]) for key in values):
        row = {"images": name, "corruption": corruption}
        for key, found in values.items():
            if key[:2] == (name, corruption):
                row[f"{key[2]} acc %"] = float(np.mean(found))
        table.append({**row, **places.get((name, corruption), {})})
    return table


def ood_table(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Detection of foreign images, a row for each set, score and classifier."""
    places: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in results:
        if row["kind"] != "ood":
            continue
        metric, score = next(
            (row["metric"].removesuffix(f"_{s}"), s) for s in SCORE_NAMES if row["metric"].endswith(f"_{s}")
        )
        place = places.setdefault(
            (row["set"], score, row["probe"]),
            {"foreign": row["set"], "score": score, "classifier": row["probe"]},
        )
        place[f"{DETECTION_NAMES[metric]} %"] = row["value"]
        if metric == "auroc":
            place["interval"] = "{:.1f} to {:.1f}".format(*(100 * end for end in row["interval"]))
    scores = list(SCORE_NAMES)
    return sorted(places.values(), key=lambda place: scores.index(place["score"]))


def retrieval_table(sets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two rows a set, one for each direction, recalls in per cent with their 95% intervals."""

    def recall(direction: Mapping[str, Any], k: int) -> str:
        value, (low, high) = direction[f"recall_{k}"], direction["intervals"][f"recall_{k}"]
        return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    return [
        {
            "retrieval": item["set"],
            "query": query,
            "images": item["images"],
            "texts": item["texts"],
            "quarantined": item["quarantined"],
            **{f"recall@{k}": recall(direction, k) for k in RECALLS},
            "median rank": f"{direction['median_rank']:g}",
        }
        for item in sets
        for query, direction in (("image", item["image_to_text"]), ("text", item["text_to_image"]))
    ]


def evaluation_page(summary: Mapping[str, Any], evidence: Evidence) -> str:
    """The report as one HTML page."""
    results = summary["results"]
    first = summary["sets"][0]
    facts = {
        "images": ", ".join(
            f"{item['set']} ({item['images']:,})" for item in _first_of_each(summary["sets"])
        ),
        "classifiers": ", ".join(
            name if name == ZERO_SHOT else f"{name} ({about['method']})"
            for name, about in summary["probes"].items()
        ),
        "encoder": summary["encoder_name"]
        + (", which is not CLIP: it serves first impressions" if summary["encoder_name"] == "lite" else ""),
        "classes": f"{len(summary['classes'])}",
        "seed": f"{summary['config']['seed']}",
        "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    }
    sections = [
        _overview(summary),
        *_corrupted(results),
        *_shifted(results),
        _calibration(evidence, first["set"]),
        *_detection(results, evidence, first["set"]),
        *_retrieval(summary["retrieval"]),
        *_classes(evidence),
        *_examples(evidence),
    ]
    return render_page(f"Robustness on {first['set']}", facts=facts, sections=sections)


def _first_of_each(sets: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    seen = set()
    for item in sets:
        if item["set"] not in seen:
            seen.add(item["set"])
            yield item


def _overview(summary: Mapping[str, Any]) -> Section:
    worse = summary["significantly_worse"]
    where = "; ".join(
        " ".join(
            str(cell[key]) for key in ("probe", "set", "corruption", "severity") if cell[key] is not None
        )
        for cell in worse
    )
    verdict = (
        f"Significantly worse than zero-shot (paired bootstrap, 95%): {where}."
        if worse
        else "Nowhere is a probe significantly worse than zero-shot (paired bootstrap, 95%)."
    )
    text = (
        "Accuracy, and expected calibration error (ECE: 15 bins of equal width, top label). Labels were used for "
        f"this evaluation alone.\n\n{verdict}"
    )
    return Section(
        title="Overview",
        text=text,
        tables=[
            ("Accuracy and calibration", overview_table(summary["results"])),
            (
                "Gain over zero-shot in points of accuracy, on the same images, with 95% bootstrap intervals; "
                "* where the interval leaves out zero",
                [row for row in gain_table(summary["results"]) if row["corruption"] in ("none", "mean")],
            ),
        ],
    )


def corruption_curves(results: Sequence[Row], name: str) -> dict[str, dict[str, dict[int, float]]]:
    """Accuracy on a set by corruption, classifier and severity, as the figures take it; empty without corruptions."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for row in results:
        if row["set"] == name and row["metric"] == "accuracy" and row["corruption"] not in (None, "mean"):
            line = curves.setdefault(row["corruption"], {}).setdefault(row["probe"], {})
            line[row["severity"]] = row["value"]
    return curves


def plain_values(results: Sequence[Row], kind: str, metric: str) -> dict[str, dict[str, float]]:
    """Values of a metric on the sets of a kind, by set and classifier, without corruptions."""
    found: dict[str, dict[str, float]] = {}
    for row in results:
        if row["kind"] == kind and row["metric"] == metric and row["corruption"] is None:
            found.setdefault(row["set"], {})[row["probe"]] = row["value"]
    return found


def _corrupted(results: Sequence[Row]) -> Iterator[Section]:
    names = dict.fromkeys(row["set"] for row in results if row["corruption"] is not None)
    clean = next(iter(plain_values(results, "clean", "accuracy").values()))
    for name in names:
        curves = corruption_curves(results, name)
        mine = [row for row in results if row["set"] == name]
        generated = any(row["kind"] == "corrupted" for row in mine)
        origin = (
            "ImageNet-C's functions were applied to the images at the encoder's input size, seeded by image; on "
            "other images than ImageNet's this is not a published benchmark."
            if generated
            else "The published images, read as they are."
        )
        panels = severity_figures(curves, clean=clean if generated else {})
        yield Section(
            title=f"Corruptions of {name}",
            text=f"{origin} Corruption error is the sum of errors over severities relative to zero-shot's: under "
            "1 is better than zero-shot.",
            tables=[
                ("Mean over severities", _without_images(corruption_table(mine))),
                (
                    "Gain over zero-shot in points, paired, with 95% intervals; * where zero is left out",
                    _without_images(
                        row for row in gain_table(mine) if row["corruption"] not in ("none", "mean")
                    ),
                ),
            ],
            legend=colours(clean),
            pictures=[
                Picture(
                    caption="Mean accuracy over severities",
                    figure=corruption_figure(curves, clean=clean if generated else None),
                    alt=f"Accuracy of every classifier under each corruption of {name}",
                ),
                *(
                    Picture(
                        caption="",
                        figure=figure,
                        alt=f"Accuracy against severity of {corruption.replace('_', ' ')}",
                    )
                    for corruption, figure in panels.items()
                ),
            ],
        )


def _without_images(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one set, whose name the section tells."""
    return [{key: value for key, value in row.items() if key != "images"} for row in rows]


def _shifted(results: Sequence[Row]) -> Iterator[Section]:
    shifted = plain_values(results, "shift", "accuracy_of_classes")
    if not shifted:
        return
    before = plain_values(results, "shift", "clean_accuracy_of_classes")
    kept, beyond = (
        plain_values(results, "shift", key) for key in ("retained_accuracy", "effective_robustness")
    )
    rows = [
        {
            "images": name,
            "classifier": probe,
            "clean acc %": before[name][probe],
            "shifted acc %": value,
            "kept %": kept[name][probe],
            "effective robustness %": beyond.get(name, {}).get(probe),
        }
        for name, found in shifted.items()
        for probe, value in found.items()
    ]
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for name, found in shifted.items():
        for probe, value in found.items():
            points.setdefault(probe, {})[name] = (before[name][probe], value)
    yield Section(
        title="Natural shifts",
        text="Accuracy among the classes that occur in the shifted set, there and on the clean one. Effective "
        "robustness (Taori et al. 2020) is what a classifier has beyond the accuracy that ImageNet models of its "
        "clean accuracy have; it is defined for the sets whose fit was published.",
        tables=[("Accuracy under shift", rows)],
        pictures=[
            Picture(
                caption="Shifted against clean accuracy: on the solid line a shift costs nothing",
                figure=effective_robustness_figure(points, fits={n: FITS[n] for n in shifted if n in FITS}),
                alt="Accuracy on shifted sets against accuracy on the clean set, by classifier",
            )
        ],
    )


def _calibration(evidence: Evidence, name: str) -> Section:
    y = torch.from_numpy(evidence.labels)
    bins, curves = {}, {}
    for who, probe in evidence.probes.items():
        bins[who] = reliability_bins(probe.probabilities(evidence.features), y)
        coverage, risk, _ = risk_coverage(
            torch.from_numpy(evidence.clean[who].confidence), torch.from_numpy(evidence.clean[who].correct)
        )
        curves[who] = (coverage.numpy(), risk.numpy())
    rows = [
        {
            "classifier": who,
            "accuracy %": found.metrics["accuracy"],
            "top 5 %": found.metrics["top5_accuracy"],
            "mean recall %": found.metrics["mean_recall"],
            "ECE %": found.metrics["ece"],
            "adaptive ECE %": found.metrics["adaptive_ece"],
            "NLL": found.metrics["nll"],
            "Brier": found.metrics["brier"],
            "AURC": found.metrics["aurc"],
            "AUGRC": found.metrics["augrc"],
        }
        for who, found in evidence.clean.items()
    ]
    return Section(
        title=f"Calibration and selective prediction on {name}",
        text="A reliable classifier lies on the diagonal. Risk and coverage: the share of errors among the most "
        "confident images, as more of them are kept; AURC and AUGRC are areas under that curve and under its "
        "generalised form, and smaller is better.",
        tables=[("Clean images", rows)],
        legend=colours(evidence.probes),
        pictures=[
            Picture(
                caption="Reliability",
                figure=reliability_figure(bins),
                alt="Accuracy against confidence for every classifier",
            ),
            Picture(
                caption="Risk and coverage",
                figure=risk_coverage_figure(curves),
                alt="Share of errors against share of images kept",
            ),
        ],
    )


def _detection(results: Sequence[Row], evidence: Evidence, clean: str) -> Iterator[Section]:
    if not evidence.scores:
        return
    pictures = []
    for name, by_probe in evidence.scores.items():
        for score in ("msp", "mcm"):
            auroc = {
                row["probe"]: row["value"]
                for row in results
                if row["set"] == name and row["metric"] == f"auroc_{score}"
            }
            drawn = {
                probe: (inside[score].numpy(), outside[score].numpy())
                for probe, (inside, outside) in by_probe.items()
            }
            pictures.append(
                Picture(
                    caption=f"{SCORE_NAMES[score]}: {clean} and {name}",
                    figure=ood_figure(drawn, score=SCORE_NAMES[score], names=(clean, name), auroc=auroc),
                    alt=f"Histograms of the {SCORE_NAMES[score]} of {clean} and {name}, by classifier",
                )
            )
    yield Section(
        title="Foreign images",
        text="How well each score tells images of other classes from those of the classifier's own. AUROC: the share "
        "of pairs in which the familiar image scores higher. FPR95 in: foreign images accepted where 95% of the "
        "familiar ones are; FPR95 out: familiar images flagged where 95% of the foreign ones are.",
        tables=[("Detection", ood_table(results))],
        pictures=pictures,
    )


def _retrieval(sets: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    if sets:
        yield Section(
            title="Retrieval",
            text=(
                "The encoder alone, no classifier: the share of queries whose best own candidate is among the first "
                "1, 5 and 10 of all, and its median rank; half of the foreign candidates that tie with it are ahead."
            ),
            tables=[("Recall in per cent, with 95% bootstrap intervals over images", retrieval_table(sets))],
        )


def _classes(evidence: Evidence) -> Iterator[Section]:
    names = next(iter(evidence.probes.values())).class_names
    y = torch.from_numpy(evidence.labels)
    recalls = {
        who: per_class_recall(torch.from_numpy(found.predicted), y, num_classes=len(names))
        for who, found in evidence.clean.items()
    }
    counts = np.bincount(evidence.labels, minlength=len(names))
    rows = [
        {
            "class": name,
            "images": int(counts[place]),
            **{f"{who} recall %": float(found[place]) for who, found in recalls.items()},
        }
        for place, name in enumerate(names)
        if counts[place]
    ]
    shown = rows[:MAX_CLASS_ROWS]
    left = f" The first {len(shown):,} of {len(rows):,} classes." if len(shown) < len(rows) else ""
    pictures = []
    for who, found in evidence.clean.items():
        matrix = confusion_matrix(torch.from_numpy(found.predicted), y, num_classes=len(names))
        pictures.append(
            Picture(
                caption=f"Confusion matrix: {who}",
                figure=confusion_matrix_figure(matrix.numpy(), names),
                alt=f"Shares of each true class by predicted class, {who}",
            )
        )
    yield Section(title="Classes", text=left.strip(), tables=[("Recall by class", shown)], pictures=pictures)


def _examples(evidence: Evidence) -> Iterator[Section]:
    if any(images for _, images in evidence.examples):
        yield Section(
            title="Images",
            text="The first ones in the order of a hash of their names, so neither the best nor the worst.",
            examples=[(caption, images) for caption, images in evidence.examples if images],
        )
