"""The zero-shot head: what the driver must know of an encoder, and pseudo-labels from class names alone."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from lpclip import prompts, store
from lpclip.config import EncoderConfig, digest
from lpclip.encoders import load_encoder
from lpclip.probe import Probe
from lpclip.views import BASE_VIEWS, Preprocess


@dataclass(frozen=True, kw_only=True)
class Head:
    """A zero-shot head: class embeddings and the temperature that turns cosines into probabilities."""

    class_names: tuple[str, ...]
    weight: np.ndarray
    """(K, d) float32, unit norm."""
    temperature: float
    identity: str
    """Digest of encoder, class names, templates and temperature."""


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """What the driver must know of an encoder, which it never loads itself."""

    name: str
    identity: dict[str, Any]
    preprocess: Preprocess
    logit_scale: float
    head: np.ndarray | None
    """(K, d) float32 zero-shot weights of the class names that were asked for."""
    notes: tuple[str, ...] = ()
    """Warnings that came with loading it."""


def _describe(config: EncoderConfig, names: tuple[str, ...], templates: tuple[str, ...]) -> EncoderInfo:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        encoder = load_encoder(config, device="cuda" if torch.cuda.is_available() else "cpu")
    head = prompts.zero_shot_head(encoder, names, templates=templates).numpy() if names else None
    return EncoderInfo(
        name=encoder.name,
        identity={**encoder.identity, "dim": encoder.dim},
        preprocess=encoder.preprocess,
        logit_scale=encoder.logit_scale,
        head=head,
        # A worker's warnings end in Ray's logs, where nobody looks: these belong into the plan.
        notes=tuple(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning)),
    )


def has_gpus() -> bool:
    """Whether the cluster has GPUs."""
    return ray.cluster_resources().get("GPU", 0) >= 1


def describe_encoder(
    config: EncoderConfig, *, class_names: tuple[str, ...] = (), templates: tuple[str, ...] = ()
) -> EncoderInfo:
    """An encoder's identity, preprocessing and, for class names, zero-shot weights, from a Ray task on its device.

    Raises ValueError when the encoder cannot be loaded.
    """
    task = ray.remote(num_cpus=1, num_gpus=1 if has_gpus() else 0, max_retries=1)(_describe)
    try:
        return ray.get(task.remote(config, class_names, templates))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def describe_probes_encoder(
    probe: Probe, *, pretrained: str | None, with_head: bool
) -> tuple[EncoderConfig, EncoderInfo]:
    """The encoder that a probe was trained with, `pretrained` being where its checkpoint lies now, if it has moved.

    With the zero-shot head of the probe's classes, if asked. Raises ValueError when the encoder has changed.
    """
    made = probe.encoder["config"]
    encoder = EncoderConfig(
        encoder=made["encoder"], pretrained=pretrained or made["pretrained"], precision=made["precision"]
    )
    names = probe.class_names if with_head else ()
    templates = tuple(probe.encoder["templates"]) if with_head else ()
    info = describe_encoder(encoder, class_names=names, templates=templates)
    if info.identity != probe.encoder["identity"]:
        raise ValueError(
            f"the probe was trained on features of another encoder than {encoder.encoder} as it is now: "
            "the weights, the precision or the preprocessing differ"
        )
    return encoder, info


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
