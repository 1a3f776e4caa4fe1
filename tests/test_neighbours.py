"""Nearest neighbours: exact, the same for every cut of the rows, and of use to the rounds."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from test_self_training import Workers, assert_same_probe, planted

from lpclip.config import SelfTrainingConfig
from lpclip.method.neighbours import nearest
from lpclip.method.priors import Prior
from lpclip.method.recipe import RECIPE
from lpclip.method.self_training import Rounds
from lpclip.method.shard import CHUNK_ROWS, Shard, fit_whitening
from lpclip.method.state import State

FEATURES, LABELS, HEAD = planted(2_000)
WHITENING = fit_whitening(Shard(features=FEATURES, num_rows=len(FEATURES)))


def find(features: np.ndarray, first_row: int = 0, count: int = 4) -> torch.Tensor:
    return nearest(
        features, among=FEATURES, first_row=first_row, whitening=WHITENING, count=count, dtype=torch.float32
    )


def test_neighbours_are_those_of_a_full_comparison() -> None:
    z = (torch.tensor(FEATURES).double() - WHITENING.mean) @ WHITENING.whitener
    z = torch.nn.functional.normalize(z, dim=1)
    similarity = (z @ z.T).fill_diagonal_(-2)
    found = similarity.gather(1, find(FEATURES)).numpy()
    expected = similarity.topk(4, dim=1).values.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_without_a_space_rows_are_compared_as_they_are() -> None:
    similarity = torch.tensor(FEATURES).float() @ torch.tensor(FEATURES).float().T
    found = nearest(FEATURES, among=FEATURES, first_row=0, whitening=None, count=4, dtype=torch.float32)
    expected = similarity.fill_diagonal_(-2).topk(4, dim=1).values.numpy()
    np.testing.assert_allclose(similarity.gather(1, found).numpy(), expected, atol=2e-3)


def test_no_row_is_its_own_neighbour_even_among_equals() -> None:
    same = np.repeat(FEATURES[:1], 6, axis=0)
    found = nearest(same, among=same, first_row=0, whitening=WHITENING, count=3, dtype=torch.float32)
    assert not (found == torch.arange(6)[:, None]).any()


@pytest.mark.parametrize("cut", [0, 1, 1024, 1999, 2000])
def test_a_cut_of_the_rows_finds_what_all_rows_find(cut: int) -> None:
    parts = torch.cat([find(FEATURES[:cut]), find(FEATURES[cut:], first_row=cut)])
    assert torch.equal(parts, find(FEATURES))


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(3, 2), (40, 3), (200, 10), (600, 30), (100_000, 30), (100_001, 0)]
)
def test_neighbours_are_fewer_than_a_class_has_images_and_used_where_affordable(
    num_rows: int, expected: int
) -> None:
    assert RECIPE.neighbour_count(SelfTrainingConfig(), num_rows=num_rows, num_classes=10) == expected


def test_the_flag_decides_and_never_asks_for_more_neighbours_than_there_are() -> None:
    config = SelfTrainingConfig(neighbours=7)
    assert RECIPE.neighbour_count(config, num_rows=1_000_000, num_classes=10) == 7
    assert RECIPE.neighbour_count(config, num_rows=5, num_classes=2) == 4


def rounds(shard: Shard, all_reduce=lambda tensor: tensor, *, solver: str) -> State:
    config, prior = SelfTrainingConfig(rounds=4, solver=solver), Prior(strength=0.3)
    steps = Rounds(shard, head=HEAD / 0.05, config=config, prior=prior, all_reduce=all_reduce).run()
    return [state for state, _ in steps][-1]


@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
def test_rounds_with_neighbours_do_not_depend_on_the_workers(solver: str) -> None:
    features, _, _ = planted(CHUNK_ROWS + 500)
    whitening = fit_whitening(Shard(features=features, num_rows=len(features)))
    options = {"among": features, "whitening": whitening, "count": 5, "dtype": torch.float32}
    whole = Shard(
        features=features, num_rows=len(features), neighbours=nearest(features, first_row=0, **options)
    )
    workers = Workers(2)
    found: dict[int, State] = {}

    def work(rank: int, rows: slice) -> None:
        shard = Shard(
            features=features[rows],
            first_row=rows.start,
            num_rows=len(features),
            neighbours=nearest(features[rows], first_row=rows.start, **options),
        )
        found[rank] = rounds(shard, workers.all_reduce(rank), solver=solver)

    threads = [
        threading.Thread(target=work, args=(rank, rows))
        for rank, rows in enumerate([slice(0, CHUNK_ROWS), slice(CHUNK_ROWS, len(features))])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_probe(found[0], rounds(whole, solver=solver))
    assert_same_probe(found[1], found[0])


@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
def test_neighbours_mend_labels_that_the_teacher_gets_wrong(solver: str) -> None:
    plain = Shard(features=FEATURES, num_rows=len(FEATURES))
    helped = Shard(features=FEATURES, num_rows=len(FEATURES), neighbours=find(FEATURES, count=10))

    def last_labels(shard: Shard) -> np.ndarray:
        config = SelfTrainingConfig(rounds=1, solver=solver)
        steps = Rounds(shard, head=HEAD / 0.05, config=config, prior=Prior(strength=0.0)).run()
        return [found.labels for _, found in steps][-1]

    assert (last_labels(helped) == LABELS).mean() > (last_labels(plain) == LABELS).mean()
