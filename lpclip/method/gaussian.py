"""Gaussian classes with one covariance, in closed form, in the whitened space of all features."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpclip.method.linear import Linear


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """Features centred and whitened by their shrunk covariance: z = (f - mean) . whitener."""

    mean: Tensor
    """(d,) float64."""
    whitener: Tensor
    """(d, d) float64: eigenvectors over the root of the shrunk eigenvalues."""
    variance: Tensor
    """(d,) float64: what is left of each whitened direction's variance, at most about 1."""
    shrinkage: float
    num_rows: float

    def to(self, device: torch.device) -> Whitening:
        """The same on another device."""
        mean, whitener = self.mean.to(device), self.whitener.to(device)
        return replace(self, mean=mean, whitener=whitener, variance=self.variance.to(device))


def make_whitening(moments: Tensor) -> Whitening:
    """The whitening of features with moments (d + 1, d + 1) float64: the sum of [1 f]'[1 f] over all rows.

    The covariance is shrunk toward a multiple of the identity by max(0.1, 2d / (2d + n)): with fewer images
    than dimensions, directions that the sample did not see must not be blown up.
    """
    num_rows, dim = moments[0, 0], len(moments) - 1
    mean = moments[0, 1:] / num_rows
    covariance = moments[1:, 1:] / num_rows - torch.outer(mean, mean)
    shrinkage = max(0.1, 2 * dim / (2 * dim + float(num_rows)))
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    floor = values.mean().clamp_min(1e-12)
    shrunk = (1 - shrinkage) * values + shrinkage * floor
    return Whitening(
        mean=mean,
        whitener=vectors / shrunk.sqrt(),
        variance=values / shrunk,
        shrinkage=shrinkage,
        num_rows=float(num_rows),
    )


def row_moments(features: Tensor) -> Tensor:
    """Sum of [1 f]'[1 f] over rows (N, d), float64 (d + 1, d + 1)."""
    rows = torch.nn.functional.pad(features.float(), (1, 0), value=1.0)
    return (rows.T @ rows).double()


def gaussian_probe(sums: Tensor, counts: Tensor, *, whitening: Whitening) -> Linear:
    """Shared-covariance Gaussian classes as a linear classifier of raw features.

    `sums` (K, d) and `counts` (K,), float64, are the targets' sums of features and of ones. In the whitened
    space the within-class covariance is total minus between, S = D - M' P M with D diagonal, M the class
    means (K, d) and P = diag(counts / n), where n counts the rows under the threshold too: with the kept rows
    alone, S would not be positive definite. It is shrunk by L toward its mean variance t,
        (1 - L) S + L t I = E - (1 - L) M' P M,    E = (1 - L) D + L t I,
    and inverted by the Woodbury identity, a K x K system:
        S^-1 M' = E^-1 M' (I + (((1 - L) P)^-1 - G)^-1 G),    G = M E^-1 M'.
    Logits: z . S^-1 mu_k - mu_k' S^-1 mu_k / 2 (linear discriminant analysis, equal priors).
    """
    seen = counts.clamp_min(1e-3)
    share = seen / whitening.num_rows  # P
    means = (sums / seen[:, None] - whitening.mean) @ whitening.whitener  # M
    shrinkage = max(0.3, whitening.shrinkage)  # L
    within = (whitening.variance.sum() - (share[:, None] * means**2).sum()) / len(whitening.variance)
    diagonal = (1 - shrinkage) * whitening.variance + shrinkage * within.clamp_min(1e-6)  # E, with t = within
    scaled = means / diagonal  # M E^-1
    gram = scaled @ means.T  # G
    inner = torch.diag(1 / (share * (1 - shrinkage))) - gram
    directions = scaled + torch.linalg.solve(inner, gram).T @ scaled  # M S^-1, S shrunk
    weight = directions @ whitening.whitener.T
    bias = -(directions * means).sum(dim=1) / 2 - weight @ whitening.mean
    return Linear(weight=weight.float(), bias=bias.float())
