"""The temperature of a probe, set without labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpclip.method.few_labels import Correction, FewLabels, mean_feature
from lpclip.method.held_out import held_out_logits
from lpclip.method.linear import BLOCK_CELLS, Linear
from lpclip.method.probe import Probe
from lpclip.method.pseudo_labels import bisect_factor

# The temperature is set on this many rows, the first in row order: a fair sample.
CALIBRATION_ROWS = 20_000
# The guess without labels counts as much as this many given labels.
GUESS_LABELS = 50


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


def label_free_temperature(
    probe: Probe,
    *,
    zero_shot: Probe,
    features: np.ndarray,
    trained: Linear,
    head: Tensor,
    labels: FewLabels | None = None,
) -> float:
    """The temperature at which the probe is as confident on the mean as it can be expected to be right.

    A probe is surer of images that it was fitted to than of others. How much surer is measured with students that did
    without a part of the images (`held_out_logits`): `trained` (K', d) is the rounds' own classifier, `head` (K', d)
    the texts of its names in units of logits. Labels play no part, but for the few that were given, if any: `labels`.
    docs/method.md has what other ways give.
    """
    sample = features[:CALIBRATION_ROWS]
    found = held_out_logits(trained, head=head, features=features)
    target = expected_accuracy(mean_confidence(zero_shot, sample), evidence=found.evidence)
    honest = temperature_at(found.held_out, confidence=target)
    optimism = honest / temperature_at(found.fitted, confidence=target)
    guess = optimism * temperature_at(probe.logits(sample), confidence=target)
    if labels is None:
        return guess
    return guess * labelled_temperature(found.student, labels, features=features, guess=honest) / honest


def labelled_temperature(
    classifier: Linear, labels: FewLabels, *, features: np.ndarray, guess: float
) -> float:
    """The temperature at which the step of given labels makes a classifier as confident of others as it is right.

    A fifth of the labels after the other is left out of the step, and asked. They are no fair sample, as people are
    asked for the labels of hard images; so it is their own confidence that is set to the share of them that is right.
    The `guess` of the temperature counts as if GUESS_LABELS more labels had shown it.
    """
    logits = Correction(labels, mean=mean_feature(features)).held_out(classifier)
    if not len(logits):
        return guess
    right = int((logits.argmax(dim=1) == labels.named.classes).sum())
    guessed = float(torch.softmax(logits / guess, dim=1).amax(dim=1).mean())
    target = (GUESS_LABELS * guessed + right) / (GUESS_LABELS + len(logits))
    return temperature_at(logits, confidence=target)


def temperature_at(logits: Tensor, *, confidence: float) -> float:
    """The temperature that gives logits (N, K) this mean maximal probability, within 2^-8 to 2^8."""
    blocks = logits.split(max(1, BLOCK_CELLS // logits.shape[1]))

    def too_sure(temperature: float) -> bool:
        tops = (torch.softmax(block / temperature, dim=1).amax(dim=1) for block in blocks)
        return sum(float(top.double().sum()) for top in tops) > confidence * len(logits)

    return bisect_factor(too_sure, octaves=8, steps=40)
