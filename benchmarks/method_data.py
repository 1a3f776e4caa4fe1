"""Data sets and settings of the benchmark of methods: images as features, and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Images:
    """Features (n, d) float16 of unit norm and class indices (n,), -1 for none."""

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Any) -> Images:
        """Those rows: a slice, places or a mask."""
        return Images(features=self.features[rows], labels=self.labels[rows])


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set with all that its settings need."""

    name: str
    head: Tensor
    single_head: Tensor
    temperature: float
    train: Images
    test: Images
    foreign: np.ndarray | None
    corrupted: dict[str, tuple[Images, Images]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The images that methods see, and those they are tested on."""

    name: str
    seed: int
    unlabelled: Images
    test: Images
    balanced: Images | None = None
    """The test images before the cut, where there is one."""


def long_tailed(images: Images, *, ratio: float, order: np.ndarray, limit: float = np.inf) -> Images:
    """Class order[k] keeps n ratio^(-k / (K - 1)) images, n as large as classes and the limit allow."""
    shares = ratio ** -np.linspace(0, 1, len(order))
    counts = np.bincount(images.labels, minlength=len(order))[order]
    largest = min((counts / shares).min(), limit / shares.sum())
    keep = np.maximum(1, (largest * shares + 1e-9).astype(int))
    places = [np.flatnonzero(images.labels == k)[:n] for k, n in zip(order, keep, strict=True)]
    return images.take(np.sort(np.concatenate(places)))


def only_classes(images: Images, classes: np.ndarray) -> Images:
    """The images of these classes."""
    return images.take(np.isin(images.labels, classes))


def with_foreign(
    images: Images, foreign: np.ndarray, *, share: float, limit: int, rng: np.random.Generator
) -> Images:
    """As many images as the limit allows, a share of them from `foreign` and without a label, shuffled."""
    own = int(min(len(images), (1 - share) * limit, len(foreign) * (1 - share) / share))
    added = rng.choice(len(foreign), round(own * share / (1 - share)), replace=False)
    features = np.concatenate([images.features[:own], foreign[added]])
    labels = np.concatenate([images.labels[:own], np.full(len(added), -1)])
    return Images(features=features, labels=labels).take(rng.permutation(len(labels)))
