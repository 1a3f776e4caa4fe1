"""Self-training in one call and one process: check the arrays, choose the prior, run the rounds, set the temperature.

The selftrain job runs the same rounds under Ray Train, with checkpoints. On the same features both give the same probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from lpclip.config import SelfTrainingConfig, UserError, check, to_dict
from lpclip.method.arrays import StoredFeatures, ZeroShotHead, arrange, check_head, join_origins
from lpclip.method.calibration import label_free_temperature, labelled_factor
from lpclip.method.confirmation import with_neighbours
from lpclip.method.few_labels import NONE_OF_THESE, Correction, FewLabels, mean_feature
from lpclip.method.linear import Linear
from lpclip.method.neighbours import comparison_dtype
from lpclip.method.presence import named_classes, with_absent
from lpclip.method.priors import PRIORS, Prior, read_prior
from lpclip.method.probe import Probe, zero_shot_probe
from lpclip.method.recipe import RECIPE
from lpclip.method.self_training import Rounds
from lpclip.method.shard import Shard, compute_device, fit_whitenings
from lpclip.method.state import Pass, State
from lpclip.method.trial import ChosenPrior, try_priors


@dataclass(frozen=True, kw_only=True)
class SelfTraining:
    """A finished self-training: the probe, and what it was made of."""

    probe: Probe
    """The self-trained probe; zero-shot itself where the rounds cannot be trusted."""
    zero_shot: Probe
    """Zero-shot as a probe, at the encoder's own temperature; `config.temperature` is the first teacher's alone."""
    prior: ChosenPrior
    """The class prior, and the evidence for it."""
    rounds: tuple[State, ...]
    """The state after every round, oldest first, each with its `metrics`."""
    labels: np.ndarray
    """(N,) int32 pseudo-labels, in the order of the features."""
    confidence: np.ndarray
    """(N,) float32, the probability of each pseudo-label."""
    kept: np.ndarray
    """(N,) bool, False for labels with a confidence below the threshold."""

    @property
    def trusted(self) -> bool:
        """True when the probe comes from the rounds, False when it is zero-shot."""
        return self.prior.trusted


def _silent(line: str) -> None:
    """Show no progress."""


def self_train(
    features: np.ndarray | StoredFeatures,
    head: ZeroShotHead,
    *,
    strong: Sequence[np.ndarray] = (),
    config: SelfTrainingConfig | None = None,
    shares: Sequence[float] | np.ndarray | None = None,
    labels: np.ndarray | None = None,
    tell: Callable[[str], None] = _silent,
) -> Probe:
    """Train a probe on unlabelled features; `fit` explains the arguments and returns more than the probe."""
    return fit(features, head, strong=strong, config=config, shares=shares, labels=labels, tell=tell).probe


def fit(
    features: np.ndarray | StoredFeatures,
    head: ZeroShotHead,
    *,
    strong: Sequence[np.ndarray] = (),
    config: SelfTrainingConfig | None = None,
    shares: Sequence[float] | np.ndarray | None = None,
    labels: np.ndarray | None = None,
    tell: Callable[[str], None] = _silent,
) -> SelfTraining:
    """Train a probe on unlabelled features, from the pseudo-labels of a zero-shot head (docs/method.md).

    features: (N, d) of unit norm, float16, float32 or float64 (converted to float32). The order of an array's rows
        does not matter: they are first sorted by a hash of their bytes. A store's features are sorted already and
        bring their strong views and the encoder's identity; with them the probe equals the selftrain job's.
    head: class names, their weights (K, d) of unit norm, and the encoder's temperature.
    strong: further views of the same rows, each (N, d), such as augmented images; the last student is fitted to them.
    config: options of the method. Its `num_workers` is not used: everything runs in this process. Its `present` is
        auto, all or comma-separated class names.
    shares: the classes' shares (K,) where they are known; they replace `config.prior`.
    labels: (N,) class indices of the few images whose label is known, -1 for all others, -2 for images that belong to
        no class. They correct the teachers of all rounds.
    tell: called with a line of text after each step, for instance `print`.

    Raises UserError when an array has a wrong shape, a NaN or a row that is not of unit norm, an option is out of
    range, or the features and the head come from two encoders.
    """
    weight, names = check_head(head), tuple(head.class_names)
    config, prior, present = _read_options(config, shares, class_names=names)
    rows, views, order = arrange(features, strong, dim=weight.shape[1])
    given = _given_labels(labels, rows, order=order, num_classes=len(names), present=present)
    temperature = head.temperature if config.temperature is None else config.temperature
    origin = join_origins(features, head)
    zero_shot = zero_shot_probe(weight, temperature=head.temperature, class_names=names, encoder=origin)
    teacher = weight / temperature
    tried = weight if present is None else weight[present]
    labels_tried = given if given is None or present is None else given.among(present)
    chosen = _try_priors(
        rows, tried, temperature=temperature, config=config, prior=prior, labels=labels_tried, tell=tell
    )
    if present is not None:
        chosen = replace(chosen, present=present)
    places = np.arange(len(names)) if chosen.present is None else chosen.present
    shard = Shard(features=rows, strong=views, num_rows=len(rows), device=compute_device())
    states, last = _run(
        shard,
        head=teacher[places],
        prior=chosen.prior,
        config=config,
        labels=None if given is None else given.among(places),
        tell=tell,
    )
    probe = finish_probe(
        states[-1],
        zero_shot=zero_shot,
        teacher=teacher,
        features=rows,
        config=config,
        chosen=chosen,
        labels=given,
    )
    found = zero_shot_labels(probe, rows, labels=given)
    if chosen.trusted:
        found = places[last.labels].astype(np.int32), last.confidence, last.kept
    labels, confidence, kept = (values[np.argsort(order)] for values in found)
    return SelfTraining(
        probe=probe,
        zero_shot=zero_shot,
        prior=chosen,
        rounds=tuple(states),
        labels=labels,
        confidence=confidence,
        kept=kept,
    )


def finish_probe(
    last: State,
    *,
    zero_shot: Probe,
    teacher: Tensor,
    features: np.ndarray,
    config: SelfTrainingConfig,
    chosen: ChosenPrior,
    labels: FewLabels | None = None,
) -> Probe:
    """The last round's probe with its temperature, or zero-shot where the rounds are not trusted.

    The `labels` that were given correct zero-shot too.

    `zero_shot` has the encoder's own temperature: that is the one it was calibrated with. `teacher` (K, d) is the head
    in units of the rounds' logits. `features` are (N, d).
    """
    probe, temperature, places = zero_shot, 1.0, chosen.present
    if chosen.trusted:
        head = teacher if places is None else teacher[places]
        own = found = last.classifier(head)
        if places is not None:
            found = with_absent(own, places, zero_shot=zero_shot, features=features)
        probe = replace(zero_shot, weight=found.weight, bias=found.bias)
        temperature = label_free_temperature(
            probe,
            zero_shot=zero_shot,
            features=features,
            trained=own,
            head=head,
        )
        temperature *= chosen.labelled_factor
    elif labels is not None:
        probe, temperature = corrected_zero_shot(zero_shot, labels, features=features)
    summary = {
        "method": "self-trained" if chosen.trusted else "zero-shot (fallback)",
        "training": to_dict(config),
        "rounds": last.round,
        "images": len(features),
    }
    return replace(probe, temperature=temperature, summary=summary)


def corrected_zero_shot(zero_shot: Probe, labels: FewLabels, *, features: np.ndarray) -> tuple[Probe, float]:
    """Zero-shot with the step of the given labels, and the temperature of the result."""
    scale = zero_shot.temperature
    logits = Linear(weight=zero_shot.weight / scale, bias=zero_shot.bias / scale)
    correction = Correction(labels, mean=mean_feature(features))
    found = correction.apply(logits)
    probe = replace(zero_shot, weight=scale * found.weight, bias=scale * found.bias)
    return probe, scale * labelled_factor(correction.held_out(logits), labels.named, features=features)


def zero_shot_labels(
    probe: Probe, features: np.ndarray, *, labels: FewLabels | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N,) int32, confidences (N,) float32 and `kept` (N,) bool that a probe gives features (N, d).

    Images whose label was given have this one, with confidence 1; those of no class are not kept.
    """
    label, confidence, kept = (
        *(found.numpy() for found in probe.label(features)),
        np.ones(len(features), bool),
    )
    if labels is not None:
        label[labels.named.places], confidence[labels.named.places] = labels.named.classes, 1.0
        kept[labels.places] = labels.classes.numpy() >= 0
    return label.astype(np.int32), confidence, kept


