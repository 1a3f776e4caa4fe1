"""Which of the class names have images among the unlabelled ones, and what a probe does with the other names.

A name without images does harm: rounds that pull labels to it cut another class to fill it. Two witnesses speak for a
name: rows that zero-shot is sure of, and labels that rounds without a class prior give it. A name that neither speaks
for is taken for absent. Labels play no part.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lpclip.method.linear import Linear

# A row is sure where zero-shot gives a name more than this.
SURE = 0.9
# So few rows say too little of what is not among them.
ENOUGH_ROWS = 40
# With a smaller share of sure rows, zero-shot is weak: those it has speak for what is easy, not for what is there.
ENOUGH_OF_ALL = 0.05
# With fewer sure rows for each name on the mean, a name without any says nothing about that name ...
ENOUGH_SURE = 3.0
# ... but at least so many of them may still crowd on half of the names that chance would hit.
CROWD, CROWD_NAMES = 10, 0.5
# Zero-shot speaks for a name with more than this share of the mean number of sure rows, rounds with more than this
# share of the mean number of labels.
SURE_SHARE, LABEL_SHARE = 0.1, 0.5
# With more names left than this share, all of them stay: to leave one out gains little, and costs a class if wrong.
MOST_LEFT = 0.6
STEPS = 8
# An absent name's row in the probe takes this share of the unlabelled images.
TAKEN = 0.003


def present_classes(zero_shot: Tensor, *, label: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Places (K',) int64, rising, of the names that have images; all K where too little speaks against any.

    `zero_shot` are its logits (n, K) of the rows. `label` takes places and returns the rows' labels (n,), places among
    these, of rounds that know these names alone and have no class prior.
    """
    num_rows, num_classes = zero_shot.shape
    places = np.arange(num_classes)
    for _ in range(STEPS if num_rows >= ENOUGH_ROWS else 0):
        sure = (torch.softmax(zero_shot[:, places], dim=1) > SURE).sum(dim=0).numpy()
        spoken_for = sure > SURE_SHARE * sure.mean()
        if sure.sum() < ENOUGH_OF_ALL * num_rows:
            break
        if sure.mean() < ENOUGH_SURE and not _crowd(sure, hit=int(spoken_for.sum())):
            break
        counts = np.bincount(label(places), minlength=len(places))
        kept = spoken_for | (counts >= LABEL_SHARE * num_rows / len(places))
        if kept.all() or kept.sum() < 2:
            break
        places = places[kept]
    return places if len(places) <= MOST_LEFT * num_classes else np.arange(num_classes)


def _crowd(sure: np.ndarray, *, hit: int) -> bool:
    """Say whether sure rows crowd on few names: thrown at equal names, `total` of them hit K (1 - (1 - 1/K)^total)."""
    total, num_names = int(sure.sum()), len(sure)
    by_chance = num_names * (1 - (1 - 1 / num_names) ** total)
    return total >= CROWD and hit <= CROWD_NAMES * by_chance


def among_all(present: Linear, places: np.ndarray, *, num_classes: int) -> Linear:
    """A classifier of the names at `places` as one of all names, in which the others have no chance."""
    weight = torch.zeros(num_classes, present.weight.shape[1])
    bias = torch.full((num_classes,), -1e4)
    weight[places], bias[places] = present.weight, present.bias
    return Linear(weight=weight, bias=bias)


def with_absent(present: Linear, places: np.ndarray, *, zero_shot: Linear, features: np.ndarray) -> Linear:
    """A classifier of the names at `places` as one of all names: an image of an absent name may come later.

    The rows of absent names are zero-shot's, scaled to the spread of the classifier's logits and lowered until TAKEN of
    the unlabelled features (n, d), which have no image of these names, goes to them.
    """
    absent = np.setdiff1d(np.arange(len(zero_shot.bias)), places)

    def work(rows: slice) -> list[Tensor]:
        own, other = present.logits(features[rows]), zero_shot.logits(features[rows])
        return [own.std(dim=1), other.std(dim=1), own.amax(dim=1), other[:, absent].amax(dim=1)]

    own_spread, other_spread, own_top, absent_top = zero_shot.by_blocks(len(features), work)
    scale = own_spread.mean() / other_spread.mean()
    ahead = scale * absent_top - own_top
    price = ahead.kthvalue(max(1, round((1 - TAKEN) * len(ahead)))).values
    found = among_all(present, places, num_classes=len(zero_shot.bias))
    found.weight[absent] = scale * zero_shot.weight[absent]
    found.bias[absent] = scale * zero_shot.bias[absent] - price
    return found
