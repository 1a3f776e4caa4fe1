"""The temperature of a probe, set without labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpclip.method.few_labels import WRONG, FewLabels
from lpclip.method.held_out import held_out_logits
from lpclip.method.linear import BLOCK_CELLS, Linear
from lpclip.method.probe import Probe
from lpclip.method.pseudo_labels import bisect_factor

# The temperature is set on this many rows, the first in row order: a fair sample.
CALIBRATION_ROWS = 20_000
# How far given labels are expected to move a guess of the temperature: a standard deviation, in octaves.
OCTAVES = 0.3


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
    probe: Probe, *, zero_shot: Probe, features: np.ndarray, trained: Linear, head: Tensor
) -> float:
    """The temperature at which the probe is as confident on the mean as it can be expected to be right.

    A probe is surer of images that it was fitted to than of others. How much surer is measured with students that did
    without a part of the images (`held_out_logits`): `trained` (K', d) is the rounds' own classifier, `head` (K', d)
    the texts of its names in units of logits. Labels play no part. docs/method.md has what other ways give.
    """
    sample = features[:CALIBRATION_ROWS]
    found = held_out_logits(trained, head=head, features=features)
    target = expected_accuracy(mean_confidence(zero_shot, sample), evidence=found.evidence)
    optimism = temperature_at(found.held_out, confidence=target) / temperature_at(
        found.fitted, confidence=target
    )
    return optimism * temperature_at(probe.logits(sample), confidence=target)


def labelled_factor(logits: Tensor, labels: FewLabels, *, features: np.ndarray) -> float:
    """The factor that corrects a guess of the temperature, found from given labels.

    `logits` (L, K) are those of the labels' images, over the guessed temperature, by a classifier that did without the
    label in question. The factor t makes the labels most likely, and is near 1 as long as they are few:

        largest t of   sum_l w_l log((1 - e) softmax(logits_l / t)_{y_l} + e / K)  -  (log2 t)^2 / (2 s^2)

    People are asked for the labels of hard images. So a label's weight w_l is the number of images, of features (N, d),
    that are nearer to its own than to another one; the weights' sum is that of as many equal ones as say as much (Kish,
    Survey Sampling, 1965).
    """
    if not len(logits):
        return 1.0
    counts = _stand_for(labels, features=features[:CALIBRATION_ROWS])
    weights = counts * counts.sum() / (counts**2).sum()

    def worth(octaves: float) -> float:
        own = torch.softmax(logits.double() / 2**octaves, dim=1).gather(1, labels.classes[:, None])[:, 0]
        likelihood = ((1 - WRONG) * own + WRONG / logits.shape[1]).log()
        return float((weights * likelihood).sum()) - octaves**2 / (2 * OCTAVES**2)

    near = max(np.linspace(-2, 2, 17), key=worth)
    return float(2 ** max(near + np.linspace(-0.25, 0.25, 51), key=worth))


def _stand_for(labels: FewLabels, *, features: np.ndarray) -> Tensor:
    """(L,) float64: of features (N, d), how many are nearest to each label's image."""
    counts = torch.zeros(len(labels.classes), dtype=torch.float64)
    for block in torch.as_tensor(features).split(max(1, BLOCK_CELLS // len(counts))):
        nearest = (block.float() @ labels.features.T).argmax(dim=1)
        counts += torch.bincount(nearest, minlength=len(counts))
    return counts


def temperature_at(logits: Tensor, *, confidence: float) -> float:
    """The temperature that gives logits (N, K) this mean maximal probability, within 2^-8 to 2^8."""
    blocks = logits.split(max(1, BLOCK_CELLS // logits.shape[1]))

    def too_sure(temperature: float) -> bool:
        tops = (torch.softmax(block / temperature, dim=1).amax(dim=1) for block in blocks)
        return sum(float(top.double().sum()) for top in tops) > confidence * len(logits)

    return bisect_factor(too_sure, octaves=8, steps=40)