def is_last_student(number: int, *, before: Mapping[str, float] | None, config: SelfTrainingConfig) -> bool:
    """Say whether the student with this number is the last one, which is fitted to the strong views as well.

    `before` has the metrics of the student before it, None for the first. The last student follows the round that is
    the last allowed one, or in which hardly a label changed.
    """
    return number > config.rounds or (before is not None and before["flip_rate"] < RECIPE.stop_flip_rate)


def round_line(number: int, metrics: Mapping[str, float], *, is_last: bool = False) -> str:
    """One line about a round, or about the last student, from its metrics."""
    return (
        f"{'last student, with the strong views' if is_last else f'round {number}'}: "
        f"{metrics['flip_rate']:.1%} of the labels changed, {metrics['coverage']:.1%} kept, "
        f"mean confidence {metrics['mean_confidence']:.3f}, {metrics['zero_shot_agreement']:.1%} agree with zero-shot"
    )


def _given_labels(
    labels: np.ndarray | None,
    rows: np.ndarray,
    *,
    order: np.ndarray,
    num_classes: int,
    present: np.ndarray | None,
) -> FewLabels | None:
    """The labels (N,) as they were given of the rows (N, d), which stand in this order. Raises UserError."""
    if labels is None:
        return None
    found = np.asarray(labels)
    if found.shape != (len(rows),) or not np.issubdtype(found.dtype, np.integer):
        raise UserError(f"labels must be {len(rows)} integers, one for each row of the features")
    if found.min() < NONE_OF_THESE or found.max() >= num_classes:
        raise UserError(
            f"labels must be class indices below {num_classes}, -1 (not known) or -2 (none of the classes), not "
            f"{found.min()} to {found.max()}"
        )
    if present is not None and not np.isin(found[found >= 0], present).all():
        raise UserError("labels name a class that config.present leaves out")
    return FewLabels.of_rows(found[order], rows)


