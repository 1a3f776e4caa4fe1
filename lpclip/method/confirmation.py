"""Confirmation of the rounds without a label: are equal class shares to be trusted, and the rounds at all?

The whitened features are cut into two halves of their directions, and the rounds are run in each half alone. Where
classes are real, halves that cannot see each other find the same ones; where a prior has cut one class into many,
each half cuts along its own noise. So the share of labels that the halves confirm tells good rounds from bad ones.
Classifiers of independent views can hardly agree unless they are right: this is the argument of co-training (Blum and
Mitchell, COLT 1998; Dasgupta et al., NeurIPS 2001).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpclip.config import SelfTrainingConfig
from lpclip.method.agreement import Agreement, agreement
from lpclip.method.calibration import expected_accuracy, labelled_factor, temperature_at
from lpclip.method.chance import chance_confidence, head_confidence
from lpclip.method.few_labels import FewLabels, more_often_right
from lpclip.method.gaussian import Whitening
from lpclip.method.linear import Linear
from lpclip.method.neighbours import nearest
from lpclip.method.presence import Presence, present_classes
from lpclip.method.priors import PRIORS, Prior
from lpclip.method.recipe import RECIPE
from lpclip.method.self_training import Rounds
from lpclip.method.shard import Shard, Whitenings, compute_device, fit_whitening, fit_whitenings
from lpclip.method.state import Pass, State

SAMPLE_ROWS = 10_000
HALF_ROWS = 6_000
SPLITS = 4
HALF_ROUNDS = 12
# Equal shares may be confirmed by TOLERANCE less often than a weak pull to them. They must be confirmed more often, by
# SUSPICION times the distance in relative entropy, the further from equal the labels are that the weak pull gives.
TOLERANCE = 0.035
SUSPICION = 0.2
# Where even the weak pull leaves labels with a smaller relative entropy, there is none: such labels mean a steep tail
# or names without images, and a pull would fill these with images of others.
LEAST_ENTROPY = 0.85
# Halves of pure noise have a kappa up to 0.25, as they start from the same labels; real classes have 0.4 and more.
MIN_KAPPA = 0.28


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """Evidence for the rounds with a prior, from the halves."""

    agreement: float
    """The mean share of the rounds' labels that rounds in a half alone, from the same zero-shot labels, repeat."""
    kappa: float
    """The same beyond what labels of these frequencies share by chance (Cohen, 1960): 0 by chance, 1 for all."""
    entropy: float
    """Entropy of the labels' class shares over that of equal shares."""
    confidence: float
    """Zero-shot's mean confidence."""
    chance: float
    """The confidence that names without a meaning reach (lpclip/method/chance.py)."""
    labelled: int = 0
    """Images with a class that somebody gave them. The rounds that are tried do not see these labels."""
    won: int = 0
    """Those of them that the rounds have right and zero-shot has not."""
    lost: int = 0
    """Those that zero-shot has right and the rounds have not."""

    @property
    def trusted(self) -> bool:
        """True where the rounds found something at all."""
        return not self.doubts

    @property
    def doubts(self) -> list[str]:
        """The reasons not to trust the rounds, each a clause; none where given labels show that they are better.

        The opposite is no reason: labels are asked for where the rounds are unsure, and so most likely wrong.
        """
        if more_often_right(self.won, self.lost):
            return []
        found = []
        if self.kappa < MIN_KAPPA:
            found.append(f"the halves hardly confirm them (kappa {self.kappa:.2f}, {MIN_KAPPA} is needed)")
        if self.confidence <= self.chance:
            found.append(
                f"the class names fit these images no better than random ones (zero-shot's mean confidence is "
                f"{self.confidence:.2f}, and {self.chance:.2f} is reached by chance)"
            )
        return found


