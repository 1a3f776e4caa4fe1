"""The probe: a linear classifier of unit-norm features with everything that it takes to use it, and its folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lpclip import files
from lpclip.config import UserError, digest
from lpclip.method.linear import Linear

FORMAT = 1
KEYS = {"format", "class_names", "temperature", "feature_normalisation", "encoder", "summary"}
"""What probe.json holds beside its digest."""


@dataclass(frozen=True, kw_only=True)
class Probe(Linear):
    """A linear classifier of unit-norm features; probabilities are softmax(logits / temperature)."""

    temperature: float = 1.0
    class_names: tuple[str, ...] = ()
    encoder: dict[str, Any] = field(default_factory=dict)
    """Everything needed to compute the same features again: configuration, identity, preprocessing, views."""
    summary: dict[str, Any] = field(default_factory=dict)

    def probabilities(self, features: Tensor | np.ndarray) -> Tensor:
        """(N, d) unit-norm features to (N, K) float32 class probabilities."""
        return torch.softmax(self.logits(features).div_(self.temperature), dim=1)

    def label(self, features: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """The most probable class (N,) int64 of each of the unit-norm features (N, d), and its probability (N,)."""
        confidence, label = self.by_blocks(
            len(features), lambda rows: self.probabilities(features[rows]).max(dim=1)
        )
        return label, confidence

    def top(self, features: Tensor | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most probable classes (N, k) int64 of unit-norm features (N, d), and their probabilities (N, k).

        With fewer than k classes it is all of them.
        """
        k = min(k, len(self.bias))
        probabilities, places = self.by_blocks(
            len(features), lambda rows: self.probabilities(features[rows]).topk(k, dim=1)
        )
        return places.numpy(), probabilities.numpy()

    def predict_proba(self, features: Tensor | np.ndarray) -> np.ndarray:
        """(N, d) unit-norm features to (N, K) float32 class probabilities, as scikit-learn names them."""
        return self.probabilities(features).numpy()

    @classmethod
    def load(cls, folder: str) -> Probe:
        """Read what `save` wrote. Raises UserError with the reason when the folder holds no probe, or a damaged one."""
        return load_probe(folder)

    def save(self, folder: str) -> None:
        """Write probe.safetensors, then probe.json: the folder is a probe when the second is there."""
        files.make_folder(folder)
        tensors = save_tensors({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()})
        files.write_bytes(files.join(folder, "probe.safetensors"), tensors)
        text = {
            "format": FORMAT,
            "class_names": list(self.class_names),
            "temperature": self.temperature,
            "feature_normalisation": "l2",
            "encoder": self.encoder,
            "summary": self.summary,
        }
        files.write_json(files.join(folder, "probe.json"), {**text, "digest": _digest(text, tensors)})


def load_probe(folder: str) -> Probe:
    """Read a saved probe. Raises UserError with the reason when the folder holds none, or a damaged one."""
    try:
        text = files.read_json(files.join(folder, "probe.json"))
        data = files.read_bytes(files.join(folder, "probe.safetensors"))
        tensors = load_tensors(data)
    except FileNotFoundError as error:
        inside = [files.join(folder, *names) for names in (("probe",), ("data", "lpclip", "probe"))]
        holding = [place for place in inside if files.exists(files.join(place, "probe.json"))]
        hint = f"; {holding[0]} holds one" if holding else ""
        raise UserError(
            f"{folder} holds no probe: probe.json and probe.safetensors belong there{hint}"
        ) from error
    except SafetensorError as error:
        raise UserError(f"{files.join(folder, 'probe.safetensors')} is damaged: {error}") from error
    if not isinstance(text, dict) or text.get("format") != FORMAT:
        raise UserError(
            f"{files.join(folder, 'probe.json')} is not of format {FORMAT}: another version of lpclip made it"
        )
    missing = {"class_names", "temperature", "encoder", "summary"} - text.keys()
    missing |= {"weight", "bias"} - tensors.keys()
    if missing:
        raise UserError(f"{folder} is damaged: it lacks {', '.join(sorted(missing))}")
    # Earlier versions wrote no digest, and none of them any other key.
    written = text.pop("digest", None)
    if text.keys() - KEYS or (written is not None and written != _digest(text, data)):
        raise UserError(f"{folder} was changed or damaged after it was written: its digest is another one")
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(text["class_names"]) != len(weight):
        raise UserError(f"{folder} is damaged: weights, biases and class names do not fit each other")
    return Probe(
        weight=weight,
        bias=bias,
        temperature=text["temperature"],
        class_names=tuple(text["class_names"]),
        encoder=text["encoder"],
        summary=text["summary"],
    )


def probe_digest(folder: str) -> str:
    """The digest of a saved probe, also of one that an earlier version wrote without it."""
    text = files.read_json(files.join(folder, "probe.json"))
    text.pop("digest", None)
    return _digest(text, files.read_bytes(files.join(folder, "probe.safetensors")))


def _digest(text: dict[str, Any], tensors: bytes) -> str:
    """Digest of both files; of the first, as it is read back."""
    return digest([json.loads(json.dumps(text)), hashlib.sha256(tensors).hexdigest()])


def zero_shot_probe(head: Tensor, *, temperature: float, **names: Any) -> Probe:
    """The zero-shot classifier as a probe: text embeddings (K, d) over the temperature, no bias."""
    return Probe(weight=head.float() / temperature, bias=torch.zeros(len(head)), **names)
