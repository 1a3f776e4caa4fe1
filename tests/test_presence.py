"""Names without images are left out of the rounds, on evidence alone, and the probe still knows them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import lpclip
from lpclip.method.linear import Linear
from lpclip.method.presence import among_all, present_classes, with_absent

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


@pytest.mark.parametrize("classes", [(1, 4, 7), (0, 2, 3, 5, 8, 11)])
def test_the_names_that_have_images_are_found(classes: tuple[int, ...]) -> None:
    features, _ = images(classes)
    _, found = head()
    places = present_classes(zero_shot(features, found), label=by_text(features, found))
    assert places.tolist() == list(classes)


def test_all_names_stay_where_all_have_images_or_nearly_all() -> None:
    _, found = head()
    for classes in (range(NUM_CLASSES), range(NUM_CLASSES - 2)):
        features, _ = images(tuple(classes))
        places = present_classes(zero_shot(features, found), label=by_text(features, found))
        assert places.tolist() == list(range(NUM_CLASSES))


def test_all_names_stay_with_fewer_than_forty_images() -> None:
    _, found = head()
    for each, left in ((13, NUM_CLASSES), (14, 3)):
        features, _ = images((1, 4, 7), each=each)
        assert len(present_classes(zero_shot(features, found), label=by_text(features, found))) == left


def test_all_names_stay_where_zero_shot_is_sure_of_nothing() -> None:
    features, _ = images((1, 4, 7))
    _, found = head()
    assert (
        len(present_classes(zero_shot(features, found) / 20, label=by_text(features, found))) == NUM_CLASSES
    )


@pytest.mark.parametrize("each", [60, 600])
def test_a_weak_zero_shot_names_nothing_as_absent_with_many_images_either(each: int) -> None:
    # One in fifty rows is sure, all of three names: as with the lite encoder on Fashion-MNIST.
    labels = np.repeat(np.arange(NUM_CLASSES), each)
    logits = torch.zeros(len(labels), NUM_CLASSES)
    sure = np.arange(0, len(labels), 50)
    logits[sure, sure % 3] = 20.0

    def few_names(places: np.ndarray) -> np.ndarray:
        return np.zeros(len(labels), int)

    assert len(present_classes(logits, label=few_names)) == NUM_CLASSES
    logits[1::20, 3], logits[2::20, 4] = 20.0, 20.0
    assert present_classes(logits, label=few_names).tolist() == [0, 1, 2, 3, 4]


def test_the_rounds_speak_for_a_name_of_which_zero_shot_is_never_sure() -> None:
    features, labels = images((1, 4, 7))
    _, found = head()
    logits = zero_shot(features, found)
    logits[labels == 7] /= 20
    both = present_classes(logits, label=lambda places: np.searchsorted(places, labels))
    assert both.tolist() == [1, 4, 7]
    merged = np.where(labels == 7, 4, labels)
    alone = present_classes(logits, label=lambda places: np.searchsorted(places, merged))
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


def test_a_prior_that_is_asked_for_keeps_all_names() -> None:
    features, _ = images((1, 4, 7))
    _, found = head()
    assert lpclip.fit(features, found, config=lpclip.SelfTrainingConfig(prior="weak")).prior.present is None
