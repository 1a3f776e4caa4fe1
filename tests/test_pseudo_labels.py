"""Soft targets, the correction of their class shares, and the scale of confidence: checked where the truth is known."""

from __future__ import annotations

import itertools

import pytest
import torch

from lpclip.method.priors import MAX_FACTOR, Prior, prior_sums, update_factors
from lpclip.method.pseudo_labels import SMALLEST_TARGET, confidence_sums, scale_to_confidence, soft_targets

SKEWED = torch.tensor([0.7, 0.2, 0.1])


def one_shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def logits_of(shares: torch.Tensor, *, num_rows: int = 10_000) -> torch.Tensor:
    """Logits, exact for equally frequent classes, of unit Gaussians whose classes have other shares."""
    generator = torch.Generator().manual_seed(0)
    means = 1.5 * torch.eye(len(shares))
    labels = torch.multinomial(shares, num_rows, replacement=True, generator=generator)
    points = means[labels] + torch.randn(num_rows, len(shares), generator=generator)
    return points @ means.T - means.square().sum(dim=1) / 2


def settle(logits: torch.Tensor, *, prior: Prior, steps: int = 40) -> torch.Tensor:
    factors = torch.ones(logits.shape[1])
    posterior = torch.softmax(logits, dim=1)
    for _ in range(steps):
        factors = update_factors(prior_sums(posterior, factors), prior=prior)
    return factors


def shares_under(logits: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return soft_targets(logits, factors)[1].mean(dim=0)


def test_without_factors_the_targets_are_the_posteriors():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    posterior, targets = soft_targets(logits, torch.ones(4))
    torch.testing.assert_close(posterior, torch.softmax(logits, dim=1))
    torch.testing.assert_close(targets, posterior)


def test_factors_multiply_the_odds():
    _, targets = soft_targets(torch.zeros(1, 2), torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(targets, torch.tensor([[0.75, 0.25]]))


def test_a_target_too_small_to_matter_is_exactly_zero():
    _, targets = soft_targets(torch.tensor([[0.0, -20.0, -200.0]]), torch.ones(3))
    assert targets.tolist() == [[1.0, 0.0, 0.0]]
    _, targets = soft_targets(torch.tensor([[0.0, -10.0]]), torch.ones(2))
    assert targets[0, 1] > SMALLEST_TARGET


def test_logits_beyond_all_bounds_give_finite_targets():
    posterior, targets = soft_targets(torch.tensor([[1e30, -1e30], [-1e4, 1e4]]), torch.tensor([1e-6, 1.0]))
    assert posterior.isfinite().all()
    assert targets.isfinite().all()


def test_a_planted_prior_is_recovered():
    posterior = torch.softmax(logits_of(SKEWED), dim=1)
    factors = torch.ones(3)
    for _ in range(30):
        # As the rounds do: what was corrected is what the next correction starts from, halfway each time.
        posterior = posterior * factors
        posterior = posterior / posterior.sum(dim=1, keepdim=True)
        factors = torch.ones(3)
        for _ in range(20):
            factors = update_factors(prior_sums(posterior, factors), prior=Prior(shares=SKEWED))
    torch.testing.assert_close(posterior.mean(dim=0), SKEWED, atol=1e-3, rtol=0)


def test_at_full_strength_the_targets_go_halfway_to_the_prior():
    logits = logits_of(torch.ones(3) / 3)
    found = shares_under(logits, settle(logits, prior=Prior(shares=SKEWED)))
    halfway = (shares_under(logits, torch.ones(3)) + SKEWED) / 2
    torch.testing.assert_close(found, halfway, atol=1e-4, rtol=0)


def test_strength_moves_the_shares_part_of_the_way_however_long_it_iterates():
    logits = logits_of(torch.ones(3) / 3)
    before = shares_under(logits, torch.ones(3))
    found = []
    for strength in (0.25, 0.5, 0.75):
        prior = Prior(shares=SKEWED, strength=strength)
        factors = settle(logits, prior=prior)
        torch.testing.assert_close(factors, settle(logits, prior=prior, steps=80))
        found.append(float(shares_under(logits, factors)[0]))
    places = [float(before[0]), *found, float(before[0] + SKEWED[0]) / 2]
    assert places == sorted(places)
    assert min(b - a for a, b in itertools.pairwise(places)) > 0.01


def test_strength_zero_leaves_the_targets_alone():
    logits = logits_of(SKEWED, num_rows=100)
    assert settle(logits, prior=Prior(strength=0.0), steps=3).tolist() == [1.0, 1.0, 1.0]


def test_what_is_asked_for_lies_halfway_between_the_counts_and_the_prior():
    assert Prior().target(torch.tensor([6.0, 2.0, 0.0, 0.0])).tolist() == [0.5, 0.25, 0.125, 0.125]
    found = Prior(shares=torch.tensor([0.5, 0.5, 0.0])).target(torch.tensor([1.0, 1.0, 8.0]))
    torch.testing.assert_close(found, torch.tensor([0.3, 0.3, 0.4]).double())


def test_sums_for_the_prior_add_up_over_shards():
    posterior = torch.softmax(logits_of(SKEWED, num_rows=101), dim=1)
    whole = prior_sums(posterior, SKEWED)
    cut = sum(prior_sums(part, SKEWED) for part in posterior.split([0, 1, 60, 40]))
    torch.testing.assert_close(cut, whole)


def test_the_classes_order_does_not_matter():
    logits, order = logits_of(SKEWED, num_rows=500), torch.tensor([2, 0, 1])
    factors = settle(logits, prior=Prior(), steps=10)
    torch.testing.assert_close(settle(logits[:, order], prior=Prior(), steps=10), factors[order])


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_class_that_nothing_resembles_keeps_finite_factors(strength: float):
    logits = torch.cat(
        [torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.full((20, 1), -1e4)], 1
    )
    factors = settle(logits, prior=Prior(shares=torch.ones(3) / 3, strength=strength), steps=50)
    assert factors.isfinite().all()
    assert factors.max() / factors.min() <= MAX_FACTOR**2 * 1.0001


def test_no_rows_at_all_give_finite_factors():
    assert update_factors(torch.zeros(2, 3, dtype=torch.float64), prior=Prior()).isfinite().all()


@pytest.mark.parametrize("target", [0.5, 0.8, 0.99])
@pytest.mark.parametrize("size", [0.1, 1.0, 1e2])
def test_scaling_hits_the_wanted_confidence(target: float, size: float):
    logits = size * torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    scale = scale_to_confidence(logits, target, all_reduce=one_shard)
    total, rows = confidence_sums(scale * logits).tolist()
    assert total / rows == pytest.approx(target, abs=1e-4)


def test_scaling_knows_no_unit():
    logits = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    scale = scale_to_confidence(logits, 0.8, all_reduce=one_shard)
    assert scale_to_confidence(logits / 7, 0.8, all_reduce=one_shard) == pytest.approx(7 * scale, rel=1e-4)


def test_a_confidence_out_of_reach_gives_a_finite_scale():
    assert 0 < scale_to_confidence(torch.zeros(10, 4), 0.8, all_reduce=one_shard) < 1e4
    assert 0 < scale_to_confidence(torch.randn(10, 4), 0.1, all_reduce=one_shard) < 1e4


def test_confidence_sums_by_hand():
    assert confidence_sums(torch.tensor([[0.0, 0.0], [1e4, 0.0]])).tolist() == [1.5, 2.0]
    assert confidence_sums(torch.zeros(0, 3)).tolist() == [0.0, 0.0]
