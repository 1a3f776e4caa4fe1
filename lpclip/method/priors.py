"""The class prior: shares that the pseudo-labels are pulled to, and how strongly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lpclip.config import UserError, counted

# Factors stay within this ratio of the prior's own. Where it fits they need about 3; where it does not they would
# grow without bound, round after round, for classes that have no image.
MAX_FACTOR = 5.0


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The class shares q that targets are pulled to, and the strength of the pull."""

    shares: Tensor | None = None
    """(K,), summing to 1; uniform when None."""
    strength: float = 1.0
    """The exponent a in (0, 1]: 1 is the full correction. 0 leaves the targets alone."""

    def among(self, places: np.ndarray) -> Prior:
        """The prior of the classes at `places` (K',) alone: their shares, which sum to 1 again."""
        if self.shares is None:
            return self
        shares = self.shares[places]
        return replace(self, shares=shares / shares.sum())

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
    """A step of v_k <- (r_k / mean_i(p0_ik / sum_j p0_ij v_j))^a, normalised to mean 1; `sums` of all shards.

    r is `prior.target`, halfway to the prior q; a is the prior's strength. Each step starts from the original
    posteriors p0: steps that start from corrected posteriors would reach r in the end, however small a is.
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


# The pull to equal shares where nothing says that they are equal: enough for classes that zero-shot hardly ever
# names, not enough to cut one class into many.
WEAK_STRENGTH = 0.3


# `auto` chooses between the first two: lpclip/method/confirmation.py.
PRIORS = {"uniform": Prior(), "weak": Prior(strength=WEAK_STRENGTH), "none": Prior(strength=0.0)}


def read_prior(spec: str, class_names: tuple[str, ...], *, text: str | None = None) -> Prior | None:
    """The prior that `--prior` names, None for `auto`; `text` is its file, one weight a line or `name<TAB>weight`.

    Raises UserError when the weights do not fit the classes.
    """
    if spec == "auto":
        return None
    if spec in PRIORS:
        return PRIORS[spec]
    assert text is not None, spec
    rows = [line.strip().rsplit("\t", 1) for line in text.splitlines() if line.strip()]
    try:
        weights = [float(row[-1]) for row in rows]
    except ValueError as error:
        raise UserError(f"--prior {spec} holds something that is not a weight: {error}") from error
    if any(len(row) == 2 for row in rows):
        names = [row[0].strip() for row in rows if len(row) == 2]
        if len(names) != len(rows) or sorted(names) != sorted(class_names):
            missing = [name for name in class_names if name not in names]
            raise UserError(
                f"--prior {spec} must name each class once; missing: {', '.join(missing) or 'none'}"
            )
        weights = [weights[names.index(name)] for name in class_names]
    if len(weights) != len(class_names):
        raise UserError(
            f"--prior {spec} has {counted(len(weights), 'weight')} for {len(class_names)} classes"
        )
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise UserError(f"--prior {spec}: weights must be positive numbers")
    shares = torch.tensor(weights, dtype=torch.float64)
    return Prior(shares=shares / shares.sum())
