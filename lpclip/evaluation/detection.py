"""Detection of out-of-distribution images: scores of logits, and metrics of scores.

A larger score means more in-distribution throughout. Which side counts as positive differs between papers and
between libraries, and changes AUPR and FPR95: the names here say it, `_in` or `_out`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lpclip.evaluation.bootstrap import bootstrap_blocks, collect

SCORES = ("msp", "max_logit", "energy", "mcm")


def ood_scores(logits: Tensor, *, temperature: float, cosine_temperature: float) -> dict[str, Tensor]:
    """Scores (N,) float64 of logits (N, K), larger for more in-distribution. With z = logits / temperature:

    msp: max softmax(z) (Hendrycks and Gimpel, 2017).
    max_logit: max z (Hendrycks et al., 2022).
    energy: logsumexp(z), the negative free energy (Liu et al., 2020).
    mcm: max softmax(z * cosine_temperature) (Ming et al., 2022). Zero-shot CLIP's z are cosines over
    `cosine_temperature`, so this is the softmax of the cosines at temperature 1; logits of other probes are
    brought to that scale.

    Raises ValueError for temperatures that are not positive.
    """
    if not (temperature > 0 and cosine_temperature > 0):
        raise ValueError(f"temperatures must be positive, not {temperature} and {cosine_temperature}")
    # In float64: float32 rounds many confident rows to a probability of 1, which ties them.
    z = logits.double() / temperature
    largest, energy = z.amax(dim=1), z.logsumexp(dim=1)
    mcm = torch.softmax(z * cosine_temperature, dim=1).amax(dim=1)
    return dict(zip(SCORES, ((largest - energy).exp(), largest, energy, mcm), strict=True))


def detection_metrics(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """Metrics of scores that separate in-distribution images (N,) from others (M,); larger is more in-distribution.

    auroc: the share of pairs in which the in-distribution image scores higher, ties counting half.
    aupr_in, aupr_out: average precision, in-distribution or the others being positive (no interpolation).
    fpr95_in: the share of others accepted by the highest threshold that accepts at least 95% of in-distribution
    images (in-distribution positive, as in the papers of MSP and MCM).
    fpr95_out: the share of in-distribution images flagged by the lowest threshold that flags at least 95% of the
    others (the others positive, as in OpenOOD, pytorch-ood and TorchUncertainty).

    A threshold never parts equal scores. Raises ValueError for NaN or when a side is empty.
    """
    scores = torch.cat(_sides(inside, outside))
    levels, level = scores.unique(return_inverse=True)
    # Images at each distinct score, rising.
    n_in = torch.bincount(level[: len(inside)], minlength=len(levels))
    n_out = torch.bincount(level[len(inside) :], minlength=len(levels))
    won = 2 * (n_in * (n_out.cumsum(0) - n_out)).sum() + (n_in * n_out).sum()
    return {
        "auroc": int(won) / (2 * len(inside) * len(outside)),
        "aupr_in": _average_precision(n_in.flip(0), n_out.flip(0)),
        "aupr_out": _average_precision(n_out, n_in),
        "fpr95_in": _fpr95(n_in.flip(0), n_out.flip(0)),
        "fpr95_out": _fpr95(n_out, n_in),
    }


def auroc_interval(
    inside: Tensor, outside: Tensor, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of `detection_metrics`' AUROC, both sides resampled on their own."""
    inside, outside = (side.sort().values for side in _sides(inside, outside))
    below = torch.searchsorted(outside, inside)
    not_above = torch.searchsorted(outside, inside, right=True)
    n = (len(inside), len(outside))
    pairs = zip(
        bootstrap_blocks(n[0], resamples=resamples, seed=(seed, 0), beside=n[1]),
        bootstrap_blocks(n[1], resamples=resamples, seed=(seed, 1), beside=n[0]),
        strict=True,
    )

    def measure(n_in: Tensor, n_out: Tensor) -> Tensor:
        # Drawn images from the lowest score up: how many each in-distribution image beats, ties counting half.
        beaten = pad(n_out.cumsum(dim=1), (1, 0))
        twice = beaten.index_select(1, below) + beaten.index_select(1, not_above)
        return (n_in * twice).sum(dim=1, dtype=torch.float64)

    wins = collect((measure(*pair) for pair in pairs), resamples=resamples)
    aurocs = wins / (2 * len(inside) * len(outside))
    low, high = aurocs.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _sides(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    for name, scores in {"in-distribution": inside, "out-of-distribution": outside}.items():
        if scores.ndim != 1 or len(scores) == 0 or scores.isnan().any():
            raise ValueError(f"detection needs at least one {name} score, (N,) of them, and none may be NaN")
    return inside.double(), outside.double()


def _average_precision(positives: Tensor, negatives: Tensor) -> float:
    """From counts (L,) at each threshold, the most positive one first."""
    accepted = positives.cumsum(0)
    precision = accepted.double() / (accepted + negatives.cumsum(0))
    return float((precision * positives).sum() / positives.sum())


def _fpr95(positives: Tensor, negatives: Tensor) -> float:
    """From counts (L,) at each threshold, the most positive one first."""
    # In whole numbers: 0.95 N is not always exact.
    enough = 20 * positives.cumsum(0) >= 19 * positives.sum()
    return int(negatives.cumsum(0)[enough][0]) / int(negatives.sum())
