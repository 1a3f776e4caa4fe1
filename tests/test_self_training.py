"""Self-training on planted classes: what it finds, what it must not depend on, and what it refuses."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lpclip.config import SelfTrainingConfig, config_identity
from lpclip.method.priors import Prior, read_prior
from lpclip.method.pseudo_labels import AllReduce
from lpclip.method.recipe import RECIPE
from lpclip.method.self_training import Rounds
from lpclip.method.shard import CHUNK_ROWS, Shard
from lpclip.method.state import Pass, State

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES, DIM = 5, 12
TEMPERATURE = 0.05
CONFIG = SelfTrainingConfig(rounds=4)
GRADIENT = SelfTrainingConfig(solver="gradient", rounds=2)


def planted(num_rows: int, *, num_classes: int = NUM_CLASSES, dim: int = DIM, seed: int = 0):
    """Unit-norm features around class directions, their classes, and a head that has them only roughly right."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(num_classes, dim))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    labels = rng.integers(num_classes, size=num_rows)
    features = means[labels] + 0.25 * rng.normal(size=(num_rows, dim))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    head = means + 0.2 * rng.normal(size=means.shape)
    return features.astype(np.float16), labels, F.normalize(torch.tensor(head).float(), dim=1)


def train(
    features: np.ndarray,
    head: torch.Tensor,
    *,
    config: SelfTrainingConfig = CONFIG,
    prior: Prior | None = None,
    start: State | None = None,
) -> list[tuple[State, Pass]]:
    shard = Shard(features=features, num_rows=len(features))
    return list(Rounds(shard, head=head / TEMPERATURE, config=config, prior=prior or Prior()).run(start))


def labels_of(state: State, features: np.ndarray, *, head: torch.Tensor) -> np.ndarray:
    return state.classifier(head / TEMPERATURE).predict(features)


class Workers:
    """Workers as threads that meet in a sum, as processes do in an all-reduce."""

    def __init__(self, number: int) -> None:
        self._barrier, self._tensors = threading.Barrier(number, timeout=60), [torch.empty(0)] * number

    def all_reduce(self, rank: int) -> AllReduce:
        def add(tensor: torch.Tensor) -> torch.Tensor:
            self._tensors[rank] = tensor
            self._barrier.wait()
            total = torch.stack(self._tensors).sum(dim=0)
            self._barrier.wait()
            return total

        return add


def train_on_workers(
    features: np.ndarray, head: torch.Tensor, cuts: list[int], *, config: SelfTrainingConfig
) -> list[list[tuple[State, Pass]]]:
    """All rounds of every worker; worker i has the rows from cut i to cut i + 1."""
    edges = [0, *cuts, len(features)]
    workers = Workers(len(edges) - 1)

    def work(rank: int) -> list[tuple[State, Pass]]:
        shard = Shard(
            features=features[edges[rank] : edges[rank + 1]], first_row=edges[rank], num_rows=len(features)
        )
        own, add = head / TEMPERATURE, workers.all_reduce(rank)
        return list(Rounds(shard, head=own, config=config, prior=Prior(), all_reduce=add).run())

    with ThreadPoolExecutor(len(edges) - 1) as pool:
        return list(pool.map(work, range(len(edges) - 1)))


def assert_same_probe(found: State, expected: State, *, tolerance: float = 1e-4) -> None:
    bound = tolerance * float(expected.weight.abs().max())
    torch.testing.assert_close(found.weight, expected.weight, atol=bound, rtol=0)
    torch.testing.assert_close(found.bias, expected.bias, atol=bound, rtol=0)
    torch.testing.assert_close(found.factors.log(), expected.factors.log(), atol=bound, rtol=0)
    assert found.zero_shot_share == pytest.approx(expected.zero_shot_share, abs=1e-6)
    assert found.evidence == pytest.approx(expected.evidence, abs=1e-6)


