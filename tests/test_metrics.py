"""Metrics against cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lpclip.metrics import NUM_BINS, classification_metrics, confusion_matrix, reliability_bins


def random_case(num_rows: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(2 * torch.randn(num_rows, 6, generator=generator), dim=1)
    return probabilities, torch.randint(6, (num_rows,), generator=generator)


def test_a_case_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]])
    found = classification_metrics(probabilities, torch.tensor([0, 1, 1, 1]))
    assert found["accuracy"] == 0.75
    # Two bins of two rows each: |0.5 - 0.9| and |1 - 0.7|, averaged.
    assert found["ece"] == pytest.approx((0.4 + 0.3) / 2)
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + 2 * math.log(0.7)) / 4)


def test_sure_and_right_is_perfect_and_sure_and_wrong_is_the_worst():
    sure = torch.eye(3)
    right = classification_metrics(sure, torch.tensor([0, 1, 2]))
    assert right == {"accuracy": 1.0, "ece": 0.0, "nll": 0.0}
    wrong = classification_metrics(sure, torch.tensor([1, 2, 0]))
    assert (wrong["accuracy"], wrong["ece"]) == (0.0, 1.0)
    assert wrong["nll"] == pytest.approx(-math.log(1e-12))


def test_labels_below_zero_are_left_out():
    probabilities, labels = random_case(100)
    hidden = torch.arange(100) % 3 == 0
    found = classification_metrics(probabilities, labels.masked_fill(hidden, -1))
    assert found == classification_metrics(probabilities[~hidden], labels[~hidden])


@pytest.mark.parametrize("num_rows", [0, 5])
def test_without_any_label_there_is_no_metric(num_rows: int):
    found = classification_metrics(torch.full((num_rows, 4), 0.25), torch.full((num_rows,), -1))
    assert found == {"accuracy": None, "ece": None, "nll": None}


def test_labels_drawn_from_the_probabilities_are_calibrated():
    probabilities, _ = random_case(20_000)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    found = classification_metrics(probabilities, labels)
    assert found["ece"] < 0.02
    entropy = float(-(probabilities * probabilities.log()).sum(dim=1).mean())
    assert found["nll"] == pytest.approx(entropy, abs=0.02)


def test_the_order_of_classes_and_rows_does_not_matter():
    probabilities, labels = random_case()
    order, rows = torch.tensor([3, 5, 0, 1, 4, 2]), probabilities[:, 0].argsort()
    other = classification_metrics(probabilities[rows][:, order], order.argsort()[labels[rows]])
    assert other == pytest.approx(classification_metrics(probabilities, labels), abs=1e-5)


def test_the_bins_add_up_to_the_ece_and_the_accuracy():
    probabilities, labels = random_case()
    bins = {name: torch.tensor(values) for name, values in reliability_bins(probabilities, labels).items()}
    share = bins["count"] / 2000
    found = classification_metrics(probabilities, labels)
    assert len(share) == NUM_BINS
    assert float((share * (bins["accuracy"] - bins["confidence"]).abs()).sum()) == pytest.approx(
        found["ece"], abs=1e-5
    )
    assert float((share * bins["accuracy"]).sum()) == pytest.approx(found["accuracy"], abs=1e-5)


def test_each_row_lies_in_the_bin_of_its_confidence():
    probabilities = torch.tensor([[1.0, 0.0], [0.99, 0.01], [0.51, 0.49], [0.5, 0.5], [0.0, 1.0]])
    bins = reliability_bins(probabilities, torch.tensor([0, 1, 0, 0, -1]))
    assert bins["count"] == [0] * 7 + [2] + [0] * 6 + [2]
    assert bins["accuracy"][7] == 1.0
    assert bins["confidence"][14] == pytest.approx(0.995)
    assert bins["accuracy"][14] == 0.5


def test_without_rows_all_bins_are_empty():
    bins = reliability_bins(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert bins == {"confidence": [0.0] * 15, "accuracy": [0.0] * 15, "count": [0] * 15}


def test_the_confusion_matrix_has_true_classes_as_rows():
    predicted, labels = torch.tensor([1, 1, 0, 2, 2]), torch.tensor([0, 1, 0, -1, 1])
    found = confusion_matrix(predicted, labels, num_classes=3)
    assert found.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_the_confusion_matrix_holds_the_accuracy():
    probabilities, labels = random_case()
    matrix = confusion_matrix(probabilities.argmax(dim=1), labels, num_classes=6)
    assert matrix.sum() == 2000
    accuracy = classification_metrics(probabilities, labels)["accuracy"]
    assert float(matrix.trace() / matrix.sum()) == pytest.approx(accuracy)
