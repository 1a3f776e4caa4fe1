"""Gaussian classes with one covariance, in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lpclip.method.linear import Linear

# The total covariance is shrunk by this much at least, and as if IDENTITY_ROWS rows a dimension had shown the identity.
LEAST_TOTAL_SHRINKAGE = 0.1
IDENTITY_ROWS = 2.0
# The within-class covariance is shrunk by this much at least: the targets that it is computed from are not exact.
LEAST_SHRINKAGE = 0.3
# Share of the mean square of the features that is added to every variance.
ROUNDING = 1e-5


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """Mean and covariance of features, and the space in which they are white: z = (f - mean) . whitener."""

    mean: Tensor
    """(d,) float64."""
    covariance: Tensor
    """(d, d) float64, as it is."""
    shrunk: Tensor
    """(d, d) float64: the covariance, shrunk toward a multiple of the identity."""
    shrinkage: float
    num_rows: float

    def to(self, device: torch.device) -> Whitening:
        """The same on a device; itself, with what it knows already, where it is there."""
        if self.mean.device == device:
            return self
        mean, covariance, shrunk = (part.to(device) for part in (self.mean, self.covariance, self.shrunk))
        return replace(self, mean=mean, covariance=covariance, shrunk=shrunk)

    @cached_property
    def root(self) -> Tensor:
        """(d, d) float64, the lower triangle L with L L' = shrunk."""
        return torch.linalg.cholesky(self.shrunk)

    @cached_property
    def total_variance(self) -> float:
        """Sum of the variances in the white space."""
        return float((torch.cholesky_inverse(self.root) * self.covariance).sum())

    @cached_property
    def whitener(self) -> Tensor:
        """(d, d) float64: the transposed inverse of the root."""
        identity = torch.eye(len(self.mean), dtype=self.root.dtype, device=self.root.device)
        return torch.linalg.solve_triangular(self.root, identity, upper=False).T

    @cached_property
    def principal(self) -> Tensor:
        """(d, d) float64: the whitener whose directions are uncorrelated; they are the principal ones."""
        vectors = torch.linalg.eigh(self.covariance).eigenvectors
        return vectors / (vectors * (self.shrunk @ vectors)).sum(dim=0).sqrt()

    def whitened(self, differences: Tensor) -> Tensor:
        """Differences of features (n, d) float64 in the white space."""
        return torch.linalg.solve_triangular(self.root, differences.T, upper=False).T


def make_whitening(moments: Tensor) -> Whitening:
    """The whitening of features with moments (d + 1, d + 1) float64: the sum of [1 f]'[1 f] over all rows.

    The covariance is shrunk toward a multiple of the identity by max(0.1, 2d / (2d + n)): with fewer images
    than dimensions, directions that the sample did not see must not be blown up.
    """
    num_rows, dim = moments[0, 0], len(moments) - 1
    mean = moments[0, 1:] / num_rows
    covariance = moments[1:, 1:] / num_rows - torch.outer(mean, mean)
    identity_rows = IDENTITY_ROWS * dim
    shrinkage = max(LEAST_TOTAL_SHRINKAGE, identity_rows / (identity_rows + float(num_rows)))
    identity = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    # More than float32's rounding took: rows that are all alike would have a covariance that is not even positive.
    covariance += (ROUNDING * moments[1:, 1:].trace() / num_rows / dim).clamp_min(1e-12) * identity
    floor = covariance.trace() / dim
    return Whitening(
        mean=mean,
        covariance=covariance,
        shrunk=(1 - shrinkage) * covariance + shrinkage * floor * identity,
        shrinkage=shrinkage,
        num_rows=float(num_rows),
    )


def row_moments(features: Tensor) -> Tensor:
    """Sum of [1 f]'[1 f] over rows (N, d), float64 (d + 1, d + 1)."""
    rows = torch.nn.functional.pad(features.float(), (1, 0), value=1.0)
    return (rows.T @ rows).double()


