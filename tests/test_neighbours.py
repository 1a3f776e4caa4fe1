"""Nearest neighbours: the right ones, the same for every cut of the rows, and of use to the rounds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from test_self_training import Workers, assert_same_probe, planted

from lpclip.config import SelfTrainingConfig
from lpclip.method import neighbours
from lpclip.method.gaussian import Whitening
from lpclip.method.neighbours import nearest
from lpclip.method.priors import Prior
from lpclip.method.recipe import RECIPE
from lpclip.method.self_training import Rounds
from lpclip.method.shard import CHUNK_ROWS, Shard, fit_whitening
from lpclip.method.state import SharedTargets, State

FEATURES, LABELS, HEAD = planted(2_000)
WHITENING = fit_whitening(Shard(features=FEATURES, num_rows=len(FEATURES)))


def find(
    features: np.ndarray = FEATURES,
    *,
    count: int = 4,
    whitening: Whitening | None = WHITENING,
    exact: bool = True,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    shard = Shard(features=features, num_rows=len(features))
    return nearest(shard, whitening=whitening, count=count, dtype=dtype, exact=exact).long()


def find_with_workers(features: np.ndarray, cuts: list[int], *, count: int, **options: Any) -> torch.Tensor:
    """The places that workers find, worker i with the rows from cut i to cut i + 1, one after the other."""
    edges = [0, *cuts, len(features)]
    workers = Workers(len(edges) - 1)

    def work(rank: int) -> torch.Tensor:
        first, stop = edges[rank : rank + 2]
        shard = Shard(features=features[first:stop], first_row=first, num_rows=len(features))
        return nearest(shard, count=count, all_reduce=workers.all_reduce(rank), **options)

    with ThreadPoolExecutor(len(edges) - 1) as pool:
        return torch.cat(list(pool.map(work, range(len(edges) - 1))))


def test_neighbours_are_those_of_a_full_comparison() -> None:
    z = (torch.tensor(FEATURES).double() - WHITENING.mean) @ WHITENING.whitener
    z = torch.nn.functional.normalize(z, dim=1)
    similarity = (z @ z.T).fill_diagonal_(-2)
    found = similarity.gather(1, find()).numpy()
    expected = similarity.topk(4, dim=1).values.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_without_a_space_rows_are_compared_as_they_are() -> None:
    similarity = torch.tensor(FEATURES).float() @ torch.tensor(FEATURES).float().T
    expected = similarity.fill_diagonal_(-2).topk(4, dim=1).values.numpy()
    np.testing.assert_allclose(similarity.gather(1, find(whitening=None)).numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_no_row_is_its_own_neighbour_even_among_equals(exact: bool) -> None:
    same = np.repeat(FEATURES[:1], 100, axis=0)
    found = find(same, count=3, exact=exact)
    assert not (found == torch.arange(100)[:, None]).any()


@pytest.mark.parametrize(
    ("exact", "dtype"),
    [
        (True, torch.float32),
        (False, torch.float32),
        # Not every CPU computes in it; the others take half a minute.
        pytest.param(True, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_workers_find_what_one_finds(exact: bool, dtype: torch.dtype) -> None:
    features, _, _ = planted(3 * CHUNK_ROWS + 500)
    options: dict[str, Any] = {"count": 5, "whitening": WHITENING, "exact": exact, "dtype": dtype}
    whole = find_with_workers(features, [], **options)
    for cuts in ([CHUNK_ROWS], [CHUNK_ROWS, 3 * CHUNK_ROWS], [0, CHUNK_ROWS, len(features)]):
        assert torch.equal(find_with_workers(features, cuts, **options), whole)


def test_cells_find_most_neighbours_and_none_that_is_far() -> None:
    features, _, _ = planted(20_000, dim=64)
    found, expected = (
        find(features, count=10, whitening=None, exact=False),
        find(features, count=10, whitening=None),
    )
    hits = (found[:, :, None] == expected[:, None, :]).any(dim=2).float().mean()
    assert 0.4 < hits < 1.0  # 1 would mean that all rows are searched
    unit = torch.tensor(features).float()
    mean = [(unit[:, None] * unit[places]).sum(dim=2).mean() for places in (found, expected)]
    assert mean[0] > 0.95 * mean[1]


def test_beyond_a_number_of_rows_the_cells_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(neighbours.EXACT_ROWS, "cpu", 1_999)
    shard = Shard(features=FEATURES, num_rows=len(FEATURES))
    found = nearest(shard, whitening=WHITENING, count=4, dtype=torch.float32).long()
    assert torch.equal(found, find(exact=False))
    assert not torch.equal(found, find())


def test_rows_with_fewer_neighbours_in_their_cells_count_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "PROBES", 1)
    lonely = np.eye(40, dtype=np.float16)[[0] * 199 + [1]]  # the last row is alone in its cell
    found = find(lonely, count=3, whitening=None, exact=False)
    assert (found[:199] < 199).all()
    assert (found[199] == 199).all()


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(3, 2), (40, 3), (200, 10), (600, 30), (10_000_000, 30), (10_000_001, 0)]
)
def test_neighbours_are_fewer_than_a_class_has_images_and_used_where_affordable(
    num_rows: int, expected: int
) -> None:
    assert RECIPE.neighbour_count(SelfTrainingConfig(), num_rows=num_rows, num_classes=10) == expected


def test_the_flag_decides_and_never_asks_for_more_neighbours_than_there_are() -> None:
    config = SelfTrainingConfig(neighbours=7)
    assert RECIPE.neighbour_count(config, num_rows=100_000_000, num_classes=10) == 7
    assert RECIPE.neighbour_count(config, num_rows=5, num_classes=2) == 4


def rounds(shard: Shard, all_reduce=lambda tensor: tensor, *, solver: str) -> State:
    config, prior = SelfTrainingConfig(rounds=4, solver=solver), Prior(strength=0.3)
    steps = Rounds(shard, head=HEAD / 0.05, config=config, prior=prior, all_reduce=all_reduce).run()
    return [state for state, _ in steps][-1]


@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
def test_rounds_with_neighbours_do_not_depend_on_the_workers(solver: str) -> None:
    features, _, _ = planted(CHUNK_ROWS + 500)
    found = find(features, count=5).int()
    whole = Shard(features=features, num_rows=len(features), neighbours=found)
    workers = Workers(2)

    def work(rank: int, rows: slice) -> State:
        shard = Shard(
            features=features[rows],
            first_row=rows.start,
            num_rows=len(features),
            neighbours=found[rows],
        )
        return rounds(shard, workers.all_reduce(rank), solver=solver)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, (0, 1), (slice(0, CHUNK_ROWS), slice(CHUNK_ROWS, len(features))))
    assert_same_probe(first, rounds(whole, solver=solver))
    assert_same_probe(second, first)


@pytest.mark.parametrize(("num_classes", "tolerance"), [(10, 0.0), (40, 2e-3)])
def test_shared_targets_are_the_mean_of_the_neighbours(num_classes: int, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.softmax(4 * torch.randn(50, num_classes, generator=generator), dim=1)
    shared = SharedTargets.zeros(50, num_classes, device=torch.device("cpu"))
    shared.fill(0, targets[:20])
    shared.fill(20, targets[20:])
    places = torch.randint(50, (8, 3), generator=generator, dtype=torch.int32)
    found = shared.mean_of(places, num_classes=num_classes)
    # Of many classes only the largest targets are kept.
    torch.testing.assert_close(found, targets[places.long()].mean(dim=1), atol=tolerance + 1e-6, rtol=0)


@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
def test_neighbours_mend_labels_that_the_teacher_gets_wrong(solver: str) -> None:
    plain = Shard(features=FEATURES, num_rows=len(FEATURES))
    helped = Shard(features=FEATURES, num_rows=len(FEATURES), neighbours=find(count=10))

    def last_labels(shard: Shard) -> np.ndarray:
        config = SelfTrainingConfig(rounds=1, solver=solver)
        steps = Rounds(shard, head=HEAD / 0.05, config=config, prior=Prior(strength=0.0)).run()
        return [found.labels for _, found in steps][-1]

    assert (last_labels(helped) == LABELS).mean() > (last_labels(plain) == LABELS).mean()
