"""The two solvers, which fit a student to a teacher's labels: Gaussian classes in closed form, and Adam."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lpclip.method.gaussian import TextAnchors, Whitening, gaussian_probe, mean_evidence
from lpclip.method.linear import Linear
from lpclip.method.pseudo_labels import AllReduce, scale_to_confidence
from lpclip.method.recipe import Recipe
from lpclip.method.shard import CPU, Shard
from lpclip.method.state import Pass, State


@dataclass(frozen=True, kw_only=True)
class Student(Linear):
    """A student in units of logits."""

    zero_shot_share: float
    """Share of the zero-shot logits that is added to its own."""
    evidence: float
    """How much of it comes from images rather than from texts, 0 to 1."""


class Solver(Protocol):
    """A way to fit a student."""

    def fit(self, teacher: State, labelled: Pass) -> Student:
        """Fit a student to the labels of the teacher's pass."""


@dataclass(frozen=True, kw_only=True)
class GaussianSolver:
    """Gaussian classes from the targets' sums and the texts, scaled to the recipe's confidence times the evidence."""

    shard: Shard
    head: Tensor
    """(K, d) float32 zero-shot weights in units of logits."""
    whitening: Whitening
    zero_shot_share: float
    """Share of the zero-shot logits that is added with full evidence; without any, they stand alone."""
    recipe: Recipe
    all_reduce: AllReduce

    def fit(self, teacher: State, labelled: Pass) -> Student:
        """Fit the classes. Nothing of the teacher is needed but its labels' sums."""
        return self.fit_sums(labelled.sums, labelled.counts)

    def fit_sums(self, sums: Tensor, counts: Tensor) -> Student:
        """Fit the classes to the targets' sums of features (K, d) and of ones (K,), float64."""
        device = self.shard.device
        sums, counts = sums.to(device), counts.to(device)
        anchors = TextAnchors(head=self.head.to(device), rows=self.recipe.text_rows)
        fitted = gaussian_probe(
            sums,
            counts,
            whitening=self._whitening,
            anchors=anchors if self.recipe.text_rows else None,
        )
        rows = max(0, min(self.recipe.scale_rows, self.shard.num_rows) - self.shard.first_row)
        logits = fitted.logits(torch.from_numpy(self.shard.features[:rows]).to(device))
        scale = (
            scale_to_confidence(logits, self.recipe.confidence, all_reduce=self.all_reduce) * fitted.evidence
        )
        return Student(
            weight=(scale * fitted.weight).to(CPU),
            bias=(scale * fitted.bias).to(CPU),
            zero_shot_share=1 - (1 - self.zero_shot_share) * fitted.evidence,
            evidence=fitted.evidence,
        )

    @cached_property
    def _whitening(self) -> Whitening:
        """On the shard's device, with its root and variance, which are the same in all rounds."""
        return self.whitening.to(self.shard.device)


@dataclass(frozen=True, kw_only=True)
class GradientSolver:
    """LP-CLIP's objective (reconstructed): cross-entropy of the strong views against the teacher's labels.

    Each row counts by its confidence; rows under the threshold are left out. The loss adds the log of the labels' class
    shares to the logits (logit adjustment, Menon et al., ICLR 2021): what makes a class frequent among the labels is
    then explained by its share, not learnt. Adam starts from the teacher and takes batches that are cut from a seeded
    permutation of all rows, so that every number of workers takes the same steps.
    """

    shard: Shard
    head: Tensor
    """(K, d) float32 zero-shot weights in units of logits."""
    seed: int
    recipe: Recipe
    all_reduce: AllReduce

    def fit(self, teacher: State, labelled: Pass) -> Student:
        """Fit by steps from the teacher's own weights."""
        weight, device = teacher.weight + teacher.zero_shot_share * self.head, self.shard.device
        parameters = torch.cat([weight, teacher.bias[:, None]], dim=1).to(device)
        optimiser = torch.optim.Adam([parameters], lr=self.recipe.gradient_rate)
        # A row more for each class: one that no label has stays possible.
        shares = ((labelled.counts + 1) / (labelled.counts + 1).sum()).log().float().to(device)
        views = self.shard.strong or (self.shard.features,)
        weights = torch.from_numpy(np.where(labelled.kept, labelled.confidence, 0).astype(np.float32))
        for epoch in range(self.recipe.gradient_epochs):
            view = views[(epoch + teacher.round) % len(views)]
            for batch in self._batches(teacher.round, epoch):
                mine = np.sort(
                    batch[(batch >= self.shard.first_row) & (batch < self.shard.first_row + len(weights))]
                )
                mine = mine - self.shard.first_row
                labels = torch.from_numpy(labelled.labels[mine]).long().to(device)
                gradient = weighted_cross_entropy_gradient(
                    torch.from_numpy(view[mine]).to(device).float(),
                    torch.nn.functional.one_hot(labels, len(teacher.bias)).float(),
                    weights[mine].to(device),
                    weight=parameters[:, :-1],
                    bias=parameters[:, -1] + self.recipe.gradient_balance * shares,
                )
                parameters.grad = (self.all_reduce(gradient.cpu()) / len(batch)).float().to(device)
                optimiser.step()
        # With few images a class, the steps fit the images seen and no others: zero-shot makes up the rest.
        evidence = mean_evidence(labelled.counts, text_rows=self.recipe.text_rows)
        learnt = evidence * parameters.to(CPU)
        return Student(
            weight=learnt[:, :-1].contiguous(),
            bias=learnt[:, -1],
            zero_shot_share=1 - evidence,
            evidence=evidence,
        )

    def _batches(self, round_number: int, epoch: int) -> list[np.ndarray]:
        """Places among all rows of each batch of an epoch."""
        seed = self.seed * 1_000_003 + round_number * 1009 + epoch
        order = torch.randperm(self.shard.num_rows, generator=torch.Generator().manual_seed(seed)).numpy()
        return np.array_split(order, max(1, round(self.shard.num_rows / self.recipe.gradient_batch)))


def weighted_cross_entropy_gradient(
    features: Tensor, targets: Tensor, weights: Tensor, *, weight: Tensor, bias: Tensor
) -> Tensor:
    """Gradient (K, d + 1) float64 of sum_i w_i CE(targets_i, softmax(f_i weight' + bias)), bias last."""
    residual = (torch.softmax(features @ weight.T + bias, dim=1) - targets) * weights[:, None]
    return torch.cat([residual.T @ features, residual.sum(dim=0)[:, None]], dim=1).double()
