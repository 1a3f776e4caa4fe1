"""The rounds: pseudo-label with the teacher, fit the student, let it teach; under Ray Train or in this process.

A round is one pass over a worker's rows. Rows stand in the order of a hash of their ids and are cut into fixed
chunks; chunks are dealt to workers in runs, their sums are taken in float64 and added over workers. So the
probe does not depend on the number of workers beyond float64's rounding. Labels are not even loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpclip.config import SelfTrainingConfig
from lpclip.errors import UserError
from lpclip.method.gaussian import Whitening, gaussian_probe, make_whitening, row_moments
from lpclip.method.linear import Linear
from lpclip.method.priors import Prior, prior_sums, update_factors
from lpclip.method.probe import weighted_cross_entropy_gradient
from lpclip.method.pseudo_labels import AllReduce, scale_to_confidence, soft_targets

CHUNK_ROWS = 4096
# Rows that set the Gaussian logits' scale: enough for a mean, few enough to bisect on.
SAMPLE_ROWS = 8192
STOP_FLIP_RATE = 0.002

# The recipe's constants: one set for all data. docs/method.md has the measurements behind them.
CONFIDENCE = 0.8
ZERO_SHOT_SHARE = 0.3
# Of the last student, which faces other images than the unlabelled ones: the text weights know more of these.
LAST_ZERO_SHOT_SHARE = 0.6
NEIGHBOUR_WEIGHT = 2.0
NEIGHBOUR_FLOOR = 1e-3
MAX_NEIGHBOUR_ROWS = 100_000
NEIGHBOURS = (3, 30)
FIRST_PRIOR_STEPS = 10
# Rows that the first factors settle on: shares of thousands of classes, and no ten passes over a million rows.
FIRST_PRIOR_ROWS = 131_072
GRADIENT_EPOCHS = 5
GRADIENT_BATCH = 512
GRADIENT_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A worker's rows."""

    features: np.ndarray
    """(n, d) float16 or float32, unit norm: what the teacher sees."""
    strong: tuple[np.ndarray, ...] = ()
    """Strong views, each (n, d) float16: what the gradient solver's students see (the base view without them), and
    the gaussian solver's last student beside the base view."""
    first_row: int = 0
    """Place of the shard's first row among all rows."""
    num_rows: int = 0
    """Rows of all shards."""
    neighbours: Tensor | None = None
    """(n, k) int64: places among all rows of each row's nearest neighbours, or none are used."""
    zero_shot: Tensor | None = None
    """(n, K) float32 zero-shot logits, where the features are only a part of what gives them."""

    def zero_shot_logits(self, rows: slice, features: Tensor, *, head: Tensor) -> Tensor:
        """(m, K) of the chunk `rows`, whose features (m, d) are given; `head` (K, d) is in units of logits."""
        return features @ head.T if self.zero_shot is None else self.zero_shot[rows]

    def views(self, rows: slice, features: Tensor, *, strong: bool) -> list[Tensor]:
        """The base view (m, d) of the chunk `rows`, which is given, and its strong views, if wanted."""
        return [features, *(torch.from_numpy(view[rows]).float() for view in self.strong if strong)]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Row slices and their features (m, d) as float32."""
        for start in range(0, len(self.features), CHUNK_ROWS):
            rows = slice(start, min(start + CHUNK_ROWS, len(self.features)))
            yield rows, torch.from_numpy(self.features[rows]).float()


@dataclass(frozen=True, kw_only=True)
class Whitenings:
    """What the gaussian solver needs of the features. Labels play no part in it, so trainings can share it."""

    base: Whitening
    last: Whitening | None
    """Of all views, for the last student; None without strong views."""


@dataclass(kw_only=True)
class State:
    """What a round hands to the next one, and all that a checkpoint holds."""

    round: int
    weight: Tensor
    """(K, d) float32: what the rounds learnt, in units of logits."""
    bias: Tensor
    """(K,) float32, without the prior's log factors."""
    factors: Tensor
    """(K,) float32: the prior's column factors."""
    zero_shot_share: float = 0.0
    """How much of the zero-shot logits is added."""
    metrics: dict[str, float] = field(default_factory=dict)

    def classifier(self, head: Tensor) -> Linear:
        """The state as a linear classifier, given the zero-shot `head` (K, d) in units of logits."""
        return Linear(
            weight=self.weight + self.zero_shot_share * head,
            bias=self.bias + self.factors.clamp_min(1e-12).log(),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """For safetensors."""
        return {"weight": self.weight, "bias": self.bias, "factors": self.factors}


@dataclass(kw_only=True)
class Pass:
    """Sums of one pass of a teacher over the rows."""

    sums: Tensor
    counts: Tensor
    prior: Tensor
    numbers: Tensor
    labels: np.ndarray
    confidence: np.ndarray
    kept: np.ndarray
    targets: Tensor | None
    """(num_rows, K) float32, the targets of all shards' rows, where neighbours are used."""


def neighbour_count(config: SelfTrainingConfig, *, num_rows: int, num_classes: int) -> int:
    """How many neighbours to use: as configured, or half as many as a class has images, 3 to 30, if affordable."""
    if config.solver == "gradient":
        return 0
    few, many = NEIGHBOURS
    count = config.neighbours
    if count is None:
        count = 0 if num_rows > MAX_NEIGHBOUR_ROWS else min(many, max(few, num_rows // (2 * num_classes)))
    return max(0, min(count, num_rows - 1))


def run_pass(
    shard: Shard,
    teacher: State,
    *,
    head: Tensor,
    threshold: float,
    before: Pass | None,
    strong: bool = False,
) -> Pass:
    """Label all rows of a shard with the teacher, helped by what the pass `before` said of their neighbours.

    The sums, of the base features or their mean with the `strong` views, and the targets are this shard's own.
    """
    num_classes, dim = teacher.weight.shape
    sums, counts = torch.zeros(num_classes, dim, dtype=torch.float64), torch.zeros(num_classes).double()
    prior, numbers = torch.zeros(2, num_classes, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    labels = np.empty(len(shard.features), np.int32)
    confidence, kept = np.empty(len(labels), np.float32), np.empty(len(labels), bool)
    shared = torch.zeros(shard.num_rows, num_classes) if shard.neighbours is not None else None
    for rows, features in shard.chunks():
        zero_shot = shard.zero_shot_logits(rows, features, head=head)
        logits = features @ teacher.weight.T + teacher.bias + teacher.zero_shot_share * zero_shot
        if before is not None and before.targets is not None and shard.neighbours is not None:
            around = torch.nn.functional.embedding_bag(shard.neighbours[rows], before.targets, mode="mean")
            logits = logits + NEIGHBOUR_WEIGHT * torch.log(around + NEIGHBOUR_FLOOR)
        posterior, targets = soft_targets(logits, teacher.factors)
        top, label = targets.max(dim=1)
        keep = top >= threshold
        prior += prior_sums(posterior, teacher.factors)
        if shared is not None:
            shared[shard.first_row + rows.start : shard.first_row + rows.stop] = targets
        targets = targets * keep[:, None]
        seen = features
        if strong:
            views = shard.views(rows, features, strong=True)
            seen = torch.stack(views).mean(dim=0)
        sums += (targets.T @ seen).double()
        counts += targets.sum(dim=0, dtype=torch.float64)
        base = zero_shot.argmax(dim=1)
        flips = (
            torch.from_numpy(before.labels[rows]) != label if before is not None else torch.zeros(len(label))
        )
        numbers += torch.stack(
            [torch.tensor(float(len(label))), keep.sum(), top.sum(), flips.sum(), (base == label).sum()]
        ).double()
        labels[rows], confidence[rows], kept[rows] = label.numpy(), top.numpy(), keep.numpy()
    return Pass(
        sums=sums,
        counts=counts,
        prior=prior,
        numbers=numbers,
        labels=labels,
        confidence=confidence,
        kept=kept,
        targets=shared,
    )


def _reduce(found: Pass, all_reduce: AllReduce) -> Pass:
    fields = ("sums", "counts", "prior", "numbers")
    flat = all_reduce(torch.cat([getattr(found, name).flatten() for name in fields]))
    pieces = flat.split([getattr(found, name).numel() for name in fields])
    shaped = {n: p.reshape(getattr(found, n).shape) for n, p in zip(fields, pieces, strict=True)}
    targets = all_reduce(found.targets) if found.targets is not None else None
    return replace(found, **shaped, targets=targets)


def _metrics(found: Pass) -> dict[str, float]:
    rows, kept, confidence, flips, agreement = found.numbers.tolist()
    share = found.counts / found.counts.sum().clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum() / math.log(len(share))
    return {
        "coverage": kept / rows,
        "mean_confidence": confidence / rows,
        "class_entropy": float(entropy),
        "flip_rate": flips / rows,
        "zero_shot_agreement": agreement / rows,
    }


def self_train(
    shard: Shard,
    *,
    zero_shot: Tensor,
    temperature: float,
    config: SelfTrainingConfig,
    prior: Prior,
    all_reduce: AllReduce = lambda tensor: tensor,
    start: State | None = None,
    zero_shot_share: float = ZERO_SHOT_SHARE,
    whitenings: Whitenings | None = None,
) -> Iterator[tuple[State, Pass]]:
    """Self-training rounds on features (n, d), from a zero-shot head (K, d) of unit norm.

    Yields after every round the student with its metrics, and its own pass over the shard (sums of all shards). With
    strong views a last round of the gaussian solver follows, beyond `config.rounds`.
    `start` is the state of the last round of an interrupted run, `whitenings` what `fit_whitenings` gives. Raises
    UserError when no row is left to fit.
    """
    head = zero_shot / temperature
    first = State(
        round=0,
        weight=torch.zeros(len(head), shard.features.shape[1]),
        bias=torch.zeros(len(head)),
        factors=torch.ones(len(head)),
        zero_shot_share=1.0,
    )
    teacher = start or first
    options: dict[str, Any] = {"head": head, "threshold": config.threshold}
    if start is None:
        _first_factors(shard, teacher, head=head, prior=prior, all_reduce=all_reduce)
    found = _reduce(run_pass(shard, teacher, before=None, **options), all_reduce)
    if whitenings is None and config.solver == "gaussian":
        whitenings = fit_whitenings(shard, all_reduce=all_reduce)
    earlier, converged = None, start is not None and start.metrics["flip_rate"] < STOP_FLIP_RATE
    while teacher.round < config.rounds and not converged:
        _require_labels(found, number=teacher.round + 1, threshold=config.threshold)
        if config.solver == "gaussian":
            assert whitenings is not None
            student = _gaussian_student(shard, found, whitening=whitenings.base, all_reduce=all_reduce)
            student.zero_shot_share = zero_shot_share
        else:
            student = _gradient_student(
                shard, teacher, found, head=head, config=config, all_reduce=all_reduce
            )
        earlier, found = (
            found,
            _graduate(shard, student, teacher, found, prior=prior, all_reduce=all_reduce, **options),
        )
        yield student, found
        teacher = student
        converged = student.metrics["flip_rate"] < STOP_FLIP_RATE
    if config.solver != "gaussian" or whitenings is None or whitenings.last is None:
        return
    # One more student, of the same labels, sees the strong views as well: what they change lies within a class, so
    # that its boundaries turn away from it. Earlier, it would cost the rounds what they know of clean images.
    _require_labels(found, number=teacher.round + 1, threshold=config.threshold)
    seen = _reduce(run_pass(shard, teacher, before=earlier, strong=True, **options), all_reduce)
    student = _gaussian_student(shard, seen, whitening=whitenings.last, all_reduce=all_reduce)
    student.zero_shot_share = LAST_ZERO_SHOT_SHARE
    found = _graduate(shard, student, teacher, found, prior=prior, all_reduce=all_reduce, **options)
    yield student, found


def _require_labels(found: Pass, *, number: int, threshold: float) -> None:
    if found.numbers[1] == 0:
        raise UserError(
            f"no pseudo-label has a confidence of at least {threshold:g} (--threshold) in round {number}; "
            "lower the threshold or the temperature"
        )


def _graduate(
    shard: Shard,
    student: State,
    teacher: State,
    found: Pass,
    *,
    prior: Prior,
    all_reduce: AllReduce,
    **options: Any,
) -> Pass:
    """Make a fitted student the teacher's successor: its round, prior factors and, from its own pass, metrics."""
    student.round = teacher.round + 1
    # Halfway in the logarithm: a full step from the last teacher's sums to this student's can oscillate.
    student.factors = (teacher.factors * update_factors(found.prior, prior=prior)).sqrt()
    own = _reduce(run_pass(shard, student, before=found, **options), all_reduce)
    student.metrics = _metrics(own)
    return own


def fit_whitenings(shard: Shard, *, all_reduce: AllReduce = lambda tensor: tensor) -> Whitenings:
    """The whitenings of all shards' features."""
    last = fit_whitening(shard, all_reduce=all_reduce, strong=True) if shard.strong else None
    return Whitenings(base=fit_whitening(shard, all_reduce=all_reduce), last=last)


def fit_whitening(
    shard: Shard, *, all_reduce: AllReduce = lambda tensor: tensor, strong: bool = False
) -> Whitening:
    """The whitening of all shards' base features, or of all their views."""
    dim = shard.features.shape[1]
    total = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)
    for rows, features in shard.chunks():
        views = shard.views(rows, features, strong=strong)
        total += sum(row_moments(view) for view in views) / len(views)
    return make_whitening(all_reduce(total))


def _first_factors(
    shard: Shard, teacher: State, *, head: Tensor, prior: Prior, all_reduce: AllReduce
) -> None:
    """Bring the zero-shot teacher's factors to their fixed point; later rounds go on from there, a step each."""
    for _ in range(FIRST_PRIOR_STEPS if prior.strength else 0):
        sums = torch.zeros(2, len(teacher.bias), dtype=torch.float64)
        for rows, features in shard.chunks():
            if shard.first_row + rows.start >= FIRST_PRIOR_ROWS:
                break
            posterior = torch.softmax(shard.zero_shot_logits(rows, features, head=head), dim=1)
            sums += prior_sums(posterior, teacher.factors)
        teacher.factors = update_factors(all_reduce(sums), prior=prior)


def _gaussian_student(shard: Shard, found: Pass, *, whitening: Whitening, all_reduce: AllReduce) -> State:
    """Gaussian classes from the targets, at a constant confidence.

    Constant: with a confidence that grows from round to round accuracy declines after its best round.
    """
    fitted = gaussian_probe(found.sums, found.counts, whitening=whitening)
    rows = max(0, min(SAMPLE_ROWS, shard.num_rows) - shard.first_row)
    sample = torch.from_numpy(shard.features[:rows]).float()
    scale = scale_to_confidence(fitted.logits(sample), CONFIDENCE, all_reduce=all_reduce)
    factors = torch.ones(len(fitted.bias))
    return State(round=0, weight=scale * fitted.weight, bias=scale * fitted.bias, factors=factors)


def _gradient_student(
    shard: Shard,
    teacher: State,
    found: Pass,
    *,
    head: Tensor,
    config: SelfTrainingConfig,
    all_reduce: AllReduce,
) -> State:
    """LP-CLIP's objective (reconstructed): cross-entropy of the strong views against the teacher's labels.

    Each row counts by its confidence; rows under the threshold are left out. Adam on batches that are cut from
    a seeded permutation of all rows, so that every worker count takes the same steps.
    """
    weight = teacher.weight + teacher.zero_shot_share * head
    parameters = torch.cat([weight, teacher.bias[:, None]], dim=1)
    first, second = torch.zeros_like(parameters), torch.zeros_like(parameters)
    views = shard.strong or (shard.features,)
    weights = torch.from_numpy(np.where(found.kept, found.confidence, 0).astype(np.float32))
    steps = 0
    for epoch in range(GRADIENT_EPOCHS):
        seed = config.seed * 1_000_003 + teacher.round * 1009 + epoch
        order = torch.randperm(shard.num_rows, generator=torch.Generator().manual_seed(seed)).numpy()
        for batch in np.array_split(order, max(1, round(shard.num_rows / GRADIENT_BATCH))):
            mine = np.sort(batch[(batch >= shard.first_row) & (batch < shard.first_row + len(weights))])
            mine = mine - shard.first_row
            view = views[(epoch + teacher.round) % len(views)]
            gradient = weighted_cross_entropy_gradient(
                torch.from_numpy(view[mine]).float(),
                torch.nn.functional.one_hot(
                    torch.from_numpy(found.labels[mine]).long(), len(teacher.bias)
                ).float(),
                weights[mine],
                weight=parameters[:, :-1],
                bias=parameters[:, -1],
            )
            total = all_reduce(gradient) / len(batch)
            steps += 1
            first = 0.9 * first + 0.1 * total.float()
            second = 0.999 * second + 0.001 * total.float() ** 2
            step = (first / (1 - 0.9**steps)) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
            parameters = parameters - GRADIENT_RATE * step
    return State(
        round=0, weight=parameters[:, :-1].contiguous(), bias=parameters[:, -1], factors=teacher.factors
    )
