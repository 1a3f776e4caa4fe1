"""A few given labels on planted classes: what they correct, what they leave alone, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from test_self_training import Workers, assert_same_probe

from lpclip import Head, fit
from lpclip.config import SelfTrainingConfig, UserError
from lpclip.method import few_labels as few_labels_module
from lpclip.method.calibration import OCTAVES, labelled_factor
from lpclip.method.confirmation import Confirmation, Sample
from lpclip.method.few_labels import (
    CONSTANT,
    NONE_OF_THESE,
    RIDGE,
    WRONG,
    Correction,
    FewLabels,
    gathered,
    mean_feature,
    more_often_right,
    with_labelled,
)
from lpclip.method.fit import SelfTraining, finish_probe, zero_shot_labels
from lpclip.method.linear import Linear
from lpclip.method.priors import PRIORS
from lpclip.method.probe import zero_shot_probe
from lpclip.method.self_training import Rounds
from lpclip.method.shard import CHUNK_ROWS, Shard, fit_whitenings
from lpclip.method.state import Pass, State
from lpclip.method.trial import ChosenPrior

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CLASSES, DIM, TEMPERATURE = 5, 32, 0.05
NAMES = tuple("abcde")
UNKNOWN = -1
CONFIG = SelfTrainingConfig(rounds=3)


def planted(
    num_rows: int = 1500, *, misled: bool = False, noise: float = 0.08
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Features around class directions, their classes, and a head; if `misled`, it confuses the first two classes."""
    rng = np.random.default_rng(0)
    means = np.linalg.qr(rng.normal(size=(DIM, NUM_CLASSES)))[0].T
    classes = rng.integers(NUM_CLASSES, size=num_rows)
    rows = means[classes] + 0.13 * rng.normal(size=(num_rows, DIM))
    head = means + noise * rng.normal(size=means.shape)
    if misled:
        head[0], head[1] = 0.45 * means[0] + 0.55 * means[1], 0.55 * means[0] + 0.45 * means[1]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16), classes, F.normalize(torch.tensor(head).float(), dim=1)


def some(classes: np.ndarray, *, each: int) -> np.ndarray:
    """The labels of the first images of each class, -1 for all others."""
    found = np.full(len(classes), UNKNOWN)
    for label in range(NUM_CLASSES):
        rows = np.flatnonzero(classes == label)[:each]
        found[rows] = label
    return found


def few(labels: np.ndarray, features: np.ndarray) -> FewLabels:
    found = FewLabels.of_rows(labels, features)
    assert found is not None
    return found


def trained(
    features: np.ndarray, head: torch.Tensor, labels: np.ndarray | None = None, **options: Any
) -> SelfTraining:
    named = Head(class_names=NAMES, weight=head.numpy(), temperature=TEMPERATURE)
    return fit(features, named, config=SelfTrainingConfig(**options), labels=labels)


def accuracy(found: SelfTraining, features: np.ndarray, classes: np.ndarray) -> float:
    return float((found.probe.predict(features) == classes).mean())


def test_labels_correct_a_misleading_head_on_other_images() -> None:
    features, classes, head = planted(misled=True)
    labels = some(classes, each=4)
    others = labels == UNKNOWN
    without, given = trained(features, head), trained(features, head, labels)
    assert accuracy(without, features[others], classes[others]) < 0.7
    assert accuracy(given, features[others], classes[others]) > 0.95


@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
def test_images_have_their_given_label_and_those_of_no_class_count_in_none(solver: str) -> None:
    features, classes, head = planted(800)
    labels = some(classes, each=3)
    rows = np.flatnonzero(labels != UNKNOWN)
    labels[rows[0]] = (classes[rows[0]] + 1) % NUM_CLASSES
    foreign = np.flatnonzero(labels == UNKNOWN)[:20]
    labels[foreign] = NONE_OF_THESE
    found = trained(features, head, labels, solver=solver, present="all")
    assert found.trusted
    assert (found.labels[rows] == labels[rows]).all()
    assert (found.confidence[rows] == 1).all()
    assert found.kept[rows].all()
    assert not found.kept[foreign].any()
    assert found.kept.sum() == len(features) - len(foreign)


