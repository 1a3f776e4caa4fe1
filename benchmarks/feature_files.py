"""Feature files as data sets of the benchmark of methods, each cut into its settings.

A file is an .npz, read without unpickling:

    features     (n, d) float16 or float32 of unit norm
    labels       (n,) int, -1 for none
    texts        (K, d) zero-shot weights of unit norm, NaN where a class has no text; any name that begins with `text`
                 and fits will do, and a file may have none
    temperature  the encoder's softmax temperature; 0.01, CLIP's, where it is missing

Images of classes without a text are foreign ones. In a file without texts, the feature of one random image a class
stands in for its text, at a temperature of 0.02, and that image is left out: a weak teacher, and not zero-shot CLIP.

A seed cuts the images into halves: the unlabelled ones, and those to test on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from method_data import Data, Images, Setting, long_tailed, only_classes, with_foreign

from lpclip.method.chance import random_head

TEMPERATURE, ONE_IMAGE_TEMPERATURE = 0.01, 0.02
FEW_A_CLASS = (10, 3)
# Seeds from here on: those that the method compares heads with are small numbers.
RANDOM_HEADS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """The contents of a feature file."""

    name: str
    images: Images
    texts: np.ndarray | None
    """(K, d) float32 of unit norm, or NaN in every cell of a row."""
    temperature: float


def read_file(path: str) -> FeatureFile:
    """Read a feature file. Raises ValueError when it is none."""
    with np.load(path, allow_pickle=False) as found:
        if not {"features", "labels"} <= set(found.files):
            raise ValueError(f"{path} is no feature file: it has no features, or no labels")
        features, labels = found["features"], found["labels"].astype(np.int64)
        texts = [found[name] for name in found.files if name.startswith("text")]
        fitting = [text for text in texts if text.dtype.kind == "f" and text.shape[1:] == features.shape[1:]]
        temperature = float(found["temperature"]) if "temperature" in found.files else TEMPERATURE
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"{path}: features {features.shape} and labels {labels.shape} do not fit each other")
    return FeatureFile(
        name=Path(path).stem,
        images=Images(features=features, labels=labels),
        texts=fitting[0].astype(np.float32) if fitting else None,
        temperature=temperature,
    )


def file_settings(
    file: FeatureFile, *, seed: int, others: Sequence[FeatureFile]
) -> Iterator[tuple[Data, Setting]]:
    """All settings of a seed. Foreign images come from the file itself, or from `others` of the same encoder."""
    rng = np.random.default_rng(seed)
    data = _with_texts(file, rng) if file.texts is not None else _with_one_image_heads(file, rng)
    alike = [o.images.features for o in others if o.images.features.shape[1] == data.head.shape[1]]
    if data.foreign is None and alike:
        data = replace(data, foreign=np.concatenate(alike))
    for setting in _settings(data, seed=seed, rng=rng):
        yield data, setting
    everything = Setting(name="random head", seed=seed, unlabelled=data.train, test=data.test)
    head = random_head(data.head, seed=RANDOM_HEADS + seed)
    yield replace(data, head=head, single_head=head), everything


def _settings(data: Data, *, seed: int, rng: np.random.Generator) -> Iterator[Setting]:
    train, test = data.train, data.test
    num_classes = len(data.head)
    order = rng.permutation(num_classes)
    yield Setting(name="all", seed=seed, unlabelled=train, test=test)
    least = np.bincount(train.labels, minlength=num_classes)
    if np.median(least) >= 2 * min(FEW_A_CLASS):
        yield Setting(
            name="long-tailed 1:10",
            seed=seed,
            unlabelled=long_tailed(train, ratio=10, order=order),
            test=long_tailed(test, ratio=10, order=order),
        )
    for name, count in {
        "few classes": max(3, min(5, num_classes // 6)),
        "half of the classes": num_classes // 2,
    }.items():
        present = order[:count]
        yield Setting(
            name=name,
            seed=seed,
            unlabelled=only_classes(train, present),
            test=only_classes(test, present),
            balanced=test,
        )
    if data.foreign is not None:
        limit = round(len(train) / 0.8)
        mixed = with_foreign(train, data.foreign, share=0.2, limit=limit, rng=rng)
        yield Setting(name="20% foreign", seed=seed, unlabelled=mixed, test=test)
    for count in FEW_A_CLASS:
        if np.median(least) > count:
            yield Setting(name=f"{count} a class", seed=seed, unlabelled=_at_most(train, count), test=test)


def _with_texts(file: FeatureFile, rng: np.random.Generator) -> Data:
    assert file.texts is not None
    named = np.flatnonzero(np.isfinite(file.texts).all(axis=1))
    place = np.full(len(file.texts) + 1, -1)
    place[named] = np.arange(len(named))
    labels = place[file.images.labels]
    known = Images(features=file.images.features, labels=labels).take(labels >= 0)
    foreign = file.images.features[labels < 0]
    head = F.normalize(torch.from_numpy(file.texts[named]), dim=1)
    return _halves(
        known.take(rng.permutation(len(known))),
        name=file.name,
        head=head,
        temperature=file.temperature,
        foreign=foreign if len(foreign) else None,
    )


def _with_one_image_heads(file: FeatureFile, rng: np.random.Generator) -> Data:
    images = file.images.take(rng.permutation(len(file.images)))
    classes, first = np.unique(images.labels, return_index=True)
    first = first[classes >= 0]
    head = F.normalize(torch.from_numpy(images.features[first]).float(), dim=1)
    rest = images.take(np.setdiff1d(np.arange(len(images)), first))
    return _halves(
        rest,
        name=f"{file.name} (one-image heads)",
        head=head,
        temperature=ONE_IMAGE_TEMPERATURE,
        foreign=None,
    )


def _halves(
    images: Images, *, name: str, head: torch.Tensor, temperature: float, foreign: np.ndarray | None
) -> Data:
    half = len(images) // 2
    return Data(
        name=name,
        head=head,
        single_head=head,
        temperature=temperature,
        train=images.take(slice(half)),
        test=images.take(slice(half, None)),
        foreign=foreign,
        corrupted={},
    )


def _at_most(images: Images, count: int) -> Images:
    """The first images of each class."""
    order = np.argsort(images.labels, kind="stable")
    starts = np.searchsorted(images.labels[order], images.labels[order])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - starts
    return images.take(rank < count)
