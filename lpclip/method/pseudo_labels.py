"""Pseudo-labels: from a linear teacher's logits to soft targets and weights, without any label.

Everything works on rows of one shard and on sums that add up over shards; `all_reduce` adds them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over all workers."""

# Sharp softmaxes are full of denormal floats, which slow a matrix product many times over.
SMALLEST_TARGET = 1e-6


def alone(tensor: Tensor) -> Tensor:
    """The all-reduce of a single worker: the tensor as it is."""
    return tensor


def soft_targets(logits: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Posteriors p0 = softmax(logits) and targets p proportional to p0 v, both (N, K), for column factors v (K,)."""
    posterior = torch.softmax(logits, dim=1)
    targets = posterior * factors
    targets = targets / targets.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return posterior, torch.where(targets < SMALLEST_TARGET, 0.0, targets)


def scale_to_confidence(logits: Tensor, target: float, *, all_reduce: AllReduce) -> float:
    """The factor on logits (N, K) that gives them this mean maximal probability, over all shards' rows."""

    def too_unsure(factor: float) -> bool:
        total, rows = all_reduce(confidence_sums(logits * factor).cpu())
        return bool(total < target * rows)

    return bisect_factor(too_unsure, octaves=12, steps=24)


def bisect_factor(too_small: Callable[[float], bool], *, octaves: float, steps: int) -> float:
    """The factor at which `too_small` turns from true to false, within 2^-octaves to 2^octaves, by its logarithm."""
    low, high = -octaves, octaves
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(2.0**middle) else (low, middle)
    return 2.0 ** ((low + high) / 2)


def confidence_sums(logits: Tensor) -> Tensor:
    """(2,) float64: the sum of maximal probabilities, and the number of rows."""
    # torch.softmax takes ten times as long for few classes, and only its largest value is wanted.
    top = 1 / torch.exp(logits - logits.amax(dim=1, keepdim=True)).sum(dim=1)
    rows = torch.full((), len(logits), dtype=torch.float64, device=logits.device)
    return torch.stack([top.double().sum(), rows])
