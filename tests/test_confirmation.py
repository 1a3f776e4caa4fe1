"""Choosing a prior without labels: planted equal and unequal classes are told apart, and noise is not believed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpclip.config import SelfTrainingConfig, UserError
from lpclip.encoders.head import Head
from lpclip.jobs import settle_prior as settle_prior_module
from lpclip.jobs.settle_prior import settle_prior
from lpclip.method.chance import HEADS, chance_confidence, head_confidence, random_head
from lpclip.method.confirmation import MIN_KAPPA, Confirmation, Sample, choose_prior
from lpclip.method.priors import PRIORS, Prior
from lpclip.method.trial import ChosenPrior, try_priors

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SelfTrainingConfig()
NUM_CLASSES, DIM = 6, 64


def planted(counts: list[int], *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Classes of so many rows each in all directions alike, and a head that has their means only roughly right."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(len(counts), DIM)) / np.sqrt(DIM)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    rows = means[labels] + 0.09 * rng.normal(size=(len(labels), DIM))
    head = means + 0.9 * rng.normal(size=means.shape) / np.sqrt(DIM)
    rows, head = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (rows, head))
    return rows.astype(np.float16), labels, torch.tensor(head).float()


def sample(features: np.ndarray, head: torch.Tensor, *, config: SelfTrainingConfig = CONFIG) -> Sample:
    return Sample(features, zero_shot=head, temperature=0.05, config=config)


def test_equal_classes_are_recognised() -> None:
    features, _, head = planted([150] * NUM_CLASSES)
    name, found = choose_prior(sample(features, head))
    assert name == "uniform"
    assert found["uniform"].trusted
    assert found["uniform"].agreement > 0.6


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([500, 400, 0, 0, 0, 0], "none"),
        ([700, 60, 40, 20, 10, 5], "none"),
        ([330, 220, 150, 110, 90, 70], "weak"),
    ],
    ids=["absent", "steep tail", "tail"],
)
def test_unequal_classes_are_recognised(counts: list[int], expected: str) -> None:
    features, _, head = planted(counts)
    name, found = choose_prior(sample(features, head))
    assert name == expected
    assert set(found) == {"uniform", "weak", name}
    assert found[name].trusted


@pytest.mark.parametrize("counts", [[150] * 6, [700, 60, 40, 20, 10, 5], [500, 400, 300, 0, 0, 0], [9] * 6])
def test_both_solvers_get_the_same_classes_prior_and_trust(counts: list[int]) -> None:
    features, _, head = planted(counts)

    def chosen(solver: str) -> dict[str, Any]:
        config = replace(CONFIG, solver=solver)
        options: dict[str, Any] = {"config": config, "prior": None, "show": lambda name, found: None}
        return try_priors(features, head, temperature=0.05, **options).summary(tuple("abcdef"))

    found = chosen("gradient")
    assert found["tried"].keys() >= {"uniform", "weak", found["name"]}
    assert found["trusted"]
    assert found == chosen("gaussian")


def test_noise_is_not_believed() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(900, DIM))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    name, found = choose_prior(sample(rows, planted([1] * NUM_CLASSES)[2]))
    assert not found[name].trusted


def test_the_classes_order_does_not_matter() -> None:
    features, _, head = planted([200, 100, 80, 60, 40, 20])
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    (name, found), (other, turned) = (choose_prior(sample(features, h)) for h in (head, head[order]))
    assert name == other
    for key, value in found.items():
        assert turned[key].agreement == pytest.approx(value.agreement, abs=0.01)
        assert turned[key].entropy == pytest.approx(value.entropy, abs=0.01)


def test_the_same_sample_gives_the_same_choice() -> None:
    features, _, head = planted([100] * NUM_CLASSES)
    assert choose_prior(sample(features, head)) == choose_prior(sample(features, head))


def test_the_trial_is_of_the_training_that_will_run_on_any_number_of_workers() -> None:
    features, _, head = planted([60] * NUM_CLASSES)
    prior, usual = PRIORS["weak"], sample(features, head).confirm(PRIORS["weak"])
    workers = replace(CONFIG, num_workers=2)
    assert sample(features, head, config=workers).confirm(prior) == usual
    for changes in ({"rounds": 1}, {"neighbours": 0}):
        assert sample(features, head, config=replace(CONFIG, **changes)).confirm(prior) != usual
    # A soft teacher, none of whose labels reaches the threshold: the training would end as the trial does.
    soft = Sample(features, zero_shot=head, temperature=0.5, config=replace(CONFIG, threshold=0.5))
    with pytest.raises(UserError, match="--threshold"):
        soft.confirm(prior)


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("num_classes", [1, 2, NUM_CLASSES])
def test_hardly_any_rows_or_classes_give_an_answer(num_rows: int, num_classes: int) -> None:
    features, _, head = planted([1] * NUM_CLASSES)
    name, found = choose_prior(sample(features[:num_rows], head[:num_classes]))
    assert name in PRIORS
    assert all(np.isfinite([value.agreement, value.kappa, value.entropy]).all() for value in found.values())


def test_a_known_prior_is_confirmed_too() -> None:
    features, labels, head = planted([300, 200, 150, 100, 80, 70])
    shares = torch.tensor(np.bincount(labels) / len(labels))
    known, equal = (sample(features, head).confirm(prior) for prior in (Prior(shares=shares), Prior()))
    assert known.trusted
    assert known.agreement > equal.agreement
    assert 0 < known.entropy < 1


def test_trust_begins_at_the_bounds() -> None:
    enough = Confirmation(agreement=0.5, kappa=MIN_KAPPA, entropy=1.0, confidence=0.5, chance=0.4)
    assert enough.trusted
    assert not replace(enough, kappa=MIN_KAPPA - 0.01, agreement=0.9).trusted
    assert not replace(enough, chance=0.5).trusted
    assert "0.50 is reached by chance" in replace(enough, chance=0.5).doubts[0]


@pytest.mark.parametrize("rows", [900, 60, 12])
def test_names_without_a_meaning_are_found_out_with_few_images_too(rows: int) -> None:
    features, _, head = planted([150] * NUM_CLASSES)
    seen = torch.from_numpy(features[:rows])
    bound = chance_confidence(seen, head, temperature=0.05)
    assert head_confidence(seen, head, temperature=0.05) > bound + 0.1
    # Other heads without a meaning than those that the bound is made of: one in HEADS + 1 may pass.
    others = [random_head(head, seed=seed) for seed in range(HEADS, 3 * HEADS)]
    passed = [head_confidence(seen, other, temperature=0.05) > bound for other in others]
    assert np.mean(passed) < 0.15


def test_real_clusters_with_meaningless_names_are_not_trusted() -> None:
    features, _, head = planted([150] * NUM_CLASSES)
    found = sample(features, random_head(head, seed=99)).confirm(PRIORS["weak"])
    assert not found.trusted
    assert "the class names fit these images no better than random ones" in found.doubts[-1]


def test_random_heads_are_spread_like_the_head() -> None:
    head = planted([1] * NUM_CLASSES)[2]
    other = random_head(head, seed=0)
    torch.testing.assert_close(other.norm(dim=1), torch.ones(NUM_CLASSES))
    assert (other @ head.mean(dim=0) > 0).float().mean() > 0.5
    assert not torch.equal(other, random_head(head, seed=1))
    assert torch.equal(other, random_head(head, seed=0))


def test_the_trial_of_another_version_is_not_this_version_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, _, weight = planted([60] * NUM_CLASSES)
    head = Head(class_names=tuple("abcdef"), weight=weight.numpy(), temperature=0.05)

    def settled() -> ChosenPrior:
        return settle_prior(
            CONFIG,
            out=str(tmp_path),
            features=features,
            prior=None,
            head=head,
            fingerprint="f",
            present=None,
        )

    path = tmp_path / "prior.json"
    with monkeypatch.context() as patch:
        patch.setattr(settle_prior_module, "FORMAT", 1)
        expected = settled()
        kept = json.loads(path.read_text())
        kept["tried"] = {name: {"kappa": 0.0, "images_per_class": 60.0} for name in kept["tried"]}
        path.write_text(json.dumps(kept))
    assert settled() == expected
    assert json.loads(path.read_text())["tried"] != kept["tried"]


def test_a_threshold_above_what_the_halves_reach_ends_no_trial() -> None:
    features, _, head = planted([60] * NUM_CLASSES)
    sure = replace(CONFIG, threshold=0.95)
    assert 0 < sample(features, head, config=sure).confirm(PRIORS["weak"]).kappa < 1
