"""Frozen dual encoders: images and texts into one space, where a cosine times `logit_scale` is a logit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpclip.encoders.engine import computes_bfloat16
from lpclip.images.pixels import Preprocess


class Encoder(Protocol):
    """A frozen image tower and a frozen text tower that share one space.

    `identity` is JSON-able, free of paths, and differs whenever image features do.
    """

    name: str
    preprocess: Preprocess
    dim: int
    logit_scale: float
    identity: dict[str, Any]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) to float32 (B, dim) of unit norm, on the encoder's device."""
        ...

    def image_network(self) -> nn.Module:
        """`encode_image` as one module, which another library can convert."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """B texts to float32 (B, dim) of unit norm, on the encoder's device."""
        ...


def resolve_precision(precision: str, *, device: torch.device) -> torch.dtype:
    """The weights' dtype; `auto` takes half precision only where the hardware computes in it."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and computes_bfloat16():
        return torch.bfloat16
    return torch.float32


def to_input(pixels: Tensor, preprocess: Preprocess, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """uint8 (B, S, S, 3) to normalised (B, 3, S, S); NHWC bytes seen as NCHW are channels-last already."""
    assert pixels.dtype == torch.uint8, pixels.dtype
    assert pixels.shape[1:] == (preprocess.size, preprocess.size, 3), pixels.shape
    mean, std = _constant(preprocess.mean, device), _constant(preprocess.std, device)
    return (pixels.to(device).float().div_(255).sub_(mean).div_(std)).permute(0, 3, 1, 2).to(dtype)


class ImageNetwork(nn.Module):
    """uint8 (B, S, S, 3) to float32 (B, dim) of unit norm; `tower` takes normalised float32 (B, 3, S, S)."""

    def __init__(self, tower: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.tower = tower
        self.mean, self.std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)

    def forward(self, pixels: Tensor) -> Tensor:
        images = (pixels.float() / 255 - self.mean) / self.std
        return F.normalize(self.tower(images.permute(0, 3, 1, 2)), dim=1)


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values on the device, sent there once: each sending would wait until the device has done all its work."""
    return torch.tensor(values, device=device)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Hash of every weight's name, dtype, shape and bytes: the same for any file format."""
    total = blake2b(digest_size=16)
    for name in sorted(state):
        weight = state[name].detach().cpu().contiguous()
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        total.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
