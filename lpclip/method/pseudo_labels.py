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
    """The factor on logits (N, K) that gives them this mean maximal probability, by bisection of its log."""
    low, high = -12.0, 12.0
    for _ in range(24):
        middle = (low + high) / 2
        found = all_reduce(confidence_sums(logits * 2.0**middle))
        low, high = (middle, high) if found[0] < target * found[1] else (low, middle)
    return 2.0 ** ((low + high) / 2)


def confidence_sums(logits: Tensor) -> Tensor:
    """(2,) float64: the sum of maximal probabilities, and the number of rows."""
    # torch.softmax takes ten times as long for few classes, and only its largest value is wanted.
    top = 1 / torch.exp(logits - logits.amax(dim=1, keepdim=True)).sum(dim=1)
    return torch.stack([top.double().sum(), torch.tensor(float(len(logits)), dtype=torch.float64)])
