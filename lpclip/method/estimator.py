"""The self-trained probe as a scikit-learn classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from lpclip.config import SelfTrainingConfig
from lpclip.method.arrays import ZeroShotHead
from lpclip.method.fit import SelfTraining, fit
from lpclip.method.probe import Probe


class SelfTrainedProbe(ClassifierMixin, BaseEstimator):
    """A probe that `fit` self-trains on unlabelled features (N, d); labels are ignored.

    `head` is the zero-shot head, `config` has the method's options, `shares` (K,) are the classes' shares where they
    are known, as in `lpclip.fit`. Rows of any norm are scaled to unit norm, in `fit` and in the predictions.

    After `fit`: `probe_` (Probe), `training_` (SelfTraining), `classes_` (K,), the indices of the head's class names.
    """

    probe_: Probe
    training_: SelfTraining
    classes_: np.ndarray

    def __init__(
        self,
        head: ZeroShotHead,
        *,
        config: SelfTrainingConfig | None = None,
        shares: np.ndarray | None = None,
    ) -> None:
        self.head = head
        self.config = config
        self.shares = shares

    def fit(self, X: Any, y: Any = None) -> SelfTrainedProbe:
        """Train on features X (N, d) and ignore y. Raises ValueError for arrays that cannot be used."""
        rows = _unit_rows(validate_data(self, X, dtype=[np.float32, np.float16]))
        self.training_ = fit(rows, self.head, config=self.config, shares=self.shares)
        self.probe_ = self.training_.probe
        self.classes_ = np.arange(len(self.probe_.class_names))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Class indices (N,) int64 of features X (N, d)."""
        check_is_fitted(self)
        return self.probe_.predict(self._check(X))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities (N, K) float32 of features X (N, d)."""
        check_is_fitted(self)
        return self.probe_.predict_proba(self._check(X))

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (N, K) float32 of features X (N, d); of two classes, the second's minus the first's (N,)."""
        check_is_fitted(self)
        logits = self.probe_.logits(self._check(X)).numpy()
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def _check(self, X: Any) -> np.ndarray:
        return _unit_rows(validate_data(self, X, dtype=[np.float32, np.float16], reset=False))


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)
    return (rows / np.maximum(norms, 1e-12)).astype(rows.dtype)
