"""The sets of an evaluation: clean, corrupted, shifted and foreign images, opened and checked before any work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lpclip.config import ClassConfig, EvaluateJob, UserError
from lpclip.evaluation.results import Cell, Kind
from lpclip.features.data import Data, open_data
from lpclip.images.classes import ClassList, map_labels, resolve_classes
from lpclip.images.published import Published, published_sets
from lpclip.images.views import CORRUPTIONS, SEVERITIES, View, base_views
from lpclip.jobs.evaluate_names import parse_named
from lpclip.jobs.inputs import with_checked_labels
from lpclip.method.probe import Probe

IMAGENET_C = CORRUPTIONS[:15]


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Images to evaluate on, and the views whose mean is a cell's feature."""

    name: str
    kind: Kind
    data: Data
    cells: dict[Cell, tuple[View, ...]]

    @property
    def key(self) -> str:
        """Unique among an evaluation's sets: a published set is one for each corruption and severity."""
        return f"{self.name} {self.data.name}"

    @property
    def views(self) -> tuple[View, ...]:
        """All views that are needed."""
        return tuple(dict.fromkeys(view for views in self.cells.values() for view in views))


def parse_corruptions(job: EvaluateJob) -> list[tuple[str, int]]:
    """Name and severity of every corruption that is asked for. Raises UserError for unknown or repeated ones."""
    severities = [text.strip() for text in job.severities.split(",")]
    for text in severities:
        if text not in SEVERITIES:
            raise UserError(
                f"--severities: {text!r} is not a whole number from 1 to 5; give them separated by commas, as in 1,3,5"
            )
    named = [name.strip() for name in job.corruptions.split(",")]
    names = {"none": [], "all": list(IMAGENET_C)}.get(job.corruptions, named)
    for name in names:
        if name not in CORRUPTIONS:
            raise UserError(
                f"--corruptions: {name!r} is no corruption; there are {', '.join(CORRUPTIONS)}, and all for the "
                "first 15"
            )
    found = [(name, int(severity)) for name in names for severity in severities]
    if len(set(found)) < len(found):
        raise UserError("--corruptions or --severities name one of them twice")
    return found


def open_sets(job: EvaluateJob, probe: Probe, corruptions: list[tuple[str, int]]) -> Iterator[EvaluationSet]:
    """All sets, opened but not read, --data's first."""
    base = base_views(probe.encoder["views"])
    taken = set()

    def one(
        name: str, kind: Kind, data: Data, cells: dict[Cell, tuple[View, ...]] | None = None
    ) -> EvaluationSet:
        if kind != "ood" and not data.has_labels and data.source is not None:
            raise UserError(f"{name} has no labels: there is nothing to measure on it")
        return EvaluationSet(
            name=name, kind=kind, data=data, cells=cells or {Cell(set=name, kind=kind): base}
        )

    def named(specs: tuple[str, ...], flag: str) -> Iterator[tuple[str, str]]:
        for spec in specs:
            name, path = parse_named(spec, flag=flag, optional=False)
            assert name is not None
            if name in taken:
                raise UserError(f"--{flag} {spec}: another set is called {name}")
            taken.add(name)
            yield name, path

    data = open_data(job.data, config=job.source, split="test", limit=job.limit)
    taken.add(data.name)
    cells = {Cell(set=data.name, kind="clean"): base}
    for name, severity in corruptions:
        views = tuple(View(name=name, level=severity, mirrored=view.mirrored) for view in base)
        cells[Cell(set=data.name, kind="corrupted", corruption=name, severity=severity)] = views
    yield one(data.name, "clean", data, cells)
    for name, path in named(job.shift, "shift"):
        yield one(name, "shift", open_data(path, config=job.source, split="test", limit=job.limit))
    for name, path in named(job.ood, "ood"):
        yield one(name, "ood", open_data(path, config=job.source, split="test", limit=job.limit))
    for name, path in named(job.corrupted, "corrupted"):
        published, notes = published_sets(path)
        for item in published:
            yield _published(name, item, job, base, notes=tuple(notes))
            notes = []


def _published(
    name: str, item: Published, job: EvaluateJob, base: tuple[View, ...], *, notes: tuple[str, ...]
) -> EvaluationSet:
    source = item.open(config=job.source, limit=job.limit)
    source = replace(source, notes=(*source.notes, *notes))
    data = Data(source)
    cell = Cell(set=name, kind="published corruption", corruption=item.corruption, severity=item.severity)
    return EvaluationSet(name=name, kind="published corruption", data=data, cells={cell: base})


def evaluation_classes(job: EvaluateJob, probe: Probe) -> ClassList:
    """The probe's classes, with the labels that `--classes` gives them."""
    if job.classes is None:
        return ClassList(names=probe.class_names)
    classes = resolve_classes(ClassConfig(classes=job.classes), label_names=None)
    if classes.names != probe.class_names:
        raise UserError(
            f"--classes {job.classes} has other names than the probe, or another order: the probe's are "
            f"{', '.join(probe.class_names[:5])}{', ...' if len(probe.class_names) > 5 else ''}"
        )
    return classes


def checked_set(item: EvaluationSet, classes: ClassList) -> EvaluationSet:
    """A set with a note where its labels seem to count from 1.

    Raises UserError for a foreign label, or where only the names of labels are known before the reading, when none is a
    class. The labels of foreign images are not read.
    """
    if item.kind == "ood":
        return item
    names, source = item.data.label_names, item.data.source
    if source is not None and source.labels_there is not None:
        return replace(item, data=with_checked_labels(item.data, classes))
    for place in range(len(names or ())):
        with contextlib.suppress(UserError):
            map_labels(np.array([place]), label_names=names, classes=classes, data=item.data.name)
            return item
    if names is not None:
        raise UserError(
            f"none of {item.data.name}'s labels ({', '.join(names[:5])}) is a class of the probe "
            f"({', '.join(classes.names[:5])})"
        )
    return item
