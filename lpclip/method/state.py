"""The things that a round hands to the next one: the student, and its pass over the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpclip.method.linear import Linear
from lpclip.method.pseudo_labels import AllReduce


@dataclass(frozen=True, kw_only=True)
class State:
    """A round's student, who teaches the next round: all that a checkpoint holds."""

    round: int
    weight: Tensor
    """(K, d) float32: what the rounds learnt, in units of logits."""
    bias: Tensor
    """(K,) float32, without the prior's log factors."""
    factors: Tensor
    """(K,) float32: the prior's column factors."""
    zero_shot_share: float = 0.0
    """Share of the zero-shot logits that is added."""
    evidence: float = 1.0
    """How much of it comes from images rather than from texts, 0 to 1; the neighbours count by it."""
    metrics: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> State:
        """The same with its tensors on another device."""
        weight, bias, factors = self.weight.to(device), self.bias.to(device), self.factors.to(device)
        return replace(self, weight=weight, bias=bias, factors=factors)

    def classifier(self, head: Tensor) -> Linear:
        """The state as a linear classifier, given the zero-shot `head` (K, d) in units of logits."""
        return Linear(
            weight=self.weight + self.zero_shot_share * head,
            bias=self.bias + self.factors.clamp_min(1e-12).log(),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as safetensors takes them."""
        return {"weight": self.weight, "bias": self.bias, "factors": self.factors}


def zero_shot_state(num_classes: int, dim: int) -> State:
    """The first teacher: zero-shot itself, without factors of a prior."""
    return State(
        round=0,
        weight=torch.zeros(num_classes, dim),
        bias=torch.zeros(num_classes),
        factors=torch.ones(num_classes),
        zero_shot_share=1.0,
    )


class Tally(NamedTuple):
    """Sums over the rows of a pass."""

    rows: float = 0.0
    kept: float = 0.0
    """Rows whose confidence reaches the threshold."""
    confidence: float = 0.0
    """Sum of the largest targets."""
    flips: float = 0.0
    """Rows whose label is another than in the pass before."""
    agreement: float = 0.0
    """Rows whose label is zero-shot's."""


LARGEST_TARGETS = 16
"""So many targets of a row are kept for its neighbours. All targets of ImageNet's images would take 5 GB."""


@dataclass(frozen=True, kw_only=True)
class SharedTargets:
    """The largest targets of all shards' rows, which neighbours look up."""

    values: Tensor
    """(num_rows, t) float32."""
    classes: Tensor
    """(num_rows, t) int32, each row's all different."""

    @classmethod
    def zeros(cls, num_rows: int, num_classes: int, *, device: torch.device) -> SharedTargets:
        """Of no row yet. Every shard fills in its own rows, then they are added up."""
        size = (num_rows, min(num_classes, LARGEST_TARGETS))
        values = torch.zeros(size, device=device)
        return cls(values=values, classes=torch.zeros(size, dtype=torch.int32, device=device))

    def to(self, device: torch.device) -> SharedTargets:
        """The same with its tensors on another device."""
        return SharedTargets(values=self.values.to(device), classes=self.classes.to(device))

    def fill(self, first_row: int, targets: Tensor) -> None:
        """Set the rows from `first_row` on to their targets (m, K)."""
        values, classes = targets.topk(self.values.shape[1], dim=1)
        self.values[first_row : first_row + len(targets)] = values
        self.classes[first_row : first_row + len(targets)] = classes.int()

    def mean_of(self, places: Tensor, *, num_classes: int) -> Tensor:
        """The mean targets (m, K) of the rows at places (m, k)."""
        total = torch.zeros(len(places), num_classes, device=places.device)
        # One neighbour after the other: its classes are all different, so a GPU adds in the same order every time.
        for each in places.long().unbind(dim=1):
            total.scatter_add_(1, self.classes[each].long(), self.values[each])
        return total / places.shape[1]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A teacher's labels of a shard's rows, with the sums of all shards."""

    sums: Tensor
    """(K, d) float64: targets' sums of features, over rows that are kept. All sums are on the CPU."""
    counts: Tensor
    """(K,) float64: targets' sums over rows that are kept."""
    prior: Tensor
    """(2, K) float64: what a step of the prior's factors needs."""
    tally: Tally
    labels: np.ndarray
    """(n,) int32, this shard's."""
    confidence: np.ndarray
    """(n,) float32, this shard's."""
    kept: np.ndarray
    """(n,) bool, this shard's."""
    targets: SharedTargets | None
    """Where neighbours are used."""

    def over_shards(self, all_reduce: AllReduce) -> Pass:
        """The pass with the sums and the targets of all shards, from one with its own shard's."""
        tally = torch.tensor(self.tally, dtype=torch.float64)
        parts = (self.sums, self.counts, self.prior, tally)
        flat = all_reduce(torch.cat([part.flatten().cpu() for part in parts]))
        pieces = flat.split([part.numel() for part in parts])
        sums, counts, prior, tally = (p.reshape(o.shape) for p, o in zip(pieces, parts, strict=True))
        targets = self.targets
        if targets is not None:
            targets = SharedTargets(values=all_reduce(targets.values), classes=all_reduce(targets.classes))
        return replace(
            self, sums=sums, counts=counts, prior=prior, tally=Tally(*tally.tolist()), targets=targets
        )

    def metrics(self) -> dict[str, float]:
        """Metrics of a round: shares of all rows, and the entropy of the class shares over log K."""
        rows, kept, confidence, flips, agreement = self.tally
        share = self.counts / self.counts.sum().clamp_min(1e-12)
        entropy = -(share * share.clamp_min(1e-12).log()).sum() / math.log(len(share))
        return {
            "coverage": kept / rows,
            "mean_confidence": confidence / rows,
            "class_entropy": float(entropy),
            "flip_rate": flips / rows,
            "zero_shot_agreement": agreement / rows,
        }