CUTS = {
    "one chunk, then two": [CHUNK_ROWS],
    "two chunks, then one": [2 * CHUNK_ROWS],
    "three workers": [CHUNK_ROWS, 2 * CHUNK_ROWS],
    "workers without a row": [0, 2 * CHUNK_ROWS, 10_000],
}


@pytest.mark.parametrize("name", CUTS)
def test_gaussian_rounds_do_not_depend_on_the_workers(name: str):
    features, _, head = planted(10_000)
    alone = train(features, head, config=replace(CONFIG, threshold=0.6))
    workers = train_on_workers(features, head, CUTS[name], config=replace(CONFIG, threshold=0.6))
    for rounds in workers:
        assert len(rounds) == len(alone)
        for (state, found), (expected, whole) in zip(rounds, alone, strict=True):
            assert_same_probe(state, expected)
            assert state.metrics == pytest.approx(expected.metrics, abs=1e-4)
            torch.testing.assert_close(found.sums, whole.sums, atol=1e-2, rtol=1e-4)
    last = [rounds[-1][1] for rounds in workers]
    assert (np.concatenate([found.labels for found in last]) == alone[-1][1].labels).all()
    assert (
        labels_of(workers[0][-1][0], features, head=head) == labels_of(alone[-1][0], features, head=head)
    ).all()


class ManyAtOnce(Shard):
    """A shard that works on several chunks at a time, as on a GPU."""

    def chunks_at_once(self, width: int) -> int:
        return 2


def test_rounds_do_not_depend_on_the_number_of_chunks_at_a_time():
    features, _, head = planted(2 * CHUNK_ROWS + 500)
    options: dict[str, Any] = {"head": head / TEMPERATURE, "config": CONFIG, "prior": Prior()}
    one = Rounds(Shard(features=features, num_rows=len(features)), **options).run()
    shard = ManyAtOnce(features=features, num_rows=len(features))
    assert [rows.stop - rows.start for rows, _ in shard.chunks(width=5)] == [2 * CHUNK_ROWS, 500]
    for (expected, _), (found, own) in zip(one, Rounds(shard, **options).run(), strict=True):
        assert_same_probe(found, expected, tolerance=1e-6)
        assert own.labels.tolist() == labels_of(found, features, head=head).tolist()


def test_gradient_rounds_do_not_depend_on_the_workers():
    features, _, head = planted(6000)
    alone = train(features, head, config=GRADIENT)
    for rounds in train_on_workers(features, head, [CHUNK_ROWS], config=GRADIENT):
        assert_same_probe(rounds[-1][0], alone[-1][0])


