"""An encoder described without loading it, and the zero-shot head: class names as weights.

This module does not import torch: the processes that commit features stay small and start fast.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lpclip.config import UserError, digest
from lpclip.images.pixels import Preprocess


@dataclass(frozen=True, kw_only=True)
class Head:
    """A zero-shot head: class embeddings and the temperature that turns cosines into probabilities."""

    class_names: tuple[str, ...]
    weight: np.ndarray
    """(K, d) float32, unit norm."""
    temperature: float
    identity: str = ""
    """Digest of encoder, class names, templates and temperature."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """Everything needed to load the same encoder again, for the probes that are trained from this head."""


def refuse_another(found: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise UserError unless an encoder's full identity is the one with which the job began."""
    if found != identity:
        raise UserError(
            f"another encoder was found on {platform.node()} than where the job began: its weights, its "
            "precision or its preprocessing differ; all nodes must have the same checkpoint"
        )


def make_head(info: EncoderInfo, names: tuple[str, ...], *, temperature: float | None) -> Head:
    """The zero-shot head of the class names that `info` was asked for; the encoder's own temperature by default.

    Raises UserError when the encoder's embedding of a name is NaN or infinite.
    """
    assert info.head is not None
    assert temperature is None or temperature > 0, temperature
    lost = np.flatnonzero(~np.isfinite(info.head).all(axis=1))
    if len(lost):
        raise UserError(
            f"the encoder gives a NaN or an infinite embedding of {names[lost[0]]!r}: try --precision float32"
        )
    used = temperature if temperature is not None else 1 / info.logit_scale
    identity = digest([info.identity, names, hashlib.sha256(info.head.tobytes()).hexdigest(), used])
    return Head(class_names=names, weight=info.head, temperature=used, identity=identity)


def take_names(head: Head, places: np.ndarray) -> Head:
    """The head of the class names at `places` alone."""
    return replace(
        head,
        class_names=tuple(head.class_names[place] for place in places),
        weight=head.weight[places],
        identity=digest([head.identity, places.tolist()]),
    )


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """The description of an encoder that the driver works with."""

    name: str
    identity: dict[str, Any]
    preprocess: Preprocess
    logit_scale: float
    head: np.ndarray | None
    """(K, d) float32 zero-shot weights of the class names that were asked for."""
    notes: tuple[str, ...] = ()
    """Warnings that came with loading it."""
    engine: str = "torch"
    """The library that computes image features, torch or openvino."""
