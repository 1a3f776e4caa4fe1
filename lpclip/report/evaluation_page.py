"""The evaluation's page: finished numbers and arrays become sections of tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lpclip.evaluation.evidence import Evidence
from lpclip.evaluation.results import MEAN, Result, RetrievalResult, worse_than_zero_shot
from lpclip.evaluation.shift import ALEXNET_ERROR, FITS
from lpclip.report.evaluation_figures import (
    corruption_figure,
    effective_robustness_figure,
    ood_figure,
    risk_coverage_figure,
    severity_figures,
)
from lpclip.report.evaluation_tables import (
    SCORE_NAMES,
    classification_table,
    corruption_curves,
    corruption_table,
    gain_table,
    ood_table,
    overview_table,
    plain_values,
    retrieval_table,
    shift_table,
)
from lpclip.report.page import Example, Picture, Section, render_page
from lpclip.report.style import colours
from lpclip.report.training_figures import confusion_matrix_figure, reliability_figure

MAX_CLASS_ROWS = 100
DRAWN_SCORES = ("msp", "mcm")


def evaluation_page(
    evidence: Evidence, *, facts: Mapping[str, str], examples: Sequence[tuple[str, Sequence[Example]]]
) -> str:
    """The report as one HTML page: `facts` on top, then a section for each kind of images.

    `examples` are pairs of a caption and images.
    """
    results = evidence.results
    clean = next(found.set for found in results if found.kind == "clean")
    sections = [
        _overview(results),
        *_corrupted(results),
        *_shifted(results),
        _calibration(evidence, clean),
        *_detection(evidence, clean),
        *_retrieval(evidence.retrieval),
        _classes(evidence),
        *_examples(examples),
    ]
    return render_page(f"Robustness on {clean}", facts=facts, sections=sections)


def _overview(results: Sequence[Result]) -> Section:
    worse = "; ".join(f"{gain.probe} {gain.place}" for gain in worse_than_zero_shot(results))
    verdict = (
        f"Significantly worse than zero-shot (paired bootstrap, 95%): {worse}."
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
            ("Accuracy and calibration", overview_table(results)),
            (
                "Gain over zero-shot in points of accuracy, on the same images, with 95% bootstrap intervals; "
                "* where the interval leaves out zero",
                [row for row in gain_table(results) if row["corruption"] in ("none", MEAN)],
            ),
        ],
    )


def _corrupted(results: Sequence[Result]) -> Iterator[Section]:
    names = dict.fromkeys(found.set for found in results if found.corruption is not None)
    clean = next(iter(plain_values(results, "clean", "accuracy").values()))
    for name in names:
        yield _corruptions_of(name, [found for found in results if found.set == name], clean)


def _corruptions_of(name: str, results: Sequence[Result], clean: Mapping[str, float]) -> Section:
    """The section of one set, from its own results and the classifiers' clean accuracies."""
    curves = corruption_curves(results, name)
    generated = any(found.kind == "corrupted" for found in results)
    origin = (
        "ImageNet-C's functions were applied to the images at the encoder's input size, seeded by image; on "
        "other images than ImageNet's this is not a published benchmark."
        if generated
        else "The published images, read as they are."
    )
    overview = Picture(
        caption="Mean accuracy over severities",
        figure=corruption_figure(curves, clean=clean if generated else None),
        alt=f"Accuracy of every classifier under each corruption of {name}",
    )
    panels = [
        Picture(caption="", figure=figure, alt=f"Accuracy against severity of {corruption.replace('_', ' ')}")
        for corruption, figure in severity_figures(curves, clean=clean if generated else {}).items()
    ]
    gains = (row for row in gain_table(results) if row["corruption"] not in ("none", MEAN))
    return Section(
        title=f"Corruptions of {name}",
        text=f"{origin} Corruption error is the sum of errors over severities relative to zero-shot's: under "
        f"1 is better than zero-shot.{_beside_alexnet(results)}",
        tables=[
            ("Mean over severities", _without_images(corruption_table(results))),
            (
                "Gain over zero-shot in points, paired, with 95% intervals; * where zero is left out",
                _without_images(gains),
            ),
        ],
        legend=colours(clean),
        pictures=[overview, *panels],
    )


def _beside_alexnet(results: Sequence[Result]) -> str:
    """A sentence with each classifier's mCE, or with the mean over those of ImageNet-C's corruptions that are there."""
    errors = [found for found in results if found.metric in ("corruption_error_alexnet", "mce")]
    means = [
        f"{r.probe} {100 * r.value:.1f}%" for r in errors if r.corruption == MEAN and r.value is not None
    ]
    if not means:
        return ""
    count, total = len({found.corruption for found in errors} - {MEAN}), len(ALEXNET_ERROR)
    title = (
        "mCE"
        if count == total
        else f"Mean corruption error over {count} of {total} corruptions, which is no mCE"
    )
    return f"\n\n{title} (AlexNet has 100%): {', '.join(means)}."


