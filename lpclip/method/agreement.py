"""Agreement of two labellings, and what of it is beyond chance."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Agreement(NamedTuple):
    """Agreement of labellings, as it is and by chance."""

    share: float
    """Share of the rows that have the same label in both."""
    chance: float
    """The share that labels of these frequencies would have in common by chance."""

    @property
    def kappa(self) -> float:
        """Agreement beyond chance (Cohen, 1960): 0 by chance, 1 for all."""
        return (self.share - self.chance) / max(1 - self.chance, 1e-9)


def agreement(first: np.ndarray, second: np.ndarray, *, num_classes: int) -> Agreement:
    """Agreement of two labellings (n,), class indices below `num_classes`."""
    shares = [np.bincount(labels, minlength=num_classes) / len(labels) for labels in (first, second)]
    return Agreement(share=float((first == second).mean()), chance=float(shares[0] @ shares[1]))