def rounds(features: np.ndarray, head: torch.Tensor, labels: FewLabels | None) -> list[tuple[State, Pass]]:
    shard = Shard(features=features, num_rows=len(features))
    return list(
        Rounds(shard, head=head / TEMPERATURE, prior=PRIORS["weak"], config=CONFIG, labels=labels).run()
    )


def test_an_image_of_no_class_is_in_no_sum() -> None:
    features, _, head = planted(300)
    labels = np.full(300, UNKNOWN)
    labels[7] = NONE_OF_THESE
    found, whole = (rounds(features, head, given)[0][1] for given in (few(labels, features), None))
    assert float(found.counts.sum()) == pytest.approx(299, abs=1e-3)
    assert float(whole.counts.sum()) == pytest.approx(300, abs=1e-3)


def test_no_label_at_all_is_the_training_without_labels_bit_by_bit() -> None:
    features, _, head = planted(600)
    plain, none = trained(features, head), trained(features, head, np.full(600, UNKNOWN))
    assert torch.equal(plain.probe.weight, none.probe.weight)
    assert plain.probe.temperature == none.probe.temperature
    for one, other in zip(plain.rounds, none.rounds, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)
        assert one.metrics == other.metrics


@pytest.mark.parametrize("cuts", [[CHUNK_ROWS], [0, CHUNK_ROWS]], ids=["two shards", "three, one empty"])
def test_labels_give_the_same_probe_on_any_number_of_shards(cuts: list[int]) -> None:
    features, classes, head = planted(CHUNK_ROWS + 700, misled=True)
    ids = np.array([f"{row:05d}" for row in range(len(features))], dtype=object)
    labels = some(classes, each=4)
    labels[CHUNK_ROWS + 50] = NONE_OF_THESE
    labels[-1] = classes[-1]
    by_id = {ids[row]: int(labels[row]) for row in reversed(np.flatnonzero(labels != UNKNOWN).tolist())}
    edges = [0, *cuts, len(features)]
    workers = Workers(len(edges) - 1)

    def work(rank: int) -> list[tuple[State, Pass]]:
        own, add = slice(edges[rank], edges[rank + 1]), workers.all_reduce(rank)
        places, rows, known = gathered(by_id, ids=ids[own], features=features[own], first_row=edges[rank])
        given = FewLabels(places=add(places).long(), features=add(rows).float(), classes=known)
        shard = Shard(features=features[own], first_row=edges[rank], num_rows=len(features))
        whitenings = fit_whitenings(shard, all_reduce=add)
        options: dict[str, Any] = {"head": head / TEMPERATURE, "prior": PRIORS["weak"], "config": CONFIG}
        return list(Rounds(shard, **options, all_reduce=add, whitenings=whitenings, labels=given).run())

    with ThreadPoolExecutor(len(edges) - 1) as pool:
        parts = list(pool.map(work, range(len(edges) - 1)))
    alone = rounds(features, head, few(labels, features))
    for part in parts:
        for (state, _), (expected, _) in zip(part, alone, strict=True):
            assert_same_probe(state, expected)
    found = np.concatenate([part[-1][1].labels for part in parts])
    assert (found == alone[-1][1].labels).all()
    named = labels >= 0
    assert (found[named] == labels[named]).all()
    assert not np.concatenate([part[-1][1].kept for part in parts])[CHUNK_ROWS + 50]


def sure(head: torch.Tensor) -> Linear:
    return Linear(weight=head / TEMPERATURE, bias=torch.zeros(len(head)))


def corrected(features: np.ndarray, labels: np.ndarray, classifier: Linear) -> Linear:
    return Correction(few(labels, features), mean=mean_feature(features)).apply(classifier)


def test_one_wrong_label_among_many_hardly_moves_a_sure_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    features, classes, head = planted(800)
    right = some(classes, each=10)
    wrong = right.copy()
    row = int(np.flatnonzero(right == 0)[0])
    wrong[row] = 1

    def moved() -> float:
        one, other = (corrected(features, labels, sure(head)) for labels in (right, wrong))
        return float((one.weight - other.weight).norm())

    robust = moved()
    monkeypatch.setattr(few_labels_module, "WRONG", 1e-9)
    assert robust < moved() / 5