@pytest.mark.parametrize("config", [CONFIG, GRADIENT], ids=["gaussian", "gradient"])
def test_the_same_run_twice_is_the_same_bit_for_bit(config: SelfTrainingConfig):
    features, _, head = planted(800)
    (first, _), (second, _) = (train(features, head, config=config)[-1] for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert torch.equal(first.factors, second.factors)


def test_the_seed_decides_the_gradient_s_batches():
    features, _, head = planted(1500)
    states = [train(features, head, config=replace(GRADIENT, seed=seed))[-1][0] for seed in (0, 1)]
    assert not torch.equal(states[0].weight, states[1].weight)


def test_a_class_that_zero_shot_hardly_names_grows_because_the_loss_knows_the_labels_shares():
    features, labels, head = planted(1500)
    # The two classes' text weights nearly coincide, a little to the advantage of one.
    head[1] = F.normalize(head[0] + 0.3 * (head[1] - head[0]), dim=0)
    shard = Shard(features=features, num_rows=len(features))
    found = {}
    for balance in (0.0, RECIPE.gradient_balance):
        options: dict[str, Any] = {"config": GRADIENT, "prior": Prior(strength=0.0)}
        recipe = replace(RECIPE, gradient_balance=balance)
        *_, (state, _) = Rounds(shard, head=head / TEMPERATURE, recipe=recipe, **options).run()
        found[balance] = (labels_of(state, features, head=head) == labels).mean()
    assert found[RECIPE.gradient_balance] > found[0.0] + 0.02


def test_rounds_beat_their_teacher_and_come_near_to_the_supervised_rule():
    features, labels, head = planted(4000, dim=8)
    zero_shot = float(((torch.tensor(features).float() @ head.T).argmax(dim=1).numpy() == labels).mean())
    x = torch.tensor(features).double()
    means = torch.stack([x[labels == k].mean(dim=0) for k in range(NUM_CLASSES)])
    inverse = torch.linalg.inv(torch.cov((x - means[labels]).T))
    best = x @ (means @ inverse).T - ((means @ inverse) * means).sum(dim=1) / 2
    bayes = float((best.argmax(dim=1).numpy() == labels).mean())
    accuracy = float((labels_of(train(features, head)[-1][0], features, head=head) == labels).mean())
    assert bayes - 0.03 < accuracy
    assert zero_shot + 0.03 < accuracy


@pytest.mark.parametrize("config", [CONFIG, GRADIENT], ids=["gaussian", "gradient"])
def test_the_order_of_classes_does_not_matter(config: SelfTrainingConfig):
    features, _, head = planted(1000)
    order = torch.tensor([4, 2, 0, 1, 3])
    state = train(features, head, config=config)[-1][0]
    other = train(features, head[order], config=config)[-1][0]
    assert_same_probe(
        other,
        replace(state, weight=state.weight[order], bias=state.bias[order], factors=state.factors[order]),
    )


def test_the_order_of_rows_does_not_matter():
    features, _, head = planted(6000)
    order = np.random.default_rng(1).permutation(6000)
    (state, found), (other, shuffled) = train(features, head)[-1], train(features[order], head)[-1]
    assert_same_probe(other, state)
    assert (shuffled.labels == found.labels[order]).mean() > 0.9995


def test_turned_features_and_head_give_the_turned_probe():
    features, _, head = planted(1500)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0))).Q
    state = train(features.astype(np.float32), head)[-1][0]
    turned = train((torch.tensor(features).float() @ turn).numpy(), head @ turn)[-1][0]
    assert_same_probe(replace(turned, weight=turned.weight @ turn.T), state, tolerance=1e-3)


@pytest.mark.parametrize("config", [CONFIG, GRADIENT], ids=["gaussian", "gradient"])
def test_resumed_rounds_equal_the_uninterrupted(config: SelfTrainingConfig):
    features, _, head = planted(700)
    config = replace(config, rounds=4)
    whole = train(features, head, config=config)
    assert len(whole) >= 3
    for done in range(1, len(whole)):
        resumed = train(features, head, config=config, start=whole[done - 1][0])
        assert [state.round for state, _ in resumed] == [state.round for state, _ in whole[done:]]
        for (state, found), (expected, labelled) in zip(resumed, whole[done:], strict=True):
            assert torch.equal(state.weight, expected.weight)
            assert torch.equal(state.bias, expected.bias)
            assert torch.equal(state.factors, expected.factors)
            assert state.metrics == expected.metrics
            assert (found.labels == labelled.labels).all()


def test_rounds_end_when_hardly_a_label_changes_and_at_the_latest_after_all():
    features, _, head = planted(2000)
    states = [state for state, _ in train(features, head, config=replace(CONFIG, rounds=50))]
    assert len(states) < 50
    assert states[-1].metrics["flip_rate"] < RECIPE.stop_flip_rate
    assert all(state.metrics["flip_rate"] >= RECIPE.stop_flip_rate for state in states[:-1])
    assert [state.round for state in states] == list(range(1, len(states) + 1))
    assert len(train(features, head, config=replace(CONFIG, rounds=1))) == 1


