"""An encoder described to the driver: its identity, its preprocessing, the weights of class names."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import ray

from lpclip.config import Device, EncoderConfig, UserError
from lpclip.encoders.head import EncoderInfo
from lpclip.encoders.on_cpu import describe_on_cpu

WAIT_SECONDS = 15
"""After so long without an answer, a line says what the job waits for. The next one comes after twice the time."""


def has_gpus() -> bool:
    """Say whether the cluster has GPUs."""
    return ray.cluster_resources().get("GPU", 0) >= 1


def uses_gpus(device: Device) -> bool:
    """Say whether images are encoded on GPUs, those included that a cluster has yet to start."""
    return device == "gpu" or (device == "auto" and has_gpus())


def describe_encoder(
    config: EncoderConfig,
    *,
    class_names: tuple[str, ...] = (),
    templates: tuple[str, ...] = (),
    device: Device = "auto",
) -> EncoderInfo:
    """An encoder's identity, preprocessing and, for class names, zero-shot weights, computed where images are encoded.

    With `device` gpu, it waits until there is a GPU, and prints that it waits.
    Raises UserError when the encoder cannot be loaded, or there is no GPU and never will be.
    """
    if not uses_gpus(device):
        # Another process would cost its start and torch's import for nothing. The encoders will run on the CPU, so this
        # one does too, even if this process sees a GPU that Ray was not given.
        return describe_on_cpu(config, class_names, templates)

    from lpclip.encoders.zero_shot import describe

    if not has_gpus() and not os.environ.get("RAY_ADDRESS") and len(ray.nodes()) == 1:
        raise UserError(
            "--device gpu: Ray sees no GPU on this machine, and RAY_ADDRESS names no cluster that could have one"
        )
    task = ray.remote(num_cpus=1, num_gpus=1, max_retries=1)(describe)
    try:
        return _get(task.remote(config, class_names, templates))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _get(found: ray.ObjectRef) -> Any:
    """The result of a task on a GPU. While it does not come, lines say why."""
    begin, pause = time.monotonic(), WAIT_SECONDS
    while not ray.wait([found], timeout=pause)[0]:
        pause *= 2
        waited = f"{time.monotonic() - begin:.0f} s"
        if has_gpus():
            text = f"waiting for a free GPU or for the encoder to load, for {waited} now"
        else:
            text = (
                f"waiting for a GPU, for {waited} now: the cluster has none yet, and --device cpu needs none"
            )
        print(text, file=sys.stderr, flush=True)
    return ray.get(found)
