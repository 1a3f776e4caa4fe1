"""OUT/report.html of a self-training: which images the page shows, and their pictures from the feature store."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lpclip import files
from lpclip.config import UserError, counted
from lpclip.evaluation.notable import (
    Labelling,
    Likeness,
    Pair,
    centred,
    examples_of_classes,
    frequent_pairs,
    misfits,
    near_duplicates,
    num_repeated,
    principal,
    reasons,
)
from lpclip.features.store import Store
from lpclip.images.pixels import decode_image
from lpclip.jobs.inputs import EncodedInputs
from lpclip.method.probe import Probe
from lpclip.method.trial import ChosenPrior
from lpclip.report.page import Example
from lpclip.report.training_page import Duplicates, Guard, TrainingReport, training_page

SIDE = 112
PICTURE_BYTES = 4000
QUALITIES = (75, 50, 30, 15)
MOST_PAIRS, OF_A_PAIR = 12, 6
OF_CLASSES = 900
"""Images of classes in all: the more classes there are, the fewer has each."""
MOST_OF_A_CLASS = 6
MOST_GROUPS, OF_A_GROUP = 6, 6
MOST_DUPLICATES = 24
MOST_REASONS = 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished self-training, as far as its page shows it."""

    data: str
    known: EncodedInputs
    chosen: ChosenPrior
    zero_shot: Probe
    probe: Probe
    results: Mapping[str, Mapping[str, float | None]]
    """Metrics by classifier, as in summary.json."""
    measured_on: str
    """The images with labels, in words; empty without any."""
    history: Sequence[Mapping[str, Any]]
    figures: Mapping[str, Figure]
    facts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Rows of a store that have a picture, and what is said of each."""

    ids: np.ndarray
    """(N,) of all rows."""
    thumbnails: Mapping[str, bytes]
    before: Labelling
    after: Labelling
    class_names: tuple[str, ...]
    truth: np.ndarray | None = None
    """(N,) class indices, -1 for none."""

    @cached_property
    def rows(self) -> np.ndarray:
        """Places (n,) of the rows with a thumbnail, in row order."""
        return np.array([row for row, name in enumerate(self.ids) if name in self.thumbnails], np.int64)

    def example(self, row: int, **about: Labelling) -> Example | None:
        """An image with its labels, by default zero-shot's and the probe's; None if its thumbnail is damaged."""
        name = self.ids[row]
        image = shrunk(self.thumbnails[name])
        if image is None:
            return None
        about = about or {"zero-shot": self.before, "probe": self.after}
        truth = -1 if self.truth is None else int(self.truth[row])
        return Example(
            image=image,
            name=name,
            truth=self.class_names[truth] if truth >= 0 else None,
            predictions={
                who: (self.class_names[found.label[row]], float(found.confidence[row]))
                for who, found in about.items()
            },
        )

    def examples(self, rows: Sequence[int] | np.ndarray, most: int) -> list[Example]:
        """The first `most` of these rows that have a sound picture."""
        found = filter(None, (self.example(int(row)) for row in rows))
        return [example for example, _ in zip(found, range(most), strict=False)]


def write_training_page(outcome: Outcome, path: str) -> None:
    """Write the page of a self-training."""
    files.write_bytes(path, training_page(_report(outcome)).encode())


def _report(outcome: Outcome) -> TrainingReport:
    known, chosen, names = outcome.known, outcome.chosen, outcome.probe.class_names
    store, features = known.encoded.store, known.features.base
    before, after = _labels(outcome.zero_shot, features), _labels(outcome.probe, features)
    thumbnails, missing = _thumbnails(store)
    gallery = Gallery(
        ids=known.features.ids,
        thumbnails=thumbnails,
        before=before,
        after=after,
        class_names=names,
        truth=known.y if known.tested is None else None,
    )
    rows, num_classes = gallery.rows, len(names)
    sample = features[rows]
    changes = frequent_pairs(before.label, after.label, num_classes=num_classes)
    central = centred(sample)
    reduced = principal(central)
    confidence = before.confidence[rows]
    groups = misfits(
        reduced, sample, outcome.zero_shot.weight.numpy(), confidence=confidence, most=MOST_GROUPS
    )
    confusions, confused = _confusions(outcome, gallery)
    return TrainingReport(
        data=outcome.data,
        class_names=names,
        num_images=len(features),
        sample=len(rows),
        missing=missing,
        guard=_guard(chosen, names),
        results=outcome.results if outcome.measured_on else {},
        measured_on=outcome.measured_on,
        figures=outcome.figures,
        before=np.bincount(before.label, minlength=num_classes),
        after=np.bincount(after.label, minlength=num_classes),
        changes=changes,
        changed=[
            (
                f"{names[pair.first]} → {names[pair.second]} ({counted(pair.count, 'image')})",
                gallery.examples(_rows_of(pair, before.label, after.label, rows), OF_A_PAIR),
            )
            for pair in changes[:MOST_PAIRS]
        ],
        classes=list(_classes(gallery, sample)),
        confidence=float(confidence.mean()) if len(rows) else 0.0,
        groups=[(group, gallery.examples(rows[group.rows], OF_A_GROUP)) for group in groups],
        duplicates=_duplicates(gallery, features, near_duplicates(reduced, central)),
        quarantine=reasons(store.quarantine(), most=MOST_REASONS),
        history=outcome.history,
        confusions=confusions,
        confused=confused,
        facts=outcome.facts,
    )


def _labels(probe: Probe, features: np.ndarray) -> Labelling:
    label, confidence = probe.label(features)
    return Labelling(label=label.numpy(), confidence=confidence.numpy())


def _thumbnails(store: Store) -> tuple[dict[str, bytes], str]:
    """The store's thumbnails by id, and a sentence where there are none."""
    try:
        found = store.thumbnails()
    except UserError as error:
        return {}, f"Images are missing on this page: {error}."
    if found:
        return found, ""
    return {}, (
        f"Images are missing on this page: the feature store {store.path} has no thumbnails, as an earlier "
        f"version of lpclip "
        "made it. Another --features and --out encode the images again."
    )