def test_a_pass_describes_its_own_student():
    features, _, head = planted(1000)
    rounds = train(features, head, config=replace(CONFIG, threshold=0.7))
    for (state, found), (_, before) in zip(rounds[1:], rounds, strict=False):
        assert (found.labels == labels_of(state, features, head=head)).all()
        assert (found.kept == (found.confidence >= 0.7)).all()
        zero_shot = (torch.tensor(features).float() @ head.T).argmax(dim=1).numpy()
        assert state.metrics == pytest.approx(
            {
                "coverage": found.kept.mean(),
                "mean_confidence": found.confidence.mean(),
                "class_entropy": state.metrics["class_entropy"],
                "flip_rate": (found.labels != before.labels).mean(),
                "zero_shot_agreement": (found.labels == zero_shot).mean(),
            }
        )
        assert 0.9 < state.metrics["class_entropy"] <= 1


def test_the_threshold_leaves_rows_out_of_the_sums():
    features, _, head = planted(1000)
    state, found = train(features, head, config=replace(CONFIG, rounds=1, threshold=0.9))[-1]
    logits = state.classifier(head / TEMPERATURE).logits(features)
    targets = torch.softmax(logits, dim=1) * torch.tensor(found.kept)[:, None]
    assert 0 < found.kept.sum() < 1000
    torch.testing.assert_close(found.counts, targets.sum(dim=0).double(), atol=1e-2, rtol=0)
    assert found.counts.sum() <= found.kept.sum() + 1e-3
    everything = train(features, head, config=replace(CONFIG, rounds=1))[-1][1]
    assert everything.kept.all()
    assert float(everything.counts.sum()) == pytest.approx(1000, abs=0.1)


def test_a_high_threshold_costs_no_more_than_the_rows_it_leaves_out():
    features, labels, head = planted(3000, num_classes=8, dim=16)
    zero_shot = ((torch.tensor(features).float() @ head.T).argmax(dim=1).numpy() == labels).mean()
    for state, _ in train(features, head, config=replace(CONFIG, threshold=0.99)):
        assert (labels_of(state, features, head=head) == labels).mean() > zero_shot
        assert state.metrics["coverage"] < 0.8


@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
def test_a_threshold_that_nobody_reaches_is_refused(solver: str):
    features, _, head = planted(50)
    config = SelfTrainingConfig(solver=solver, threshold=1 - 1e-9)
    with pytest.raises(ValueError, match="lower the threshold"):
        train(features, head[:2] * 1e-3, config=config)


def test_a_known_prior_helps_where_classes_are_unequal():
    rng = np.random.default_rng(3)
    features, labels, head = planted(6000)
    shares = np.array([0.7, 0.2, 0.05, 0.03, 0.02])
    chosen = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == k))[: int(1000 * s)] for k, s in enumerate(shares)]
    )
    features, labels = features[chosen], labels[chosen]
    accuracy, found = {}, {}
    for name in ("uniform", "known"):
        prior = Prior(shares=torch.tensor(shares) if name == "known" else None)
        last = labels_of(train(features, head, prior=prior)[-1][0], features, head=head)
        accuracy[name] = (last == labels).mean()
        found[name] = np.bincount(last, minlength=5) / len(last)
    assert accuracy["known"] > accuracy["uniform"] + 0.02
    assert np.abs(found["known"] - shares).max() < 0.03


def test_without_a_prior_the_factors_stay_one():
    features, _, head = planted(500)
    for state, _ in train(features, head, prior=Prior(strength=0.0)):
        assert state.factors.tolist() == [1.0] * NUM_CLASSES
        assert torch.equal(state.classifier(head).bias, state.bias)


def test_zero_shot_logits_can_come_from_elsewhere():
    features, _, head = planted(900)
    logits = torch.tensor(features).float() @ head.T / TEMPERATURE
    given = Shard(features=features, num_rows=900, zero_shot=logits)
    rounds = Rounds(given, head=head / TEMPERATURE, config=CONFIG, prior=Prior()).run()
    for (state, found), (expected, whole) in zip(rounds, train(features, head), strict=True):
        assert_same_probe(state, expected)
        assert (found.labels == whole.labels).all()


