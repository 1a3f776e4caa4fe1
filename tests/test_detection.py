"""Scores of logits, and their metrics against scikit-learn's, TorchUncertainty's and cases worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch_uncertainty.metrics import classification as torch_uncertainty

from lpclip.evaluation.bootstrap import bootstrap_blocks
from lpclip.evaluation.detection import auroc_interval, detection_metrics, ood_scores

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn_counts(num_rows: int, **options: Any) -> torch.Tensor:
    """The counts (B, N) of all resamples."""
    return torch.cat(list(bootstrap_blocks(num_rows, **options)))


def sides(seed: int, n_in: int, n_out: int, *, levels: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of both sides, rounded to a few levels per unit if any, so that many are tied."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randn(n_in, generator=generator).double() + 1
    outside = torch.randn(n_out, generator=generator).double()
    return (inside, outside) if levels == 0 else (inside.mul(levels).round(), outside.mul(levels).round())


CASES = [
    sides(0, 1, 1),
    sides(1, 20, 30),
    sides(2, 500, 40),
    sides(3, 99, 1000),
    sides(4, 20, 20, levels=1),
    sides(5, 400, 700, levels=2),
    sides(6, 333, 777, levels=10),
    (torch.zeros(20), torch.zeros(30)),
    (torch.ones(20), torch.zeros(30)),
    (torch.zeros(20), torch.ones(30)),
]


@pytest.mark.parametrize("drawn", CASES)
def test_scikit_learn_finds_the_same(drawn: tuple[torch.Tensor, torch.Tensor]):
    inside, outside = drawn
    found = detection_metrics(inside, outside)
    scores = torch.cat([inside, outside]).numpy()
    is_in = np.arange(len(scores)) < len(inside)
    assert found["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(is_in, scores), abs=1e-9)
    for name, positive, sign in (("in", is_in, 1), ("out", ~is_in, -1)):
        precision = sklearn.metrics.average_precision_score(positive, sign * scores)
        assert found[f"aupr_{name}"] == pytest.approx(precision, abs=1e-9)
        false, true, _ = sklearn.metrics.roc_curve(positive, sign * scores, drop_intermediate=False)
        assert found[f"fpr95_{name}"] == pytest.approx(false[true >= 0.95 - 1e-12].min(), abs=1e-9)


@pytest.mark.parametrize("drawn", CASES)
@pytest.mark.filterwarnings("ignore:Metric `FPR95`")
def test_torch_uncertainty_takes_the_others_as_positive(drawn: tuple[torch.Tensor, torch.Tensor]):
    inside, outside = drawn
    found, scores = detection_metrics(inside, outside), torch.cat(drawn)
    is_out = (torch.arange(len(scores)) >= len(inside)).long()
    theirs = torch_uncertainty.FPR95(pos_label=1)
    theirs.update(-scores, is_out)
    assert found["fpr95_out"] == pytest.approx(float(theirs.compute()), abs=1e-6)
    mirrored = torch_uncertainty.FPR95(pos_label=0)
    mirrored.update(scores, is_out)
    assert found["fpr95_in"] == pytest.approx(float(mirrored.compute()), abs=1e-6)


def test_a_case_by_hand():
    found = detection_metrics(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 0.0]))
    # Of six pairs four are won, one is lost, one is tied.
    assert found["auroc"] == pytest.approx(4.5 / 6)
    # In-distribution first: 3 alone, then both 2s, then 1.
    assert found["aupr_in"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    # The others first: 0 alone, then 1, then both 2s.
    assert found["aupr_out"] == pytest.approx((1 + 2 / 4) / 2)
    # All in-distribution images are in from 1 up, where one of two others is; all others are out from 2 down.
    assert (found["fpr95_in"], found["fpr95_out"]) == (1 / 2, 2 / 3)


def test_95_of_100_are_enough_and_94_are_not():
    outside = torch.tensor([5.5])
    for low, expected in ((5, 0.0), (6, 1.0)):
        inside = torch.cat([torch.full((100 - low,), 6.0), torch.full((low,), 5.0)])
        assert detection_metrics(inside, outside)["fpr95_in"] == expected
        assert detection_metrics(-outside, -inside)["fpr95_out"] == expected


@pytest.mark.parametrize("drawn", CASES)
def test_the_sides_mirror_each_other(drawn: tuple[torch.Tensor, torch.Tensor]):
    inside, outside = drawn
    found, mirrored, swapped = (
        detection_metrics(*pair) for pair in ((inside, outside), (-outside, -inside), (outside, inside))
    )
    names = {"auroc": "auroc", "aupr_in": "aupr_out", "fpr95_in": "fpr95_out"}
    for name, other in (*names.items(), *((b, a) for a, b in names.items())):
        assert mirrored[other] == found[name]
    assert swapped["auroc"] == pytest.approx(1 - found["auroc"])


def test_only_the_order_of_scores_matters():
    inside, outside = sides(7, 300, 200, levels=5)
    found = detection_metrics(inside, outside)
    assert detection_metrics(inside.exp(), outside.exp()) == found
    # Large scores are no probabilities: a sigmoid would tie them.
    assert detection_metrics(inside + 1e6, outside + 1e6) == found


def test_infinite_scores_have_an_order():
    found = detection_metrics(torch.tensor([math.inf, 1.0]), torch.tensor([0.0, -math.inf]))
    assert found == {"auroc": 1, "aupr_in": 1, "aupr_out": 1, "fpr95_in": 0, "fpr95_out": 0}


@pytest.mark.parametrize("measure", [detection_metrics, auroc_interval])
@pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([0.0, math.nan]), torch.zeros(2, 2)])
def test_both_sides_need_scores(measure, bad: torch.Tensor):
    with pytest.raises(ValueError, match="one in-distribution score"):
        measure(bad, torch.zeros(3))
    with pytest.raises(ValueError, match="one out-of-distribution score"):
        measure(torch.zeros(3), bad)


def test_scores_by_hand():
    logits = torch.tensor([[0.0, math.log(3) * 2], [1.0, 1.0]])
    found = ood_scores(logits, temperature=2.0, cosine_temperature=0.5)
    assert set(found) == {"msp", "max_logit", "energy", "mcm"}
    assert found["msp"].tolist() == pytest.approx([3 / 4, 1 / 2])
    assert found["max_logit"].tolist() == pytest.approx([math.log(3), 0.5])
    assert found["energy"].tolist() == pytest.approx([math.log(4), 0.5 + math.log(2)])
    root = math.sqrt(3)
    assert found["mcm"].tolist() == pytest.approx([root / (1 + root), 1 / 2])


def test_mcm_of_zero_shot_is_the_softmax_of_its_cosines():
    cosines = torch.rand(50, 9, generator=torch.Generator().manual_seed(0)) / 3
    expected = torch.softmax(cosines.double(), dim=1).amax(dim=1)
    for temperature in (1.0, 1.7):
        logits = cosines / 0.01 * temperature
        found = ood_scores(logits, temperature=temperature, cosine_temperature=0.01)["mcm"]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_rows_are_scored_alone():
    logits = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 0.5, "cosine_temperature": 0.1}
    found = ood_scores(logits, **options)
    for name, scores in ood_scores(logits[-5:], **options).items():
        assert found[name].shape == (20_000,)
        torch.testing.assert_close(found[name][-5:], scores, atol=1e-12, rtol=0)
    assert all(len(scores) == 0 for scores in ood_scores(logits[:0], **options).values())


def test_confident_rows_are_not_tied():
    msp = ood_scores(torch.tensor([[20.0, 0.0], [25.0, 0.0]]), temperature=1.0, cosine_temperature=1.0)["msp"]
    assert msp[0] < msp[1]


@pytest.mark.parametrize(("temperature", "cosine_temperature"), [(0.0, 1.0), (1.0, -1.0), (math.nan, 1.0)])
def test_temperatures_must_be_positive(temperature: float, cosine_temperature: float):
    with pytest.raises(ValueError, match="must be positive"):
        ood_scores(torch.zeros(2, 2), temperature=temperature, cosine_temperature=cosine_temperature)


@pytest.mark.parametrize("drawn", [sides(1, 20, 30), sides(5, 40, 70, levels=1), sides(8, 50, 50)])
def test_an_interval_is_of_aurocs_of_repeated_scores(drawn: tuple[torch.Tensor, torch.Tensor]):
    inside, outside = (side.sort().values for side in drawn)
    draws = [
        detection_metrics(inside.repeat_interleave(n_in), outside.repeat_interleave(n_out))["auroc"]
        for n_in, n_out in zip(
            drawn_counts(len(inside), resamples=60, seed=(9, 0)).long(),
            drawn_counts(len(outside), resamples=60, seed=(9, 1)).long(),
            strict=True,
        )
    ]
    found = auroc_interval(*drawn, resamples=60, seed=9)
    assert found == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=1e-6)


def test_an_interval_has_the_known_width():
    inside, outside = sides(10, 800, 500)
    low, high = auroc_interval(inside, outside)
    # DeLong's standard error, from the share of the other side that each score beats.
    beats = (inside[:, None] > outside).double()
    error = math.sqrt(float(beats.mean(dim=1).var() / 800 + beats.mean(dim=0).var() / 500))
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.1)
    assert low < detection_metrics(inside, outside)["auroc"] < high


def test_the_seed_makes_the_interval():
    first, again, other = (auroc_interval(*sides(1, 200, 300), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_parted_sides_leave_no_doubt():
    assert auroc_interval(torch.ones(5), torch.zeros(7)) == (1.0, 1.0)
    assert auroc_interval(torch.zeros(5), torch.zeros(7)) == (0.5, 0.5)
