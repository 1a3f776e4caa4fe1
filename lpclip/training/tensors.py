"""Files of tensors that a training has written."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lpclip import files
from lpclip.config import UserError


def read_tensors(path: str, *, remedy: str) -> dict[str, Tensor]:
    """Tensors by name. Raises UserError, which ends with the remedy, when the file is damaged."""
    try:
        return load(files.read_bytes(path))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
