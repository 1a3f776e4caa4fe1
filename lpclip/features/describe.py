"""An encoder described to the driver: its identity, its preprocessing, the weights of class names."""

from __future__ import annotations

import warnings

import ray
import torch

from lpclip.config import EncoderConfig
from lpclip.encoders import prompts
from lpclip.encoders.head import EncoderInfo
from lpclip.encoders.load import full_identity, load_encoder


def _describe(
    config: EncoderConfig, names: tuple[str, ...], templates: tuple[str, ...], *, device: str | None = None
) -> EncoderInfo:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        encoder = load_encoder(config, device=device)
    head = prompts.zero_shot_head(encoder, names, templates=templates).numpy() if names else None
    return EncoderInfo(
        name=encoder.name,
        identity=full_identity(encoder),
        preprocess=encoder.preprocess,
        logit_scale=encoder.logit_scale,
        head=head,
        # A worker's warnings end in Ray's logs, where nobody looks. These belong in the plan.
        notes=tuple(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning)),
    )


def has_gpus() -> bool:
    """Say whether the cluster has GPUs."""
    return ray.cluster_resources().get("GPU", 0) >= 1


def describe_encoder(
    config: EncoderConfig, *, class_names: tuple[str, ...] = (), templates: tuple[str, ...] = ()
) -> EncoderInfo:
    """An encoder's identity, preprocessing and, for class names, zero-shot weights, computed where GPUs are.

    Raises UserError when the encoder cannot be loaded.
    """
    if not has_gpus():
        # Another process would cost its start and torch's import for nothing. The encoders will run on the CPU, so this
        # one does too, even if this process sees a GPU that Ray was not given.
        return _describe(config, class_names, templates, device="cpu")
    task = ray.remote(num_cpus=1, num_gpus=1, max_retries=1)(_describe)
    try:
        return ray.get(task.remote(config, class_names, templates))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