def _guard(chosen: ChosenPrior, names: tuple[str, ...]) -> Guard:
    summary, found = chosen.summary(names), chosen.tried[chosen.name]
    return Guard(
        given=found.labelled,
        by_labels=not found.doubts and bool(replace(found, won=0, lost=0).doubts),
        prior=chosen.name,
        tried={name: asdict(found) for name, found in chosen.tried.items()},
        doubts=found.doubts,
        absent=summary["absent"],
        why_these_names=chosen.why,
    )


def _rows_of(pair: Pair, first: np.ndarray, second: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those of these rows that have the first class of a pair in the first labelling, and the second in the other."""
    return rows[(first[rows] == pair.first) & (second[rows] == pair.second)]


def _classes(gallery: Gallery, sample: np.ndarray) -> Iterator[tuple[str, list[Example]]]:
    """Images of each class; of many classes one image of a kind each, all of a kind in one group."""
    names, rows = gallery.class_names, gallery.rows
    counts = np.bincount(gallery.after.label, minlength=len(names))
    each = min(MOST_OF_A_CLASS, OF_CLASSES // (3 * len(names)))
    found = examples_of_classes(sample, gallery.after.take(rows), num_classes=len(names), each=max(1, each))
    if each > 1:
        for number, kinds in found.items():
            examples = [
                gallery.example(int(rows[place]), **{kind: gallery.after})
                for kind, places in kinds.items()
                for place in places
            ]
            yield f"{names[number]} ({counted(int(counts[number]), 'image')})", list(filter(None, examples))
        return
    largest = sorted(found, key=lambda number: -counts[number])[:OF_CLASSES]
    for kind in next(iter(found.values()), {}) if each else ("surest",):
        examples = [
            gallery.example(int(rows[place]), **{kind: gallery.after})
            for number in sorted(largest)
            for place in found[number][kind]
        ]
        yield f"The {kind} image of each class", list(filter(None, examples))


def _duplicates(gallery: Gallery, features: np.ndarray, pairs: Sequence[Likeness]) -> Duplicates:
    """The pairs that are nearly equal; those with two labels come first."""
    rows, label = gallery.rows, gallery.after.label

    def is_at_odds(pair: Likeness) -> bool:
        return bool(label[rows[pair.first]] != label[rows[pair.second]])

    shown = []
    for pair in sorted(pairs, key=lambda pair: not is_at_odds(pair))[:MOST_DUPLICATES]:
        first, second = (
            gallery.example(int(rows[place]), probe=gallery.after) for place in (pair.first, pair.second)
        )
        if first is not None and second is not None:
            labels = "two labels" if is_at_odds(pair) else "one label"
            shown.append((f"cosine {pair.cosine:.3f}, {labels}", first, second))
    return Duplicates(
        repeated=num_repeated(features),
        pairs=shown,
        found=len(pairs),
        at_odds=sum(map(is_at_odds, pairs)),
    )


def _confusions(
    outcome: Outcome, gallery: Gallery
) -> tuple[list[tuple[Pair, int]], list[tuple[str, list[Example]]]]:
    """The probe's mistakes on labelled images, beside the number of the same ones by zero-shot; and images of them."""
    known, names = outcome.known, outcome.probe.class_names
    labelled = known.y >= 0
    if not labelled.any():
        return [], []
    if known.tested is not None:
        gallery = Gallery(
            ids=known.tested.store.ids(),
            thumbnails=_thumbnails(known.tested.store)[0],
            before=_labels(outcome.zero_shot, known.x),
            after=_labels(outcome.probe, known.x),
            class_names=names,
            truth=known.y,
        )
    pairs, others = (
        frequent_pairs(known.y[labelled], found.label[labelled], num_classes=len(names))
        for found in (gallery.after, gallery.before)
    )
    same = {(pair.first, pair.second): pair.count for pair in others}
    images = [
        (
            f"{names[pair.first]}, labelled {names[pair.second]} ({counted(pair.count, 'image')})",
            gallery.examples(_rows_of(pair, known.y, gallery.after.label, gallery.rows), OF_A_PAIR),
        )
        for pair in pairs[:MOST_PAIRS]
    ]
    return [(pair, same.get((pair.first, pair.second), 0)) for pair in pairs], images


def shrunk(data: bytes) -> bytes | None:
    """A thumbnail at the size of the page, as a JPEG of few bytes; None when it is damaged."""
    with contextlib.suppress(UserError):
        image = decode_image(data, max_pixels=1 << 20, max_bytes=1 << 20)
        image.thumbnail((SIDE, SIDE))
        for quality in QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True, comment=b"")
            if buffer.tell() <= PICTURE_BYTES:
                return buffer.getvalue()
    return None
