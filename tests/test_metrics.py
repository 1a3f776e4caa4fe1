"""Metrics against cases worked by hand, and against scikit-learn's, TorchUncertainty's and plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch_uncertainty.metrics import classification as torch_uncertainty

from lpclip.evaluation.bootstrap import BLOCK_RESAMPLES, bootstrap_blocks, mean_interval
from lpclip.evaluation.metrics import (
    METRICS,
    NUM_BINS,
    answers,
    classification_metrics,
    confusion_matrix,
    metric_intervals,
    per_class_recall,
    reliability_bins,
    risk_coverage,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    (seed, *size) for seed, size in enumerate([(15, 2), (40, 3), (100, 5), (500, 6), (997, 10), (2000, 50)])
]


def metrics_of(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float | None]:
    return classification_metrics(answers(probabilities, labels))


def intervals_of(
    probabilities: torch.Tensor, labels: torch.Tensor, **options: Any
) -> dict[str, tuple[float, float]]:
    return metric_intervals(answers(probabilities, labels), **options)


def drawn_counts(num_rows: int, **options: Any) -> torch.Tensor:
    """The counts (B, N) of all resamples."""
    return torch.cat(list(bootstrap_blocks(num_rows, **options)))


def random_case(num_rows: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(2 * torch.randn(num_rows, 6, generator=generator), dim=1)
    return probabilities, torch.randint(6, (num_rows,), generator=generator)


def test_a_case_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]])
    found = metrics_of(probabilities, torch.tensor([0, 1, 1, 1]))
    assert found["accuracy"] == 0.75
    # Two bins of two rows each: |0.5 - 0.9| and |1 - 0.7|, averaged.
    assert found["ece"] == pytest.approx((0.4 + 0.3) / 2)
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + 2 * math.log(0.7)) / 4)


def test_sure_and_right_is_perfect_and_sure_and_wrong_is_the_worst():
    sure = torch.eye(3)
    right = metrics_of(sure, torch.tensor([0, 1, 2]))
    zeros = dict.fromkeys(("ece", "adaptive_ece", "nll", "brier", "aurc", "augrc"), 0.0)
    assert right == {"accuracy": 1.0, "top5_accuracy": None, "mean_recall": 1.0, **zeros}
    wrong = metrics_of(sure, torch.tensor([1, 2, 0]))
    assert (wrong["accuracy"], wrong["mean_recall"]) == (0.0, 0.0)
    assert (wrong["ece"], wrong["adaptive_ece"], wrong["brier"]) == (1.0, 1.0, 2.0)
    # Errors among k rows over k is 1 throughout, and over the three rows 1/3, 2/3 and 1.
    assert (wrong["aurc"], wrong["augrc"]) == (1.0, pytest.approx(2 / 3))
    assert wrong["nll"] == pytest.approx(-math.log(1e-12))


def test_labels_below_zero_are_left_out():
    probabilities, labels = random_case(100)
    hidden = torch.arange(100) % 3 == 0
    found = metrics_of(probabilities, labels.masked_fill(hidden, -1))
    assert found == metrics_of(probabilities[~hidden], labels[~hidden])


@pytest.mark.parametrize("num_rows", [0, 5])
def test_without_any_label_there_is_no_metric(num_rows: int):
    found = metrics_of(torch.full((num_rows, 4), 0.25), torch.full((num_rows,), -1))
    assert found == dict.fromkeys(METRICS)
    assert intervals_of(torch.full((num_rows, 4), 0.25), torch.full((num_rows,), -1)) == {}


def test_labels_drawn_from_the_probabilities_are_calibrated():
    probabilities, _ = random_case(20_000)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    found = metrics_of(probabilities, labels)
    assert found["ece"] < 0.02
    entropy = float(-(probabilities * probabilities.log()).sum(dim=1).mean())
    assert found["nll"] == pytest.approx(entropy, abs=0.02)


def test_the_order_of_classes_and_rows_does_not_matter():
    probabilities, labels = random_case()
    order, rows = torch.tensor([3, 5, 0, 1, 4, 2]), probabilities[:, 0].argsort()
    other = metrics_of(probabilities[rows][:, order], order.argsort()[labels[rows]])
    assert other == pytest.approx(metrics_of(probabilities, labels), abs=1e-5)


def test_the_bins_add_up_to_the_ece_and_the_accuracy():
    probabilities, labels = random_case()
    confidence, predicted = probabilities.max(dim=1)
    bins = reliability_bins(confidence, predicted == labels)
    share = bins.count / 2000
    found = metrics_of(probabilities, labels)
    assert len(share) == NUM_BINS
    assert (share * abs(bins.accuracy - bins.confidence)).sum() == pytest.approx(found["ece"], abs=1e-5)
    assert (share * bins.accuracy).sum() == pytest.approx(found["accuracy"], abs=1e-5)


def test_each_row_lies_in_the_bin_of_its_confidence():
    bins = reliability_bins(torch.tensor([1.0, 0.99, 0.51, 0.5]), torch.tensor([True, False, True, True]))
    assert bins.count.tolist() == [0] * 7 + [2] + [0] * 6 + [2]
    assert bins.accuracy[7] == 1.0
    assert bins.confidence[14] == pytest.approx(0.995)
    assert bins.accuracy[14] == 0.5


def test_without_rows_all_bins_are_empty():
    bins = reliability_bins(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    for values in (bins.confidence, bins.accuracy, bins.count):
        assert values.tolist() == [0] * 15


def test_the_confusion_matrix_has_true_classes_as_rows():
    predicted, labels = torch.tensor([1, 1, 0, 2, 2]), torch.tensor([0, 1, 0, -1, 1])
    found = confusion_matrix(predicted, labels, num_classes=3)
    assert found.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_the_confusion_matrix_holds_the_accuracy():
    probabilities, labels = random_case()
    matrix = confusion_matrix(probabilities.argmax(dim=1), labels, num_classes=6)
    assert matrix.sum() == 2000
    accuracy = metrics_of(probabilities, labels)["accuracy"]
    assert float(matrix.trace() / matrix.sum()) == pytest.approx(accuracy)


def case(seed: int, num_rows: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels that follow the probabilities in half of the rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_rows, num_classes, generator=generator)
    noisy = logits + 3 * torch.randn(num_rows, num_classes, generator=generator)
    return torch.softmax(logits, dim=1), noisy.argmax(dim=1)


def tied_case(num_rows: int = 60, num_classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Few distinct rows, so that most confidences are tied."""
    probabilities, labels = case(3, num_rows, num_classes)
    return probabilities[torch.arange(num_rows) % 5], labels


