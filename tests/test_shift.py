"""The corruption error and effective robustness against published figures and cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit, logit

from lpclip.evaluation.shift import (
    ALEXNET_ERROR,
    ALEXNET_ERRORS,
    FITS,
    corruption_error,
    effective_robustness,
)


def test_zero_shot_is_more_robust_than_models_of_its_accuracy():
    found = {
        "imagenet-v2": effective_robustness(0.6188, accuracy=0.6835, fit="imagenet-v2"),
        "imagenet-sketch": effective_robustness(0.4814, accuracy=0.6835, fit="imagenet-sketch"),
    }
    assert {name: 100 * value for name, value in found.items()} == pytest.approx(
        {"imagenet-v2": 6.6, "imagenet-sketch": 30.6}, abs=0.05
    )


@pytest.mark.parametrize("fit", FITS)
def test_the_fit_is_a_line_of_logits(fit: str):
    a, b, _ = FITS[fit]
    for accuracy in np.linspace(0.01, 0.99, 7):
        expected = expit(a * logit(accuracy) + b)
        assert effective_robustness(0.5, accuracy=accuracy, fit=fit) == pytest.approx(0.5 - expected)
        assert effective_robustness(expected, accuracy=accuracy, fit=fit) == pytest.approx(0.0)


@pytest.mark.parametrize("fit", FITS)
def test_no_and_full_accuracy_are_the_limits(fit: str):
    assert effective_robustness(0.3, accuracy=0.0, fit=fit) == 0.3
    assert effective_robustness(0.3, accuracy=1.0, fit=fit) == pytest.approx(-0.7)
    assert effective_robustness(0.0, accuracy=1e-9, fit=fit) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(("shift", "accuracy"), [(61.88, 0.68), (0.6, 68.35), (-0.1, 0.5), (0.5, math.nan)])
def test_accuracies_are_fractions(shift: float, accuracy: float):
    with pytest.raises(ValueError, match="must be fractions"):
        effective_robustness(shift, accuracy=accuracy, fit="imagenet-v2")


def test_an_unknown_fit_names_the_known_ones():
    with pytest.raises(ValueError, match="no fit for 'imagenet-a': there are imagenet-v2, imagenet-sketch"):
        effective_robustness(0.5, accuracy=0.5, fit="imagenet-a")


def test_the_corruption_error_is_a_ratio_of_sums():
    errors = {"fog": [0.1, 0.2, 0.6], "snow": [0.3]}
    reference = {"fog": [0.2, 0.4, 0.4], "snow": [0.2], "frost": [0.5]}
    assert corruption_error(errors, reference=reference) == pytest.approx({"fog": 0.9, "snow": 1.5})
    assert corruption_error(reference, reference=reference) == pytest.approx(
        {"fog": 1, "snow": 1, "frost": 1}
    )


def test_only_the_sum_over_severities_matters_against_alexnet():
    ratios = dict(zip(ALEXNET_ERROR, np.linspace(0.5, 0.9, 15), strict=True))
    steps = np.array([-0.1, -0.05, 0, 0.05, 0.1])
    errors = {name: (ratio * ALEXNET_ERROR[name] + steps).tolist() for name, ratio in ratios.items()}
    assert corruption_error(errors, reference=ALEXNET_ERRORS) == pytest.approx(ratios)


def test_alexnet_is_known_for_the_sum_of_five_severities_alone():
    assert ALEXNET_ERRORS.keys() == ALEXNET_ERROR.keys()
    assert len(ALEXNET_ERROR) == 15
    assert sum(ALEXNET_ERRORS["jpeg_compression"]) == pytest.approx(5 * 0.6065)
    with pytest.raises(ValueError, match="fog: errors at 1 severities, but the reference has 5"):
        corruption_error({"fog": [0.5]}, reference=ALEXNET_ERRORS)


def test_a_reference_without_errors_gives_no_ratio():
    assert corruption_error({"fog": [0.1, 0.2]}, reference={"fog": [0.0, 0.0]}) == {"fog": None}


@pytest.mark.parametrize(
    ("errors", "reference", "reason"),
    [
        ({"fog": [0.1]}, {"snow": [0.1]}, "fog: errors at 1 severities, but the reference has 0"),
        ({"fog": [0.1, 0.2]}, {"fog": [0.1]}, "fog: errors at 2 severities"),
        ({"fog": []}, {"fog": []}, "fog: errors at 0 severities"),
        ({"fog": [10.0]}, {"fog": [0.1]}, "fractions"),
        ({"fog": [0.1]}, {"fog": [math.nan]}, "fractions"),
    ],
)
def test_both_sides_need_errors_at_the_same_severities(errors, reference, reason: str):
    with pytest.raises(ValueError, match=reason):
        corruption_error(errors, reference=reference)
