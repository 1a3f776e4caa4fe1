"""Evaluation on labelled features, the temperature without labels, and the supervised ceiling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lpclip.evaluation.judge import Labelled, evaluate, judge, judgement_curves, probe_curves
from lpclip.evaluation.metrics import answers, classification_metrics
from lpclip.method.calibration import (
    expected_accuracy,
    label_free_temperature,
    mean_confidence,
    temperature_at,
)
from lpclip.method.held_out import held_out_logits
from lpclip.method.probe import Probe
from lpclip.method.supervised import supervised_probe

DIM = 8


def blobs(num_rows: int, *, classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.choice(classes, size=num_rows)
    features = np.eye(DIM)[labels] + 0.25 * rng.normal(size=(num_rows, DIM))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16), labels.astype(
        np.int64
    )


def probe_of(num_classes: int, *, sharpness: float = 5.0) -> Probe:
    return Probe(
        weight=sharpness * torch.eye(num_classes, DIM),
        bias=torch.zeros(num_classes),
        class_names=tuple("abcdefgh"[:num_classes]),
        encoder={"model": "lite"},
    )


def test_evaluation_is_the_metrics_of_the_probe_s_probabilities():
    features, labels = blobs(300, classes=(0, 1, 2))
    labels[::4] = -1
    probe = probe_of(3)
    found = evaluate(probe, features, labels)
    assert found == classification_metrics(answers(probe.probabilities(features), torch.from_numpy(labels)))
    assert found["accuracy"] > 0.9
    assert evaluate(probe, features, np.full(300, -1))["accuracy"] is None


def test_temperature_changes_calibration_and_no_accuracy():
    features, labels = blobs(300, classes=(0, 1, 2))
    warm, cold = (evaluate(replace(probe_of(3), temperature=t), features, labels) for t in (5.0, 0.2))
    assert warm["accuracy"] == cold["accuracy"]
    assert warm["ece"] != cold["ece"]


def test_curves_count_every_labelled_row_once():
    features, labels = blobs(300, classes=(0, 1, 2))
    labels[:50] = -1
    found = probe_curves(probe_of(3), features, labels)
    assert found.confusion.sum() == 250
    assert found.reliability.count.sum() == 250
    assert len(found.coverage) == len(found.risk) == 250


def test_curves_hold_the_metrics_and_are_the_same_from_a_probe_and_from_its_judgement():
    features, labels = blobs(300, classes=(0, 1, 2))
    features = np.concatenate([features, features[:40]])
    labels = np.concatenate([labels, (labels[:40] + 1) % 3])  # some answers are wrong
    probe = probe_of(4)
    judgement = judge({"mine": probe}, Labelled(features=features, labels=labels), seed=0)["mine"]
    found = judgement_curves(judgement, labels, num_classes=4)
    assert found.confusion.trace() / 340 == pytest.approx(judgement.metrics["accuracy"])
    assert found.risk.mean() == pytest.approx(judgement.metrics["aurc"])
    assert found.recall[:3] == pytest.approx(found.confusion.diagonal()[:3] / found.confusion.sum(axis=1)[:3])
    assert np.isnan(found.recall[3])
    assert found.recall[:3].mean() == pytest.approx(judgement.metrics["mean_recall"])
    again = probe_curves(probe, features, labels)
    for name in ("coverage", "risk", "recall", "confusion"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    for name in ("confidence", "accuracy", "count"):
        np.testing.assert_array_equal(getattr(again.reliability, name), getattr(found.reliability, name))


@pytest.mark.parametrize("sharpness", [0.5, 5.0, 500.0])
def test_the_temperature_without_labels_gives_the_expected_accuracy_as_confidence(sharpness: float):
    features, _ = blobs(500, classes=(0, 1, 2))
    zero_shot, probe = probe_of(3, sharpness=2.0), probe_of(3, sharpness=sharpness)
    evidence = held_out_logits(probe, head=zero_shot.weight, features=features).evidence
    assert 0.9 < evidence < 1
    target = expected_accuracy(mean_confidence(zero_shot, features), evidence=evidence)
    temperature = label_free_temperature(
        probe, zero_shot=zero_shot, features=features, trained=probe, head=zero_shot.weight
    )
    # So many images and so few dimensions: a student is hardly surer of those that it was fitted to.
    assert mean_confidence(replace(probe, temperature=temperature), features) == pytest.approx(
        target, abs=0.02
    )


def test_a_student_s_confidence_in_what_it_was_fitted_to_is_not_taken_for_its_confidence_in_others():
    noise = np.random.default_rng(0).normal(size=(150, 100)).astype(np.float32) / 10
    zero_shot = probe_of(3, sharpness=2.0)
    zero_shot = replace(zero_shot, weight=F.pad(zero_shot.weight, (0, 100 - DIM)))
    found = held_out_logits(zero_shot, head=zero_shot.weight, features=noise)
    fitted, held_out, evidence = found.fitted, found.held_out, found.evidence
    labels = zero_shot.predict(noise)
    assert (fitted.argmax(dim=1).numpy() == labels).mean() > (
        held_out.argmax(dim=1).numpy() == labels
    ).mean() + 0.1
    own = temperature_at(
        zero_shot.logits(noise),
        confidence=expected_accuracy(mean_confidence(zero_shot, noise), evidence=evidence),
    )
    found = label_free_temperature(
        zero_shot, zero_shot=zero_shot, features=noise, trained=zero_shot, head=zero_shot.weight
    )
    assert found < 0.95 * own


@pytest.mark.parametrize("num_rows", [1, 9, 10])
def test_hardly_any_image_to_hold_out_gives_a_finite_temperature(num_rows: int):
    features, _ = blobs(num_rows, classes=(0, 1, 2))
    probe = probe_of(3)
    found = label_free_temperature(
        probe, zero_shot=probe, features=features, trained=probe, head=probe.weight
    )
    assert 0 < found < 1e3


def test_held_out_logits_know_nothing_of_the_rows_of_their_fold():
    features, _ = blobs(60, classes=(0, 1, 2))
    probe = probe_of(3, sharpness=2.0)
    moved = features.copy()
    moved[0] = -moved[0]
    before, after = (
        held_out_logits(probe, head=probe.weight, features=rows).held_out for rows in (features, moved)
    )
    own, others = torch.arange(5, 60, 5), torch.arange(1, 60, 5)
    # The scale is that of the mean confidence of all rows.
    torch.testing.assert_close(F.normalize(before[own]), F.normalize(after[own]), atol=1e-2, rtol=1e-2)
    assert (F.normalize(before[others]) - F.normalize(after[others])).abs().max() > 1e-2


def test_the_expected_accuracy_multiplies_the_odds_and_is_no_less_than_zero_shot_s():
    assert expected_accuracy(0.75) == pytest.approx(0.9)
    assert expected_accuracy(0.5) == 0.5
    assert expected_accuracy(0.75, evidence=0.0) == 0.75
    assert expected_accuracy(0.75, evidence=0.5) == pytest.approx(0.825)
    assert expected_accuracy(0.2) == pytest.approx(0.2)
    assert 0 < expected_accuracy(0.0) < expected_accuracy(1.0) < 1


def test_a_probe_without_an_opinion_gets_a_finite_temperature():
    features, _ = blobs(50, classes=(0, 1))
    flat = Probe(weight=torch.zeros(3, DIM), bias=torch.zeros(3))
    sure = probe_of(3)
    found = label_free_temperature(flat, zero_shot=sure, features=features, trained=flat, head=sure.weight)
    assert 0 < found < 1e3


@pytest.mark.parametrize(
    ("classes", "num_classes"),
    [((0, 1, 2), 3), ((0, 1), 2), ((1, 3), 4), ((0, 2, 5), 7)],
    ids=["all classes", "two classes", "two of four", "three of seven"],
)
def test_the_supervised_probe_knows_the_classes_that_occur_and_predicts_no_other(
    classes: tuple[int, ...], num_classes: int
):
    features, labels = blobs(400, classes=classes)
    labels[::7] = -1
    like = probe_of(num_classes)
    probe = supervised_probe(features, labels, like=like)
    assert evaluate(probe, features, labels)["accuracy"] > 0.95
    assert set(probe.logits(features).argmax(dim=1).tolist()) == set(classes)
    assert probe.probabilities(features)[:, [k for k in range(num_classes) if k not in classes]].sum() == 0
    assert (probe.class_names, probe.encoder) == (like.class_names, like.encoder)
    assert probe.weight.shape == like.weight.shape
    assert 0.9 < probe.summary["held_out_accuracy"] <= 1


def test_two_classes_have_the_probabilities_of_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    features, labels = blobs(200, classes=(0, 1))
    probe = supervised_probe(features, labels, like=probe_of(2))
    model = LogisticRegression(C=probe.summary["C"], max_iter=200, tol=1e-3)
    expected = model.fit(features.astype(np.float32), labels).predict_proba(features.astype(np.float32))
    np.testing.assert_allclose(probe.probabilities(features), expected, atol=1e-4)


@pytest.mark.parametrize(
    "labels",
    [[0, 1] * 4, [0] * 20, [-1] * 20, [0, 1] * 4 + [-1] * 20, [1] + [0] * 19],
    ids=["eight rows", "one class", "no label", "eight labels", "a class gone with the held-out rows"],
)
def test_too_few_labels_for_a_ceiling_are_refused(labels: list[int]):
    features, _ = blobs(len(labels), classes=(0, 1))
    with pytest.raises(ValueError, match="--supervised needs"):
        supervised_probe(features, np.array(labels), like=probe_of(2))
