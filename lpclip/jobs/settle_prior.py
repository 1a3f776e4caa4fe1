"""Which class prior a training uses, and whether its rounds can be trusted: asked for by name, or chosen."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch

from lpclip import files
from lpclip.config import SelfTrainingConfig, UserError, config_identity, did_you_mean, digest
from lpclip.encoders.head import Head
from lpclip.method.confirmation import Confirmation
from lpclip.method.priors import PRIORS, Prior, read_prior
from lpclip.method.trial import ChosenPrior, try_priors

# The format of prior.json: the outcome of another version's trial is not this version's.
FORMAT = 2
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
            text = files.read_bytes(spec).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prior {spec} is none of auto, uniform, weak, none, nor a text file that can be read"
                f"{did_you_mean(spec, ('auto', *PRIORS))}"
            ) from error
    return read_prior(spec, class_names, text=text)


def settle_prior(
    training: SelfTrainingConfig,
    *,
    out: str,
    features: np.ndarray,
    prior: Prior | None,
    head: Head,
    fingerprint: str,
) -> ChosenPrior:
    """Try the rounds on a sample: with the prior that was asked for, or with those that `auto` has to choose from.

    OUT/prior.json keeps the outcome, so that a job which goes on goes on with the same prior.
    """
    path = files.join(out, "prior.json")
    shares = None if prior is None or prior.shares is None else prior.shares.tolist()
    identity = digest([FORMAT, fingerprint, head.identity, config_identity(training), shares])
    kept = files.read_json(path) if files.exists(path) else {}
    if kept.get("identity") != identity:
        print(
            "prior: trying the rounds on a sample, whole and in random halves of the features' directions "
            "(a minute)",
            flush=True,
        )
        found = try_priors(
            features,
            torch.tensor(head.weight),
            temperature=head.temperature,
            config=training,
            prior=prior,
            show=print_tried,
        )
        outcome = {k: asdict(v) for k, v in found.tried.items()}
        present = None if found.present is None else found.present.tolist()
        kept = {"identity": identity, "name": found.name, "tried": outcome, "present": present}
        files.write_json(path, kept)
    name, tried = kept["name"], {k: Confirmation(**v) for k, v in kept["tried"].items()}
    present = None if kept["present"] is None else np.array(kept["present"])
    prior = PRIORS[name] if prior is None else prior
    chosen = ChosenPrior(name=name, prior=prior, tried=tried, present=present)
    if present is not None:
        print_present(head.class_names, present)
    print_prior(name, tried, trusted=chosen.trusted)
    return chosen


def print_tried(name: str, found: Confirmation) -> None:
    """Print how far rounds in halves of the features' directions confirm the rounds with one prior."""
    print(
        f"  {name}: rounds in the halves repeat {found.agreement:.1%} of its labels "
        f"(kappa {found.kappa:.2f}; 0 is chance, 1 is all)",
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


def print_prior(name: str, tried: dict[str, Confirmation], *, trusted: bool) -> None:
    """Print the prior that the rounds go on with, and a warning if their result cannot be trusted."""
    print(f"prior: {name}{MEANINGS.get(name, '')}", flush=True)
    if not trusted:
        why = "; ".join(tried[name].doubts)
        print(
            f"WARNING: OUT/probe will be zero-shot, because the rounds cannot be trusted: {why}", flush=True
        )
