"""The benchmark's own arithmetic: cuts, temperatures, means and the scoring of choices."""

from __future__ import annotations

from dataclasses import replace

import methods
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baselines import METHODS
from methods import Data, Images, Row, Setting, Trial

from lpclip.evaluation.metrics import answers, classification_metrics
from lpclip.method.confirmation import Confirmation

pytestmark = pytest.mark.usefixtures("one_thread")


def balanced(num_rows: int, *, num_classes: int = 5) -> Images:
    """Rows in a shuffled order, each with its place as its only feature."""
    labels = np.random.default_rng(0).permutation(np.arange(num_rows) % num_classes)
    return Images(features=np.arange(num_rows, dtype=np.float32)[:, None], labels=labels)


def row(method: str, accuracy: float, **changes) -> Row:
    base = Row(data="d", setting="s", images=5000, method=method, kind="inductive", accuracy=accuracy)
    return replace(base, **{"ece": 0.1, "nll": 1.0, "seconds": 2.0, **changes})


def test_a_long_tail_falls_by_the_ratio_from_the_first_class_of_the_order_to_the_last():
    order = np.array([3, 0, 4, 1, 2])
    cut = methods.long_tailed(balanced(5000), ratio=100, order=order)
    counts = np.bincount(cut.labels)[order]
    assert counts.tolist() == [1000, 316, 100, 31, 10]
    assert (np.diff(cut.features[:, 0]) > 0).all(), "the row order stays"


def test_a_long_tail_keeps_to_its_limit_and_leaves_no_class_out():
    cut = methods.long_tailed(balanced(5000), ratio=10, order=np.arange(5), limit=300)
    assert 295 <= len(cut) <= 300
    tiny = methods.long_tailed(balanced(50), ratio=100, order=np.arange(5))
    assert np.bincount(tiny.labels).tolist() == [10, 3, 1, 1, 1]


def test_only_some_classes_stay():
    cut = methods.only_classes(balanced(100), np.array([4, 1]))
    assert set(cut.labels) == {1, 4}
    assert len(cut) == 40


