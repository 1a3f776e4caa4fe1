"""Options of the rounds do what their help says, with both solvers: each test fails where the option is ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import lpclip

NUM_CLASSES, DIM = 4, 24
SHARES = (0.7, 0.1, 0.1, 0.1)

pytestmark = pytest.mark.usefixtures("one_thread")
solvers = pytest.mark.parametrize("solver", ["gaussian", "gradient"])


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@cache
def planted() -> tuple[np.ndarray, lpclip.Head]:
    """Images of four classes that overlap, one of them with most of the images, and a head that is roughly right."""
    rng = np.random.default_rng(0)
    means = unit(rng.normal(size=(NUM_CLASSES, DIM)))
    labels = rng.choice(NUM_CLASSES, size=400, p=SHARES)
    weight = unit(means + 0.6 * unit(rng.normal(size=means.shape)))
    head = lpclip.Head(class_names=tuple("abcd"), weight=weight, temperature=0.1)
    return unit(means[labels] + 0.4 * rng.normal(size=(400, DIM))), head


@cache
def trained(
    solver: str, *, temperature_of_head: float = 0.1, shares: Sequence[float] | None = None, **options: object
) -> lpclip.SelfTraining:
    features, head = planted()
    config = lpclip.SelfTrainingConfig(**{"solver": solver, "rounds": 3, "prior": "weak", **options})
    return lpclip.fit(features, replace(head, temperature=temperature_of_head), config=config, shares=shares)


def label_shares(found: lpclip.SelfTraining) -> np.ndarray:
    return np.bincount(found.labels, minlength=NUM_CLASSES) / len(found.labels)


@solvers
def test_no_more_rounds_run_than_were_asked_for_and_these_are_the_first(solver: str) -> None:
    three, one = trained(solver), trained(solver, rounds=1)
    assert (len(three.rounds), len(one.rounds)) == (3, 1)
    assert torch.equal(one.rounds[0].weight, three.rounds[0].weight)
    assert not torch.equal(one.probe.weight, three.probe.weight)


@solvers
def test_labels_below_the_threshold_are_left_out_of_the_fit(solver: str) -> None:
    every, sure = trained(solver), trained(solver, threshold=0.7)
    assert every.kept.all()
    assert 0.2 < sure.kept.mean() < 0.98
    assert (sure.kept == (sure.confidence >= 0.7)).all()
    for state, other in zip(sure.rounds, every.rounds, strict=True):
        assert state.metrics["coverage"] < other.metrics["coverage"] == 1
        assert not torch.allclose(state.weight, other.weight, rtol=1e-3), "the fit knows nothing of it"


def test_the_gradient_solver_takes_no_step_for_a_label_below_the_threshold() -> None:
    features, head = planted()
    options = {"solver": "gradient", "rounds": 1, "prior": "none", "neighbours": 0}
    unsure = trained(**options).zero_shot.probabilities(features).amax(dim=1).numpy() < 0.7
    assert 0.02 < unsure.mean() < 0.5
    other = np.where(unsure[:, None], features[::-1], features)
    for threshold, same in ((0.7, True), (0.0, False)):
        config = lpclip.SelfTrainingConfig(**options, threshold=threshold)
        one, two = (lpclip.fit(features, head, strong=(view,), config=config) for view in (features, other))
        assert torch.allclose(one.rounds[0].weight, two.rounds[0].weight, atol=1e-3) == same


@solvers
def test_the_temperature_is_the_first_teachers(solver: str) -> None:
    given, own = trained(solver, temperature=0.2), trained(solver)
    as_head = trained(solver, temperature_of_head=0.2)
    for state, same, other in zip(given.rounds, as_head.rounds, own.rounds, strict=True):
        assert torch.equal(state.weight, same.weight)
        assert not torch.allclose(state.weight, other.weight, rtol=1e-3)
    assert torch.equal(given.zero_shot.weight, own.zero_shot.weight)


@solvers
def test_priors_pull_labels_to_their_shares(solver: str) -> None:
    largest = {
        name: label_shares(trained(solver, prior=name, rounds=8)).max()
        for name in ("none", "weak", "uniform")
    }
    assert largest["none"] > largest["weak"] > largest["uniform"] + 0.2
    given = trained(solver, prior="uniform", shares=SHARES, rounds=8)
    assert given.trusted
    assert label_shares(given).max() > largest["uniform"] + 0.3
