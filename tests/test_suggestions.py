"""The images that are asked for: one of every look, more where the probe is unsure, and the same ones every time."""

from __future__ import annotations

import numpy as np
import pytest

from lpclip.method.suggestions import Suggestions, how_unsure, suggest

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, CLUSTERS = 24, 6
SURE, UNSURE = (0.98, 0.01, 0.01), (0.4, 0.35, 0.25)


def planted(each: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Features around six directions, and which of these each belongs to."""
    rng = np.random.default_rng(0)
    means = np.linalg.qr(rng.normal(size=(DIM, CLUSTERS)))[0].T
    clusters = rng.permutation(np.repeat(np.arange(CLUSTERS), each))
    rows = means[clusters] + 0.05 * rng.normal(size=(len(clusters), DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), clusters


def chosen(features: np.ndarray, unsure: np.ndarray, *, count: int, seed: int = 0) -> Suggestions:
    probabilities = np.where(unsure[:, None], UNSURE, SURE).astype(np.float32)
    return suggest(features, probabilities, count=count, seed=seed)


def test_every_cluster_is_asked_for_and_no_image_twice() -> None:
    features, clusters = planted()
    found = chosen(features, np.zeros(len(clusters), bool), count=CLUSTERS)
    assert sorted(clusters[found.places]) == list(range(CLUSTERS))
    assert found.stands_for.tolist() == [60] * CLUSTERS
    many = chosen(features, clusters < 3, count=40)
    assert len(set(many.places.tolist())) == 40
    assert many.stands_for.sum() == len(features)


def test_more_are_asked_for_where_the_probe_is_unsure_and_these_first() -> None:
    features, clusters = planted()
    found = chosen(features, clusters < 2, count=30)
    is_unsure = clusters[found.places] < 2
    # A third of the images.
    assert is_unsure.mean() > 0.5
    assert is_unsure[:10].all()
    helps = found.stands_for * found.unsure
    assert (np.diff(helps) <= 0).all()
    assert set(clusters[found.places]) == set(range(CLUSTERS))


def test_the_same_question_has_the_same_answer() -> None:
    features, clusters = planted()
    one, other, another = (chosen(features, clusters < 2, count=30, seed=seed) for seed in (0, 0, 1))
    assert one.places.tolist() == other.places.tolist()
    assert one.places.tolist() != another.places.tolist()


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_fewer_images_than_are_wanted_are_all_asked_for(rows: int) -> None:
    features, clusters = planted()
    found = chosen(features[:rows], clusters[:rows] < 3, count=50)
    assert sorted(found.places) == list(range(rows))


def test_an_image_that_is_there_many_times_is_asked_for_once() -> None:
    features, clusters = planted(4)
    repeated = np.concatenate([features, np.repeat(features[:3], 50, axis=0)])
    unsure = np.concatenate([clusters < 3, np.ones(150, bool)])
    for count in (10, 24, 100):
        found = chosen(repeated, unsure, count=count)
        assert len(found.places) == min(count, 24)
        assert len({repeated[place].tobytes() for place in found.places}) == len(found.places)


def test_an_outlier_is_not_asked_for() -> None:
    features, clusters = planted()
    far = -features[clusters == 0].astype(np.float32).mean(axis=0)
    features = np.concatenate([features, (far / np.linalg.norm(far)).astype(np.float16)[None]])
    found = chosen(features, np.append(clusters < 6, True), count=CLUSTERS)
    assert len(features) - 1 not in found.places


def test_how_unsure_a_probe_is() -> None:
    found = how_unsure(np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.5, 0.3], [1 / 3] * 3]))
    assert found.tolist() == pytest.approx([0, 1, 0.8, 1])