def test_a_wrong_tenth_of_the_labels_still_helps() -> None:
    features, classes, head = planted(misled=True)
    labels = some(classes, each=10)
    others, rows = labels == UNKNOWN, np.flatnonzero(labels != UNKNOWN)
    labels[rows[::10]] = (labels[rows[::10]] + 2) % NUM_CLASSES
    without, given = trained(features, head), trained(features, head, labels)
    better = accuracy(given, features[others], classes[others])
    assert better > accuracy(without, features[others], classes[others]) + 0.2


def test_the_correction_reaches_the_maximum_of_its_likelihood() -> None:
    rng = np.random.default_rng(1)
    features, _, head = planted(60)
    # Some are wrong: the likelihood is that of labels which may be.
    labels = np.where(np.arange(60) < 12, rng.integers(NUM_CLASSES, size=60), UNKNOWN)
    classifier = Linear(weight=8 * head, bias=torch.linspace(-0.5, 0.5, NUM_CLASSES))
    found = corrected(features, labels, classifier)
    mean = mean_feature(features)
    scale = float((1 - mean @ mean).sqrt())
    given = torch.tensor(features[:12]).double()
    rows = F.pad((given - mean) / scale, (0, 1), value=CONSTANT)
    start, wanted = classifier.logits(features[:12]).double(), torch.tensor(labels[:12])

    def worth(flat: np.ndarray) -> tuple[float, np.ndarray]:
        step = torch.tensor(flat.reshape(NUM_CLASSES, -1), requires_grad=True)
        said = torch.softmax(start + rows @ step.T, dim=1)[range(12), wanted]
        loss = -torch.log((1 - WRONG) * said + WRONG / NUM_CLASSES).sum() + RIDGE / 2 * (step**2).sum()
        loss.backward()
        assert step.grad is not None
        return float(loss.detach()), step.grad.numpy().ravel()

    # What the correction added, in the units of the equation.
    weight = (found.weight - classifier.weight).double()
    constant = (found.bias - classifier.bias).double() + weight @ mean
    own = torch.cat([weight * scale, constant[:, None] / CONSTANT], dim=1).numpy().ravel()
    best = minimize(worth, np.zeros_like(own), jac=True, method="BFGS", options={"gtol": 1e-7})
    assert worth(np.zeros_like(own))[0] > best.fun + 3
    assert worth(own)[0] == pytest.approx(best.fun, abs=0.02)
    assert np.abs(worth(own)[1]).max() < 0.1


def test_one_classifier_is_more_often_right_than_another_beyond_chance() -> None:
    assert not more_often_right(0, 0)
    assert not more_often_right(4, 0)
    assert more_often_right(5, 0)
    assert not more_often_right(5, 1)
    assert more_often_right(30, 15)
    assert not more_often_right(15, 30)


def test_labels_decide_whether_the_rounds_are_trusted() -> None:
    usual: dict[str, Any] = {"agreement": 0.5, "entropy": 1.0, "confidence": 0.5, "chance": 0.4}
    assert not Confirmation(**usual, kappa=0.1).trusted
    assert Confirmation(**usual, kappa=0.1, labelled=10, won=6, lost=0).trusted
    assert not Confirmation(**usual, kappa=0.1, labelled=10, won=2, lost=2).trusted
    # People are asked where the rounds are unsure: their being wrong there is no evidence.
    assert Confirmation(**usual, kappa=0.6, labelled=10, won=0, lost=6).trusted


def test_the_trial_counts_the_labels_that_tell_the_rounds_from_zero_shot() -> None:
    features, _, head = planted(900, noise=0.3)

    def tried(labels: np.ndarray) -> Confirmation:
        given = few(labels, features)
        options: dict[str, Any] = {"zero_shot": head, "temperature": TEMPERATURE, "labels": given}
        return Sample(features, config=SelfTrainingConfig(), **options).confirm(PRIORS["weak"])

    zero_shot = (torch.tensor(features).float() @ head.T).argmax(dim=1).numpy()
    labels = np.full(900, UNKNOWN)
    labels[:40] = zero_shot[:40]
    found = tried(labels)
    assert (found.labelled, found.won) == (40, 0)
    # Labels that disagree with what the rounds found, and agree with zero-shot.
    rounds_say = trained(features, head, present="all", prior="weak").probe.predict(features)
    rows = np.flatnonzero(rounds_say != zero_shot)[:12]
    assert len(rows) == 12
    labels[:] = UNKNOWN
    labels[rows] = zero_shot[rows]
    found = tried(labels)
    assert found.lost > found.won
    labels[rows] = rounds_say[rows]
    assert tried(labels).won > 8


