"""The baselines on planted clusters: what every one of them must do, the equations of some, and their temperature."""

from __future__ import annotations

from dataclasses import replace

import baselines
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baselines import METHODS, Problem, cosine_neighbours, fit_probe, sinkhorn, supervised
from calibrated import baseline_temperature

from lpclip.method.calibration import expected_accuracy, mean_confidence
from lpclip.method.probe import zero_shot_probe

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES, DIM = 4, 24
names = pytest.mark.parametrize("name", METHODS)


def planted(num_rows: int, *, num_classes: int = NUM_CLASSES, present: int | None = None, seed: int = 0):
    """Gaussian clusters about class directions, off centre; a head that has them only roughly right; the labels."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(num_classes, DIM)) / DIM**0.5
    labels = rng.integers(present or num_classes, size=num_rows)
    features = 0.3 * np.ones(DIM) / DIM**0.5 + means[labels] + 0.1 * rng.normal(size=(num_rows, DIM))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    heads = [
        F.normalize(torch.tensor(means + noise * rng.normal(size=means.shape)).float(), dim=1)
        for noise in (0.25, 0.3)
    ]
    problem = Problem(
        features=features.astype(np.float16), head=heads[0], single_head=heads[1], temperature=0.05
    )
    return problem, torch.from_numpy(labels)


def accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    return float((probabilities.argmax(dim=1) == labels).double().mean())


@names
def test_every_method_gives_probabilities_that_beat_chance(name: str):
    problem, labels = planted(800)
    rows, truth = replace(problem, features=problem.features[:500]), labels[500:]
    solution = METHODS[name](rows)
    p = solution.predict(problem.features[500:])
    assert p.shape == (300, NUM_CLASSES)
    assert p.dtype == torch.float32
    assert torch.allclose(p.sum(dim=1), torch.ones(300), atol=1e-5)
    assert accuracy(p, truth) > 1.5 / NUM_CLASSES
    assert (solution.transductive is not None) == (name in ("StatA", "TransCLIP"))
    if solution.transductive is not None:
        assert solution.transductive.shape == (500, NUM_CLASSES)
        assert torch.allclose(solution.transductive.sum(dim=1), torch.ones(500), atol=1e-5)


@names
def test_every_method_is_deterministic_and_predicts_each_row_by_itself(name: str):
    problem, _ = planted(300)
    first, again = METHODS[name](problem), METHODS[name](problem)
    p = first.predict(problem.features)
    assert torch.equal(p, again.predict(problem.features))
    assert torch.allclose(first.predict(torch.from_numpy(problem.features[7:9])), p[7:9], atol=1e-4)


@names
def test_the_order_of_classes_does_not_matter(name: str):
    problem, _ = planted(300)
    order = torch.tensor([2, 0, 3, 1])
    moved = replace(problem, head=problem.head[order], single_head=problem.single_head[order])
    here, there = METHODS[name](problem), METHODS[name](moved)
    p, q = here.predict(problem.features), there.predict(problem.features)
    assert torch.allclose(p[:, order], q, atol=0.02)
    assert accuracy(q, p[:, order].argmax(dim=1)) > 0.98


@names
@pytest.mark.parametrize(("num_rows", "num_classes", "present"), [(30, 4, 3), (30, 100, 5), (5, 3, 1)])
def test_few_rows_and_classes_without_any_leave_finite_probabilities(
    name: str, num_rows: int, num_classes: int, present: int
):
    problem, _ = planted(num_rows, num_classes=num_classes, present=present)
    solution = METHODS[name](problem)
    for p in (solution.predict(problem.features), solution.transductive):
        assert p is None or (p.shape == (num_rows, num_classes) and bool(torch.isfinite(p).all()))


@pytest.mark.parametrize("name", ["StatA", "TransCLIP", "InMaP", "ZLaP", "domain-centred zero-shot"])
def test_methods_that_look_at_the_rows_beat_zero_shot_on_clusters(name: str):
    gains = []
    for seed in range(3):
        problem, labels = planted(600, seed=seed)
        solution = METHODS[name](problem)
        found = solution.predict(problem.features) if solution.transductive is None else solution.transductive
        base = accuracy(METHODS["zero-shot"](problem).predict(problem.features), labels)
        gains.append(accuracy(found, labels) - base)
    assert np.mean(gains) > 0.01, gains


def test_the_supervised_ceiling_is_above_all():
    problem, labels = planted(600)
    ceiling = accuracy(supervised(problem, labels.numpy()).predict(problem.features), labels)
    assert ceiling > accuracy(METHODS["zero-shot"](problem).predict(problem.features), labels)
    assert ceiling > 0.95


def test_neighbours_are_those_of_the_full_cosine_matrix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(baselines, "SEARCH_ROWS", 64)
    problem, _ = planted(150)
    f = torch.from_numpy(problem.features).float()
    full = f @ f.T
    assert torch.allclose(
        cosine_neighbours(problem.features, among=problem.features, count=1)[0][:, 0], full.diagonal()
    )
    cosines, places = cosine_neighbours(problem.features, among=problem.features, count=5, same=True)
    assert torch.allclose(full.gather(1, places), cosines, atol=1e-6)
    best = full.fill_diagonal_(-1).topk(5, dim=1)
    assert torch.allclose(best.values, cosines, atol=1e-6)


@pytest.mark.parametrize("name", ["StatA", "TransCLIP", "ZLaP"])
def test_neighbours_may_be_computed_before(name: str):
    problem, _ = planted(200)
    _, places = cosine_neighbours(problem.features, among=problem.features, count=8, same=True)
    given = METHODS[name](replace(problem, neighbours=places)).predict(problem.features)
    assert torch.allclose(METHODS[name](problem).predict(problem.features), given, atol=1e-4)


def test_zlap_is_the_solution_of_the_linear_system_of_its_graph():
    problem, _ = planted(60)
    x = torch.from_numpy(problem.features).double()
    size, classes = NUM_CLASSES + len(x), problem.head.double()
    images = x @ x.T
    near = images.clone().fill_diagonal_(-1).topk(5, dim=1).indices
    directed = torch.zeros(size, size, dtype=torch.float64)
    directed[NUM_CLASSES:, NUM_CLASSES:].scatter_(1, near, images.gather(1, near).clamp_min(0))
    directed[NUM_CLASSES:, :NUM_CLASSES] = (x @ classes.T).clamp_min(0) ** 5
    graph = directed + directed.T
    roots = graph.sum(dim=1).rsqrt()
    system = torch.eye(size) - 0.3 * roots[:, None] * graph * roots
    new, _ = planted(20, seed=0)
    query = torch.from_numpy(new.features).double()
    seeds = torch.zeros(len(query), size, dtype=torch.float64)
    top = (query @ x.T).topk(5, dim=1)
    seeds[:, NUM_CLASSES:].scatter_(1, top.indices, top.values.clamp_min(0))
    seeds[:, :NUM_CLASSES] = (query @ classes.T).clamp_min(0) ** 5
    scores = torch.linalg.solve(system, seeds.T)[:NUM_CLASSES].T
    expected = scores / scores.sum(dim=1, keepdim=True)
    found = METHODS["ZLaP"](problem).predict(new.features)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_centred_logits_have_mean_zero_in_every_class():
    problem, _ = planted(200)
    logs = METHODS["logit centring"](problem).predict(problem.features).log()
    means = logs.mean(dim=0)
    assert torch.allclose(means, means.mean().expand_as(means), atol=1e-3)


def test_sinkhorn_balances_columns_and_keeps_rows():
    problem, _ = planted(400)
    posterior = zero_shot_probe(problem.head, temperature=0.05).probabilities(problem.features)
    balanced = sinkhorn(posterior, num_steps=300)
    assert torch.allclose(balanced.sum(dim=1), torch.ones(400), atol=1e-5)
    assert torch.allclose(balanced.mean(dim=0), torch.full((NUM_CLASSES,), 1 / NUM_CLASSES), atol=1e-3)


def test_a_probe_fitted_to_its_own_posteriors_stays():
    problem, _ = planted(300)
    start = zero_shot_probe(problem.head, temperature=0.05)
    fitted = fit_probe(problem.features, start.probabilities(problem.features), start=start)
    assert torch.allclose(fitted.weight, start.weight, atol=1e-3)


def test_transclip_assigns_rows_by_the_equation_of_all_pairs():
    problem, _ = planted(60)
    x, head = torch.from_numpy(problem.features).double(), problem.head.double()
    cosines = x @ x.T
    near = cosines.clone().fill_diagonal_(-1).topk(3, dim=1).indices
    directed = torch.zeros_like(cosines).scatter_(1, near, cosines.gather(1, near))
    y = torch.softmax(x @ head.T / problem.temperature, dim=1)
    sure = y.topk(8, dim=0).indices
    weights = torch.zeros_like(y).scatter_(0, sure, y.gather(0, sure))
    z, means, variance = y, F.normalize(weights.T @ x, dim=1), torch.full((DIM,), 1 / DIM).double()
    for _ in range(11):
        density = -((x[:, None] - means) ** 2 / variance).sum(dim=2) / 2
        for _ in range(5):
            z = torch.softmax(y.log() + density / 50 + (directed + directed.T) @ z / 6, dim=1)
        means = F.normalize(z.T @ x, dim=1)
        variance = (z[:, :, None] * (x[:, None] - means) ** 2).sum(dim=(0, 1)) / len(x)
    found = METHODS["TransCLIP"](problem).transductive
    assert found is not None
    assert torch.allclose(found.double(), z, atol=1e-3)


FITTED = [name for name in METHODS if not name.startswith("zero-shot")]


@pytest.mark.parametrize("name", FITTED)
def test_baselines_are_as_confident_in_images_not_seen_as_they_are_expected_to_be_right(name: str):
    problem, _ = planted(600)
    unseen = problem.features[300:]
    problem = replace(problem, features=problem.features[:300], temperature=0.3)
    solution = METHODS[name](problem)
    temperature = baseline_temperature(METHODS[name], problem, solution=solution)
    zero_shot = mean_confidence(zero_shot_probe(problem.head, temperature=0.3), problem.features)
    # A class has 75 rows, and its text counts for ten.
    expected = expected_accuracy(zero_shot, evidence=75 / 85)
    assert 0.5 < expected < 0.95
    p = torch.softmax(solution.logits(unseen) / temperature, dim=1)
    assert float(p.amax(dim=1).mean()) == pytest.approx(expected, abs=0.06)


def test_zero_shot_keeps_its_temperature_and_a_handful_of_rows_needs_no_folds():
    problem, _ = planted(6)
    for name in METHODS:
        temperature = baseline_temperature(METHODS[name], problem, solution=METHODS[name](problem))
        assert 0 < temperature < np.inf
        assert (temperature == 1) == (name not in FITTED)
