"""The ceiling: a probe on true labels, for comparison alone."""

from __future__ import annotations

import numpy as np
import torch

from lpclip.config import UserError
from lpclip.method.probe import Probe


def supervised_probe(features: np.ndarray, labels: np.ndarray, *, like: Probe) -> Probe:
    """The ceiling: logistic regression on true labels, its regularisation chosen on a fifth of the rows.

    Features (N, d) in row order, class indices (N,) with -1 for none. Classes that never occur keep a logit
    far below all others. Raises UserError with fewer than two classes or ten labelled rows.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second, and most trainings have no ceiling

    known = labels >= 0
    x, y = features[known].astype(np.float32), labels[known]
    held = len(y) // 5
    if len(y) < 10 or len(np.unique(y[held:])) < 2:
        raise UserError("--supervised needs at least ten labelled images of two classes in --data")
    scores = {}
    for strength in (1.0, 10.0, 100.0):
        model = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x[held:], y[held:])
        scores[strength] = model.score(x[:held], y[:held])
    best = max(scores, key=scores.__getitem__)
    model = LogisticRegression(C=best, max_iter=200, tol=1e-3).fit(x, y)
    weight, bias = torch.zeros(like.weight.shape), torch.full(like.bias.shape, -1e4)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])
    places = torch.from_numpy(model.classes_)
    weight[places], bias[places] = (
        torch.from_numpy(coefficients).float(),
        torch.from_numpy(intercepts).float(),
    )
    return Probe(
        weight=weight,
        bias=bias,
        class_names=like.class_names,
        encoder=like.encoder,
        summary={"method": "supervised", "C": best, "held_out_accuracy": scores[best]},
    )
