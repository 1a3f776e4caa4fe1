"""Metrics of class probabilities against true labels. Labels serve evaluation alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpclip.evaluation.bootstrap import bootstrap_blocks, collect, percentiles
from lpclip.evaluation.evidence import Reliability

NUM_BINS = 15
TOP = 5
METRICS = (
    "accuracy",
    "top5_accuracy",
    "mean_recall",
    "ece",
    "adaptive_ece",
    "nll",
    "brier",
    "aurc",
    "augrc",
)
# Those that are means over rows, in the order of `Answers.scores`.
MEANS = ("accuracy", "top5_accuracy", "nll", "brier")
# Softmax and means of it may miss [0, 1] by a rounding error.
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A classifier's answers to N labelled rows. Metrics need no more of its probabilities (N, K)."""

    num_classes: int
    labels: Tensor
    """(N,) int64."""
    predicted: Tensor
    """(N,) int64: the most probable class; of equally probable ones the first."""
    confidence: Tensor
    """(N,): its probability."""
    scores: Tensor
    """(N, M) float64: each row's share in the `means`."""

    @property
    def correct(self) -> Tensor:
        """(N,) bool."""
        return self.predicted == self.labels

    @property
    def means(self) -> tuple[str, ...]:
        """Names of the M metrics that are means over rows."""
        return tuple(name for name in MEANS if name != "top5_accuracy" or self.num_classes > TOP)


def answers(probabilities: Tensor, labels: Tensor) -> Answers:
    """The answers of probabilities (N, K), float32 or float64, to class indices (N,) int64, below 0 for none.

    Rows without a label are left out. Raises ValueError when probabilities are NaN or outside [0, 1], a label is K or
    more, or the shapes do not fit.
    """
    p, y = _labelled(probabilities, labels)
    confidence, predicted = p.max(dim=1)
    return Answers(
        num_classes=p.shape[1],
        labels=y,
        predicted=predicted,
        confidence=confidence,
        scores=_scores(p, y, predicted=predicted),
    )


def classification_metrics(found: Answers) -> dict[str, float | None]:
    """`METRICS` of a classifier's answers; without rows every value is None.

    accuracy, top5_accuracy: the share of rows whose true class is the most probable, or one of the five most
    probable; of equally probable classes the first comes first. Top-5 is None when there are at most five classes.
    mean_recall: the mean of `per_class_recall` over the classes that occur, also called balanced accuracy.
    ece: expected calibration error of the top label, L1, 15 bins of equal width (Guo et al., 2017). Bins hold
    their lower edge, and a confidence of exactly 1 has a bin of its own, as in torchmetrics.
    adaptive_ece: the same with 15 bins of equal mass (Nguyen and O'Connor, 2015), the rows in order of confidence cut
    into runs whose sizes differ by at most one, the first ones longer. Tied rows share their errors evenly.
    nll: mean negative log-likelihood in nats, of probabilities of at least 1e-12.
    brier: mean squared error summed over classes, 0 to 2 (Brier, 1950).
    aurc, augrc: means of the selective and the generalized risk of `risk_coverage`, the confidence being the
    largest probability.
    """
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    if len(found.labels) == 0:
        return metrics
    confidence, correct = found.confidence, found.correct
    # A bin's share of the error is the absolute sum of accuracy less confidence over its rows.
    gaps = torch.bincount(_ece_bins(confidence), correct.double() - confidence.double())
    recall = per_class_recall(found.predicted, found.labels, num_classes=found.num_classes)
    _, selective, generalized = risk_coverage(confidence, correct)
    return (
        metrics
        | dict(zip(found.means, found.scores.mean(dim=0).tolist(), strict=True))
        | {
            "mean_recall": float(recall.nanmean()),
            "ece": float(gaps.abs().sum() / len(confidence)),
            "adaptive_ece": _adaptive_calibration_error(confidence, correct),
            "aurc": float(selective.mean()),
            "augrc": float(generalized.mean()),
        }
    )


