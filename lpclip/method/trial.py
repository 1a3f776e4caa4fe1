"""A trial of the rounds on a sample: which class prior they get, and whether they can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from lpclip.config import SelfTrainingConfig
from lpclip.method.confirmation import Confirmation, Sample, choose_prior
from lpclip.method.few_labels import FewLabels, with_labelled
from lpclip.method.neighbours import comparison_dtype
from lpclip.method.priors import PRIORS, Prior


@dataclass(frozen=True, kw_only=True)
class ChosenPrior:
    """The prior of a training, and how far halves of the features confirm the rounds with it."""

    name: str
    prior: Prior
    tried: dict[str, Confirmation]
    """By candidate."""
    present: np.ndarray | None
    """Places (K',) of the class names that the rounds use; None for all of them."""
    why: str
    """Why these, a clause."""
    labelled_factor: float = 1.0
    """The label-free temperature is multiplied by it. Given labels decide it; without any it is 1."""

    @property
    def trusted(self) -> bool:
        """True when the rounds are to be used at all."""
        return self.tried[self.name].trusted

    def summary(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """For OUT/summary.json."""
        present = range(len(class_names)) if self.present is None else self.present
        return {
            "name": self.name,
            "trusted": self.trusted,
            "why_these_names": self.why,
            "absent": [name for place, name in enumerate(class_names) if place not in present],
            "tried": {name: asdict(found) for name, found in self.tried.items()},
            "labelled_factor": self.labelled_factor,
        }


def try_priors(
    features: np.ndarray,
    zero_shot: Tensor,
    *,
    temperature: float,
    config: SelfTrainingConfig,
    prior: Prior | None,
    labels: FewLabels | None = None,
    show: Callable[[str, Confirmation], None],
) -> ChosenPrior:
    """Try the rounds on a sample of features (N, d), with the given prior or with the candidates of `auto`.

    `zero_shot` is the head (K, d) of all names, or of those that are known to have images; `show` is called with each
    candidate's outcome. Given `labels` say how often the rounds that are tried are right, and whether rounds that have
    the other labels are as sure as they should be. All rounds are those of the gaussian solver, which is fast: what
    they say of the classes holds for the gradient solver too.
    """
    name, dtype = config.prior, comparison_dtype()
    config = replace(config, solver="gaussian")
    sample = Sample(
        features,
        zero_shot=zero_shot,
        temperature=temperature,
        config=config,
        dtype=dtype,
        labels=labels,
    )
    if prior is None:
        name, tried = choose_prior(sample, show=show)
    else:
        tried = {name: sample.confirm(prior)}
        show(name, tried[name])
    present, why = None, "all of them" if config.present == "all" else "as --present says"
    if config.present == "auto" and prior is not None:
        why = "names without images are looked for with --prior auto alone"
    elif config.present == "auto" and not (tried[name].trusted and tried["weak"].trusted):
        why = "the rounds cannot be trusted"
    elif config.present == "auto":
        found = sample.present()
        why = found.why
        # Some absent names may be left: equal shares would be ruinous, so the weak prior is taken.
        places = with_labelled(found.places, labels)
        if len(places) < len(zero_shot):
            name, present = "weak", places
    prior = PRIORS[name] if prior is None else prior
    factor = 1.0
    if labels is not None and tried[name].trusted:
        factor = sample.factor_of_labels(prior, labels=labels, present=present)
    return ChosenPrior(name=name, prior=prior, tried=tried, present=present, why=why, labelled_factor=factor)
