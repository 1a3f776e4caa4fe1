"""The page of a self-training: what it did to the labels, shown on images. Labels are needed nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lpclip.config import counted
from lpclip.evaluation.notable import NEAR, Group, Pair
from lpclip.report.page import Example, Picture, Section, render_page

MOST_CLASSES = 100
"""Classes that have a row in the table of shares; of more, those that changed most have one."""
MOST_PAIRS = 15

Shown = Sequence[tuple[str, Sequence[Example]]]
"""Captions and images."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What was tried before the rounds, and what came of it."""

    prior: str
    """The class prior that the rounds use."""
    tried: Mapping[str, Mapping[str, float]]
    """By prior: agreement, kappa, entropy, confidence, chance."""
    doubts: Sequence[str]
    """Why the rounds cannot be trusted, each a clause; empty where they are."""
    absent: Sequence[str]
    """Class names that the rounds leave out."""
    why_these_names: str
    given: int = 0
    """Labels that people gave."""
    by_labels: bool = False
    """True where nothing but these labels speaks for the rounds."""

    @property
    def trusted(self) -> bool:
        """True when the probe comes from the rounds."""
        return not self.doubts


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Images that repeat others."""

    repeated: int
    """Images of all whose features are, bit by bit, those of another one before them."""
    pairs: Sequence[tuple[str, Example, Example]] = ()
    """Captions and two images that are nearly equal."""
    found: int = 0
    """Such pairs, shown or not."""
    at_odds: int = 0
    """Those of them that have two labels."""


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """Everything that the page of a self-training shows, as finished numbers and images."""

    data: str
    class_names: tuple[str, ...]
    num_images: int
    sample: int
    """Images that may be shown: those with a thumbnail."""
    missing: str
    """Why images are missing, a sentence; empty where none is."""
    guard: Guard
    results: Mapping[str, Mapping[str, float | None]]
    """Metrics of each classifier, empty without labels."""
    measured_on: str
    figures: Mapping[str, Figure]
    before: np.ndarray
    """(K,) images of each class by zero-shot's labels."""
    after: np.ndarray
    """(K,) the same by the probe's."""
    changes: Sequence[Pair]
    """From zero-shot's label to the probe's, of all images."""
    changed: Shown = ()
    classes: Shown = ()
    confidence: float = 0.0
    """Zero-shot's mean confidence in the images that may be shown."""
    groups: Sequence[tuple[Group, Sequence[Example]]] = ()
    duplicates: Duplicates
    quarantine: Sequence[tuple[str, str, int, Sequence[str]]] = ()
    """Stage, reason, number and first ids."""
    history: Sequence[Mapping[str, Any]]
    confusions: Sequence[tuple[Pair, int]] = ()
    """True and wrong label of the probe, with the number of the same mistake by zero-shot."""
    confused: Shown = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_changed(self) -> int:
        """Images whose label the probe changed."""
        return sum(pair.count for pair in self.changes)


def training_page(report: TrainingReport) -> str:
    """The page as HTML."""
    sections = [
        _verdict(report),
        _shares(report),
        *_changed(report),
        *_classes(report),
        _groups(report),
        _duplicates(report),
        _quarantine(report),
        _rounds(report),
        *_confusions(report),
    ]
    return render_page(f"Self-training on {report.data}", facts=report.facts, sections=sections)


def _share(count: int, total: int) -> str:
    return f"{count:,} of {counted(total, 'image')} ({count / max(1, total):.1%})"


def _outcome(report: TrainingReport) -> str:
    """Whether the rounds were trusted and why, and what they changed."""
    guard = report.guard
    changed = f"The probe gives {_share(report.num_changed, report.num_images)} another label than zero-shot."
    if guard.trusted:
        why = "two halves of the features, which cannot see each other, confirm them"
        if guard.by_labels:
            why = "they have more of the given labels right than zero-shot"
        text = f"The rounds were trusted: {why}. {changed}"
    elif guard.given:
        text = (
            "The probe is zero-shot with the given labels alone, because the rounds cannot be trusted: "
            f"{'; '.join(guard.doubts)}. {changed}"
        )
    else:
        text = (
            "The probe fell back to zero-shot: it is zero-shot itself and changed no label, because the rounds "
            f"cannot be trusted: {'; '.join(guard.doubts)}."
        )
    if guard.given:
        text += f" Training was given {counted(guard.given, 'label')}, and these images are not evaluated on."
    return text


