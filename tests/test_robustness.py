"""Rows of robustness numbers against cases worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lpclip.evaluation.evidence import Judgement, Judgements, Scores
from lpclip.evaluation.judge import Labelled, accuracy_among, foreign_scores, judge
from lpclip.evaluation.results import ZERO_SHOT, Cell, Result, worse_than_zero_shot
from lpclip.evaluation.shift import ALEXNET_ERROR, effective_robustness
from lpclip.evaluation.tabulate import (
    MEAN_METRICS,
    corruption_results,
    labelled_results,
    ood_results,
    shift_results,
)
from lpclip.method.probe import Probe

CLEAN = Cell(set="photos", kind="clean")


def judgement(correct: str, **metrics: float) -> Judgement:
    """Images that are classified right (1) or wrong (0); a calibration error of a hundredth of the accuracy."""
    right = np.array([digit == "1" for digit in correct])
    accuracy = float(right.mean())
    return Judgement(
        predicted=np.where(right, 0, 1),
        confidence=np.full(len(right), 0.5, np.float32),
        correct=right,
        metrics={**dict.fromkeys(MEAN_METRICS, accuracy / 100), "accuracy": accuracy, **metrics},
        intervals={"accuracy": (0.0, 1.0)},
    )


def judgements(zero_shot: str, probe: str) -> Judgements:
    return {ZERO_SHOT: judgement(zero_shot), "mine": judgement(probe)}


def cell(corruption: str, severity: int, **names: Any) -> Cell:
    return Cell(
        **{"set": "photos", "kind": "corrupted", "corruption": corruption, "severity": severity, **names}
    )


def values(rows: list[Result], metric: str) -> dict[tuple[Any, ...], float | None]:
    """Values of a metric by corruption, severity and probe; each of them is there once."""
    chosen = [row for row in rows if row.metric == metric]
    found = {(row.corruption, row.severity, row.probe): row.value for row in chosen}
    assert len(found) == len(chosen)
    return found


def interval(
    rows: list[Result], metric: str, corruption: str | None, severity: int | None
) -> tuple[float, float] | None:
    (row,) = [
        row
        for row in rows
        if (row.metric, row.probe, row.corruption, row.severity) == (metric, "mine", corruption, severity)
    ]
    return row.interval


# Zero-shot and the probe on four images under two corruptions.
CELLS = {
    cell("fog", 1): judgements("1100", "1111"),
    cell("fog", 5): judgements("1000", "1100"),
    cell("snow", 1): judgements("0011", "1011"),
    cell("snow", 5): judgements("0000", "0001"),
}


def test_means_over_corruptions_are_taken_at_each_severity_and_over_all() -> None:
    rows = corruption_results(None, CELLS, alexnet=False, seed=0)
    accuracy = values(rows, "accuracy")
    assert accuracy == pytest.approx(
        {
            ("mean", 1, ZERO_SHOT): 0.5,
            ("mean", 1, "mine"): 0.875,
            ("mean", 5, ZERO_SHOT): 0.125,
            ("mean", 5, "mine"): 0.375,
            ("mean", None, ZERO_SHOT): 0.3125,
            ("mean", None, "mine"): 0.625,
        }
    )
    for metric in set(MEAN_METRICS) - {"accuracy"}:
        assert values(rows, metric) == pytest.approx({key: v / 100 for key, v in accuracy.items()})
    assert {(row.set, row.kind) for row in rows} == {("photos", "corrupted")}
    for row in rows:
        assert (row.interval is not None) == (row.metric in ("accuracy", "accuracy_gain"))


def test_gains_of_means_are_paired_by_image() -> None:
    rows = corruption_results(None, CELLS, alexnet=False, seed=0)
    gains = values(rows, "accuracy_gain")
    assert gains == pytest.approx(
        {("mean", 1, "mine"): 0.375, ("mean", 5, "mine"): 0.25, ("mean", None, "mine"): 0.3125}
    )
    for severity in (1, 5, None):
        low, high = interval(rows, "accuracy_gain", "mean", severity)
        assert 0 <= low < gains["mean", severity, "mine"] < high <= 1
    # Every image is gained under one of two corruptions: whichever images are drawn, the mean is a half.
    even = {cell("fog", 1): judgements("0000", "1100"), cell("snow", 1): judgements("0000", "0011")}
    rows = corruption_results(None, even, alexnet=False, seed=0)
    assert interval(rows, "accuracy_gain", "mean", 1) == (0.5, 0.5)
    assert interval(rows, "accuracy", "mean", None) == (0.5, 0.5)
    # Classifiers that are right on the same images do not differ, however uncertain their accuracy is.
    same = {cell("fog", 1): judgements("0110", "0110")}
    rows = corruption_results(None, same, alexnet=False, seed=0)
    assert interval(rows, "accuracy_gain", "mean", 1) == (0, 0)
    low, high = interval(rows, "accuracy", "mean", 1)
    assert low < 0.5 < high


def test_corruptions_of_different_numbers_of_images_count_alike() -> None:
    cells = {cell("fog", 1): judgements("10", "11"), cell("snow", 1): judgements("1000", "1100")}
    rows = corruption_results(None, cells, alexnet=False, seed=0, same_images=False)
    assert values(rows, "accuracy")["mean", None, "mine"] == pytest.approx(0.75)
    assert values(rows, "accuracy_gain")["mean", None, "mine"] == pytest.approx(0.375)


def test_retained_accuracy_is_the_share_of_the_clean_one() -> None:
    rows = corruption_results(judgements("1110", "1111"), CELLS, alexnet=False, seed=0)
    assert values(rows, "retained_accuracy") == pytest.approx(
        {
            ("mean", 1, ZERO_SHOT): 0.5 / 0.75,
            ("mean", 1, "mine"): 0.875,
            ("mean", 5, ZERO_SHOT): 0.125 / 0.75,
            ("mean", 5, "mine"): 0.375,
            ("mean", None, ZERO_SHOT): 0.3125 / 0.75,
            ("mean", None, "mine"): 0.625,
        }
    )
    without = corruption_results(judgements("0000", "1111"), CELLS, alexnet=False, seed=0)
    assert {row.probe for row in without if row.metric == "retained_accuracy"} == {"mine"}
    # Published images are other images than the clean ones: there is nothing to retain.
    published = {cell("fog", 1, kind="published corruption"): judgements("1100", "1111")}
    rows = corruption_results(judgements("1110", "1111"), published, alexnet=False, seed=0)
    assert not values(rows, "retained_accuracy")


def test_the_corruption_error_is_relative_to_zero_shots() -> None:
    rows = corruption_results(None, CELLS, alexnet=False, seed=0)
    assert values(rows, "corruption_error") == pytest.approx(
        {
            ("fog", None, "mine"): 0.5 / 1.25,
            ("snow", None, "mine"): 1 / 1.5,
            ("mean", None, "mine"): (0.4 + 2 / 3) / 2,
        }
    )
    cells = {cell("fog", 1): judgements("1111", "1110"), cell("snow", 1): judgements("1100", "1110")}
    rows = corruption_results(None, cells, alexnet=False, seed=0)
    assert values(rows, "corruption_error") == {
        ("fog", None, "mine"): None,  # zero-shot makes no error to compare with
        ("snow", None, "mine"): 0.5,
        ("mean", None, "mine"): 0.5,
    }
    only_known = {cell("fog", 1): judgements("1111", "1110")}
    rows = corruption_results(None, only_known, alexnet=False, seed=0)
    assert values(rows, "corruption_error")["mean", None, "mine"] is None


def test_alexnets_errors_are_a_reference_for_all_five_severities_alone() -> None:
    five = {cell("fog", severity): judgements("1100", "1110") for severity in range(1, 6)}
    metric = "corruption_error_alexnet"
    rows = corruption_results(None, five, alexnet=True, seed=0)
    expected = {ZERO_SHOT: 0.5 / ALEXNET_ERROR["fog"], "mine": 0.25 / ALEXNET_ERROR["fog"]}
    assert values(rows, metric) == pytest.approx(
        {(corruption, None, name): v for corruption in ("fog", "mean") for name, v in expected.items()}
    )
    assert not values(corruption_results(None, five, alexnet=False, seed=0), metric)
    four = {key: found for key, found in five.items() if key.severity != 3}
    assert not values(corruption_results(None, four, alexnet=True, seed=0), metric)
    extra = {cell("saturate", severity): judgements("1100", "0000") for severity in range(1, 6)}
    more = values(corruption_results(None, five | extra, alexnet=True, seed=0), metric)
    assert more == values(rows, metric), "AlexNet's error is known for ImageNet-C's 15 corruptions"


def test_the_mean_is_called_mce_where_all_of_imagenet_cs_corruptions_are_there() -> None:
    all_15 = {
        cell(name, severity): judgements("1100", "1110") for name in ALEXNET_ERROR for severity in range(1, 6)
    }
    expected = np.mean([0.25 / error for error in ALEXNET_ERROR.values()])
    rows = corruption_results(None, all_15, alexnet=True, seed=0)
    assert values(rows, "mce")["mean", None, "mine"] == pytest.approx(expected)
    assert len(values(rows, "corruption_error_alexnet")) == 2 * 15, "for both classifiers, without a mean"
    del all_15[cell("fog", 4)]
    rows = corruption_results(None, all_15, alexnet=True, seed=0)
    assert not values(rows, "mce")
    assert len(values(rows, "corruption_error_alexnet")) == 2 * (14 + 1)


def unit(*rows: tuple[float, ...]) -> np.ndarray:
    features = np.array(rows, np.float32)
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)


def labelled(labels: list[int], *rows: tuple[float, ...]) -> Labelled:
    return Labelled(features=unit(*rows), labels=np.array(labels))


def identity_probe(*weights: float) -> Probe:
    """A probe whose logits are the features, each times its class' weight."""
    return Probe(
        weight=torch.diag(torch.tensor(weights, dtype=torch.float32)), bias=torch.zeros(len(weights))
    )


