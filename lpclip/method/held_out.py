"""Logits of images that a student was not fitted to: fold by fold, without the fold's share of all sums."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lpclip.method.gaussian import make_whitening, row_moments
from lpclip.method.linear import BLOCK_ROWS, Linear
from lpclip.method.pseudo_labels import alone
from lpclip.method.recipe import RECIPE
from lpclip.method.shard import Shard, product_sum
from lpclip.method.solvers import GaussianSolver, Student

FOLDS = 5
LEAST_ROWS = 10
ROWS = 20_000


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Logits of a student of all rows, and of students that were fitted without a fold of them."""

    fitted: Tensor
    """(n, K) logits of the first 20,000 rows by the student of all rows."""
    held_out: Tensor
    """(n, K) by the students without the row's fold."""
    evidence: float
    """That of the student of all rows."""


def held_out_logits(classifier: Linear, *, head: Tensor, features: np.ndarray) -> HeldOut:
    """Logits of the first 20,000 features (N, d) by a student of all rows, and by ones without the row's fold.

    The students are Gaussian classes of the classifier's own soft labels, anchored in the texts `head` (K, d), which
    are in units of logits. A student without a fold does without it in everything: class means and covariances. With
    fewer than ten features both are the same.
    """
    rows = torch.as_tensor(features)
    sample = rows[:ROWS].float()
    everything = _sums(rows, classifier=classifier)

    def fit(moments: Tensor, sums: Tensor, counts: Tensor) -> Student:
        shard = Shard(features=sample.numpy(), num_rows=len(sample))
        solver = GaussianSolver(
            shard=shard,
            head=head,
            whitening=make_whitening(moments),
            zero_shot_share=RECIPE.zero_shot_share,
            recipe=RECIPE,
            all_reduce=alone,
        )
        student = solver.fit_sums(sums, counts)
        return replace(student, weight=student.weight + student.zero_shot_share * head)

    whole = fit(*everything)
    fitted = whole.logits(sample)
    if len(sample) < LEAST_ROWS:
        return HeldOut(fitted=fitted, held_out=fitted, evidence=whole.evidence)
    held_out = torch.empty_like(fitted)
    fold_of = torch.arange(len(sample)) % FOLDS
    for fold in range(FOLDS):
        mine = sample[fold_of == fold]
        rest = (
            total - own for total, own in zip(everything, _sums(mine, classifier=classifier), strict=True)
        )
        held_out[fold_of == fold] = fit(*rest).logits(mine)
    return HeldOut(fitted=fitted, held_out=held_out, evidence=whole.evidence)


def _sums(rows: Tensor, *, classifier: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Moments (d + 1, d + 1), and targets' sums of features (K, d) and of ones (K,), all float64."""
    num_classes, dim = classifier.weight.shape
    moments = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)
    sums, counts = torch.zeros(num_classes, dim).double(), torch.zeros(num_classes).double()
    for block in rows.split(BLOCK_ROWS):
        features = block.float()
        targets = torch.softmax(classifier.logits(features), dim=1)
        moments += row_moments(features)
        sums += product_sum(targets, features)
        counts += targets.sum(dim=0, dtype=torch.float64)
    return moments, sums, counts
