"""Encoders on CPUs: described, and their image towers run, by OpenVINO where it can, and by torch where not.

This module does not import torch. An encoder is loaded with torch once, to be converted and kept, and never again
while nothing changes.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lpclip.config import EncoderConfig, UserError
from lpclip.encoders.engine import CPU_BATCH, OpenVinoTower, Tower, computes_bfloat16, convert, runs
from lpclip.encoders.head import EncoderInfo, refuse_another
from lpclip.encoders.kept import Kept, find, keep
from lpclip.files import cache_folder

if TYPE_CHECKING:
    from lpclip.encoders.encoder import Encoder

# A converted network must give the features of the original, of one image at least so close (cosine).
LEAST_COSINE = 0.9999


def describe_on_cpu(config: EncoderConfig, names: tuple[str, ...], templates: tuple[str, ...]) -> EncoderInfo:
    """An encoder's identity, its preprocessing, its engine and, with class names, zero-shot weights.

    Raises UserError when the encoder cannot be loaded, or `config` asks for an engine that cannot run it.
    """
    precision = _precision(config)
    if config.engine == "torch" or not runs(precision):
        return _describe_with_torch(config, names, templates)
    kept = find(config, precision=precision)
    head = kept.head(names, templates) if kept is not None and names else None
    if kept is not None and (head is not None or not names):
        return replace(kept.info, head=head)

    from lpclip.encoders.zero_shot import load_noting, zero_shot_weights

    encoder, info = load_noting(replace(config, precision="float32"), device="cpu")
    if kept is None or {**info.identity, "precision": precision} != kept.info.identity:
        info, kept = _convert(config, encoder, info)
    else:
        info = kept.info
    info = replace(info, identity={**info.identity, "precision": precision})
    if not names:
        return info
    head = zero_shot_weights(encoder, names, templates=templates).numpy()
    if kept is not None:
        kept.keep_head(head, names, templates)
    return replace(info, head=head)


def load_tower(
    config: EncoderConfig, info: EncoderInfo, *, num_threads: int, pass_size: int = CPU_BATCH
) -> Tower:
    """The image tower of an encoder that was described, with `num_threads` passes of one thread each at a time.

    Passes of another size than CPU_BATCH give the same features to float rounding only.

    Raises UserError when this machine has another encoder, or cannot run its engine.
    """
    precision = info.identity["precision"]
    if info.engine == "torch":
        from lpclip.encoders.load import TorchTower, full_identity, load_again

        encoder = load_again(config, info.identity, device="cpu")
        refuse_another(full_identity(encoder), info.identity)
        return TorchTower(encoder, num_threads=num_threads, pass_size=pass_size)
    config = replace(config, precision=precision, engine="openvino")
    # On another machine than the driver's it may have to be converted first.
    refuse_another(describe_on_cpu(config, (), ()).identity, info.identity)
    kept = find(config, precision=precision)
    assert kept is not None
    return kept.tower(num_threads=num_threads, pass_size=pass_size)


def _precision(config: EncoderConfig) -> str:
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if computes_bfloat16() else "float32"


def _describe_with_torch(
    config: EncoderConfig, names: tuple[str, ...], templates: tuple[str, ...]
) -> EncoderInfo:
    from lpclip.encoders.zero_shot import describe

    if config.engine == "openvino":
        raise UserError(
            f"--engine openvino: it is not installed on {platform.node()}, or its CPU does not compute in "
            f"{_precision(config)}; leave --engine out, or choose --precision float32"
        )
    return describe(config, names, templates, device="cpu")


def _convert(config: EncoderConfig, encoder: Encoder, info: EncoderInfo) -> tuple[EncoderInfo, Kept | None]:
    """Convert an encoder and keep it. Where that fails, the encoder stays torch's, with a note that says why."""

    def write(path: Path) -> None:
        convert(encoder.image_network(), path, size=info.preprocess.size)
        _refuse_other_features(path, encoder)

    try:
        keep(config, replace(info, engine="openvino"), convert=write)
        kept = find(config, precision=info.identity["precision"])
        assert kept is not None
    # What OpenVINO and torch raise over an operation that they do not know is of many kinds.
    except Exception as error:
        if config.engine == "openvino":
            raise UserError(f"--engine openvino cannot run {info.name}: {_line(error)}") from error
        note = (
            f"torch computes the features, more slowly: {info.name} could not be converted for OpenVINO and kept in "
            f"{cache_folder()} ({_line(error)})"
        )
        return replace(info, notes=(*info.notes, note)), None
    return kept.info, kept


def _refuse_other_features(path: Path, encoder: Encoder) -> None:
    import torch

    size = encoder.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (CPU_BATCH, size, size, 3), dtype=np.uint8)
    (found,) = OpenVinoTower(path, precision="float32", num_threads=1)([pixels])
    wanted = encoder.encode_image(torch.from_numpy(pixels)).numpy()
    cosine = float((found * wanted).sum(1).min())
    if not cosine >= LEAST_COSINE:
        raise ValueError(f"the converted network has other features, cosine {cosine:.4f}")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"[:200]