@pytest.mark.parametrize(
    ("num_rows", "num_foreign", "total"), [(5000, 900, 1000), (100, 900, 125), (5000, 50, 250)]
)
def test_a_fifth_is_foreign_whatever_is_scarce(num_rows: int, num_foreign: int, total: int):
    foreign = -np.ones((num_foreign, 1), np.float32)
    rng = np.random.default_rng(0)
    mixed = methods.with_foreign(balanced(num_rows), foreign, share=0.2, limit=1000, rng=rng)
    assert len(mixed) == total
    assert (mixed.labels == -1).sum() == total // 5
    assert ((mixed.features[:, 0] < 0) == (mixed.labels == -1)).all()
    assert (mixed.labels[: total // 2] == -1).any(), "shuffled"


def planted() -> Data:
    images = balanced(1000)
    return Data(
        name="d",
        head=torch.zeros(5, 1),
        single_head=torch.zeros(5, 1),
        temperature=1.0,
        train=images,
        test=images,
        foreign=images.features,
        corrupted={"blur:3": (images, images)},
    )


def test_settings_that_are_no_sample_come_once_and_a_seed_repeats_itself():
    first, again, second = (
        list(methods.settings(planted(), seed=seed, limit=300, limit_all=500)) for seed in (0, 0, 1)
    )
    sampled = ["long-tailed 1:10", "long-tailed 1:100", "3 classes", "20% foreign", "200 images"]
    assert [s.name for s in first] == ["all", *sampled, "corrupted blur:3"]
    assert [s.name for s in second] == sampled
    assert len(first[0].unlabelled) == 500
    assert all(len(s.unlabelled) <= 300 for s in first[1:])
    assert all(
        (a.unlabelled.features == b.unlabelled.features).all() for a, b in zip(first, again, strict=True)
    )
    assert not np.array_equal(first[-2].unlabelled.features, second[-1].unlabelled.features)


def test_test_images_are_cut_as_the_unlabelled_ones():
    of = {s.name: s for s in methods.settings(planted(), seed=0, limit=300, limit_all=500)}
    three = of["3 classes"]
    assert set(three.test.labels) == set(three.unlabelled.labels)
    assert len(set(three.test.labels)) == 3
    tail = of["long-tailed 1:10"]
    assert (
        np.bincount(tail.test.labels).argsort().tolist()
        == np.bincount(tail.unlabelled.labels).argsort().tolist()
    )
    assert tail.balanced is not None
    assert len(tail.balanced) == 1000
    assert of["20% foreign"].balanced is None


def test_a_temperature_gives_the_confidence_that_it_was_asked_for():
    logits = 5 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    found = methods.temperature_at(logits, confidence=0.7)
    assert torch.softmax(logits / found, dim=1).amax(dim=1).mean() == pytest.approx(0.7, abs=1e-4)


def test_the_best_temperature_is_the_one_that_the_labels_were_drawn_at():
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(20_000, 3, generator=generator)
    labels = torch.multinomial(torch.softmax(logits / 2.5, dim=1), 1, generator=generator)[:, 0]
    found = methods.best_temperature(logits, labels)
    assert found == pytest.approx(2.5, rel=0.05)
    nll = [
        classification_metrics(answers(torch.softmax(logits / t, dim=1), labels))["nll"]
        for t in (found, 2.0, 3.0)
    ]
    assert min(nll) == nll[0]


def test_a_choice_is_missed_where_only_the_other_candidate_keeps_up_with_zero_shot():
    def trial(uniform: float, weak: float, setting: str = "s") -> Trial:
        accuracy = {"uniform": uniform, "weak": weak}
        return Trial(setting=setting, zero_shot=0.8, accuracy=accuracy, choices={"rule": "uniform"})

    trials = [
        trial(0.9, 0.82),  # right
        trial(0.7, 0.85),  # missed and regretted
        trial(0.7, 0.6, "t"),  # below zero-shot, but so is the other
        trial(0.81, 0.83, "t"),  # regretted only
        trial(0.796, 0.8, "t"),  # within both tolerances
    ]
    (line,) = methods.guard_table(trials)
    assert (line["missed"], line["regret"], line["samples"]) == (1, 2, 5)
    assert line["worst gap %"] == pytest.approx(-0.1)
    # Settings weigh alike, however many samples they have.
    assert line["accuracy %"] == pytest.approx((0.8 + (0.7 + 0.81 + 0.796) / 3) / 2)


def test_rows_of_several_seeds_become_their_mean():
    rows = [row("a", 0.5, images=100), row("b", 0.1), row("a", 0.7, images=103, ece=None)]
    a, b = methods.over_seeds(rows)
    assert (a.method, a.accuracy, a.seeds, a.images, a.ece) == ("a", pytest.approx(0.6), 2, 102, None)
    assert b == row("b", 0.1)


def test_tables_have_a_column_a_method_and_end_with_means_and_the_worst_gap():
    rows = [
        row("zero-shot", 0.8),
        row("lpclip", 0.9),
        row("supervised", 0.95),
        row("zero-shot", 0.6, setting="few", images=200),
        row("lpclip", 0.58, setting="few", images=200),
    ]
    table = methods.accuracy_table(rows, summary=True)
    assert [line["data"] for line in table[2:]] == [
        "mean of all",
        "mean under 2,500 images",
        "worst gap to zero-shot",
    ]
    assert [line["lpclip %"] for line in table] == pytest.approx([0.9, 0.58, 0.74, 0.58, -0.02])
    assert table[2]["supervised %"] is None, "no mean of some settings"
    lines = {line["method"]: line for line in methods.method_table(rows)}
    assert (lines["lpclip"]["settings"], lines["lpclip"]["below zero-shot"]) == (2, 1)
    assert lines["lpclip"]["worst gap %"] == pytest.approx(-0.02)
    assert lines["supervised"]["accuracy %"] == pytest.approx(0.95)


def clusters() -> tuple[Data, Setting]:
    """Four planted classes in 24 dimensions, and a head that has them roughly right."""
    rng = np.random.default_rng(0)
    means, labels = rng.normal(size=(4, 24)) / 5, rng.integers(4, size=400)
    features = means[labels] + 0.1 * rng.normal(size=(400, 24))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    head = F.normalize(torch.tensor(means + rng.normal(size=means.shape) / 5).float(), dim=1)
    images = Images(features=features, labels=labels)
    train, test = images.take(slice(200)), images.take(slice(200, None))
    data = Data(
        name="d",
        head=head,
        single_head=head,
        temperature=0.05,
        train=train,
        test=test,
        foreign=None,
        corrupted={},
    )
    return data, Setting(name="all", seed=0, unlabelled=train, test=test, balanced=test)


def test_every_method_is_measured_on_a_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Confirmation, "trusted", True)
    rows, trial = methods.run(*clusters())
    found = {row.method: row for row in rows if row.kind == "inductive"}
    ours = ["lpclip uniform", "lpclip weak", "lpclip none", "lpclip --solver gradient", "lpclip"]
    assert list(found) == [*METHODS, "supervised", *ours]
    assert all(row.accuracy is not None and row.seconds is not None for row in found.values())
    chosen = trial.choices["views' agreement (lpclip)"]
    assert found["lpclip"].accuracy == found[f"lpclip {chosen}"].accuracy > found["zero-shot"].accuracy
    tried = [row for row in rows if row.kind == "temperature"]
    assert len(tried) == 8
    assert min(row.nll for row in tried[1:]) == tried[-1].nll, "the oracle's"
    assert [row.method for row in rows if row.kind == "balanced"] == ["zero-shot", "lpclip"]


def test_rounds_that_are_not_trusted_leave_zero_shot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Confirmation, "trusted", False)
    rows, _ = methods.run(*clusters(), baselines=())
    assert not {row.method for row in rows} & (METHODS.keys() - {"zero-shot"})
    of = {(row.method, row.kind): row for row in rows}
    for kind in ("inductive", "transductive"):
        assert of["lpclip", kind].accuracy == of["zero-shot", kind].accuracy
    for method in ("lpclip", "lpclip --solver gradient"):
        assert of[method, "inductive"].nll == of["zero-shot", "inductive"].nll
