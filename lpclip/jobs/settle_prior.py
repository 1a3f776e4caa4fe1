"""Which class prior a training uses, and whether its rounds can be trusted: asked for by name, or chosen."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch

from lpclip import files
from lpclip.config import SelfTrainingConfig, UserError, config_identity, counted, did_you_mean, digest
from lpclip.encoders.head import Head, take_names
from lpclip.method.confirmation import Confirmation
from lpclip.method.few_labels import FewLabels
from lpclip.method.priors import PRIORS, Prior, read_prior
from lpclip.method.trial import ChosenPrior, try_priors

# The format of prior.json: the outcome of another version's trial is not this version's.
FORMAT = 4
MEANINGS = {
    "uniform": " (labels are pulled to equal class shares)",
    "weak": " (labels are pulled weakly to equal class shares)",
    "none": " (labels are left as they are)",
}


def load_prior(spec: str, class_names: tuple[str, ...]) -> Prior | None:
    """The prior that `--prior` names, None for `auto`. Raises UserError when there is none of that name."""
    text = None
    if spec != "auto" and spec not in PRIORS:
        try:
            data = files.read_bytes(spec)
        except OSError as error:
            raise UserError(
                f"--prior {spec} is none of auto, uniform, weak, none, nor a text file that can be read"
                f"{did_you_mean(spec, ('auto', *PRIORS))}"
            ) from error
        text = files.decode_text(data, path=f"--prior {spec}")
    return read_prior(spec, class_names, text=text)


def settle_prior(
    training: SelfTrainingConfig,
    *,
    out: str,
    features: np.ndarray,
    prior: Prior | None,
    head: Head,
    fingerprint: str,
    present: np.ndarray | None,
    labels: FewLabels | None = None,
) -> ChosenPrior:
    """Try the rounds on a sample: with the prior that was asked for, or with those that `auto` has to choose from.

    `present` (K',) are the places of the names that are known to have images: the rounds use them alone. The given
    `labels`, indices of all names, say how often the rounds are right. OUT/prior.json keeps the outcome, so that a job
    which goes on goes on with the same prior.
    """
    path = files.join(out, "prior.json")
    if labels is not None and present is not None:
        labels = labels.among(present)
    tried_head = head if present is None else take_names(head, present)
    if present is not None and prior is not None:
        prior = prior.among(present)
    shares = None if prior is None or prior.shares is None else prior.shares.tolist()
    known: list[object] = [FORMAT, fingerprint, tried_head.identity, config_identity(training), shares]
    if labels is not None:
        known += [labels.places.tolist(), labels.classes.tolist()]
    identity = digest(known)
    kept = files.read_json(path) if files.exists(path) else {}
    if kept.get("identity") != identity:
        found = _try(training, features=features, prior=prior, head=tried_head, labels=labels)
        kept = {
            "identity": identity,
            "name": found.name,
            "tried": {k: asdict(v) for k, v in found.tried.items()},
            "present": None if found.present is None else found.present.tolist(),
            "why": found.why,
            "labelled_factor": found.labelled_factor,
        }
        files.write_json(path, kept)
    name, tried = kept["name"], {k: Confirmation(**v) for k, v in kept["tried"].items()}
    if kept["present"] is not None:
        print_present(head.class_names, np.array(kept["present"]))
    elif training.present == "auto":
        print(f"classes: the rounds use all {len(head.class_names)} names: {kept['why']}", flush=True)
    chosen = ChosenPrior(
        name=name,
        prior=PRIORS[name] if prior is None else prior,
        tried=tried,
        present=present if kept["present"] is None else np.array(kept["present"]),
        why=kept["why"],
        labelled_factor=kept["labelled_factor"],
    )
    print_prior(name, tried, trusted=chosen.trusted, labelled=labels is not None)
    if labels is not None and chosen.trusted:
        print_labelled_factor(chosen.labelled_factor)
    return chosen


def _try(
    training: SelfTrainingConfig,
    *,
    features: np.ndarray,
    prior: Prior | None,
    head: Head,
    labels: FewLabels | None,
) -> ChosenPrior:
    """The outcome of `try_priors`, told as it goes on."""
    what = "trying the rounds" if prior is None else "as asked; can the rounds be trusted? Trying them"
    print(
        f"prior: {what} on a sample, whole and in random halves of the features' directions (a minute)",
        flush=True,
    )
    return try_priors(
        features,
        torch.tensor(head.weight),
        temperature=head.temperature,
        config=training,
        prior=prior,
        labels=labels,
        show=print_tried,
    )


def print_tried(name: str, found: Confirmation) -> None:
    """Print how far rounds in halves of the features' directions confirm the rounds with one prior."""
    print(
        f"  {name}: rounds in the halves repeat {found.agreement:.1%} of its labels: "
        f"{found.kappa:.2f} where 0 is chance and 1 is all (Cohen's kappa)",
        flush=True,
    )
    if found.labelled:
        print(
            f"  {name}: of {counted(found.labelled, 'given label')}, these rounds have {found.won} right that "
            f"zero-shot has wrong, and zero-shot {found.lost} that they have wrong",
            flush=True,
        )


def print_present(names: tuple[str, ...], places: np.ndarray) -> None:
    """Print which class names seem to have images."""
    shown = ", ".join(names[place] for place in places[:8]) + (", ..." if len(places) > 8 else "")
    print(
        f"classes: {len(places)} of {len(names)} names seem to have images, and the rounds use these: {shown}. The "
        "probe knows the others too; --present all uses all names.",
        flush=True,
    )


def print_prior(name: str, tried: dict[str, Confirmation], *, trusted: bool, labelled: bool = False) -> None:
    """Print the prior that the rounds go on with, and a warning if their result cannot be trusted."""
    print(f"prior: {name}{MEANINGS.get(name, '')}", flush=True)
    if not trusted:
        why = "; ".join(tried[name].doubts)
        result = "zero-shot with the given labels alone" if labelled else "zero-shot itself"
        print(
            f"WARNING: the probe will be {result}, because the rounds cannot be trusted: {why}",
            flush=True,
        )


def print_labelled_factor(factor: float) -> None:
    """Print the factor by which given labels correct the temperature."""
    how = "too sure" if factor > 1.05 else "not sure enough" if factor < 0.95 else "as sure as they should be"
    print(
        f"given labels: rounds that knew one half of them were {how} of the other half: the temperature is "
        f"multiplied by {factor:.2f}",
        flush=True,
    )