class Sample:
    """A sample of the unlabelled images with its halves, on which rounds are tried."""

    def __init__(
        self,
        features: np.ndarray,
        *,
        zero_shot: Tensor,
        temperature: float,
        config: SelfTrainingConfig,
        dtype: torch.dtype = torch.float32,
        labels: FewLabels | None = None,
    ) -> None:
        """Cut features (n, d), whose order says nothing; the head (K, d) has unit norm, `dtype` compares neighbours.

        The rounds of `confirm` do without the `labels`, which then say how often these rounds are right.
        """
        self._given = None if labels is None else labels.named
        self._head = zero_shot / temperature
        rows = features[:SAMPLE_ROWS]
        shard = Shard(features=rows, num_rows=len(rows), device=compute_device())
        whitening = fit_whitening(shard)
        options: dict[str, Any] = {"config": config, "num_classes": len(zero_shot), "dtype": dtype}
        self._whole = Rounds(
            with_neighbours(shard, whitening=whitening, **options),
            head=self._head,
            prior=PRIORS["none"],
            config=config,
            whitenings=Whitenings(base=whitening, last=None),
        )
        seen = torch.from_numpy(rows[:HALF_ROWS]).float()
        self._confidence = head_confidence(seen, zero_shot, temperature=temperature)
        self._chance = chance_confidence(seen, zero_shot, temperature=temperature)
        logits = seen @ zero_shot.T / temperature
        # The halves must share nothing but the classes: their directions are uncorrelated.
        whitened = (seen - whitening.mean.float()) @ whitening.principal.float()
        in_halves = replace(
            self._whole,
            # A half is less sure: the threshold would leave out others of its labels, or all.
            config=replace(_short(config), threshold=0.0),
            # Zero-shot sees the whole image: the halves start from its labels, and then do without it.
            recipe=replace(RECIPE, zero_shot_share=0.0, text_rows=0.0),
        )
        self._halves = []
        for seed in range(SPLITS):
            order = torch.randperm(whitened.shape[1], generator=torch.Generator().manual_seed(seed))
            for half in order.chunk(2):
                directions = torch.nn.functional.normalize(whitened[:, half], dim=1).numpy()
                part = Shard(
                    features=directions, num_rows=len(directions), zero_shot=logits, device=shard.device
                )
                part = with_neighbours(part, whitening=None, **options)
                self._halves.append(replace(in_halves, shard=part, whitenings=fit_whitenings(part)))

    def confirm(self, prior: Prior) -> Confirmation:
        """Try the rounds with a prior on the whole features, and on the halves."""
        state, whole = _last(replace(self._whole, prior=prior))
        labels, num_classes = whole.labels[:HALF_ROWS], len(self._head)
        halves = [_last(replace(half, prior=prior))[1].labels for half in self._halves]
        found = [agreement(labels, half, num_classes=num_classes) for half in halves]
        mean = Agreement(*(float(np.mean(values)) for values in zip(*found, strict=True)))
        shares = np.bincount(labels, minlength=num_classes) / len(labels)
        entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum() / np.log(max(2, num_classes))
        won, lost = self._games(state.classifier(self._head))
        return Confirmation(
            labelled=0 if self._given is None else len(self._given.classes),
            won=won,
            lost=lost,
            agreement=mean.share,
            kappa=mean.kappa,
            entropy=float(entropy),
            confidence=self._confidence,
            chance=self._chance,
        )

    def _games(self, classifier: Linear) -> tuple[int, int]:
        """Given labels that only the rounds have right, and those that only zero-shot has right."""
        if self._given is None:
            return 0, 0
        features, wanted = self._given.features, self._given.classes.numpy()
        own = classifier.predict(features) == wanted
        zero_shot = (features @ self._head.T).argmax(dim=1).numpy() == wanted
        return int((own & ~zero_shot).sum()), int((zero_shot & ~own).sum())

    def factor_of_labels(self, prior: Prior, *, labels: FewLabels, present: np.ndarray | None) -> float:
        """The factor for the label-free temperature: rounds that know half of the labels are asked for the others.

        `present` (K',) are the places of the names that the rounds use; None for all of them.
        """
        head = self._head if present is None else self._head[present]
        labels = labels if present is None else labels.among(present)
        rounds, features = replace(self._whole, head=head, prior=prior), self._whole.shard.features
        rows = torch.from_numpy(features).float()
        is_first = torch.arange(len(labels.classes)) % 2 == 0
        logits = torch.zeros(len(labels.classes), len(head))
        for mine in (is_first, ~is_first):
            state, _ = _last(replace(rounds, labels=labels.take(~mine)))
            classifier = state.classifier(head)
            expected = expected_accuracy(self._confidence, evidence=state.evidence)
            guess = temperature_at(classifier.logits(rows), confidence=expected)
            logits[mine] = classifier.logits(labels.features[mine]) / guess
        return labelled_factor(logits[labels.classes >= 0], labels.named, features=features)

    def present(self) -> Presence:
        """The class names that have images in the sample."""
        zero_shot = torch.from_numpy(self._whole.shard.features).float() @ self._head.T
        short = replace(self._whole, config=_short(self._whole.config))

        def label(places: np.ndarray) -> np.ndarray:
            return _last(replace(short, head=self._head[places]))[1].labels

        return present_classes(zero_shot, label=label)


def _short(config: SelfTrainingConfig) -> SelfTrainingConfig:
    return replace(config, rounds=min(HALF_ROUNDS, config.rounds))


def _last(rounds: Rounds) -> tuple[State, Pass]:
    *_, last = rounds.run()
    return last


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
    return replace(shard, neighbours=nearest(shard, count=count, whitening=whitening, dtype=dtype))


def choose_prior(
    sample: Sample, *, show: Callable[[str, Confirmation], None] = lambda name, found: None
) -> tuple[str, dict[str, Confirmation]]:
    """The name in `PRIORS`, and the evidence for each candidate: equal class shares where the halves confirm them.

    Otherwise the pull to them is weak, and there is none where even this pull leaves labels that are far from equal.
    `show` is called with each candidate's evidence as soon as it is there.
    """
    found: dict[str, Confirmation] = {}

    def try_one(name: str) -> Confirmation:
        found[name] = sample.confirm(PRIORS[name])
        show(name, found[name])
        return found[name]

    uniform, weak = try_one("uniform"), try_one("weak")
    if uniform.agreement >= weak.agreement + SUSPICION * (1 - weak.entropy) - TOLERANCE:
        return "uniform", found
    if weak.entropy >= LEAST_ENTROPY:
        return "weak", found
    try_one("none")
    return "none", found