def _verdict(report: TrainingReport) -> Section:
    text = _outcome(report)
    names = {"zero_shot": "zero-shot", "probe": "probe", "supervised": "supervised"}
    rows = [
        {
            "classifier": shown,
            "accuracy %": report.results[name]["accuracy"],
            "ECE %": report.results[name]["ece"],
            "NLL": report.results[name]["nll"],
        }
        for name, shown in names.items()
        if name in report.results
    ]
    if rows:
        before, after = (report.results[name]["accuracy"] or 0.0 for name in ("zero_shot", "probe"))
        text += (
            f"\n\nOn {report.measured_on}, the probe is right on {after:.1%}, zero-shot on {before:.1%}. Training "
            "read no label of the images that are evaluated on."
        )
        if after < before:
            text += " Here the probe is worse than zero-shot: use OUT/zero_shot, or more images."
    else:
        text += "\n\nThere are no labels to measure accuracy with. The images below show what the labels are worth."
    if report.missing:
        text += f"\n\n{report.missing}"
    elif report.sample < report.num_images:
        text += (
            f"\n\nImages on this page are chosen from a fair sample of {report.sample:,}; numbers are of all "
            "images unless they say otherwise."
        )
    alts = {
        "rounds": "The course of the rounds; the table under Rounds has its numbers",
        "confusion_matrix": "Confusion matrix of the probe; the tables under Confusions have its largest cells",
        "reliability": "Accuracy against confidence of zero-shot and the probe",
    }
    return Section(
        title="Verdict",
        text=text,
        tables=[(f"Accuracy and calibration on {report.measured_on}", rows)],
        pictures=[
            Picture(caption="", figure=figure, alt=alts.get(name, name))
            for name, figure in report.figures.items()
        ],
    )


def _shares(report: TrainingReport) -> Section:
    total = max(1, report.num_images)
    change = report.after.astype(np.int64) - report.before
    order = np.argsort(-np.abs(change), kind="stable")
    rows = [
        {
            "class": report.class_names[place],
            "zero-shot %": report.before[place] / total,
            "probe %": report.after[place] / total,
            "change in points": f"{100 * change[place] / total:+.1f}",
            "zero-shot's images": int(report.before[place]),
            "the probe's images": int(report.after[place]),
        }
        for place in order[:MOST_CLASSES]
    ]
    empty = int((report.after == 0).sum())
    text = "The share of images that each class gets from zero-shot and from the probe, largest change first."
    if len(order) > MOST_CLASSES:
        text += f" Of {len(order):,} classes, these are the {MOST_CLASSES} that changed most."
    if empty:
        text += f" The probe gives {empty:,} of them no image."
    return Section(
        title="Class shares", text=text, tables=[("Class shares before and after the rounds", rows)]
    )


def _changed(report: TrainingReport) -> Iterator[Section]:
    if not report.changes:
        return
    names = report.class_names
    rows = [
        {
            "zero-shot's label": names[pair.first],
            "the probe's label": names[pair.second],
            "images": pair.count,
            "of all %": pair.count / report.num_images,
        }
        for pair in report.changes[:MOST_PAIRS]
    ]
    text = f"The probe changed the labels of {_share(report.num_changed, report.num_images)}."
    if report.changed:
        text += " Of the most frequent changes, these are images drawn at random."
    caption = f"Most frequent changes ({len(rows)} of {len(report.changes):,})"
    yield Section(title="Changed labels", text=text, tables=[(caption, rows)], examples=report.changed)


def _classes(report: TrainingReport) -> Iterator[Section]:
    if not report.classes:
        return
    yield Section(
        title="Classes",
        text=(
            "Of each class, by the probe's labels: images that it is surest of, least sure of, and the most "
            "typical ones, which are nearest to the mean feature of the class. Mistakes are found most easily "
            "among the least sure."
        ),
        examples=report.classes,
    )


def _groups(report: TrainingReport) -> Section:
    if not report.groups:
        text = (
            "No group of images stands out as one that no class name fits."
            if report.sample
            else "Groups are looked for among images that can be shown, and there are none."
        )
        return Section(title="Images that no class name seems to fit", text=text)
    names = report.class_names
    captions = [
        f"Group {number}, nearest to {', '.join(names[place] for place in group.nearest)}: "
        f"{counted(len(group.rows), 'image')}, mean confidence {group.confidence:.0%}"
        for number, (group, _) in enumerate(report.groups, start=1)
    ]
    return Section(
        title="Images that no class name seems to fit",
        text=(
            "Images that look alike were put into groups (k-means). These are the groups that are least like "
            "even their nearest class name. Where one shows a class of its own, add its name to --classes. "
            f"Zero-shot's mean confidence in all images of the sample is {report.confidence:.0%}."
        ),
        examples=[
            (caption, examples) for caption, (_, examples) in zip(captions, report.groups, strict=True)
        ],
    )