def test_a_cell_has_every_metric_of_every_probe_and_gains_of_all_but_zero_shot() -> None:
    features = unit((3, 1, 0), (1, 3, 0), (0, 3, 1), (3, 0, 1))
    probes = {ZERO_SHOT: identity_probe(1, 1, 1), "mine": identity_probe(1, 0.1, 1)}
    found = judge(probes, Labelled(features=features, labels=np.array([0, 1, 1, 2])), seed=0)
    assert found[ZERO_SHOT].correct.tolist() == [True, True, True, False]
    assert found["mine"].predicted.tolist() == [0, 0, 2, 0]
    best = torch.softmax(torch.from_numpy(features.astype(np.float32)), dim=1).amax(dim=1)
    assert found[ZERO_SHOT].confidence == pytest.approx(best.numpy(), abs=1e-6)

    rows = labelled_results(CLEAN, found, seed=0)
    assert values(rows, "accuracy") == {(None, None, ZERO_SHOT): 0.75, (None, None, "mine"): 0.25}
    assert values(rows, "accuracy_gain") == {(None, None, "mine"): -0.5}
    assert values(rows, "top5_accuracy")[None, None, "mine"] is None
    low, high = interval(rows, "accuracy_gain", None, None)
    assert -1 <= low < -0.5 < high <= 0
    for name in probes:
        mine = {row.metric for row in rows if row.probe == name}
        assert mine - {"accuracy_gain"} == set(found[name].metrics)
    assert all(
        (row.set, row.kind, row.corruption, row.severity) == ("photos", "clean", None, None) for row in rows
    )


