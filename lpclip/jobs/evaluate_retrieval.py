"""Image-text retrieval in the evaluate job: images and texts are encoded, and each is ranked for the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpclip.config import EvaluateJob, UserError
from lpclip.evaluation.ranking import retrieval_metrics
from lpclip.evaluation.results import RetrievalResult
from lpclip.features.data import Data
from lpclip.features.find_or_encode import Encoding
from lpclip.features.stored_views import Encoded
from lpclip.features.texts import encode_texts, read_pairs
from lpclip.images.views import WEAK, View, base_views
from lpclip.jobs.evaluate_names import parse_named
from lpclip.jobs.inputs import open_pairs
from lpclip.method.probe import Probe
from lpclip.progress import Progress


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Image-text pairs, and the views whose mean is an image's feature."""

    name: str
    data: Data
    views: tuple[View, ...]


@dataclass(frozen=True, kw_only=True)
class MeasuredPairs:
    """Retrieval on one set, the stores of its images, and the seconds it took."""

    item: PairSet
    result: RetrievalResult
    num_pairs: int
    stores: Sequence[Encoded]
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The set's entry in summary.json."""
        return {
            "set": self.item.name,
            "data": self.item.data.name,
            "images": self.result.images,
            "texts": self.result.texts,
            "pairs": self.num_pairs,
            "quarantined": self.result.quarantined,
            **{name: one.to_json() for name, one in self.result.retrieval.directions().items()},
            "views": [str(view) for view in self.item.views],
            "stores": [one.store.path for one in self.stores],
            "encoded_now": any(not one.reused for one in self.stores),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def open_pair_sets(job: EvaluateJob, probe: Probe | None) -> list[PairSet]:
    """The sets of --retrieval, opened but not read. Raises UserError when there are no texts, or a name is taken."""
    views = base_views(probe.encoder["views"]) if probe else (WEAK,)
    found: dict[str, PairSet] = {}
    for spec in job.retrieval:
        given, path = parse_named(spec, flag="retrieval", optional=True)
        source = open_pairs(
            path, config=job.source, caption_templates=job.caption_templates, split="test", limit=job.limit
        )
        name = given or source.name
        if name in found:
            raise UserError(
                f"--retrieval {spec}: another set is called {name}; give it a name, as in other={path}"
            )
        found[name] = PairSet(name=name, data=Data(source), views=views)
    return list(found.values())


def retrieval_identity(sets: list[PairSet]) -> dict[str, Any] | None:
    """Everything that changes the ranks, except the encoder; None without sets."""
    return {
        item.name: {"views": [str(view) for view in item.views], "source": item.data.source.identity}
        for item in sets
        if item.data.source is not None
    } or None


def measure_retrieval(sets: Sequence[PairSet], encoding: Encoding) -> list[MeasuredPairs]:
    """Encode images and texts of each set, and rank them. Raises UserError when too many pairs are bad."""
    return [_measure(item, encoding) for item in sets]


def _measure(item: PairSet, encoding: Encoding) -> MeasuredPairs:
    begin = time.monotonic()
    views = encoding.views_of(item.data, item.views)
    seconds = {"images": time.monotonic() - begin}
    begin = time.monotonic()
    images = views.mean(*item.views)
    texts, image_index, text_index = read_pairs(views.stores[0].store)
    text_features = encode_texts(texts, info=encoding.info, encoder=encoding.encoder, name=item.data.name)
    if not (np.isfinite(images).all() and np.isfinite(text_features).all()):
        raise UserError(
            f"features of {item.data.name} are NaN or infinite: the encoder's weights are damaged"
        )
    seconds["texts"] = time.monotonic() - begin
    begin = time.monotonic()
    progress = Progress(f"ranking {item.data.name}", total=len(images) + len(texts), unit="images and texts")
    found = retrieval_metrics(
        images, text_features, image_index=image_index, text_index=text_index, advance=progress.advance
    )
    progress.close()
    seconds["ranks"] = time.monotonic() - begin
    result = RetrievalResult(
        set=item.name,
        images=len(images),
        texts=len(texts),
        quarantined=views.stores[0].store.manifest.num_quarantined,
        retrieval=found,
    )
    return MeasuredPairs(
        item=item, result=result, num_pairs=len(text_index), stores=views.stores, seconds=seconds
    )


def retrieval_metrics_of(pairs: Sequence[MeasuredPairs]) -> dict[str, float | None]:
    """All numbers by their name in MLflow."""
    return {
        f"retrieval/{found.item.name}/{direction}_{metric}": value
        for found in pairs
        for direction, one in found.result.retrieval.directions().items()
        for metric, value in one.numbers().items()
    }