@dataclass(frozen=True, kw_only=True)
class TextAnchors:
    """The texts' opinion of where the classes lie, and its weight."""

    head: Tensor
    """(K, d) zero-shot weights in units of logits."""
    rows: float
    """The images for which a class's text counts."""


@dataclass(frozen=True, kw_only=True)
class GaussianClasses(Linear):
    """Gaussian classes as a linear classifier, with the weight that the images have in them."""

    evidence: float
    """Mean over the images of b_k, the share of their class's mean that comes from images: 0 to 1."""


def gaussian_probe(
    sums: Tensor, counts: Tensor, *, whitening: Whitening, anchors: TextAnchors | None = None
) -> GaussianClasses:
    """Shared-covariance Gaussian classes as a linear classifier of features: linear discriminant analysis.

    `sums` (K, d) and `counts` (K,), float64, are the targets' sums of features and of ones. With M_k the targets'
    means and P = diag(counts / n), the within-class covariance is total minus between, W = C - M' P M. n counts the
    rows under the threshold too: with the kept rows alone, W would not be positive definite. It is shrunk by L toward
    the shrunk total covariance C', scaled to the same mean variance in the white space, S = (1 - L) W + L t C'.

    Logits, of equal priors: (f - mean) . S^-1 m_k - m_k' S^-1 m_k / 2. The class means m_k, of which the mean of all
    features is taken off, are M_k, or, with `anchors`, their mixture with what the texts say (`anchored_means`).
    """
    share = (counts / whitening.num_rows)[:, None]  # P
    # A class without rows lies at the mean of all.
    found = (sums - counts[:, None] * whitening.mean) / (counts[:, None] + 1e-6)  # M
    trust = image_share(counts, text_rows=0.0 if anchors is None else anchors.rows)
    means = found if anchors is None else anchored_means(found, trust, whitening=whitening, head=anchors.head)
    within = whitening.covariance - found.T @ (share * found)  # W
    between = float((share * whitening.whitened(found) ** 2).sum())
    variance = max(1e-6, (whitening.total_variance - between) / len(within))  # t
    shrinkage = max(LEAST_SHRINKAGE, whitening.shrinkage)  # L
    shrunk = (1 - shrinkage) * within + shrinkage * variance * whitening.shrunk  # S
    weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk)).T
    bias = -(weight * means).sum(dim=1) / 2 - weight @ whitening.mean
    evidence = mean_evidence(counts, text_rows=0.0 if anchors is None else anchors.rows)
    return GaussianClasses(weight=weight.float(), bias=bias.float(), evidence=evidence)


def image_share(counts: Tensor, *, text_rows: float) -> Tensor:
    """b_k = n_k / (n_k + text_rows) of classes with n_k images (K,): how much of a class's mean is the images'."""
    return counts / (counts + text_rows) if text_rows else torch.ones_like(counts)


def mean_evidence(counts: Tensor, *, text_rows: float) -> float:
    """The mean of b_k over the images, 0 to 1."""
    share = image_share(counts, text_rows=text_rows)
    return float((counts * share).sum() / counts.sum().clamp_min(1e-12))


def anchored_means(found: Tensor, trust: Tensor, *, whitening: Whitening, head: Tensor) -> Tensor:
    """Class means (K, d): the share b_k of M_k, which images found, and the rest from where the text puts the class.

    The text puts class k at m0 + a T_k: m0 is the mean of all M_k, T_k the covariance of the features with the
    zero-shot logit of the class, less its mean over the classes, and a the factor with which they come closest to the
    M_k in the white space (least squares). All three weigh a class by its b_k, `trust` (K,). So a class without images
    stands where its text says.
    """
    weights = (trust / trust.sum().clamp_min(1e-12))[:, None]
    centre = weights.T @ found  # m0
    pulled = head.double() @ whitening.covariance
    pulled = pulled - weights.T @ pulled  # T
    white, target = whitening.whitened(pulled), whitening.whitened(found - centre)
    factor = (weights * white * target).sum() / (weights * white**2).sum().clamp_min(1e-12)  # a
    text = centre + factor.clamp_min(0) * pulled
    return trust[:, None] * found + (1 - trust)[:, None] * text
