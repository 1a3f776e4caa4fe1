"""From the encoder's configuration to the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lpclip.config import EncoderConfig, UserError
from lpclip.encoders.encoder import Encoder, resolve_precision
from lpclip.encoders.engine import CPU_BATCH


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


class TorchTower:
    """The image tower of an encoder on the CPU as a `Tower`."""

    def __init__(self, encoder: Encoder, *, num_threads: int, pass_size: int = CPU_BATCH) -> None:
        torch.set_num_threads(1)
        self.encoder, self.pass_size = encoder, pass_size
        self.threads = ThreadPoolExecutor(num_threads)

    def __call__(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """As `Tower`."""
        return self.threads.map(self._encode, batches)

    def _encode(self, batch: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.encoder.encode_image(torch.from_numpy(batch)).numpy()
        return found
