"""From the encoder's configuration to the encoder."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Any

import torch

from lpclip.config import EncoderConfig, UserError
from lpclip.encoders.encoder import Encoder, resolve_precision


def load_encoder(config: EncoderConfig, *, device: torch.device | str = "cpu") -> Encoder:
    """The encoder that `config` names, frozen and on `device`.

    Raises UserError when the model or its weights cannot be had.
    """
    dtype = resolve_precision(config.precision, device=torch.device(device))
    if config.encoder == "lite":
        if config.pretrained is not None:
            raise UserError("the lite encoder carries its own weights: drop --pretrained")
        from lpclip.encoders.lite import LiteEncoder

        return LiteEncoder(dtype=dtype, device=device)
    from lpclip.encoders.open_clip import OpenClipEncoder

    return OpenClipEncoder(config.encoder, pretrained=config.pretrained, dtype=dtype, device=device)


def full_identity(encoder: Encoder) -> dict[str, Any]:
    """The encoder's identity with the length of its features."""
    return {**encoder.identity, "dim": encoder.dim}


def load_again(config: EncoderConfig, identity: dict[str, Any], *, device: torch.device | str) -> Encoder:
    """The encoder that `config` names, in the precision that this full identity has: `auto` may differ by node."""
    return load_encoder(replace(config, precision=identity["precision"]), device=device)


def refuse_another(encoder: Encoder, identity: dict[str, Any]) -> None:
    """Raise UserError unless this is the encoder of that full identity, with which the job began."""
    if full_identity(encoder) != identity:
        raise UserError(
            f"another encoder was found on {platform.node()} than where the job began: its weights, its "
            "precision or its preprocessing differ; all nodes must have the same checkpoint"
        )