def test_a_class_that_a_label_names_is_present() -> None:
    features, classes, _ = planted(50)
    labels = some(classes, each=1)
    assert with_labelled(np.array([1, 2]), None).tolist() == [1, 2]
    assert with_labelled(np.array([1, 2]), few(np.where(labels == 4, 4, UNKNOWN), features)).tolist() == [
        1,
        2,
        4,
    ]
    assert with_labelled(np.array([1]), few(np.full(50, NONE_OF_THESE), features)).tolist() == [1]


def untrusted() -> ChosenPrior:
    found = Confirmation(agreement=0.3, kappa=0.0, entropy=1.0, confidence=0.5, chance=0.4)
    return ChosenPrior(name="weak", prior=PRIORS["weak"], tried={"weak": found}, present=None, why="")


@pytest.mark.parametrize("what", ["classes", "none of these", "nothing"])
def test_where_the_rounds_are_not_trusted_labels_correct_zero_shot(what: str) -> None:
    features, classes, head = planted(misled=True)
    labels = some(classes, each=4)
    others = labels == UNKNOWN
    if what == "none of these":
        labels[~others] = NONE_OF_THESE
    given = None if what == "nothing" else few(labels, features)
    zero_shot = zero_shot_probe(head, temperature=TEMPERATURE, class_names=NAMES)
    teacher = head / TEMPERATURE
    state = rounds(features, head, None)[-1][0]
    probe = finish_probe(
        state,
        zero_shot=zero_shot,
        teacher=teacher,
        features=features,
        config=SelfTrainingConfig(),
        chosen=untrusted(),
        labels=given,
    )
    before = (zero_shot.predict(features[others]) == classes[others]).mean()
    after = (probe.predict(features[others]) == classes[others]).mean()
    assert probe.summary["method"] == "zero-shot (fallback)"
    if what == "classes":
        assert before < 0.7 < 0.9 < after
    else:
        assert after == before
        sure, other = (one.probabilities(features).max(dim=1).values.mean() for one in (zero_shot, probe))
        assert float(other) == pytest.approx(float(sure), abs=0.01)


def test_a_fallback_keeps_the_given_labels_of_its_images() -> None:
    features, classes, head = planted(200)
    labels = some(classes, each=2)
    rows = np.flatnonzero(labels >= 0)
    labels[rows[0]], labels[rows[1]] = NONE_OF_THESE, (classes[rows[1]] + 1) % NUM_CLASSES
    probe = zero_shot_probe(head, temperature=TEMPERATURE, class_names=NAMES)
    found, confidence, kept = zero_shot_labels(probe, features, labels=few(labels, features))
    assert (found[rows[1:]] == labels[rows[1:]]).all()
    assert (confidence[rows[1:]] == 1).all()
    assert np.flatnonzero(~kept).tolist() == [rows[0]]


