"""An encoder described to the driver: its identity, its preprocessing, the weights of class names."""

from __future__ import annotations

import ray

from lpclip.config import EncoderConfig
from lpclip.encoders.head import EncoderInfo
from lpclip.encoders.on_cpu import describe_on_cpu


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
        return describe_on_cpu(config, class_names, templates)

    from lpclip.encoders.zero_shot import describe

    task = ray.remote(num_cpus=1, num_gpus=1, max_retries=1)(describe)
    try:
        return ray.get(task.remote(config, class_names, templates))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