def test_shift_is_measured_among_the_classes_that_occur() -> None:
    probe = identity_probe(1, 1, 5)
    # Class 2 is not in the shifted set, and the probe calls everything class 2 when it may.
    clean = labelled([0, 1, 1, 2], (3, 1, 2), (1, 3, 2), (3, 1, 2), (0, 0, 3))
    shifted = labelled([0, 0, 1, 1], (3, 1, 2), (1, 3, 2), (1, 3, 2), (3, 1, 2))
    assert accuracy_among(probe, clean, classes=np.arange(3)) == 0.25
    assert accuracy_among(probe, clean, classes=np.array([0, 1])) == pytest.approx(2 / 3)
    elsewhere = Cell(set="cards", kind="shift")
    rows = shift_results(elsewhere, {"mine": probe}, clean=clean, shifted=shifted)
    assert {row.metric: row.value for row in rows} == pytest.approx(
        {"clean_accuracy_of_classes": 2 / 3, "accuracy_of_classes": 0.5, "retained_accuracy": 0.75}
    )

    # A class that occurs in the shifted set alone has no clean accuracy.
    rows = shift_results(elsewhere, {"mine": probe}, clean=shifted, shifted=clean)
    assert {row.metric: row.value for row in rows} == pytest.approx(
        {"clean_accuracy_of_classes": 0.5, "accuracy_of_classes": 2 / 3, "retained_accuracy": 4 / 3}
    )