def test_the_student_learns_from_the_strong_views():
    features, _, head = planted(600)
    noise = np.random.default_rng(0).normal(size=(2, *features.shape)) * 0.1
    strong = tuple((features + part).astype(np.float16) for part in noise)
    states = []
    for views in ((), strong):
        shard = Shard(features=features, strong=views, num_rows=600)
        rounds = Rounds(shard, head=head / TEMPERATURE, config=GRADIENT, prior=Prior()).run()
        states.append([state for state, _ in rounds][-1])
    assert not torch.equal(states[0].weight, states[1].weight)
    assert states[1].weight.isfinite().all()


def with_cue(
    features: np.ndarray, classes: np.ndarray, *, head: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Features in which a direction that the head does not see tells the classes apart too, and that direction."""
    cue = np.linalg.svd(head.numpy())[2][NUM_CLASSES]
    return unit(features + 0.5 * np.linspace(-1, 1, NUM_CLASSES)[classes][:, None] * cue), cue


def shaken(features: np.ndarray, direction: np.ndarray, *, seed: int) -> np.ndarray:
    """Views that move at random along one direction, and along no other."""
    steps = 2 * np.random.default_rng(seed).normal(size=(len(features), 1))
    return unit(features + steps * direction)


def last_round(
    features: np.ndarray, head: torch.Tensor, *strong: np.ndarray, start: State | None = None
) -> list[tuple[State, Pass]]:
    shard = Shard(features=features, strong=strong, num_rows=len(features))
    return list(Rounds(shard, head=head / TEMPERATURE, config=CONFIG, prior=Prior()).run(start))


def test_the_last_student_withstands_what_the_strong_views_change():
    everything, classes, head = planted(4000)
    everything, cue = with_cue(everything, classes, head=head)
    features, test, labels = everything[:2000], everything[2000:], classes[2000:]
    moved = shaken(test, cue, seed=9)
    rounds = last_round(features, head, shaken(features, cue, seed=1))
    before, after = rounds[-2][0], rounds[-1][0]
    assert (labels_of(before, moved, head=head) == labels).mean() < 0.8, "it leans on the cue"
    assert (labels_of(after, moved, head=head) == labels).mean() > 0.94
    assert (labels_of(after, test, head=head) == labels).mean() > 0.94


def test_strong_views_leave_the_rounds_before_the_last_alone():
    features, _, head = planted(800)
    plain = last_round(features, head)
    strong = last_round(features, head, shaken(features, head[0].numpy(), seed=1))
    assert len(strong) == len(plain) + 1
    assert [state.round for state, _ in strong] == list(range(1, len(strong) + 1))
    for (mine, _), (theirs, _) in zip(strong, plain, strict=False):
        assert torch.equal(mine.weight, theirs.weight)


def test_a_strong_view_like_the_base_one_is_another_round():
    features, _, head = planted(800)
    copied = last_round(features, head, features)
    ordinary = train(features, head, config=replace(CONFIG, rounds=len(copied)), start=copied[-2][0])
    assert len(ordinary) == 1
    evidence, share = ordinary[0][0].evidence, RECIPE.last_zero_shot_share
    expected = replace(ordinary[0][0], zero_shot_share=1 - (1 - share) * evidence)
    assert_same_probe(copied[-1][0], expected)


def test_a_training_cut_before_its_last_round_ends_alike():
    features, _, head = planted(800)
    view = shaken(features, head[0].numpy(), seed=1)
    whole = last_round(features, head, view)
    resumed = last_round(features, head, view, start=whole[-2][0])
    assert len(resumed) == 1
    assert_same_probe(resumed[0][0], whole[-1][0])
    assert (resumed[0][1].labels == whole[-1][1].labels).all()


def test_strong_views_count_alike_on_any_number_of_workers():
    features, _, head = planted(2 * CHUNK_ROWS)
    view = shaken(features, head[0].numpy(), seed=1)
    workers = Workers(2)

    def work(rank: int) -> State:
        rows = slice(rank * CHUNK_ROWS, (rank + 1) * CHUNK_ROWS)
        shard = Shard(
            features=features[rows], strong=(view[rows],), first_row=rows.start, num_rows=len(features)
        )
        own, add = head / TEMPERATURE, workers.all_reduce(rank)
        *_, (state, _) = Rounds(shard, head=own, config=CONFIG, prior=Prior(), all_reduce=add).run()
        return state

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(2)))
    expected = last_round(features, head, view)[-1][0]
    for state in found:
        assert_same_probe(state, expected)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


EXTREMES = {
    "identical rows": unit(np.ones((20, DIM))),
    "a single row": unit(noise(1, DIM)),
    "fewer rows than classes": unit(noise(3, DIM)),
    "rows of one class": unit(noise(1, DIM) + 0.01 * noise(40, DIM)),
    "a row apart": unit(np.concatenate([np.ones((40, DIM)), -np.ones((1, DIM))])),
    "two points": unit(np.repeat(np.eye(2, DIM), 10, axis=0)),
}


@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
@pytest.mark.parametrize("prior", ["weak", "uniform", "none"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_rows_give_finite_probes(name: str, prior: str, solver: str):
    head = planted(1)[2]
    config = SelfTrainingConfig(solver=solver, rounds=3)
    for state, found in train(EXTREMES[name], head, config=config, prior=read_prior(prior, tuple("abcde"))):
        assert state.weight.isfinite().all()
        classifier = state.classifier(head)
        assert classifier.weight.isfinite().all()
        assert classifier.bias.isfinite().all()
        assert np.isfinite(found.confidence).all()
        assert np.isfinite(list(state.metrics.values())).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 0},
        {"rounds": -1},
        {"threshold": -0.1},
        {"threshold": 1.0},
        {"num_workers": -1},
        {"threshold": float("nan")},
    ],
)
def test_values_out_of_range_are_refused_by_their_flag(changes: dict[str, float]):
    flag = "--" + next(iter(changes)).replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        SelfTrainingConfig(**changes).check()


def test_the_defaults_are_in_range():
    SelfTrainingConfig().check()


def test_the_number_of_workers_is_no_part_of_a_run_s_identity():
    assert config_identity(SelfTrainingConfig(num_workers=4)) == config_identity(SelfTrainingConfig())
    assert config_identity(SelfTrainingConfig(seed=4)) != config_identity(SelfTrainingConfig())


CLASSES = ("cat", "dog")


def test_priors_by_name():
    strengths = {name: read_prior(name, CLASSES).strength for name in ("none", "weak", "uniform")}
    assert strengths == {"none": 0, "weak": 0.3, "uniform": 1}
    assert all(read_prior(name, CLASSES).shares is None for name in strengths)
    assert read_prior("auto", CLASSES) is None


@pytest.mark.parametrize(
    "text", ["3\n1\n", "3\r\n\r\n1", " 0.75\n0.25", "dog\t1\ncat\t3\n", "dog \t 5\n cat\t15"]
)
def test_a_prior_file_has_weights_in_class_order_or_by_name(text: str):
    assert read_prior("prior.txt", CLASSES, text=text).shares.tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "0 weights for 2 classes"),
        ("1\n1\n1", "3 weights for 2 classes"),
        ("1\nmany", "not a weight"),
        ("cat\tmany\ndog\t1", "not a weight"),
        ("cat\t1\ncow\t1", "must name each class once; missing: dog"),
        ("cat\t1", "missing: dog"),
        ("cat\t1\ndog\t1\ncow\t1", "must name each class once"),
        ("cat\t1\ndog\t1\ncat\t2", "must name each class once"),
        ("cat\t1\n1", "must name each class once"),
        ("0\n1", "positive"),
        ("-1\n2", "positive"),
        ("nan\n1", "positive"),
        ("inf\n1", "positive"),
    ],
)
def test_a_prior_file_that_does_not_fit_is_refused_with_the_reason(text: str, reason: str):
    with pytest.raises(ValueError, match=reason) as caught:
        read_prior("prior.txt", CLASSES, text=text)
    assert str(caught.value).count("prior.txt") == 1
