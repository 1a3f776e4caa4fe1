"""A few labels that people gave: they correct every teacher, and are the targets of their own images.

A teacher says softmax(W f + b) of an image's features f. The labels add the step D to W that makes them most likely,
and that stays small:

    largest D of   sum_l log((1 - e) softmax((W + D) f_l + b)_{y_l} + e / K)  -  r / 2 |D|^2

The features are centred and scaled to a mean square of 1, with a constant beside them, for b. e is the share of the
labels that may be wrong: a label that the classifier thinks impossible hardly counts. r holds the step back, so the
labels' weight grows with their number. The largest D is found by expectation-maximisation, as each label is right or
wrong. The curvature is replaced by its bound (Boehning, Annals of the Institute of Statistical Mathematics, 1992), so
that one factor serves all steps of all rounds. D is a sum of the labelled images' features, so it is looked for in the
directions that these span, which are as many as there are labels, and d + 1 at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lpclip.method.linear import Linear

NONE_OF_THESE = -2
"""The label of an image that belongs to no class."""
RIDGE = 0.7  # r
WRONG = 0.05  # e
CONSTANT = 0.5
STEPS = 40
FOLDS = 5
# A classifier counts as better where chance alone would make it look so less often than this.
CHANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class FewLabels:
    """Images with a given label, of all shards."""

    places: Tensor
    """(L,) int64: their places among all rows."""
    features: Tensor
    """(L, d) float32, unit norm."""
    classes: Tensor
    """(L,) int64 class indices, or NONE_OF_THESE."""

    @classmethod
    def of_rows(cls, labels: np.ndarray, features: np.ndarray) -> FewLabels | None:
        """The labels (N,) of features (N, d), -1 for those without one; None where all are without."""
        places = np.flatnonzero(labels != -1)
        if not len(places):
            return None
        return cls(
            places=torch.from_numpy(places),
            features=torch.from_numpy(features[places]).float(),
            classes=torch.from_numpy(labels[places]).long(),
        )

    @cached_property
    def named(self) -> FewLabels:
        """Those of them that belong to a class."""
        return self.take(self.classes >= 0)

    def take(self, which: Tensor) -> FewLabels:
        """Those at which `which` (L,) bool is true."""
        return FewLabels(
            places=self.places[which], features=self.features[which], classes=self.classes[which]
        )

    def among(self, present: np.ndarray) -> FewLabels:
        """The same as indices of the classes at the places `present` (K',), which include all that are given."""
        place_of = {int(place): index for index, place in enumerate(present)}
        classes = [place_of.get(label, label) for label in self.classes.tolist()]
        return replace(self, classes=torch.tensor(classes))

    def put(self, targets: Tensor, *, first_row: int) -> tuple[Tensor, Tensor]:
        """The targets (m, K) of the rows from `first_row` on with the given labels in them, and which count (m,)."""
        local = self.places - first_row
        mine = (local >= 0) & (local < len(targets))
        rows, classes = local[mine].to(targets.device), self.classes[mine].to(targets.device)
        counts = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        if not len(rows):
            return targets, counts
        targets = targets.clone()
        is_named = classes >= 0
        targets[rows[is_named]] = torch.nn.functional.one_hot(classes[is_named], targets.shape[1]).to(targets)
        counts[rows[~is_named]] = False
        return targets, counts


def with_labelled(present: np.ndarray, labels: FewLabels | None) -> np.ndarray:
    """The places (K',) of the classes that have images, and of those that a label names."""
    if labels is None:
        return present
    return np.union1d(present, labels.named.classes.numpy()).astype(present.dtype)


@dataclass(frozen=True)
class Correction:
    """The step that labels add to a classifier."""

    labels: FewLabels
    mean: Tensor
    """(d,) float64, of all features."""

    def apply(self, classifier: Linear) -> Linear:
        """The classifier (K, d), in units of logits, with the step of the labels."""
        labels = self.labels.named
        if not len(labels.classes):
            return classifier
        num_classes = len(classifier.bias)
        start = (labels.features @ classifier.weight.T + classifier.bias).double()
        wanted = torch.nn.functional.one_hot(labels.classes, num_classes).double()
        along = torch.zeros(num_classes, self._coordinates.shape[1], dtype=torch.float64)
        for _ in range(STEPS):
            found = torch.softmax(start + self._coordinates @ along.T, dim=1)
            own = (1 - WRONG) * (found * wanted).sum(dim=1)
            is_right = own / (own + WRONG / num_classes)
            gradient = ((found - wanted) * is_right[:, None]).T @ self._coordinates + RIDGE * along
            along -= torch.cholesky_solve(gradient.T, self._factor).T
        step = along @ self._directions.T
        weight = step[:, :-1] / self._scale
        bias = CONSTANT * step[:, -1] - weight @ self.mean
        return Linear(weight=classifier.weight + weight.float(), bias=classifier.bias + bias.float())

    def held_out(self, classifier: Linear) -> Tensor:
        """Logits (L, K) of the labels' images that belong to a class, each with the step of other labels alone."""
        labels = self.labels.named
        fold_of = torch.arange(len(labels.classes)) % FOLDS
        logits = torch.zeros(len(labels.classes), len(classifier.bias))
        for fold in range(FOLDS):
            mine, others = fold_of == fold, labels.take(fold_of != fold)
            logits[mine] = Correction(others, mean=self.mean).apply(classifier).logits(labels.features[mine])
        return logits

    @cached_property
    def _scale(self) -> float:
        """The root of the mean square of centred features, which have unit norm before."""
        return math.sqrt(max(1e-6, 1 - float(self.mean @ self.mean)))

    @cached_property
    def _rows(self) -> Tensor:
        """(L, d + 1) float64: centred, scaled, with a constant."""
        centred = (self.labels.named.features.double() - self.mean) / self._scale
        return torch.nn.functional.pad(centred, (0, 1), value=CONSTANT)

    @cached_property
    def _directions(self) -> Tensor:
        """(d + 1, m) float64, orthonormal: m = min(L, d + 1) directions that hold all rows."""
        return torch.linalg.qr(self._rows.T).Q

    @cached_property
    def _coordinates(self) -> Tensor:
        """(L, m) float64, the rows along these directions."""
        return self._rows @ self._directions

    @cached_property
    def _factor(self) -> Tensor:
        """(m, m) float64, the root of the bound on the curvature."""
        rows = self._coordinates
        identity = torch.eye(rows.shape[1], dtype=torch.float64)
        return torch.linalg.cholesky(rows.T @ rows / 2 + RIDGE * identity)


def mean_feature(features: np.ndarray) -> Tensor:
    """(d,) float64, the mean of features (N, d)."""
    return torch.from_numpy(features.mean(axis=0, dtype=np.float64))


def more_often_right(won: int, lost: int) -> bool:
    """Say whether a classifier is right more often than another, beyond chance: the sign test.

    `won` images are those that it alone has right, `lost` those that the other alone has right.
    """
    games = won + lost
    return sum(math.comb(games, k) for k in range(won, games + 1)) < CHANCE * 2**games


def gathered(
    labels: Mapping[str, int], *, ids: np.ndarray, features: np.ndarray, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A shard's part of what `FewLabels` has of labels by id: places, features, classes; zero for other shards' rows.

    Shards add their parts up. Rows stand in the order of the sorted ids.
    """
    order = {name: place for place, name in enumerate(sorted(labels))}
    places = torch.zeros(len(order), dtype=torch.float64)
    rows = torch.zeros(len(order), features.shape[1], dtype=torch.float64)
    for row, name in enumerate(ids.tolist()):
        if (place := order.get(name)) is not None:
            places[place] = first_row + row
            rows[place] = torch.from_numpy(features[row]).double()
    classes = torch.tensor([labels[name] for name in order], dtype=torch.int64)
    return places, rows, classes