def asked(count: int, *, wrong: float = 0.0) -> tuple[torch.Tensor, FewLabels, np.ndarray]:
    """Logits four times as large as those that the labels were drawn from, the labels, and features of unit norm."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(count, DIM))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    logits = torch.from_numpy(rng.normal(size=(count, NUM_CLASSES)) * 1.5)
    drawn = (logits + torch.from_numpy(rng.gumbel(size=logits.shape))).argmax(dim=1)
    is_wrong = torch.from_numpy(rng.random(count) < wrong)
    drawn[is_wrong] = torch.from_numpy(rng.integers(NUM_CLASSES, size=int(is_wrong.sum())))
    labels = few(drawn.numpy(), features)
    return 4 * logits.float(), labels, features


def test_the_guess_of_the_temperature_gives_way_to_labels_as_they_become_more() -> None:
    found = [
        labelled_factor(logits, labels, features=rows) for logits, labels, rows in map(asked, (30, 200, 3000))
    ]
    assert 1 < found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(4, rel=0.2)
    logits, labels, rows = asked(3000, wrong=0.05)
    assert labelled_factor(logits, labels, features=rows) == pytest.approx(4, rel=0.1), (
        "a share is taken for wrong"
    )
    logits, labels, rows = asked(30)
    none = labels.take(torch.zeros(30, dtype=torch.bool))
    assert labelled_factor(logits[:0], none, features=rows) == 1


def test_a_label_counts_for_the_images_that_are_nearest_to_its_own() -> None:
    """Two labels say that the guess is too sure, one that it is too unsure; most images are like the one."""
    features = np.eye(3, DIM, dtype=np.float32)
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [1.3, 0.0]])
    labels = FewLabels(
        places=torch.arange(3), features=torch.from_numpy(features), classes=torch.tensor([1, 1, 0])
    )

    def factor(counts: list[int]) -> float:
        return labelled_factor(logits, labels, features=np.repeat(features, counts, axis=0))

    assert factor([5, 5, 5]) > 1
    assert factor([1, 1, 300]) < 1
    # One that stands for nearly all is one label, which the guess outweighs.
    assert -np.log2(factor([1, 1, 300])) < OCTAVES


def test_rounds_that_are_asked_for_labels_correct_zero_shots_confidence() -> None:
    """Zero-shot is right about 82% of the images, and so is the guess about the rounds if zero-shot's confidence is."""
    features, classes, head = planted(900, noise=0.3)

    def factor(
        temperature: float, labels: np.ndarray, present: np.ndarray | None = None
    ) -> tuple[float, float]:
        sample = Sample(features, zero_shot=head, temperature=temperature, config=CONFIG)
        given = few(labels, features)
        found = sample.factor_of_labels(PRIORS["weak"], labels=given, present=present)
        return sample.confirm(PRIORS["weak"]).confidence, found

    labels = np.full(900, UNKNOWN)
    labels[:60] = classes[:60]
    (too_sure, more), (unsure, less) = factor(0.02, labels), factor(0.3, labels)
    assert too_sure > 0.95 > 0.5 > unsure
    assert more > 1.1 > 0.6 > less
    # A list of all names is the same as none, and images of no class say nothing of the confidence.
    assert factor(0.3, labels, np.arange(NUM_CLASSES))[1] == less
    labels[60:63] = NONE_OF_THESE
    assert factor(0.3, labels)[1] == pytest.approx(less, rel=0.1)


def test_held_out_logits_know_nothing_of_their_own_label() -> None:
    features, classes, head = planted(600)
    blank = Linear(weight=torch.zeros_like(head), bias=torch.zeros(len(head)))
    labels = some(classes, each=4)
    row = int(np.flatnonzero(labels >= 0)[0])
    changed = labels.copy()
    changed[row] = (labels[row] + 1) % NUM_CLASSES
    before, after = (
        Correction(few(given, features), mean=mean_feature(features)).held_out(blank)
        for given in (labels, changed)
    )
    torch.testing.assert_close(before[0], after[0])
    assert (before[1:20] - after[1:20]).abs().max() > 1e-3


WRONG_LABELS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "too few": (lambda labels: labels[:-1], "labels must be 60 integers, one for each row of the features"),
    "a matrix": (lambda labels: labels[:, None], "labels must be 60 integers"),
    "fractions": (lambda labels: labels + 0.5, "labels must be 60 integers"),
    "names": (lambda labels: labels.astype(str), "labels must be 60 integers"),
    "too large": (lambda labels: labels + NUM_CLASSES, "labels must be class indices below 5, -1"),
    "too small": (lambda labels: labels - 2, "or -2 .none of the classes., not -3 to 2"),
    "left out": (lambda labels: labels, "labels name a class that config.present leaves out"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_labels_that_do_not_fit_are_refused_with_a_sentence(name: str) -> None:
    features, classes, head = planted(60)
    change, sentence = WRONG_LABELS[name]
    options = {"present": "a,b"} if name == "left out" else {}
    with pytest.raises(UserError, match=sentence):
        trained(features, head, change(some(classes, each=2)), **options)


def test_labels_meet_names_that_are_known_to_be_present() -> None:
    features, classes, head = planted(900)
    rows = np.isin(classes, (1, 3))
    labels = some(classes, each=3)
    labels[~np.isin(labels, (1, 3))] = UNKNOWN
    found = trained(features[rows], head, labels[rows], present="b,d")
    assert set(found.labels) <= {1, 3}
    given = labels[rows] >= 0
    assert (found.labels[given] == labels[rows][given]).all()
    assert accuracy(found, features[rows], classes[rows]) > 0.95