@pytest.mark.parametrize("drawn", CASES)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scikit_learn_finds_the_same(drawn: tuple[int, int, int]):
    probabilities, labels = case(*drawn)
    found, classes = metrics_of(probabilities, labels), np.arange(drawn[2])
    p = probabilities.double().numpy()
    p, predicted = p / p.sum(axis=1, keepdims=True), p.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert found["mean_recall"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, predicted))
    assert found["nll"] == pytest.approx(sklearn.metrics.log_loss(labels, p, labels=classes), abs=1e-6)
    if drawn[2] > 5:
        top5 = sklearn.metrics.top_k_accuracy_score(labels, p, k=5, labels=classes)
        assert found["top5_accuracy"] == pytest.approx(top5)
    else:
        assert found["top5_accuracy"] is None


@pytest.mark.parametrize("drawn", CASES)
@pytest.mark.filterwarnings("ignore:Metric `")
def test_torch_uncertainty_finds_the_same(drawn: tuple[int, int, int]):
    probabilities, labels = case(*drawn)
    found, options = metrics_of(probabilities, labels), {"num_classes": drawn[2], "num_bins": 15}
    other = {
        "ece": torch_uncertainty.CalibrationError("multiclass", norm="l1", **options),
        "adaptive_ece": torch_uncertainty.AdaptiveCalibrationError("multiclass", norm="l1", **options),
        "brier": torch_uncertainty.BrierScore(num_classes=drawn[2]),
        "nll": torch_uncertainty.CategoricalNLL(),
    }
    for name, metric in other.items():
        assert found[name] == pytest.approx(float(metric(probabilities, labels)), abs=1e-6), name