def _duplicates(report: TrainingReport) -> Section:
    found = report.duplicates
    text = (
        f"{counted(found.repeated, 'image')} of {report.num_images:,} {'has' if found.repeated == 1 else 'have'} "
        "exactly the features of another one, as copies of a file do."
        if found.repeated
        else f"No two of the {counted(report.num_images, 'image')} have exactly the same features, as copies of a "
        f"file have."
    )
    if report.sample:
        text += (
            f" Among the {report.sample:,} images of the sample, {counted(found.found, 'pair')} "
            f"{'is' if found.found == 1 else 'are'} nearly equal: an image and the one that is nearest to it, the "
            f"cosine of whose features, seen from the mean of all, is {NEAR} or more."
        )
    if found.at_odds:
        text += f" {found.at_odds:,} of these {'has' if found.at_odds == 1 else 'have'} two different labels."
    if len(found.pairs) < found.found:
        text += f" The first {len(found.pairs)} are shown, those with two labels before the others."
    return Section(title="Near-duplicates", text=text, pairs=found.pairs)


def _quarantine(report: TrainingReport) -> Section:
    if not report.quarantine:
        return Section(title="Quarantined images", text="Every image could be read and encoded.")
    rows = [
        {"stage": stage, "reason": reason, "images": count, "as in": ", ".join(ids)}
        for stage, reason, count, ids in report.quarantine
    ]
    return Section(
        title="Quarantined images",
        text=(
            "These images could not be read, decoded or encoded, and are left out. quarantine.parquet in the "
            "folder of the features lists every one."
        ),
        tables=[("Reasons, most frequent first", rows)],
    )


def _rounds(report: TrainingReport) -> Section:
    guard = report.guard
    tried = [
        {
            "class shares": name,
            "labels repeated %": found["agreement"],
            "beyond chance (kappa)": found["kappa"],
            "evenness of the shares": found["entropy"],
            "used": "yes" if name == guard.prior else "no",
        }
        for name, found in guard.tried.items()
    ]
    rows = [
        {
            "round": entry["round"],
            "changed %": entry["flip_rate"],
            "kept %": entry["coverage"],
            "mean confidence %": entry["mean_confidence"],
            "agree with zero-shot %": entry["zero_shot_agreement"],
            **({"accuracy %": entry["accuracy"]} if entry.get("accuracy") is not None else {}),
        }
        for entry in report.history
    ]
    one = next(iter(guard.tried.values()), None)
    text = (
        "Before the rounds, they are tried on a sample: with all features, and in two halves of the features' "
        "directions that cannot see each other. Where classes are real, the halves repeat the labels. What they "
        "repeat beyond chance is Cohen's kappa: 0 is chance, 1 is all."
    )
    if one is not None:
        text += (
            f" Zero-shot's mean confidence is {one['confidence']:.2f}; names without a meaning reach "
            f"{one['chance']:.2f}."
        )
    text += f"\n\nThe rounds pull the labels to class shares as --prior {guard.prior} says. "
    if guard.absent:
        shown = ", ".join(guard.absent[:8]) + (", ..." if len(guard.absent) > 8 else "")
        text += f"They leave out {counted(len(guard.absent), 'name')} that seem to have no images: {shown}."
    else:
        text += f"They use all {len(report.class_names):,} class names ({guard.why_these_names})."
    if not guard.trusted:
        text += f"\n\nThe guard refused them: {'; '.join(guard.doubts)}."
    return Section(
        title="Rounds and their guard",
        text=text,
        tables=[("Pulls to class shares that were tried", tried), ("Rounds", rows)],
    )


def _confusions(report: TrainingReport) -> Iterator[Section]:
    if not report.confusions:
        return
    names = report.class_names
    rows = [
        {
            "true class": names[pair.first],
            "the probe's label": names[pair.second],
            "images": pair.count,
            "by zero-shot": zero_shot,
        }
        for pair, zero_shot in report.confusions[:MOST_PAIRS]
    ]
    yield Section(
        title="Confusions",
        text=(
            f"The most frequent mistakes of the probe on {report.measured_on}, and how often zero-shot makes the "
            f"same one." + (" The images are drawn at random from them." if report.confused else "")
        ),
        tables=[(f"Most frequent confusions ({len(rows)} of {len(report.confusions):,})", rows)],
        examples=report.confused,
    )
