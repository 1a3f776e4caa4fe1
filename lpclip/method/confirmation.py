"""What can be chosen without a label: how far to trust equal class shares, and whether to trust the rounds at all.

The whitened features are cut into two halves of their directions, which makes two views of every image, and the
rounds are run in each view alone. Where classes are real, views that cannot see each other find the same ones;
where a prior has cut one class into many, each view cuts along its own noise. So the share of labels that the
views confirm tells good rounds from bad ones. That classifiers of independent views can hardly agree unless they
are right is the argument of co-training (Blum and Mitchell, COLT 1998; Dasgupta et al., NeurIPS 2001).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpclip.config import SelfTrainingConfig
from lpclip.method.gaussian import Whitening
from lpclip.method.neighbours import nearest
from lpclip.method.priors import PRIORS, Prior
from lpclip.method.recipe import RECIPE, Recipe
from lpclip.method.self_training import Rounds
from lpclip.method.shard import Shard, fit_whitening

SAMPLE_ROWS = 10_000
VIEW_ROWS = 6_000
SPLITS = 4
ROUNDS = 20
VIEW_ROUNDS = 12
# Equal shares may be confirmed this much less often than a weak pull to them, but the more unequal the labels are
# that the weak pull gives, the more is asked of them: by their distance from equal shares in relative entropy.
TOLERANCE = 0.02
SUSPICION = 0.2
# Beyond chance: views of pure noise confirm up to 0.25 (they start from the same labels), real classes 0.4 and more.
MIN_KAPPA = 0.28
# With fewer images for each class name, the rounds' probe fits the images it saw and no others.
MIN_IMAGES_PER_CLASS = 10


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What the views make of the rounds with a prior."""

    agreement: float
    """The mean share of the rounds' labels that rounds in a view alone, from the same zero-shot labels, repeat."""
    kappa: float
    """The same beyond what labels of these frequencies share by chance (Cohen, 1960): 0 by chance, 1 for all."""
    entropy: float
    """Entropy of the labels' class shares over that of equal shares."""
    images_per_class: float
    """Images over class names."""

    @property
    def trusted(self) -> bool:
        """Whether there is anything in the rounds at all."""
        return self.kappa >= MIN_KAPPA and self.images_per_class >= MIN_IMAGES_PER_CLASS


class Sample:
    """A sample of the unlabelled images with its views, on which rounds are tried."""

    def __init__(
        self,
        features: np.ndarray,
        *,
        zero_shot: Tensor,
        temperature: float,
        config: SelfTrainingConfig,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Features (n, d) in an order that says nothing, a head (K, d) of unit norm; `dtype` compares neighbours."""
        self._head, self._config = zero_shot / temperature, config
        self._images_per_class = len(features) / len(zero_shot)
        rows = features[:SAMPLE_ROWS]
        shard = Shard(features=rows, num_rows=len(rows))
        whitening = fit_whitening(shard)
        options: dict[str, Any] = {"config": config, "num_classes": len(zero_shot), "dtype": dtype}
        self._whole = with_neighbours(shard, whitening=whitening, **options)
        seen = torch.from_numpy(rows[:VIEW_ROWS]).float()
        logits = seen @ zero_shot.T / temperature
        whitened = (seen - whitening.mean.float()) @ whitening.whitener.float()
        self._views = []
        for seed in range(SPLITS):
            order = torch.randperm(whitened.shape[1], generator=torch.Generator().manual_seed(seed))
            for half in order.chunk(2):
                view = torch.nn.functional.normalize(whitened[:, half], dim=1).numpy()
                part = Shard(features=view, num_rows=len(view), zero_shot=logits)
                self._views.append(with_neighbours(part, whitening=None, **options))

    def confirm(self, prior: Prior) -> Confirmation:
        """Try the rounds with a prior, and in the views."""
        labels = self._labels(self._whole, prior=prior, rounds=ROUNDS)[: len(self._views[0].features)]
        # Zero-shot sees the whole image: the views start from its labels, and then do without it.
        views = [
            self._labels(view, prior=prior, rounds=VIEW_ROUNDS, recipe=replace(RECIPE, zero_shot_share=0.0))
            for view in self._views
        ]
        shares = [np.bincount(found, minlength=len(self._head)) / len(labels) for found in (labels, *views)]
        agreement = float(np.mean([(found == labels).mean() for found in views]))
        chance = float(np.mean([shares[0] @ other for other in shares[1:]]))
        return Confirmation(
            agreement=agreement,
            kappa=(agreement - chance) / max(1 - chance, 1e-9),
            images_per_class=self._images_per_class,
            entropy=float(
                -(shares[0] * np.log(np.maximum(shares[0], 1e-12))).sum() / np.log(max(2, len(self._head)))
            ),
        )

    def _labels(self, shard: Shard, *, prior: Prior, rounds: int, recipe: Recipe = RECIPE) -> np.ndarray:
        config = replace(self._config, rounds=rounds, threshold=0.0)
        *_, (_, found) = Rounds(shard, head=self._head, prior=prior, config=config, recipe=recipe).run()
        return found.labels


def with_neighbours(
    shard: Shard,
    *,
    config: SelfTrainingConfig,
    num_classes: int,
    whitening: Whitening | None,
    dtype: torch.dtype,
) -> Shard:
    """A shard of all rows with as many neighbours as the rounds use, compared in `dtype` (in `whitening`, if any)."""
    count = RECIPE.neighbour_count(config, num_rows=shard.num_rows, num_classes=num_classes)
    if count == 0:
        return shard
    rows = shard.features
    found = nearest(rows, among=rows, first_row=0, whitening=whitening, count=count, dtype=dtype)
    return replace(shard, neighbours=found)


def choose_prior(
    sample: Sample, *, show: Callable[[str, Confirmation], None] = lambda name, found: None
) -> tuple[str, dict[str, Confirmation]]:
    """Name in `PRIORS`, and what the views make of each candidate: equal class shares where they bear them out.

    `show` is told of each candidate as it has been tried.
    """
    found = {}
    for name in ("uniform", "weak"):
        found[name] = sample.confirm(PRIORS[name])
        show(name, found[name])
    doubt = SUSPICION * (1 - found["weak"].entropy) - TOLERANCE
    equal = found["uniform"].agreement >= found["weak"].agreement + doubt
    return "uniform" if equal else "weak", found
