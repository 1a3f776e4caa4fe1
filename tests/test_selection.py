"""Choosing without labels: planted classes, and candidates whose quality is known, are put in the right order."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, cohen_kappa_score

from lpclip.config import Criterion
from lpclip.method.agreement import agreement
from lpclip.method.criteria import (
    CLUSTERS_PER_CLASS,
    CRITERIA,
    NEIGHBOURS,
    SAMPLE_ROWS,
    STARTS,
    Yardstick,
    class_ami,
    make_yardstick,
    measure,
)
from lpclip.method.linear import Linear

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES, DIM = 6, 64
SCALES = (1.0, 1.5, 2.0, 3.0)
Field = tuple[Yardstick, dict[str, Linear], dict[str, float]]


def planted(
    counts: list[int], *, seed: int = 0, noise: float = 0.09, dim: int = DIM
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Classes of so many rows each in all directions alike, the labels and the classes' means."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(len(counts), dim)) / np.sqrt(dim)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    rows = means[labels] + noise * rng.normal(size=(len(labels), dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16), labels, torch.tensor(means).float()


def candidates(means: torch.Tensor, *, seed: int = 0) -> dict[str, Linear]:
    """The true classifier, worse ones by degree, and those that fail in a way of their own."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(means.shape, generator=generator) / means.shape[1] ** 0.5
    bias = -(means**2).sum(dim=1) / 2
    weight, merged = means.clone(), bias.clone()
    weight[0] = means[:2].mean(dim=0)
    merged[:2] = torch.tensor([0.2 - float(weight[0] @ weight[0]) / 2, -1e3])
    return {
        "true": Linear(weight=means, bias=bias),
        **{f"noise {scale}": Linear(weight=means + scale * noise, bias=bias) for scale in SCALES},
        "merged": Linear(weight=weight, bias=merged),
        "constant": Linear(weight=torch.zeros_like(means), bias=torch.eye(len(means))[0]),
        "random": Linear(weight=noise, bias=torch.zeros(len(means))),
    }


def accuracy(features: np.ndarray, labels: np.ndarray, candidate: Linear) -> float:
    return float((candidate.predict(features) == labels).mean())


@pytest.fixture(scope="module")
def field() -> Field:
    """A yardstick of six planted classes, the candidates, and their accuracies."""
    features, labels, means = planted([150] * NUM_CLASSES, seed=1)
    found = candidates(means, seed=1)
    known = {name: accuracy(features, labels, candidate) for name, candidate in found.items()}
    return (
        make_yardstick(features, num_classes=NUM_CLASSES, seed=0),
        found,
        known,
    )


def worth(yardstick: Yardstick, found: dict[str, Linear], criterion: Criterion) -> dict[str, float]:
    """What each candidate is worth; every one has an answer."""
    values = {name: measure(yardstick, candidate, criterion=criterion) for name, candidate in found.items()}
    assert all(np.isfinite(value) for value in values.values())
    return values


def test_the_planted_candidates_are_as_good_as_their_names(field: Field) -> None:
    _, _, known = field
    assert known["true"] > 0.99
    assert [name for name in sorted(known, key=known.__getitem__, reverse=True) if "noise" in name] == [
        f"noise {scale}" for scale in SCALES
    ]
    assert known["merged"] == pytest.approx(5 / 6, abs=0.02)
    assert known["constant"] == pytest.approx(1 / 6)
    assert known["random"] < 0.3


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_true_classifier_is_worth_most_and_noise_costs(criterion: Criterion, field: Field) -> None:
    yardstick, found, _ = field
    values = worth(yardstick, found, criterion)
    assert max(values.values()) == values["true"]
    noisy = [values[f"noise {scale}"] for scale in SCALES]
    assert values["true"] >= noisy[0] > noisy[1] > noisy[2] > noisy[3]
    assert noisy[3] > max(values["random"], values["constant"])