@pytest.mark.parametrize("drawn", CASES)
@pytest.mark.parametrize("name", ["aurc", "augrc"])
def test_torch_uncertainty_takes_trapezoids_under_the_risk(drawn: tuple[int, int, int], name: str):
    # From coverage 1/N on, over the width 1 - 1/N: the sum of all N risks but half of the first and of the last,
    # over N - 1.
    probabilities, labels = case(*drawn)
    confidence, predicted = probabilities.double().max(dim=1)
    _, selective, generalized = risk_coverage(confidence, predicted == labels)
    risk = {"aurc": selective, "augrc": generalized}[name]
    metric = {"aurc": torch_uncertainty.AURC, "augrc": torch_uncertainty.AUGRC}[name]()
    theirs = float(metric(probabilities.double(), labels))
    mean = ((drawn[1] - 1) * theirs + float(risk[0] + risk[-1]) / 2) / drawn[1]
    assert metrics_of(probabilities, labels)[name] == pytest.approx(mean, abs=1e-6)


def test_a_case_of_selective_prediction_by_hand():
    coverage, selective, generalized = risk_coverage(
        torch.tensor([0.7, 0.9, 0.5, 0.6]), torch.tensor([False, True, False, True])
    )
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert selective.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert generalized.tolist() == [0, 1 / 4, 1 / 4, 2 / 4]


def test_tied_rows_are_taken_in_every_order():
    confidence = [0.5, 0.5, 0.9, 0.5, 0.2, 0.2]
    correct = [True, False, True, True, False, True]
    curves = []
    for order in itertools.permutations(range(6)):
        # Python's sort is stable: tied rows stay in the order of the permutation.
        accepted = sorted(order, key=lambda row: -confidence[row])
        wrong = np.cumsum([not correct[row] for row in accepted])
        curves.append([wrong / np.arange(1, 7), wrong / 6])
    expected = np.mean(curves, axis=0)
    _, *found = risk_coverage(torch.tensor(confidence), torch.tensor(correct))
    np.testing.assert_allclose(torch.stack(found).numpy(), expected, atol=1e-12)


def test_the_order_of_tied_rows_does_not_matter():
    probabilities, labels = tied_case()
    found = metrics_of(probabilities, labels)
    for seed in range(3):
        rows = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        other = metrics_of(probabilities[rows], labels[rows])
        assert other == pytest.approx(found, abs=1e-6)


def test_a_constant_confidence_has_one_bin_and_a_flat_risk():
    probabilities, labels = torch.tensor([[0.6, 0.4]]).expand(40, 2), torch.arange(40) % 4 // 3
    found = metrics_of(probabilities, labels)
    assert found["accuracy"] == 0.75
    assert found["ece"] == pytest.approx(0.15, abs=1e-6)
    assert found["adaptive_ece"] == pytest.approx(0.15, abs=1e-6)
    assert found["aurc"] == pytest.approx(0.25)
    assert found["augrc"] == pytest.approx(0.25 * 41 / 80)


@pytest.mark.parametrize("num_rows", [1, 2, 14, 15, 16, 44])
def test_the_equal_mass_bins_are_runs_in_order_of_confidence(num_rows: int):
    probabilities, labels = case(1, num_rows, 4)
    confidence, predicted = probabilities.double().max(dim=1)
    rows = confidence.argsort().tolist()
    size, longer = divmod(num_rows, NUM_BINS)
    error = 0.0
    for place in range(NUM_BINS):
        run = [rows.pop(0) for _ in range(size + (place < longer))]
        error += (
            abs(sum(float(predicted[row] == labels[row]) - float(confidence[row]) for row in run)) / num_rows
        )
    assert not rows
    assert metrics_of(probabilities, labels)["adaptive_ece"] == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("label", [0, 1])
def test_one_row(label: int):
    found = metrics_of(torch.tensor([[0.75, 0.25]]), torch.tensor([label]))
    wrong = float(label)
    assert found == {
        "accuracy": 1 - wrong,
        "top5_accuracy": None,
        "mean_recall": 1 - wrong,
        "ece": abs(1 - wrong - 0.75),
        "adaptive_ece": abs(1 - wrong - 0.75),
        "nll": pytest.approx(-math.log([0.75, 0.25][label])),
        "brier": 2 * [0.25, 0.75][label] ** 2,
        "aurc": wrong,
        "augrc": wrong,
    }