@pytest.mark.parametrize(("name", "num_classes"), [("imagenet-v2", 1000), ("imagenet-r", 200)])
def test_effective_robustness_is_measured_among_all_classes_of_its_fit(name: str, num_classes: int) -> None:
    right = np.arange(num_classes)
    features = np.eye(num_classes, dtype=np.float16)
    probe, known = identity_probe(*[1] * num_classes), Cell(set=name, kind="shift")

    def beyond(clean: np.ndarray, shifted: np.ndarray) -> list[float | None]:
        images = [
            Labelled(features=np.concatenate([features[labels], features[:1]]), labels=np.append(labels, 1))
            for labels in (clean, shifted)
        ]
        rows = shift_results(known, {"mine": probe}, clean=images[0], shifted=images[1])
        return [row.value for row in rows if row.metric == "effective_robustness"]

    accuracy = num_classes / (num_classes + 1)
    expected = effective_robustness(accuracy, accuracy=accuracy, fit=name)
    assert beyond(right, right) == pytest.approx([expected])
    assert beyond(right[:-1], right) == []
    assert beyond(right, right[2:]) == []


def test_shift_without_clean_accuracy_or_common_classes_retains_nothing() -> None:
    probes, shifted = {"mine": identity_probe(1, 1)}, labelled([0], (3, 1))
    elsewhere = Cell(set="cards", kind="shift")
    wrong = labelled([0, 1], (1, 3), (3, 1))
    # Among one class alone everything is right, so two are there.
    both = labelled([0, 1], (3, 1), (3, 1))
    rows = shift_results(elsewhere, probes, clean=wrong, shifted=both)
    assert {row.metric: row.value for row in rows} == {
        "clean_accuracy_of_classes": 0.0,
        "accuracy_of_classes": 0.5,
        "retained_accuracy": None,
    }
    assert shift_results(elsewhere, probes, clean=labelled([1], (1, 3)), shifted=shifted) == []


def test_foreign_images_are_told_by_every_score() -> None:
    probe = identity_probe(20, 20, 20)
    mine = foreign_scores(
        probe,
        inside=unit((9, 1, 1), (1, 9, 1), (1, 1, 9)),
        outside=unit((1, 1, 1), (1, 1.1, 1)),
        cosine_temperature=0.05,
    )
    turned = {score: Scores(inside=found.outside, outside=found.inside) for score, found in mine.items()}
    strange = Cell(set="noise", kind="ood")
    rows = ood_results(strange, {"mine": mine, "turned": turned}, seed=0)
    for score in ("msp", "max_logit", "energy", "mcm"):
        assert values(rows, f"auroc_{score}") == {(None, None, "mine"): 1.0, (None, None, "turned"): 0.0}
        assert interval(rows, f"auroc_{score}", None, None) == (1, 1)
        assert values(rows, f"fpr95_in_{score}") == {(None, None, "mine"): 0.0, (None, None, "turned"): 1.0}
    assert {row.interval is None for row in rows if not row.metric.startswith("auroc")} == {True}
    # At temperature 1 the softmax of cosines is flat: (9, 1, 1) has cosines of 0.988 and 0.110.
    cosines = np.array([9, 1, 1]) / np.sqrt(83)
    assert mine["mcm"].inside[0] == pytest.approx(np.exp(cosines[0]) / np.exp(cosines).sum(), abs=1e-3)


def test_a_result_is_written_to_json_with_its_keys_in_order() -> None:
    found = cell("fog", 3).result("mine", "accuracy_gain", -0.25, np.array([-0.5, -0.125]))
    assert list(found.to_json().items()) == [
        ("set", "photos"),
        ("kind", "corrupted"),
        ("corruption", "fog"),
        ("severity", 3),
        ("probe", "mine"),
        ("metric", "accuracy_gain"),
        ("value", -0.25),
        ("interval", [-0.5, -0.125]),
    ]
    assert found.place == "photos fog 3"
    assert CLEAN.result("mine", "top5_accuracy", None).to_json()["interval"] is None
    assert CLEAN.result("mine", "top5_accuracy", None).place == "photos"


def test_a_loss_is_a_gain_whose_whole_interval_lies_below_zero() -> None:
    def gain(low: float, high: float, *, corruption: str | None = "fog") -> Result:
        images = Cell(set="photos", kind="corrupted", corruption=corruption, severity=1)
        return images.result("mine", "accuracy_gain", (low + high) / 2, (low, high))

    lost = [gain(-0.3, -0.1), gain(-0.3, -0.1, corruption=None)]
    other = [gain(-0.3, 0.0), gain(0.1, 0.2), gain(-0.3, -0.1, corruption="mean")]
    other.append(CLEAN.result("mine", "accuracy", -0.2, (-0.3, -0.1)))
    assert worse_than_zero_shot([*other, *lost]) == lost
