"""lpclip's label-free temperature for a baseline, so that calibration compares methods and not rules of temperature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from baselines import Problem, Solution, zero_shot, zero_shot_single
from torch import Tensor

from lpclip.method.calibration import (
    CALIBRATION_ROWS,
    expected_accuracy,
    mean_confidence,
    temperature_at,
)
from lpclip.method.gaussian import mean_evidence
from lpclip.method.probe import zero_shot_probe
from lpclip.method.recipe import RECIPE

FOLDS = 5
# No more folds are held out than give so many rows.
ENOUGH_ROWS = 500
LEAST_ROWS = 10


def baseline_temperature(
    method: Callable[[Problem], Solution], problem: Problem, *, solution: Solution
) -> float:
    """The temperature at which the method's solution is as confident as it can be expected to be right.

    The expected accuracy is lpclip's guess, from zero-shot's confidence and from how many rows a class has. Confidence
    is that of the method's solutions without these rows; with fewer than ten rows it is the solution's own on the rows
    that it saw. Zero-shot, which sees no rows, keeps the encoder's temperature.
    """
    if method in (zero_shot, zero_shot_single):
        return 1.0
    sample = problem.features[:CALIBRATION_ROWS]
    counts = solution.predict(sample).sum(dim=0) * len(problem.features) / len(sample)
    confidence = mean_confidence(zero_shot_probe(problem.head, temperature=problem.temperature), sample)
    target = expected_accuracy(confidence, evidence=mean_evidence(counts, text_rows=RECIPE.text_rows))
    few = len(problem.features) < LEAST_ROWS
    return temperature_at(
        solution.logits(sample) if few else held_out_logits(method, problem), confidence=target
    )


def held_out_logits(method: Callable[[Problem], Solution], problem: Problem) -> Tensor:
    """Logits (m, K) of rows by the method's solutions without the row's fold, fold after fold until they are enough."""
    fold_of = np.arange(len(problem.features)) % FOLDS
    found: list[Tensor] = []
    for fold in range(FOLDS):
        if sum(map(len, found)) >= ENOUGH_ROWS:
            break
        rest = replace(problem, features=problem.features[fold_of != fold], neighbours=None)
        found.append(method(rest).logits(problem.features[fold_of == fold]))
    return torch.cat(found)
