"""The zero-shot head: class names as weights, and pseudo-labels from them alone.

Without torch, like `decode` and `commit`: the processes that commit stay small and start fast.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lpclip.config import digest
from lpclip.features import store
from lpclip.images.views import BASE_VIEWS

if TYPE_CHECKING:
    from lpclip.features.describe import EncoderInfo


@dataclass(frozen=True, kw_only=True)
class Head:
    """A zero-shot head: class embeddings and the temperature that turns cosines into probabilities."""

    class_names: tuple[str, ...]
    weight: np.ndarray
    """(K, d) float32, unit norm."""
    temperature: float
    identity: str
    """Digest of encoder, class names, templates and temperature."""


def make_head(info: EncoderInfo, names: tuple[str, ...], *, temperature: float | None) -> Head:
    """The zero-shot head of the class names that `info` was asked for; the encoder's own temperature by default."""
    assert info.head is not None
    if temperature is not None and not temperature > 0:
        raise ValueError(f"--temperature must be above 0, not {temperature}")
    used = temperature if temperature is not None else 1 / info.logit_scale
    identity = digest([info.identity, names, hashlib.sha256(info.head.tobytes()).hexdigest(), used])
    return Head(class_names=names, weight=info.head, temperature=used, identity=identity)


def pseudo_label(table: pa.Table, *, head: Head, dim: int) -> pa.Table:
    """Zero-shot pseudo-labels of rows with base-view columns: id, label, confidence."""
    base = [v for v in BASE_VIEWS if v in table.column_names]
    features = store.mean_view([store.matrix(table, view, dim) for view in base]).astype(np.float32)
    logits = features @ head.weight.T / head.temperature
    p = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    p /= p.sum(axis=1, keepdims=True)
    confidence = p.max(axis=1, initial=0).astype(np.float32)
    return pa.table({"id": table["id"], "label": p.argmax(axis=1).astype(np.int32), "confidence": confidence})