def _without_images(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one set, whose name is in the section's title."""
    return [{key: value for key, value in row.items() if key != "images"} for row in rows]


def _shifted(results: Sequence[Result]) -> Iterator[Section]:
    shifted = plain_values(results, "shift", "accuracy_of_classes")
    if not shifted:
        return
    before = plain_values(results, "shift", "clean_accuracy_of_classes")
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for name, found in shifted.items():
        for probe, value in found.items():
            points.setdefault(probe, {})[name] = (before[name][probe], value)
    beyond = plain_values(results, "shift", "effective_robustness")
    yield Section(
        title="Natural shifts",
        text="Accuracy on the shifted images and on the clean ones, among the classes that occur in both. Effective "
        "robustness (Taori et al. 2020) is what a classifier has beyond the accuracy that ImageNet models of its "
        "clean accuracy have; it is defined for the sets whose fit was published, among all of their classes.",
        tables=[("Accuracy under shift", shift_table(results))],
        pictures=[
            Picture(
                caption="Shifted against clean accuracy: on the solid line a shift costs nothing",
                figure=effective_robustness_figure(points, fits={name: FITS[name][:2] for name in beyond}),
                alt="Accuracy on shifted sets against accuracy on the clean set, by classifier",
            )
        ],
    )


def _calibration(evidence: Evidence, name: str) -> Section:
    curves = evidence.curves
    return Section(
        title=f"Calibration and selective prediction on {name}",
        text="A reliable classifier lies on the diagonal. Risk and coverage: the share of errors among the most "
        "confident images, as more of them are kept; AURC and AUGRC are areas under that curve and under its "
        "generalised form, and smaller is better.",
        tables=[("Clean images", classification_table(evidence.results))],
        legend=colours(curves),
        pictures=[
            Picture(
                caption="Reliability",
                figure=reliability_figure({who: found.reliability for who, found in curves.items()}),
                alt="Accuracy against confidence for every classifier",
            ),
            Picture(
                caption="Risk and coverage",
                figure=risk_coverage_figure(
                    {who: (found.coverage, found.risk) for who, found in curves.items()}
                ),
                alt="Share of errors against share of images kept",
            ),
        ],
    )


def _detection(evidence: Evidence, clean: str) -> Iterator[Section]:
    if not evidence.scores:
        return
    pictures = []
    for name, by_probe in evidence.scores.items():
        for score in DRAWN_SCORES:
            auroc = plain_values(evidence.results, "ood", f"auroc_{score}")[name]
            drawn = {probe: scores[score] for probe, scores in by_probe.items()}
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
        tables=[("Detection", ood_table(evidence.results))],
        pictures=pictures,
    )


def _retrieval(sets: Sequence[RetrievalResult]) -> Iterator[Section]:
    if sets:
        yield Section(
            title="Retrieval",
            text=(
                "The encoder alone, no classifier: the share of queries whose best own candidate is among the first "
                "1, 5 and 10 of all, and its median rank; half of the foreign candidates that tie with it are ahead."
            ),
            tables=[("Recall in per cent, with 95% bootstrap intervals over images", retrieval_table(sets))],
        )


def _classes(evidence: Evidence) -> Section:
    curves, names = evidence.curves, evidence.classes
    counts = next(iter(curves.values())).confusion.sum(axis=1)
    rows = [
        {
            "class": name,
            "images": int(counts[place]),
            **{f"{who} recall %": float(found.recall[place]) for who, found in curves.items()},
        }
        for place, name in enumerate(names)
        if counts[place]
    ]
    shown = rows[:MAX_CLASS_ROWS]
    left = f" The first {len(shown):,} of {len(rows):,} classes." if len(shown) < len(rows) else ""
    pictures = [
        Picture(
            caption=f"Confusion matrix: {who}",
            figure=confusion_matrix_figure(found.confusion, names),
            alt=f"Shares of each true class by predicted class, {who}",
        )
        for who, found in curves.items()
    ]
    return Section(title="Classes", text=left.strip(), tables=[("Recall by class", shown)], pictures=pictures)


def _examples(examples: Sequence[tuple[str, Sequence[Example]]]) -> Iterator[Section]:
    if any(images for _, images in examples):
        yield Section(
            title="Images",
            text="The first ones in the order of a hash of their names, so neither the best nor the worst.",
            examples=[(caption, images) for caption, images in examples if images],
        )