def test_the_clusters_tell_classes_that_are_taken_together(field: Field) -> None:
    yardstick, found, _ = field
    values = worth(yardstick, found, "class_ami")
    assert values["true"] > values["merged"] + 0.03
    assert values["merged"] > values["random"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_class_for_everything_is_worth_nothing(criterion: Criterion, field: Field) -> None:
    yardstick, found, _ = field
    assert measure(yardstick, found["constant"], criterion=criterion) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("counts", [[60, 50, 40, 30, 20, 10], [300, 4, 3, 2, 1, 0]], ids=["tail", "one"])
def test_one_class_for_everything_never_wins_however_large_it_is(
    counts: list[int], criterion: Criterion
) -> None:
    features, _, means = planted(counts)
    yardstick = make_yardstick(features, num_classes=NUM_CLASSES, seed=0)
    found = {name: value for name, value in candidates(means).items() if name != "random"}
    values = worth(yardstick, found, criterion)
    assert values["constant"] < values["true"]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("factor", [0.1, 100.0])
def test_how_sure_candidates_are_does_not_matter(criterion: Criterion, factor: float, field: Field) -> None:
    yardstick, found, _ = field
    values = list(worth(yardstick, found, criterion).values())
    every = [Linear(weight=factor * c.weight, bias=factor * c.bias + 3) for c in found.values()]
    assert [measure(yardstick, one, criterion=criterion) for one in every] == pytest.approx(values, abs=0.003)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_order_of_classes_and_candidates_does_not_matter(criterion: Criterion, field: Field) -> None:
    yardstick, found, _ = field
    values = worth(yardstick, found, criterion)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    turned = {
        name: Linear(weight=one.weight[order], bias=one.bias[order]) for name, one in reversed(found.items())
    }
    again = worth(yardstick, turned, criterion)
    assert again == pytest.approx(values, abs=0.003)


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.98, 0.01, 0.01], [0.6, 0.4, 0.0]])
def test_kappa_is_cohens(shares: list[float]) -> None:
    rng = np.random.default_rng(0)
    first = rng.choice(3, size=500, p=shares)
    for share in (0.0, 0.5, 0.9):
        second = np.where(rng.random(500) < share, first, rng.choice(3, size=500, p=shares))
        expected = cohen_kappa_score(first, second)
        assert agreement(first, second, num_classes=3).kappa == pytest.approx(expected)
        assert agreement(second, first, num_classes=5).kappa == pytest.approx(expected)
    assert agreement(first, first, num_classes=3).kappa == pytest.approx(1)
    assert agreement(np.array([0, 1]), np.array([1, 0]), num_classes=2).kappa == pytest.approx(-1)


def test_kappa_of_one_class_against_itself_is_nothing() -> None:
    ones = np.ones(50, np.int64)
    assert agreement(ones, ones, num_classes=3).kappa == 0
    assert agreement(ones, 0 * ones, num_classes=3).kappa == 0


def test_the_amount_of_clusters_information_is_scikit_learns_mean(field: Field) -> None:
    yardstick, found, _ = field
    predicted = found["noise 3.0"].predict(yardstick.features)
    each = [adjusted_mutual_info_score(labels, predicted) for labels in yardstick.clusters]
    assert len(each) == len(CLUSTERS_PER_CLASS) * STARTS
    assert max(each) - min(each) > 0.01
    assert class_ami(predicted, clusters=yardstick.clusters) == pytest.approx(np.mean(each))
    assert measure(yardstick, found["noise 3.0"], criterion="class_ami") == pytest.approx(np.mean(each))


def test_neighbours_are_the_nearest_others_and_count_one_by_one(field: Field) -> None:
    yardstick, found, _ = field
    rows = yardstick.features.astype(np.float64)
    rows -= rows.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]
    same = [len(set(a) & set(b)) for a, b in zip(nearest, yardstick.neighbours, strict=True)]
    assert yardstick.neighbours.shape == (len(rows), NEIGHBOURS)
    assert np.mean(same) > NEIGHBOURS - 0.05
    predicted = found["noise 3.0"].predict(yardstick.features)
    pairs = [(predicted[i], predicted[j]) for i, near in enumerate(yardstick.neighbours) for j in near]
    expected = cohen_kappa_score(*zip(*pairs, strict=True))
    assert measure(yardstick, found["noise 3.0"], criterion="neighbours") == pytest.approx(expected)


