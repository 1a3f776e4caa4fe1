"""Do the class names say anything of the images? A test against names that mean nothing.

Zero-shot is surer of images that its names fit than random directions are, spread about the same centre as the names'
embeddings. So its mean confidence is compared with that of random heads, as in a permutation test. The test holds for
a few dozen images as for many, and labels play no part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A head without meaning passes with a chance of one in HEADS + 1.
HEADS = 40
ROWS = 2_000


def chance_confidence(features: Tensor, head: Tensor, *, temperature: float) -> float:
    """The largest mean confidence that random heads have on features (n, d) of unit norm.

    They have as many directions as the head (K, d), of unit norm, at the same mean distance from the same centre.
    """
    heads = (random_head(head, seed=seed) for seed in range(HEADS))
    return max(head_confidence(features, other, temperature=temperature) for other in heads)


def head_confidence(features: Tensor, head: Tensor, *, temperature: float) -> float:
    """Mean maximal probability of zero-shot with a head (K, d) on the first 2,000 features (n, d)."""
    logits = features[:ROWS].float() @ head.T / temperature
    return float(torch.softmax(logits, dim=1).amax(dim=1).double().mean())


def random_head(head: Tensor, *, seed: int) -> Tensor:
    """Directions (K, d) of unit norm that mean nothing, spread about the head's centre as its own are."""
    centre = head.mean(dim=0)
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed))
    spread = (head - centre).norm(dim=1).mean()
    return F.normalize(centre + spread * F.normalize(noise, dim=1), dim=1)