def _read_options(
    config: SelfTrainingConfig | None,
    shares: Sequence[float] | np.ndarray | None,
    *,
    class_names: tuple[str, ...],
) -> tuple[SelfTrainingConfig, Prior | None, np.ndarray | None]:
    """The configuration, and what it or the shares ask for: the prior, None for `auto`, among the names to be used.

    These are the places (K',) of the class names that `present` names, None where it names none or all.
    """
    config = config or SelfTrainingConfig()
    check(config)
    present = None
    if config.present not in ("auto", "all"):
        present = named_classes([name.strip() for name in config.present.split(",")], class_names)
    if shares is not None:
        text = "\n".join(str(float(share)) for share in shares)
        config, prior = replace(config, prior="shares"), read_prior("shares", class_names, text=text)
    elif config.prior != "auto" and config.prior not in PRIORS:
        raise UserError(
            f"prior {config.prior!r} is none of auto, uniform, weak, none; give the classes' shares as shares="
        )
    else:
        prior = read_prior(config.prior, class_names)
    return config, prior if prior is None or present is None else prior.among(present), present


def _try_priors(
    rows: np.ndarray,
    weight: Tensor,
    *,
    temperature: float,
    config: SelfTrainingConfig,
    prior: Prior | None,
    labels: FewLabels | None,
    tell: Callable[[str], None],
) -> ChosenPrior:
    """The outcome of `try_priors`, told in a line for each step."""
    chosen = try_priors(
        rows,
        weight,
        temperature=temperature,
        config=config,
        prior=prior,
        labels=labels,
        show=lambda name, found: tell(f"prior {name}: halves of the features confirm {found.agreement:.1%}"),
    )
    doubt = "" if chosen.trusted else "; too little confirms the rounds: the probe will be zero-shot"
    tell(f"prior: {chosen.name}{doubt}")
    if chosen.present is not None:
        tell(f"classes: {len(chosen.present)} of {len(weight)} names have images, the rounds use these")
    elif config.present == "auto":
        tell(f"classes: the rounds use all {len(weight)} names: {chosen.why}")
    return chosen


def _run(
    shard: Shard,
    *,
    head: Tensor,
    prior: Prior,
    config: SelfTrainingConfig,
    labels: FewLabels | None,
    tell: Callable[[str], None],
) -> tuple[list[State], Pass]:
    """All rounds' states, and the last round's pass; `head` (K, d) is in units of logits."""
    whitenings = fit_whitenings(shard)
    shard = with_neighbours(
        shard,
        config=config,
        num_classes=len(head),
        whitening=whitenings.base,
        dtype=comparison_dtype(),
    )
    states: list[State] = []
    rounds = Rounds(shard, head=head, prior=prior, config=config, whitenings=whitenings, labels=labels)
    for state, found in rounds.run():
        before = states[-1].metrics if states else None
        is_last = is_last_student(state.round, before=before, config=config)
        tell(round_line(state.round, state.metrics, is_last=is_last))
        states.append(state)
        # The steps after the rounds need memory and no targets.
        last = replace(found, targets=None)
    return states, last