def test_one_class_alone_is_its_own_mean_recall():
    probabilities, _ = case(2, 100, 8)
    found = metrics_of(probabilities, torch.full((100,), 3))
    assert found["mean_recall"] == pytest.approx(found["accuracy"])
    assert not any(math.isnan(value) for value in found.values())


def test_full_confidence_has_a_bin_of_its_own():
    # One bin for both rows would hold |0.5 - 0.975|.
    probabilities = torch.tensor([[1.0, 0.0], [0.95, 0.05]])
    assert metrics_of(probabilities, torch.tensor([0, 1]))["ece"] == pytest.approx(0.95 / 2)
    assert metrics_of(probabilities, torch.tensor([1, 0]))["ece"] == pytest.approx((1 + 0.05) / 2)


def test_the_first_of_equally_probable_classes_comes_first():
    probabilities = torch.full((10, 10), 0.1)
    found = metrics_of(probabilities, torch.arange(10))
    assert (found["accuracy"], found["top5_accuracy"]) == (0.1, 0.5)


def test_a_rounding_error_above_one_makes_no_logits_of_probabilities():
    probabilities, labels = random_case(200)
    sure = torch.cat([probabilities, torch.eye(6)[:1]])
    above = sure.clone()
    above[-1, 0] += 1e-6
    labels = torch.cat([labels, torch.zeros(1, dtype=torch.long)])
    assert metrics_of(above, labels) == metrics_of(sure, labels)


