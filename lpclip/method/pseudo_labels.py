"""Pseudo-labels: from a linear teacher's logits to soft targets and weights, without any label.

Everything works on rows of one shard and on sums that add up over shards; `all_reduce` adds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]

# Sharp softmaxes are full of denormal floats, which slow a matrix product many times over.
SMALLEST_TARGET = 1e-6
# Factors stay within this ratio of the prior's own. Where it fits they need about 3; where it does not they would
# grow without bound, round after round, for classes that have no image.
MAX_FACTOR = 5.0


def soft_targets(logits: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Posteriors p0 = softmax(logits) and targets p proportional to p0 v, both (N, K), for column factors v (K,)."""
    posterior = torch.softmax(logits, dim=1)
    targets = posterior * factors
    targets = targets / targets.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return posterior, torch.where(targets < SMALLEST_TARGET, 0.0, targets)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The class shares that targets are drawn to, by the same amount however long it iterates: the strength."""

    shares: Tensor | None = None
    """(K,), summing to 1; uniform when None."""
    strength: float = 1.0
    """0 leaves the targets alone."""

    def target(self, counts: Tensor) -> Tensor:
        """The shares (K,) float64 to ask for, given the posteriors' class counts (K,): halfway to the prior.

        The rounds go the rest of the way, half of it each, as classes take shape; asked for at once, the prior
        hands a class of which nothing is known yet to the rows that are least sure.
        """
        wanted = torch.full_like(counts, 1 / len(counts)) if self.shares is None else self.shares.double()
        return (counts / counts.sum().clamp_min(1) + wanted) / 2


def prior_sums(posterior: Tensor, factors: Tensor) -> Tensor:
    """Sums (2, K) float64 over rows that a step of `update_factors` needs: of p0, and of p0 / (p0 . v)."""
    mixture = (posterior @ factors).clamp_min(1e-30)
    ratios = (posterior / mixture[:, None]).sum(dim=0, dtype=torch.float64)
    return torch.stack([posterior.sum(dim=0, dtype=torch.float64), ratios])


def update_factors(sums: Tensor, *, prior: Prior) -> Tensor:
    """A step of v_k <- (q_k / mean_i(p0_ik / sum_j p0_ij v_j))^a, normalised to mean 1; `sums` of all shards.

    Always from the original posteriors p0: iterating on corrected ones would end at q for every strength a > 0.
    """
    counts, ratios = sums
    if prior.strength == 0:
        return torch.ones_like(counts).float()
    num_rows = counts.sum().clamp_min(1)
    wanted = prior.target(counts) / (ratios / num_rows).clamp_min(1e-12)
    factors = wanted.clamp(1e-6, 1e6) ** prior.strength
    own = torch.ones_like(counts) if prior.shares is None else prior.shares.double() * len(counts)
    factors = own * (factors / own / (factors / own).log().mean().exp()).clamp(1 / MAX_FACTOR, MAX_FACTOR)
    return (factors / factors.mean()).float()


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
