"""Names without images are left out of the rounds, on evidence alone, and the probe still knows them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

import lpclip
from lpclip.method.linear import Linear
from lpclip.method.presence import among_all, named_classes, present_classes, with_absent
from lpclip.method.priors import Prior

NUM_CLASSES, DIM, TEMPERATURE = 12, 40, 0.05

pytestmark = pytest.mark.usefixtures("one_thread")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def head(*, error: float = 0.4) -> tuple[np.ndarray, lpclip.Head]:
    """The classes' true directions, and a head that has them roughly right."""
    rng = np.random.default_rng(0)
    means = unit(rng.normal(size=(NUM_CLASSES, DIM)))
    weight = unit(means + error * unit(rng.normal(size=means.shape)))
    names = tuple(f"class {place}" for place in range(NUM_CLASSES))
    return means, lpclip.Head(class_names=names, weight=weight, temperature=TEMPERATURE)


def images(classes: Sequence[int], *, each: int = 60, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Features of so many images of each class, and their labels."""
    means, _ = head()
    labels = np.repeat(np.array(classes), each)
    noise = np.random.default_rng(seed).normal(size=(len(labels), DIM))
    return unit(means[labels] + 0.13 * noise), labels


def zero_shot(features: np.ndarray, found: lpclip.Head) -> torch.Tensor:
    return torch.from_numpy(features @ found.weight.T / found.temperature)


def by_text(features: np.ndarray, found: lpclip.Head):
    """Labels as zero-shot gives them, in place of rounds."""
    return lambda places: (features @ found.weight[places].T).argmax(axis=1)


def places_of(logits: torch.Tensor, *, label: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return present_classes(logits, label=label).places


@pytest.mark.parametrize("classes", [(1, 4, 7), (0, 2, 3, 5, 8, 11)])
def test_the_names_that_have_images_are_found(classes: tuple[int, ...]) -> None:
    features, _ = images(classes)
    _, found = head()
    places = places_of(zero_shot(features, found), label=by_text(features, found))
    assert places.tolist() == list(classes)


def test_all_names_stay_where_all_have_images_or_nearly_all() -> None:
    _, found = head()
    for classes in (range(NUM_CLASSES), range(NUM_CLASSES - 2)):
        features, _ = images(tuple(classes))
        places = places_of(zero_shot(features, found), label=by_text(features, found))
        assert places.tolist() == list(range(NUM_CLASSES))


def test_all_names_stay_with_fewer_than_forty_images() -> None:
    _, found = head()
    for each, left in ((13, NUM_CLASSES), (14, 3)):
        features, _ = images((1, 4, 7), each=each)
        assert len(places_of(zero_shot(features, found), label=by_text(features, found))) == left


def test_all_names_stay_where_zero_shot_is_sure_of_nothing() -> None:
    features, _ = images((1, 4, 7))
    _, found = head()
    assert len(places_of(zero_shot(features, found) / 20, label=by_text(features, found))) == NUM_CLASSES


@pytest.mark.parametrize("each", [60, 600])
def test_a_weak_zero_shot_names_nothing_as_absent_with_many_images_either(each: int) -> None:
    # One in fifty rows is sure, all of three names: as with the lite encoder on Fashion-MNIST.
    labels = np.repeat(np.arange(NUM_CLASSES), each)
    logits = torch.zeros(len(labels), NUM_CLASSES)
    sure = np.arange(0, len(labels), 50)
    logits[sure, sure % 3] = 20.0

    def few_names(places: np.ndarray) -> np.ndarray:
        return np.zeros(len(labels), int)

    assert len(places_of(logits, label=few_names)) == NUM_CLASSES
    logits[1::20, 3], logits[2::20, 4] = 20.0, 20.0
    assert places_of(logits, label=few_names).tolist() == [0, 1, 2, 3, 4]


def test_the_rounds_speak_for_a_name_of_which_zero_shot_is_never_sure() -> None:
    features, labels = images((1, 4, 7))
    _, found = head()
    logits = zero_shot(features, found)
    logits[labels == 7] /= 20
    both = places_of(logits, label=lambda places: np.searchsorted(places, labels))
    assert both.tolist() == [1, 4, 7]
    merged = np.where(labels == 7, 4, labels)
    alone = places_of(logits, label=lambda places: np.searchsorted(places, merged))
    assert alone.tolist() == [1, 4]


def test_absent_names_take_three_in_a_thousand_of_the_images_seen_and_their_own_when_they_come() -> None:
    places = np.array([1, 4, 7])
    means, found = head()
    seen, labels = images(places.tolist(), each=2000)
    text = Linear(weight=torch.from_numpy(found.weight) / TEMPERATURE, bias=torch.zeros(NUM_CLASSES))
    own = Linear(weight=torch.from_numpy(means[places]) * 30, bias=torch.zeros(3))
    both = with_absent(own, places, zero_shot=text, features=seen)
    assert np.isin(both.predict(seen), places, invert=True).mean() == pytest.approx(0.003, abs=0.0002)
    later, true = images(range(NUM_CLASSES), seed=2)
    assert (both.predict(later) == true).mean() > 0.8
    never = among_all(own, places, num_classes=NUM_CLASSES)
    assert (never.predict(seen) == labels).mean() >= (both.predict(seen) == labels).mean()
    assert set(never.predict(later)) == {1, 4, 7}


def test_a_training_leaves_out_names_without_images_and_its_probe_knows_them() -> None:
    classes = (1, 4, 7)
    features, labels = images(classes)
    _, found = head(error=1.2)
    told: list[str] = []
    auto = lpclip.fit(features, found, tell=told.append)
    whole = lpclip.fit(features, found, config=lpclip.SelfTrainingConfig(present="all"))
    assert auto.prior.present is not None
    assert auto.prior.present.tolist() == list(classes)
    assert auto.prior.name == "weak"
    assert auto.prior.summary(found.class_names)["absent"][:2] == ["class 0", "class 2"]
    assert "classes: 3 of 12 names have images, the rounds use these" in told
    assert (auto.labels == labels).mean() > 0.98
    assert whole.prior.present is None
    assert whole.prior.summary(found.class_names)["absent"] == []
    assert whole.probe.weight.shape == auto.probe.weight.shape == (NUM_CLASSES, DIM)
    later, true = images(range(NUM_CLASSES), seed=2)
    right = {
        name: lpclip.evaluate(one.probe, later, true)["accuracy"]
        for name, one in {"auto": auto, "all": whole}.items()
    }
    assert right["auto"] > right["all"] > 0.9, "names without images are not lost"


def test_where_all_names_stay_the_reason_is_told() -> None:
    _, found = head()
    reasons = {
        "39 images cannot tell, 40 are needed": ((1, 4, 7), 13, 1),
        "zero-shot is sure of too few images to tell": ((1, 4, 7), 60, 20),
        "none seems to be without images": (range(NUM_CLASSES), 60, 1),
        "10 seem to have images, and so few others do little harm": (range(10), 60, 1),
    }
    for why, (classes, each, divisor) in reasons.items():
        features, _ = images(tuple(classes), each=each)
        logits = zero_shot(features, found) / divisor
        kept = present_classes(logits, label=by_text(features, found))
        assert (kept.why, len(kept.places)) == (why, NUM_CLASSES)


def test_a_prior_that_is_asked_for_keeps_all_names() -> None:
    features, _ = images((1, 4, 7))
    _, found = head()
    told: list[str] = []
    config = lpclip.SelfTrainingConfig(prior="weak")
    assert lpclip.fit(features, found, config=config, tell=told.append).prior.present is None
    why = "names without images are looked for with --prior auto alone"
    assert f"classes: the rounds use all 12 names: {why}" in told


def test_names_are_found_as_they_read_in_prompts() -> None:
    names = ("traffic_cone", "Stop Sign", "tennis ball")
    assert named_classes(["tennis_ball", "traffic cone"], names) is not None
    assert named_classes(["tennis_ball", "traffic cone"], names).tolist() == [0, 2]
    assert named_classes(["stop  sign", "traffic cone", "Tennis Ball"], names) is None, "all of them"


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (
            "class 1,class 44",
            "--present names 'class 44', which is none of the 12 classes (class 0, class 1, class 2,",
        ),
        ("class 1,class 44", "did you mean class 4?"),
        ("atuo", "did you mean auto?"),
        ("class 1", "--present must name at least two classes, not 1"),
        ("class 1, Class_1", "--present must name at least two classes, not 1"),
    ],
)
def test_names_that_cannot_be_used_are_refused_in_a_sentence(present: str, message: str) -> None:
    features, _ = images((1, 4))
    with pytest.raises(lpclip.UserError, match=re.escape(message)):
        lpclip.fit(features, head()[1], config=lpclip.SelfTrainingConfig(present=present))


@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
@pytest.mark.parametrize("strong", [False, True])
def test_named_classes_are_used_whatever_zero_shot_thinks_and_the_others_are_known(
    solver: Literal["gaussian", "gradient"], strong: bool
) -> None:
    # Where nothing says which names have images, equal shares give images to all twelve.
    classes = (1, 4, 7)
    features, labels = images(classes, each=33)
    _, found = head(error=1.2)
    views = images(classes, each=33, seed=3)[:1] if strong else ()
    config = lpclip.SelfTrainingConfig(solver=solver, prior="uniform", present="Class_7, class 1,CLASS_4")
    named = lpclip.fit(features, found, strong=views, config=config)
    assert named.prior.present is not None
    assert named.prior.present.tolist() == list(classes)
    summary = named.prior.summary(found.class_names)
    assert (summary["absent"][:2], summary["why_these_names"]) == (
        ["class 0", "class 2"],
        "as --present says",
    )
    assert named.trusted
    assert (named.labels == labels).mean() > 0.95
    every = lpclip.fit(features, found, strong=views, config=replace(config, present="all"))
    assert every.prior.present is None
    assert set(named.labels) == set(classes) < set(every.labels)
    later, true = images(range(NUM_CLASSES), seed=2)
    absent = np.isin(true, classes, invert=True)
    assert (named.probe.predict(later) == true)[absent].mean() > 0.4, "the other names are known"


def test_shares_count_among_the_names_that_have_images() -> None:
    shares = np.arange(1.0, NUM_CLASSES + 1)
    prior = Prior(shares=torch.from_numpy(shares / shares.sum())).among(np.array([1, 4, 7]))
    assert prior.shares is not None
    assert prior.shares.tolist() == pytest.approx([2 / 15, 5 / 15, 8 / 15])
    features, _ = images((1, 4, 7))
    config = lpclip.SelfTrainingConfig(present="class 1,class 4,class 7")
    found = lpclip.fit(features, head()[1], config=config, shares=shares)
    assert found.prior.prior.shares is not None
    assert found.prior.prior.shares.tolist() == prior.shares.tolist()
    assert found.rounds[-1].weight.shape == (3, DIM)