@pytest.mark.parametrize("measure", [metrics_of, intervals_of])
@pytest.mark.parametrize(
    ("probabilities", "labels", "reason"),
    [
        (torch.tensor([[math.nan, 0.5]]), torch.tensor([0]), "NaN"),
        (torch.tensor([[math.nan, 0.5]]), torch.tensor([-1]), "NaN"),
        (torch.tensor([[3.0, -1.0]]), torch.tensor([0]), "between 0 and 1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), "a label is 2, but there are 2 classes"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), "are needed"),
        (torch.tensor([0.5, 0.5]), torch.tensor([0, 1]), "are needed"),
    ],
)
def test_what_is_no_probabilities_and_labels_is_refused(measure, probabilities, labels, reason: str):
    with pytest.raises(ValueError, match=reason):
        measure(probabilities, labels)


def test_a_risk_needs_confidences():
    with pytest.raises(ValueError, match="NaN"):
        risk_coverage(torch.tensor([0.5, math.nan]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="both"):
        risk_coverage(torch.tensor([0.5, 0.6]), torch.tensor([True]))
    assert [len(values) for values in risk_coverage(torch.zeros(0), torch.zeros(0, dtype=torch.bool))] == [
        0
    ] * 3


def test_recall_is_counted_in_each_class():
    predicted, labels = torch.tensor([0, 1, 1, 2, 0, 2]), torch.tensor([0, 0, 1, 2, -1, 1])
    found = per_class_recall(predicted, labels, num_classes=4)
    assert found.dtype == torch.float64
    assert found[:3].tolist() == [0.5, 0.5, 1.0]
    assert found[3].isnan()


def test_recall_is_the_diagonal_of_the_confusion_matrix():
    probabilities, labels = random_case()
    predicted = probabilities.argmax(dim=1)
    matrix = confusion_matrix(predicted, labels, num_classes=6)
    expected = matrix.diagonal() / matrix.sum(dim=1)
    assert per_class_recall(predicted, labels, num_classes=6).tolist() == pytest.approx(expected.tolist())


def sure_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of confidence exactly 1, too sure, in a bin of their own, and of 0.95, not sure enough."""
    return torch.tensor([[1.0, 0.0], [0.95, 0.05]]).repeat(10, 1), torch.tensor([0, 0, 1, 0]).repeat(5)


@pytest.mark.parametrize("drawn", [tied_case(), tied_case(9, 3), case(5, 80, 8), case(6, 1, 2), sure_case()])
def test_intervals_are_quantiles_of_metrics_of_repeated_rows(drawn: tuple[torch.Tensor, torch.Tensor]):
    probabilities, labels = drawn
    # The draws are of rows in order of confidence.
    rows = probabilities.amax(dim=1).argsort(descending=True, stable=True)
    counts = drawn_counts(len(labels), resamples=60, seed=4).long()
    draws = []
    for count in counts:
        drawn_rows = rows.repeat_interleave(count)
        draws.append(metrics_of(probabilities[drawn_rows], labels[drawn_rows]))
    found = intervals_of(probabilities, labels, resamples=60, seed=4)
    top5 = {"top5_accuracy"} if probabilities.shape[1] > 5 else set()
    assert set(found) == {"accuracy", "ece", "nll", "brier", "aurc", "augrc"} | top5
    for name, interval in found.items():
        expected = np.quantile([draw[name] for draw in draws], [0.025, 0.975])
        # Sums are float32.
        assert interval == pytest.approx(tuple(expected), rel=1e-6, abs=1e-6), name


def test_intervals_hold_the_metrics_and_narrow_with_the_root_of_rows():
    widths = {}
    for num_rows in (500, 8000):
        probabilities, labels = case(0, num_rows, 10)
        point, found = metrics_of(probabilities, labels), intervals_of(probabilities, labels)
        for name in ("accuracy", "top5_accuracy", "nll", "brier", "aurc", "augrc"):
            low, high = found[name]
            assert low < point[name] < high, name
            widths[name, num_rows] = high - low
    ratios = [widths[name, 500] / widths[name, 8000] for name, _ in widths]
    assert min(ratios) > 4 * 0.8
    assert max(ratios) < 4 * 1.25


def test_the_interval_of_a_share_has_the_known_width():
    labels = torch.arange(2000) % 5 // 4
    low, high = intervals_of(torch.tensor([[0.9, 0.1]]).expand(2000, 2), labels)["accuracy"]
    assert (high - low) / (2 * 1.96) == pytest.approx(math.sqrt(0.8 * 0.2 / 2000), rel=0.1)


def test_the_seed_makes_the_interval():
    probabilities, labels = random_case(300)
    first, again, other = (intervals_of(probabilities, labels, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize(("num_rows", "resamples"), [(1, 3), (7, 25), (100, 60)])
def test_every_resample_draws_as_many_rows(num_rows: int, resamples: int):
    counts = drawn_counts(num_rows, resamples=resamples)
    assert (counts.shape, counts.dtype) == ((resamples, num_rows), torch.float32)
    assert (counts.sum(dim=1) == num_rows).all()
    assert torch.equal(counts, drawn_counts(num_rows, resamples=resamples))
    assert max(map(len, bootstrap_blocks(num_rows, resamples=resamples))) <= BLOCK_RESAMPLES


def test_counts_are_multinomial():
    counts = drawn_counts(50, resamples=4000, seed=2).double()
    # Mean 1, variance 1 - 1/N, covariance -1/N.
    assert counts.mean(dim=0).sub(1).abs().max() < 0.08
    assert float(counts.var(dim=0).mean()) == pytest.approx(1 - 1 / 50, rel=0.02)
    assert not torch.equal(counts, drawn_counts(50, resamples=4000, seed=3).double())
    covariance = counts.T.cov()
    assert float((covariance.sum() - covariance.trace()) / (50 * 49)) == pytest.approx(-1 / 50, rel=0.05)


def test_the_interval_of_a_mean_has_the_known_width():
    values = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 5.0, 1e6])
    low, high = mean_interval(values)
    error = values.double().std(dim=0) / math.sqrt(400)
    assert ((high - low) / (2 * 1.96 * error)).sub(1).abs().max() < 0.1
    assert ((low < values.double().mean(dim=0)) & (values.double().mean(dim=0) < high)).all()
    # Columns are resampled together, and alone they give the same.
    alone = mean_interval(values[:, 1])
    assert alone.shape == (2,)
    torch.testing.assert_close(alone, torch.stack([low[1], high[1]]), atol=1e-6, rtol=0)


def test_the_interval_of_a_mean_is_right_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(60, 400, generator=generator)
    low, high = mean_interval(samples)
    share = float(((low < 0.5) & (high > 0.5)).double().mean())
    assert 0.90 < share < 0.98


def test_equal_classifiers_differ_by_nothing():
    assert mean_interval(torch.zeros(10)).tolist() == [0.0, 0.0]
    assert mean_interval(torch.tensor([True, True])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("values", [torch.zeros(0), torch.tensor([1.0, math.nan])])
def test_no_values_have_no_interval(values: torch.Tensor):
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval(values)
