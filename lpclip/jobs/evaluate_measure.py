"""The evaluation's work: every set is encoded once for all classifiers, and judged by each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lpclip.config import EvaluateJob, UserError
from lpclip.evaluation.evidence import Evidence, ForeignScores, Judgements
from lpclip.evaluation.judge import Labelled, foreign_scores, judge, judgement_curves
from lpclip.evaluation.results import Cell, Result, RetrievalResult
from lpclip.evaluation.tabulate import corruption_results, labelled_results, ood_results, shift_results
from lpclip.features.find_or_encode import Encoding
from lpclip.features.stored_views import Encoded, Views
from lpclip.images.classes import ClassList
from lpclip.jobs.evaluate_sets import EvaluationSet
from lpclip.jobs.inputs import class_indices
from lpclip.jobs.runtime import Stopwatch
from lpclip.method.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """The classifiers that are measured, and the sets that they are measured on."""

    job: EvaluateJob
    out: str
    sets: Sequence[EvaluationSet]
    """--data's comes first."""
    classifiers: Mapping[str, Probe]
    """By name, zero-shot first."""
    classes: ClassList
    encoding: Encoding


@dataclass(frozen=True, kw_only=True)
class Clean:
    """The labelled images of --data, with their ids (N,) and every classifier's judgement of them."""

    images: Labelled
    ids: np.ndarray
    judgements: Judgements


@dataclass(frozen=True, kw_only=True)
class MeasuredSet:
    """The findings on one set, and the stores that hold its features."""

    item: EvaluationSet
    stores: Sequence[Encoded]
    results: Sequence[Result]
    clean: Clean
    judgements: Mapping[Cell, Judgements] = field(default_factory=dict)
    scores: ForeignScores = field(default_factory=dict)


class Rates(NamedTuple):
    """Images and features encoded a second; None when nothing was encoded."""

    images: float | None
    features: float | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything that was found about the classifiers."""

    sets: Sequence[MeasuredSet]
    results: Sequence[Result]
    clean: Clean

    def rates(self) -> Rates:
        """Images and features encoded in this run, a second."""
        encoded = [one for found in self.sets for one in found.stores if one.rate is not None]
        seconds = sum(one.seconds for one in encoded)
        if not seconds:
            return Rates(None, None)
        manifests = [one.store.manifest for one in encoded]
        return Rates(
            images=sum(manifest.num_rows for manifest in manifests) / seconds,
            features=sum(manifest.num_rows * len(manifest.views) for manifest in manifests) / seconds,
        )

    def evidence(self, classes: tuple[str, ...], retrieval: Sequence[RetrievalResult]) -> Evidence:
        """The page's numbers and arrays."""
        return Evidence(
            results=self.results,
            classes=classes,
            curves={
                name: judgement_curves(judgement, self.clean.images.labels, num_classes=len(classes))
                for name, judgement in self.clean.judgements.items()
            },
            scores={found.item.name: found.scores for found in self.sets if found.item.kind == "ood"},
            retrieval=retrieval,
        )


def measure_sets(subjects: Subjects, watch: Stopwatch) -> Measured:
    """Encode and judge all sets. Raises UserError when too many images are bad, or none has a label."""
    job = subjects.job
    sets: list[MeasuredSet] = []
    for item in subjects.sets:
        views = subjects.encoding.views_of(item.data, item.views)
        watch.lap("encode")
        if item.kind == "ood":
            sets.append(_detect(item, views, subjects, clean=sets[0].clean))
        else:
            sets.append(_judge_set(item, views, subjects, clean=sets[0].clean if sets else None))
        watch.lap("measure")
    means = _corruption_means(sets, seed=job.seed)
    watch.lap("measure")
    return Measured(
        sets=sets,
        results=[*(result for found in sets for result in found.results), *means],
        clean=sets[0].clean,
    )


def _judge_set(item: EvaluationSet, views: Views, subjects: Subjects, *, clean: Clean | None) -> MeasuredSet:
    """The classifiers' judgements of a labelled set; `clean` is None for the set of --data itself."""
    seed, classifiers = subjects.job.seed, subjects.classifiers
    labels = class_indices(views.labels, data=item.data, classes=subjects.classes)
    known = np.flatnonzero(labels >= 0)
    if item.kind == "published corruption":
        # An array's ids name its corruption and so decide the order of rows; sorted by id, all sets agree.
        known = known[np.argsort(views.ids[known])]
    if not len(known):
        raise UserError(f"{item.name} has no labelled image: there is nothing to measure on it")
    results: list[Result] = []
    judgements: dict[Cell, Judgements] = {}
    for cell, wanted in item.cells.items():
        images = Labelled(features=views.mean(*wanted)[known], labels=labels[known])
        judgements[cell] = judge(classifiers, images, seed=seed)
        results += labelled_results(cell, judgements[cell], seed=seed)
        if clean is None:
            assert cell.kind == "clean"
            clean = Clean(images=images, ids=views.ids[known], judgements=judgements[cell])
        elif cell.kind == "shift":
            results += shift_results(cell, classifiers, clean=clean.images, shifted=images)
    assert clean is not None
    return MeasuredSet(item=item, stores=views.stores, results=results, clean=clean, judgements=judgements)


def _detect(item: EvaluationSet, views: Views, subjects: Subjects, *, clean: Clean) -> MeasuredSet:
    """The classifiers' detection of foreign images."""
    (cell, wanted), *_ = item.cells.items()
    foreign = views.mean(*wanted)
    if not len(foreign):
        raise UserError(f"{item.name} has no image: there is nothing to detect")
    scores = {
        name: foreign_scores(
            probe,
            inside=clean.images.features,
            outside=foreign,
            cosine_temperature=1 / subjects.encoding.info.logit_scale,
        )
        for name, probe in subjects.classifiers.items()
    }
    results = ood_results(cell, scores, seed=subjects.job.seed)
    return MeasuredSet(item=item, stores=views.stores, results=results, clean=clean, scores=scores)


def _corruption_means(sets: Sequence[MeasuredSet], *, seed: int) -> list[Result]:
    """Means over the corruptions of each name; a published name has a set for each corruption and severity."""
    clean = sets[0].clean.judgements
    judgements = {cell: found for one in sets for cell, found in one.judgements.items() if cell.corruption}
    results: list[Result] = []
    for name in dict.fromkeys(cell.set for cell in judgements):
        # Published files may be damaged in one corruption and not in another.
        stores = [one.stores[0].store for one in sets if one.item.name == name]
        results += corruption_results(
            clean,
            {cell: found for cell, found in judgements.items() if cell.set == name},
            alexnet=name.lower().startswith("imagenet-c"),
            seed=seed,
            same_images=len(stores) == 1 or not any(store.manifest.num_quarantined for store in stores),
        )
    return results