def same(first: Yardstick, second: Yardstick) -> bool:
    return all(
        np.array_equal(getattr(first, item.name), getattr(second, item.name)) for item in fields(Yardstick)
    )


def test_the_same_seed_gives_the_same_yardstick_whatever_was_drawn_before() -> None:
    features, _, _ = planted([100] * NUM_CLASSES)
    found = []
    for number in (0, 1):
        torch.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002 - the global state is the subject
        found.append(make_yardstick(features, num_classes=NUM_CLASSES, seed=3))
    assert same(*found)
    other = make_yardstick(features, num_classes=NUM_CLASSES, seed=4)
    assert not np.array_equal(found[0].clusters, other.clusters)
    assert np.array_equal(found[0].neighbours, other.neighbours)


def test_starts_of_two_seeds_are_not_shared() -> None:
    features, _, _ = planted([100] * NUM_CLASSES, noise=0.3)
    first, second = (make_yardstick(features, num_classes=NUM_CLASSES, seed=seed).clusters for seed in (0, 1))
    # The last are of the largest number of clusters, which ends differently from every start.
    assert not any(np.array_equal(a, b) for a in first[-STARTS:] for b in second[-STARTS:])
    assert not np.array_equal(first[-2], first[-1])


def global_numbers() -> list[int]:
    """NumPy's global random state."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is the subject
    assert isinstance(state, dict)
    return [*state["state"]["key"].tolist(), state["state"]["pos"]]


def test_random_states_of_the_process_are_left_as_they_were(field: Field) -> None:
    _, found, _ = field
    features, _, _ = planted([100] * NUM_CLASSES)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global state is the subject
    before, numbers = torch.get_rng_state(), global_numbers()
    yardstick = make_yardstick(features, num_classes=NUM_CLASSES, seed=0)
    for criterion in CRITERIA:
        worth(yardstick, found, criterion)
    assert torch.equal(torch.get_rng_state(), before)
    assert global_numbers() == numbers


def test_a_yardstick_has_the_shapes_and_types_it_says(field: Field) -> None:
    yardstick, _, _ = field
    n = 150 * NUM_CLASSES
    assert yardstick.features.shape == (n, DIM)
    assert yardstick.features.dtype == np.float16
    assert yardstick.clusters.shape == (6, n)
    assert yardstick.clusters.dtype == yardstick.neighbours.dtype == np.int32
    assert [int(labels.max()) + 1 for labels in yardstick.clusters[::STARTS]] == [6, 12, 30]
    assert not (yardstick.neighbours == np.arange(n)[:, None]).any()


def test_only_the_first_rows_are_looked_at() -> None:
    features, _, _ = planted([SAMPLE_ROWS // 2 + 50] * 2, dim=8)
    yardstick = make_yardstick(features, num_classes=2, seed=0)
    assert len(yardstick.features) == len(yardstick.neighbours) == SAMPLE_ROWS
    assert yardstick.clusters.shape[1] == SAMPLE_ROWS
    alone = make_yardstick(features[:SAMPLE_ROWS], num_classes=2, seed=0)
    assert same(yardstick, alone)


def test_the_images_given_are_not_changed() -> None:
    features, _, means = planted([50] * 3)
    before = features.copy()
    yardstick = make_yardstick(features, num_classes=3, seed=0)
    for criterion in CRITERIA:
        worth(yardstick, candidates(means), criterion)
    assert np.array_equal(features, before)


@pytest.mark.parametrize(
    "counts",
    [[4] * 3, [1] * 3, [1, 1], [2, 0], [10, 10], [6, 0, 0], [1] * 12, [2] * 30, [100, 1]],
    ids=lambda counts: f"{sum(counts)} of {len(counts)}",
)
def test_hardly_any_rows_or_many_classes_give_numbers(counts: list[int]) -> None:
    features, _, means = planted(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yardstick = make_yardstick(features, num_classes=len(counts), seed=0)
        for criterion in CRITERIA:
            values = worth(yardstick, candidates(means), criterion)
            assert all(-1.001 <= value <= 1.001 for value in values.values()), criterion
    assert (yardstick.clusters.max(axis=1) > 0).all()
    assert 1 <= yardstick.neighbours.shape[1] <= min(NEIGHBOURS, len(features) - 1)
    assert not (yardstick.neighbours == np.arange(len(features))[:, None]).any()


def test_few_rows_for_many_classes_still_tell_good_from_bad() -> None:
    features, _, means = planted([6] * 100)
    yardstick = make_yardstick(features, num_classes=100, seed=0)
    for criterion in CRITERIA:
        values = worth(yardstick, candidates(means), criterion)
        order = ["true", "noise 1.5", "noise 3.0", "random", "constant"]
        assert sorted(order, key=values.__getitem__, reverse=True) == order, criterion


@pytest.mark.parametrize("counts", [[4] * 3, [6] * 2], ids=["12 of 3", "12 of 2"])
def test_classes_smaller_than_a_neighbourhood_are_still_worth_more_than_one_class(counts: list[int]) -> None:
    features, labels, means = planted(counts)
    yardstick = make_yardstick(features, num_classes=len(counts), seed=0)
    found = candidates(means)
    assert accuracy(features, labels, found["true"]) == 1.0
    values = worth(yardstick, found, "neighbours")
    assert values["true"] > values["constant"] + 0.1


def test_a_single_image_is_refused() -> None:
    features, _, _ = planted([1, 0, 0])
    with pytest.raises(ValueError, match="too few to choose between trials: 1 image$"):
        make_yardstick(features, num_classes=3, seed=0)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_images_that_are_all_alike_make_no_candidate_perfect() -> None:
    features, _, means = planted([1, 0, 0])
    yardstick = make_yardstick(features.repeat(60, axis=0), num_classes=3, seed=0)
    assert worth(yardstick, candidates(means), "class_ami")["constant"] < 0.5


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_every_seed_that_the_training_takes_gives_a_yardstick(seed: int) -> None:
    features, _, _ = planted([20] * 3)
    make_yardstick(features, num_classes=3, seed=seed)


def test_right_groups_under_wrong_names_are_worth_nothing() -> None:
    features, labels, means = planted([150] * NUM_CLASSES, noise=0.15)
    head = means + 2.5 * torch.randn(means.shape, generator=torch.Generator().manual_seed(0)) / DIM**0.5
    zero_shot = Linear(weight=8 * head, bias=torch.zeros(NUM_CLASSES))
    assert accuracy(features, labels, zero_shot) < 0.95
    yardstick = make_yardstick(features, num_classes=NUM_CLASSES, seed=0, zero_shot=zero_shot)
    true = candidates(means)["true"]
    some, all_names = [1, 0, 3, 2, 4, 5], [1, 2, 3, 4, 5, 0]
    found = {"true": true, "zero-shot": zero_shot, "noise": candidates(means)["noise 1.5"]} | {
        f"{len(set(order))} {order}": Linear(weight=true.weight[order], bias=true.bias[order])
        for order in (some, all_names)
    }
    *good, half, none = worth(yardstick, found, "structure").values()
    assert good[0] == max(good)
    assert min(good) > 0
    assert (half, none) == (0, 0)
    blind = worth(replace(yardstick, zero_shot=None), found, "structure")
    assert [*blind.values()][-1] == pytest.approx(blind["true"]), "the images' structure knows no names"


def test_labels_have_no_way_in() -> None:
    for function in (make_yardstick, measure):
        assert not [name for name in inspect.signature(function).parameters if "label" in name]
    assert not [item.name for item in fields(Yardstick) if "label" in item.name]
