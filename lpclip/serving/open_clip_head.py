"""A probe as a classifier of open_clip's zero-shot evaluation: one matrix in the place of the texts' embeddings."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save
from torch import Tensor

import lpclip
from lpclip import files
from lpclip.config import UserError
from lpclip.images.views import base_views
from lpclip.method.probe import Probe

SCALE = 100.0
"""What open_clip's evaluation multiplies by, before a softmax would give probabilities."""


def open_clip_classifier(probe: Probe) -> Tensor:
    """(d + 1, K) float32: the probe's probabilities are softmax(100 * [features, 1] @ it). The last row is its bias."""
    rows = torch.cat([probe.weight.T, probe.bias[None]])
    return (rows / (SCALE * probe.temperature)).float().contiguous()


def write_open_clip(probe: Probe, out: str, *, digest: str) -> list[str]:
    """Write `classifier` to `out`, which ends in .safetensors; `digest` is the probe's. Returns notes.

    Raises UserError when the probe's encoder is none of open_clip's.
    """
    from lpclip.encoders.open_clip import SMALL  # seconds, which other forms do without

    identity = probe.encoder["identity"]
    if identity["name"] == "lite":
        raise UserError(
            "the probe's encoder is lite, which open_clip does not have: NAME.onnx and a folder take any encoder"
        )
    about = {
        "class_names": json.dumps(list(probe.class_names)),
        "encoder": identity["name"],
        # A local checkpoint has no tag.
        "pretrained": identity.get("pretrained") or "",
        "preprocess": json.dumps(identity["preprocess"]),
        "probe": digest,
        "lpclip": lpclip.__version__,
    }
    files.write_bytes(out, save({"classifier": open_clip_classifier(probe)}, metadata=about))
    notes, source = [], probe.encoder["config"]["encoder"]
    if identity["name"] in SMALL or source.endswith(".json"):
        notes.append(
            f"open_clip itself has no encoder {identity['name']}: a program that uses the file needs lpclip too, and "
            f"calls lpclip.encoders.open_clip.register({source!r}) before it creates the model"
        )
    if len(base_views(probe.encoder["views"])) > 1:
        notes.append(
            "the probe was trained on the mean of an image and its mirror image; from the image alone, as open_clip "
            "encodes it, some labels may differ"
        )
    return notes