def per_class_recall(predicted: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    """The share (K,) float64 of each class' images that are predicted right, NaN for a class without images.

    Both arguments are class indices (N,) int64; rows with a label below 0 are left out.
    """
    known = labels >= 0
    right = torch.bincount(labels[known & (predicted == labels)], minlength=num_classes)
    return right.double() / torch.bincount(labels[known], minlength=num_classes)


def risk_coverage(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coverage, selective risk and generalized risk, each (N,) float64, of confidence (N,) and correct (N,) bool.

    At coverage k/N the k most confident rows are accepted. The selective risk is the share of errors among them,
    its mean the AURC (Geifman and El-Yaniv, 2017); the generalized risk is their errors over N, its mean the AUGRC
    (Traub et al., 2024). Tied rows are taken in random order, in expectation: the order of rows does not matter.
    Raises ValueError for NaN or shapes that do not fit.
    """
    _, errors = _spread_errors(confidence, correct)
    rejected = errors.flip(0).cumsum(0)
    rows = torch.arange(1, len(errors) + 1, dtype=torch.float64)
    return rows / len(errors), rejected / rows, rejected / len(errors)


def confusion_matrix(predicted: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    """Counts (K, K) int64: rows are true classes, columns predicted ones. Rows without a label are left out."""
    known = labels >= 0
    cells = labels[known] * num_classes + predicted[known]
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def reliability_bins(confidence: Tensor, correct: Tensor) -> Reliability:
    """The rows in 15 bins of equal width, from confidence (N,) and correct (N,) bool. Bins hold their upper edge."""
    exact, right = confidence.double(), correct.double()
    index = (exact * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    count = torch.bincount(index, minlength=NUM_BINS)
    filled = count.clamp_min(1)
    return Reliability(
        confidence=(torch.bincount(index, exact, minlength=NUM_BINS) / filled).numpy(),
        accuracy=(torch.bincount(index, right, minlength=NUM_BINS) / filled).numpy(),
        count=count.numpy(),
    )


def metric_intervals(
    found: Answers, *, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95% percentile bootstrap intervals, over rows, of `classification_metrics`; none without rows.

    All metrics but mean_recall, adaptive_ece and those that are None. An ECE is larger on a resample than on the
    rows themselves: its interval is no test of calibration.
    """
    if len(found.labels) == 0:
        return {}
    confidence, order = found.confidence.sort(descending=True, stable=True)
    scores = found.scores[order]
    errors = 1 - scores[:, found.means.index("accuracy")]
    gaps = torch.zeros(len(errors), NUM_BINS + 1)
    gaps.scatter_(1, _ece_bins(confidence)[:, None], (1 - errors - confidence).float()[:, None])
    columns = torch.cat([scores.float(), gaps], dim=1)
    areas = _RiskAreas(confidence, errors)

    def measure(counts: Tensor) -> Tensor:
        sums = (counts @ columns).double() / len(errors)
        means, bins = sums.split([scores.shape[1], NUM_BINS + 1], dim=1)
        return torch.cat([means, bins.abs().sum(dim=1, keepdim=True), areas(counts)], dim=1)

    blocks = bootstrap_blocks(len(errors), resamples=resamples, seed=seed)
    draws = collect(map(measure, blocks), resamples=resamples)
    low, high = percentiles(draws).tolist()
    return dict(zip((*found.means, "ece", "aurc", "augrc"), zip(low, high, strict=True), strict=True))


class _RiskAreas:
    """AURC and AUGRC of resamples, without sorting any.

    The r-th most confident of N rows counts in all coverages from r/N on. So an error there adds
    (1/r + ... + 1/N) / N to the AURC and (N - r + 1) / N^2 to the AUGRC, and a block of tied rows adds its error
    rate times the sum of these over its ranks.
    """

    def __init__(self, confidence: Tensor, errors: Tensor) -> None:
        """Confidence (N,), falling, and errors (N,) 0 or 1."""
        num_rows = len(errors)
        rows = torch.arange(1, num_rows + 1, dtype=torch.float64)
        harmonic = (1 / rows).flip(0).cumsum(0).flip(0) / num_rows
        self._tables = [
            torch.nn.functional.pad(worth.cumsum(0), (1, 0))
            for worth in (harmonic, rows.flip(0) / num_rows**2)
        ]
        sizes = confidence.unique_consecutive(return_counts=True)[1]
        self._ends = sizes.cumsum(0) - 1
        self._errors = errors.float()

    def __call__(self, counts: Tensor) -> Tensor:
        """(B, 2) float64 of counts (B, N) whose columns are in order of confidence."""
        total = counts.cumsum(dim=1).index_select(1, self._ends)
        wrong = (counts * self._errors).cumsum(dim=1).index_select(1, self._ends)
        nothing = torch.zeros(len(counts), 1)
        rate = wrong.diff(dim=1, prepend=nothing) / total.diff(dim=1, prepend=nothing).clamp_min(1)
        # The sum of rates times differences of a table, by parts: the differences are taken once.
        fall = -rate.diff(dim=1, append=nothing)
        place = total.long()
        return torch.stack([(table.take(place) * fall).sum(dim=1) for table in self._tables], dim=1)


def _labelled(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with a label. Raises ValueError for what is no probabilities and labels."""
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"probabilities (N, K) and labels (N,) are needed, not {shapes}")
    # The comparison is false for NaN.
    if not ((probabilities >= -TOLERANCE) & (probabilities <= 1 + TOLERANCE)).all():
        raise ValueError("probabilities must lie between 0 and 1, and none may be NaN")
    if (labels >= probabilities.shape[1]).any():
        raise ValueError(f"a label is {int(labels.max())}, but there are {probabilities.shape[1]} classes")
    known = labels >= 0
    return probabilities[known].clamp(0, 1), labels[known]


def _ece_bins(confidence: Tensor) -> Tensor:
    """The bins of the ECE, int64 from 0 to NUM_BINS, of confidence (N,)."""
    return torch.bucketize(confidence.float(), torch.linspace(0, 1, NUM_BINS + 1), right=True) - 1


def _scores(p: Tensor, y: Tensor, *, predicted: Tensor) -> Tensor:
    """`Answers.scores`."""
    own = p.gather(1, y[:, None])
    found = [predicted == y]
    if p.shape[1] > TOP:
        earlier = torch.arange(p.shape[1]) < y[:, None]
        found.append(((p > own) | ((p == own) & earlier)).sum(dim=1) < TOP)
    found.append(-own[:, 0].double().clamp_min(1e-12).log())
    found.append(p.scatter_add(1, y[:, None], -torch.ones_like(own)).square().sum(dim=1))
    return torch.stack([column.double() for column in found], dim=1)


def _spread_errors(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence, rising, and in its order the share of errors among each row's ties; (N,) float64 both."""
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        shapes = f"{tuple(confidence.shape)} and {tuple(correct.shape)}"
        raise ValueError(f"confidence and correct must be (N,) both, not {shapes}")
    if confidence.isnan().any():
        raise ValueError("no confidence may be NaN")
    confidence, order = confidence.sort()
    _, block, size = confidence.unique_consecutive(return_inverse=True, return_counts=True)
    errors = torch.bincount(block, 1 - correct[order].double()) / size
    return confidence.double(), errors[block]


def _adaptive_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    confidence, errors = _spread_errors(confidence, correct)
    runs = (1 - errors - confidence).tensor_split(NUM_BINS)
    return float(sum(run.sum().abs() for run in runs)) / len(errors)
