"""Robustness to shifted images: the corruption error and effective robustness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# AlexNet's error on ImageNet-C, the mean over severities 1 to 5 (Hendrycks and Dietterich, 2019). It was measured on
# the published files, which are 224 pixels wide already: no resizing, no crop.
ALEXNET_ERROR: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
# As a reference for `corruption_error`: only the sum over the five severities matters.
ALEXNET_ERRORS: dict[str, tuple[float, ...]] = {name: (error,) * 5 for name, error in ALEXNET_ERROR.items()}


class Fit(NamedTuple):
    """logit(accuracy under shift) = a logit(accuracy on ImageNet) + b, over standard ImageNet models."""

    a: float
    b: float
    num_classes: int
    """Both accuracies are among so many classes."""


# The fits were published by Taori et al. (2020). ImageNet-V2 is the matched-frequency set. For ImageNet-R and ObjectNet
# both accuracies are among the classes of that set.
FITS: dict[str, Fit] = {
    "imagenet-v2": Fit(0.9232, -0.4977, 1000),
    "imagenet-sketch": Fit(1.0709, -2.3701, 1000),
    "imagenet-r": Fit(0.6368, -2.1077, 200),
    "objectnet": Fit(0.9809, -1.9283, 113),
}


def corruption_error(
    errors: Mapping[str, Sequence[float]], *, reference: Mapping[str, Sequence[float]]
) -> dict[str, float | None]:
    """For each corruption the sum of errors over severities, over the reference's (Hendrycks and Dietterich, 2019).

    Errors are fractions, one for each severity, the same severities on both sides. The mean over all 15 corruptions
    with `ALEXNET_ERRORS` as the reference is ImageNet-C's mCE; it needs all five severities. A reference without
    errors gives None. Raises ValueError when the reference lacks a corruption or has other severities, or when an
    error is no fraction.
    """
    found: dict[str, float | None] = {}
    for name, values in errors.items():
        others = reference.get(name, ())
        if len(values) == 0 or len(values) != len(others):
            raise ValueError(
                f"{name}: errors at {len(values)} severities, but the reference has {len(others)}"
            )
        if not all(0 <= value <= 1 for value in (*values, *others)):
            raise ValueError(f"{name}: errors must be fractions between 0 and 1")
        total = sum(others)
        found[name] = sum(values) / total if total > 0 else None
    return found


def effective_robustness(accuracy_shift: float, *, accuracy: float, fit: str) -> float:
    """Accuracy under shift beyond what ImageNet models of this accuracy have: shift - sigmoid(a logit(acc) + b).

    Accuracies are fractions among the classes of `FITS[fit]`, whose a and b are taken (Taori et al., 2020); `accuracy`
    is ImageNet's. At 0 and 1 the sigmoid's limits hold. Raises ValueError for other accuracies and unknown fits.
    """
    if fit not in FITS:
        raise ValueError(f"no fit for {fit!r}: there are {', '.join(FITS)}")
    if not (0 <= accuracy <= 1 and 0 <= accuracy_shift <= 1):
        raise ValueError(f"accuracies must be fractions, not {accuracy_shift} and {accuracy}")
    a, b, _ = FITS[fit]
    # In odds rather than logits, which are infinite at 0 and 1.
    right, wrong = accuracy**a * math.exp(b), (1 - accuracy) ** a
    return accuracy_shift - right / (right + wrong)
