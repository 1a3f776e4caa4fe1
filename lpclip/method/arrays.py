"""Features and heads that a user hands over: refused where they cannot be used, rows in an order of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lpclip.config import UserError, counted

BLOCK_ROWS = 16_384
# Rounding a unit vector to float16 changes its norm by less than a thousandth.
NORM_TOLERANCE = 0.01


class ZeroShotHead(Protocol):
    """Class names as weights, and the temperature of the encoder that made them; `lpclip.Head` is one."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""

    @property
    def weight(self) -> np.ndarray:
        """(K, d) of unit norm."""

    @property
    def temperature(self) -> float:
        """The number that cosines are divided by to give logits."""

    @property
    def encoder(self) -> dict[str, Any]:
        """Everything needed to load the encoder again, as far as it is known."""


class StoredFeatures(Protocol):
    """Features of a store: rows in the order of a hash of their ids."""

    @property
    def base(self) -> np.ndarray:
        """(N, d) float16 of unit norm."""

    @property
    def strong(self) -> Mapping[str, np.ndarray]:
        """Strong views by name, each (N, d) float16 of unit norm."""

    @property
    def origin(self) -> dict[str, Any]:
        """The making of the features: the encoder's identity, views, the store's fingerprint."""


def check_features(features: Any, *, name: str = "features", dim: int | None = None) -> np.ndarray:
    """The same rows (N, d) as a float16 or float32 array; float64 becomes float32.

    Raises UserError when the shape is not (N, `dim`), there is no row, a value is NaN or infinite, or a row has not
    unit norm (within 1%).
    """
    rows = np.asarray(features)
    if rows.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"{name} must be float16, float32 or float64, not {rows.dtype}")
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"{name} must have the shape (N, d) with at least one row, not {rows.shape}")
    if dim is not None and rows.shape[1] != dim:
        raise UserError(
            f"{name} have {rows.shape[1]} dimensions and the zero-shot head has {dim}: both must come from one encoder"
        )
    rows = np.ascontiguousarray(rows, np.float32 if rows.dtype == np.float64 else rows.dtype)
    for start in range(0, len(rows), BLOCK_ROWS):
        # Infinities and NaNs make norms that are neither.
        norms = np.linalg.norm(rows[start : start + BLOCK_ROWS].astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))
        if len(wrong):
            place = start + int(wrong[0])
            if not np.isfinite(rows[place]).all():
                raise UserError(f"{name} hold a NaN or an infinite value in row {place}")
            raise UserError(
                f"{name} must have rows of unit norm, and row {place} has norm {norms[wrong[0]]:.3g}; divide by "
                "np.linalg.norm(features, axis=1, keepdims=True)"
            )
    return rows


def content_order(views: Sequence[np.ndarray]) -> np.ndarray:
    """A permutation (N,) of the rows of all views, each (N, d), that depends on the rows' bytes alone.

    Samples are the first rows of an order. An array often comes sorted by class, and its first rows are no sample.
    """
    keys = np.empty(len(views[0]), ">u8")
    for place in range(len(keys)):
        hashed = hashlib.blake2b(digest_size=8)
        for view in views:
            hashed.update(view[place].data)
        keys[place] = int.from_bytes(hashed.digest(), "big")
    return np.argsort(keys, kind="stable")


def check_head(head: ZeroShotHead) -> Tensor:
    """The head's weights (K, d) float32."""
    weight = check_features(head.weight, name="the head's weights").astype(np.float32)
    if len(weight) < 2 or len(head.class_names) != len(weight):
        raise UserError(
            f"the head has {counted(len(head.class_names), 'class name')} and {counted(len(weight), 'row')} of "
            "weights: a classifier needs as many of the one as of the other, and at least two"
        )
    if not 0 < head.temperature < np.inf:
        raise UserError(f"the head's temperature must be above 0, not {head.temperature}")
    return torch.from_numpy(weight)


def arrange(
    features: np.ndarray | StoredFeatures, strong: Sequence[np.ndarray], *, dim: int
) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """Rows (N, d), their strong views, and the place (N,) of each row in what was given."""
    if hasattr(features, "strong"):
        if len(strong):
            raise UserError("a store's features bring their own strong views: give either these or arrays")
        rows, views = check_features(features.base, dim=dim), tuple(features.strong.values())
        return rows, views, np.arange(len(rows))
    rows = check_features(features, dim=dim)
    views = tuple(check_features(view, name="strong views", dim=dim) for view in strong)
    if any(len(view) != len(rows) for view in views):
        raise UserError(f"strong views must have as many rows as the features: {len(rows)}")
    order = content_order((rows, *views))
    return rows[order], tuple(view[order] for view in views), order


def join_origins(features: np.ndarray | StoredFeatures, head: ZeroShotHead) -> dict[str, Any]:
    """Provenance of a probe, joined from what the head and the features know of their encoder.

    Raises UserError when they come from two encoders.
    """
    origin: dict[str, Any] = getattr(features, "origin", {})
    first, second = head.encoder.get("identity"), origin.get("identity")
    if first is not None and second is not None and first != second:
        other = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
        raise UserError(
            f"another encoder made the features than the zero-shot head: they differ in {', '.join(other)}; give the "
            "head the encoder, the weights and the precision that the features were encoded with"
        )
    return head.encoder | origin
