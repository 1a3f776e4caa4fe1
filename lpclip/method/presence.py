"""Which of the class names have images among the unlabelled ones, and what a probe does with the other names.

A name without images does harm: rounds that pull labels to it cut another class to fill it. Two witnesses speak for a
name: rows that zero-shot is sure of, and labels that rounds without a class prior give it. A name that neither speaks
for is taken for absent. Labels play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpclip.config import UserError, counted, did_you_mean, readable
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


@dataclass(frozen=True, kw_only=True)
class Presence:
    """The class names that have images."""

    places: np.ndarray
    """(K',) int64, rising."""
    why: str
    """Why these, a clause."""


def named_classes(names: Sequence[str], class_names: Sequence[str]) -> np.ndarray | None:
    """Places (K',) int64, rising, of the class names that `--present` names; None for all of them.

    Raises UserError for fewer than two names, and for one that is no class.
    """
    known = {readable(name).casefold(): place for place, name in enumerate(class_names)}
    for name in names:
        if readable(name).casefold() not in known:
            shown = f"{', '.join(class_names[:8])}{', ...' if len(class_names) > 8 else ''}"
            raise UserError(
                f"--present names {name!r}, which is none of the {len(class_names)} classes "
                f"({shown}){did_you_mean(name, ('auto', 'all', *class_names))}"
            )
    places = np.unique([known[readable(name).casefold()] for name in names]).astype(np.int64)
    if len(places) < 2:
        raise UserError(f"--present must name at least two classes, not {len(places)}")
    return places if len(places) < len(class_names) else None


def present_classes(zero_shot: Tensor, *, label: Callable[[np.ndarray], np.ndarray]) -> Presence:
    """The names that have images; all K where too little speaks against any.

    `zero_shot` are its logits (n, K) of the rows. `label` takes places and returns the rows' labels (n,), places among
    these, of rounds that know these names alone and have no class prior.
    """
    num_rows, num_classes = zero_shot.shape
    places, why = np.arange(num_classes), "none seems to be without images"
    if num_rows < ENOUGH_ROWS:
        return Presence(
            places=places, why=f"{counted(num_rows, 'image')} cannot tell, {ENOUGH_ROWS} are needed"
        )
    for _ in range(STEPS):
        sure = (torch.softmax(zero_shot[:, places], dim=1) > SURE).sum(dim=0).numpy()
        spoken_for = sure > SURE_SHARE * sure.mean()
        telling = sure.mean() >= ENOUGH_SURE or _crowd(sure, hit=int(spoken_for.sum()))
        if sure.sum() < ENOUGH_OF_ALL * num_rows or not telling:
            why = "zero-shot is sure of too few images to tell"
            break
        counts = np.bincount(label(places), minlength=len(places))
        kept = spoken_for | (counts >= LABEL_SHARE * num_rows / len(places))
        if kept.all() or kept.sum() < 2:
            break
        places = places[kept]
    if len(places) <= MOST_LEFT * num_classes:
        return Presence(places=places, why="the others seem to have none")
    if len(places) < num_classes:
        why = f"{len(places)} seem to have images, and so few others do little harm"
    return Presence(places=np.arange(num_classes), why=why)


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
