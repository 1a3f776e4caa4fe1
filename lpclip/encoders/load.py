"""From the encoder's configuration to the encoder."""

from __future__ import annotations

import torch

from lpclip.config import EncoderConfig
from lpclip.encoders.encoder import Encoder, resolve_precision
from lpclip.errors import UserError


def load_encoder(config: EncoderConfig, *, device: torch.device | str = "cpu") -> Encoder:
    """The encoder that `config` names, frozen and on `device`.

    Raises UserError when the model, its weights or an optional package cannot be had.
    """
    dtype = resolve_precision(config.precision, device=torch.device(device))
    if config.encoder == "lite":
        if config.pretrained is not None:
            raise UserError("the lite encoder carries its own weights: drop --pretrained")
        from lpclip.encoders.lite import LiteEncoder

        return LiteEncoder(dtype=dtype, device=device)
    from lpclip.encoders.open_clip import OpenClipEncoder

    return OpenClipEncoder(config.encoder, pretrained=config.pretrained, dtype=dtype, device=device)
