"""The temperature of a probe, set without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpclip.method.held_out import held_out_logits
from lpclip.method.linear import BLOCK_CELLS, Linear
from lpclip.method.probe import Probe
from lpclip.method.pseudo_labels import bisect_factor

# The temperature is set on this many rows, the first in row order: a fair sample.
CALIBRATION_ROWS = 20_000
# The guess of the accuracy counts as much as this many given labels.
GUESS_LABELS = 20


def mean_confidence(probe: Probe, features: np.ndarray) -> float:
    """Mean maximal probability of a probe on features (N, d)."""
    _, confidence = probe.label(features)
    return float(confidence.double().mean())


def expected_accuracy(zero_shot_confidence: float, *, evidence: float = 1.0) -> float:
    """A guess of a self-trained probe's accuracy from zero-shot's mean confidence c, in (0, 1): c's odds squared.

    c stands for zero-shot's accuracy. The unlabelled features are taken for a second witness that is as good and
    independent, and where such two agree their odds multiply: c^2 / (c^2 + (1 - c)^2). Never less than c itself. The
    second witness counts by its evidence, 0 to 1: the share of the class means that comes from images.
    """
    c = min(max(zero_shot_confidence, 1e-6), 1 - 1e-6)
    return c + evidence * max(0.0, c**2 / (c**2 + (1 - c) ** 2) - c)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What given labels say of a classifier's accuracy."""

    count: int
    right_without: int
    """Labels that the classifier before it, which knew none of them, has right: too few."""
    right_with: int
    """Labels that the classifier has right, which knows them: too many."""

    def accuracy(self, guess: float) -> float:
        """Halfway between the two, as if GUESS_LABELS more labels had shown the `guess`."""
        seen = (self.right_without + self.right_with) / 2
        return (GUESS_LABELS * guess + seen) / (GUESS_LABELS + self.count)


def label_free_temperature(
    probe: Probe,
    *,
    zero_shot: Probe,
    features: np.ndarray,
    trained: Linear,
    head: Tensor,
    checked: Checked | None = None,
) -> float:
    """The temperature at which the probe is as confident on the mean as it can be expected to be right.

    A probe is surer of images that it was fitted to than of others. How much surer is measured with students that did
    without a part of the images (`held_out_logits`): `trained` (K', d) is the rounds' own classifier, `head` (K', d)
    the texts of its names in units of logits. Labels play no part, but for the few that were given, if any: `checked`.
    docs/method.md has what other ways give.
    """
    sample = features[:CALIBRATION_ROWS]
    fitted, held_out, evidence = held_out_logits(trained, head=head, features=features)
    target = expected_accuracy(mean_confidence(zero_shot, sample), evidence=evidence)
    if checked is not None:
        target = checked.accuracy(target)
    optimism = temperature_at(held_out, confidence=target) / temperature_at(fitted, confidence=target)
    return optimism * temperature_at(probe.logits(sample), confidence=target)


def temperature_at(logits: Tensor, *, confidence: float) -> float:
    """The temperature that gives logits (N, K) this mean maximal probability, within 2^-8 to 2^8."""
    blocks = logits.split(max(1, BLOCK_CELLS // logits.shape[1]))

    def too_sure(temperature: float) -> bool:
        tops = (torch.softmax(block / temperature, dim=1).amax(dim=1) for block in blocks)
        return sum(float(top.double().sum()) for top in tops) > confidence * len(logits)

    return bisect_factor(too_sure, octaves=8, steps=40)
