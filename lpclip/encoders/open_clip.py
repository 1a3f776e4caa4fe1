"""open_clip's models: by name and tag, from the Hugging Face hub, or from a local checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import get_model_config
from torch import Tensor

from lpclip.config import ModelConfig, UserError, digest
from lpclip.encoders.encoder import ImageNetwork, to_input, weights_digest
from lpclip.encoders.hub import HUB, cached_or_online
from lpclip.encoders.weights import (
    PREPROCESS_KEYS,
    check_name,
    create_model,
    load_model,
    load_tokenizer,
)
from lpclip.images.pixels import Preprocess, preprocess_identity

log = logging.getLogger(__name__)


# Architectures for small images and CPUs, in the form of open_clip's own configurations. They are not CLIP's.
SMALL: dict[str, dict[str, Any]] = {
    "tiny-32": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "tiny-vit-32": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    },
}


class OpenClipEncoder:
    """The Encoder protocol over one open_clip model; the text tower stays in float32."""

    def __init__(
        self,
        name: str,
        *,
        pretrained: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """`pretrained` is open_clip's tag or a checkpoint file; hub models (hf-hub:OWNER/NAME) take none.

        `name` may be a JSON file with a model's configuration.

        Raises UserError for unknown names and tags, missing, unreachable or unfit weights.
        """
        self.name = register(name)
        self.device = torch.device(device)
        self.dtype = dtype
        model = load_model(self.name, pretrained).eval().requires_grad_(False)
        self.preprocess = _preprocess(model.visual.preprocess_cfg)
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.identity: dict[str, Any] = {
            "name": self.name,
            # A file's name says nothing that the weights' hash does not say better.
            "pretrained": None if pretrained is None or Path(pretrained).is_file() else pretrained,
            "weights": weights_digest(model.state_dict()),
            "precision": str(dtype).removeprefix("torch."),
            "preprocess": preprocess_identity(self.preprocess),
        }
        if name.endswith(".json") or name.startswith(HUB):
            # The names of open_clip's own models say how they compute. Two files may have one name and equal weights.
            self.identity["model"] = digest(
                cached_or_online(lambda: get_model_config(self.name), what=self.name)
            )
        self._model = model.to(self.device)
        self._model.visual.to(dtype=dtype, memory_format=torch.channels_last)
        size = self.preprocess.size
        self.dim = self.encode_image(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape[1]

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) to float32 (B, dim) of unit norm."""
        images = to_input(pixels, self.preprocess, dtype=self.dtype, device=self.device)
        return F.normalize(self._model.encode_image(images).float(), dim=1)

    def image_network(self) -> torch.nn.Module:
        """The image tower from bytes to features as one module."""
        return ImageNetwork(_ImageTower(self._model), self.preprocess)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """B texts to float32 (B, dim) of unit norm."""
        tokens = self._tokenizer(list(texts)).to(self.device)
        return F.normalize(self._model.encode_text(tokens).float(), dim=1)

    @cached_property
    def _tokenizer(self) -> Callable[[list[str]], Tensor]:
        return load_tokenizer(self.name)


class _ImageTower(torch.nn.Module):
    """`encode_image` of an open_clip model as a module's forward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.model.encode_image(images)
        return found


def register(name: str) -> str:
    """Make a model known to open_clip. Returns its name there; `name` may be a JSON file with its configuration.

    Raises UserError when the file holds no configuration.
    """
    _register_small()
    if name.startswith(HUB):
        return name
    if not name.endswith(".json"):
        return name.replace("/", "-")
    path = Path(name).expanduser()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder {name}: not a JSON file that can be read ({error})") from error
    if not isinstance(known, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= known.keys():
        raise UserError(
            f"--encoder {name}: a model's configuration has embed_dim, vision_cfg and text_cfg, as open_clip's own"
        )
    open_clip.add_model_config(path)
    return path.stem


@cache
def _register_small() -> None:
    # open_clip takes configurations from files alone, and reads them at once.
    with tempfile.TemporaryDirectory() as folder:
        for name, config in SMALL.items():
            Path(folder, f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """An open_clip model to be trained, in float32 on the CPU."""

    name: str
    model: Any
    preprocess: Preprocess
    tokenizer: Callable[[list[str]], Tensor]
    """B texts to (B, L) int64."""
    locked: torch.nn.Module | None
    """The tower that stays as it is."""
    open_clip_config: dict[str, Any]
    """Contents of open_clip_config.json, which lies beside trained weights."""


def load_trainable(config: ModelConfig, *, seed: int) -> Trainable:
    """The model that `config` names, with its pretrained weights or with those that the seed gives.

    Raises UserError when it cannot be had, or is not trained on pairs alone.
    """
    if config.encoder == "lite":
        raise UserError(f"the lite encoder is not trained: choose an open_clip model, or {', '.join(SMALL)}")
    if config.encoder.startswith(HUB):
        raise UserError(f"{config.encoder}: give the model's name, and its weights as --pretrained")
    name = register(config.encoder)
    if "multimodal_cfg" in (get_model_config(name) or {}):
        raise UserError(f"{name} is trained on captions that it writes: choose a model without a decoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.pretrained is None:
            check_name(name)
            with _silent():
                model = create_model(name, what=name, require_pretrained=False)
        else:
            model = load_model(name, config.pretrained)
    if getattr(model, "logit_bias", None) is not None:
        model.logit_bias.requires_grad_(False)
    locked = None
    if config.lock == "image":
        model.lock_image_tower()
        locked = model.visual
    elif config.lock == "text":
        model.lock_text_tower()
        locked = getattr(model, "text", None)
    views = {key: model.visual.preprocess_cfg[key] for key in PREPROCESS_KEYS}
    return Trainable(
        name=name,
        model=model,
        preprocess=_preprocess(model.visual.preprocess_cfg),
        tokenizer=load_tokenizer(name),
        locked=locked,
        open_clip_config={"model_cfg": get_model_config(name), "preprocess_cfg": views},
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep back open_clip's warning, through the root logger, that first weights are random."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _preprocess(config: dict[str, Any]) -> Preprocess:
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"the model takes {width}x{height} images; only square ones are supported")
    return Preprocess(
        size=height,
        # open_clip's `random` is bicubic outside of training.
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        resize=config["resize_mode"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fill=config["fill_color"],
    )
