"""open_clip's models: by name and tag, from the Hugging Face hub, or from a local checkpoint."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import pickle
import re
import ssl
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub.constants
import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import get_model_config
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg
from safetensors import SafetensorError
from torch import Tensor

from lpclip.config import ModelConfig
from lpclip.encoders.encoder import preprocess_identity, to_input, weights_digest
from lpclip.images.views import Preprocess

log = logging.getLogger(__name__)
T = TypeVar("T")

HUB = "hf-hub:"
QUICK_GELU = "-quickgelu"
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
REACH_SECONDS = 5.0

# Architectures for small images and CPUs, as open_clip's configurations are: they are not CLIP's.
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

        Raises ValueError for unknown names and tags, missing, unreachable or unfit weights.
        """
        self.name = register(name)
        self.device = torch.device(device)
        self.dtype = dtype
        model = _load_model(self.name, pretrained).eval().requires_grad_(False)
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
        self._model = model.to(self.device)
        self._model.visual.to(dtype=dtype, memory_format=torch.channels_last)
        size = self.preprocess.size
        self.dim = self.encode_image(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape[1]

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) to float32 (B, dim) of unit norm."""
        images = to_input(pixels, self.preprocess, dtype=self.dtype, device=self.device)
        return F.normalize(self._model.encode_image(images).float(), dim=1)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """B texts to float32 (B, dim) of unit norm."""
        tokens = self._tokenizer(list(texts)).to(self.device)
        return F.normalize(self._model.encode_text(tokens).float(), dim=1)

    @cached_property
    def _tokenizer(self) -> Callable[[list[str]], Tensor]:
        return _tokenizer(self.name)


def register(name: str) -> str:
    """The model's name as open_clip knows it from now on; `name` may be a JSON file with its configuration.

    Raises ValueError when the file is none.
    """
    if name.startswith(HUB):
        return name
    if not name.endswith(".json"):
        return name.replace("/", "-")
    path = Path(name).expanduser()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--encoder {name}: not a JSON file that can be read ({error})") from error
    if not isinstance(known, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= known.keys():
        raise ValueError(
            f"--encoder {name}: a model's configuration has embed_dim, vision_cfg and text_cfg, as open_clip's own"
        )
    open_clip.add_model_config(path)
    return path.stem


def _register_small() -> None:
    # open_clip takes configurations from files alone, and reads them at once.
    with tempfile.TemporaryDirectory() as folder:
        for name, config in SMALL.items():
            Path(folder, f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)


_register_small()


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
    """What open_clip_config.json is to say."""


def load_trainable(config: ModelConfig, *, seed: int) -> Trainable:
    """The model that `config` names, with its pretrained weights or with those that the seed gives.

    Raises ValueError when it cannot be had, or is not trained on pairs alone.
    """
    if config.encoder == "lite":
        raise ValueError(f"the lite encoder is not trained: choose an open_clip model, or {', '.join(SMALL)}")
    if config.encoder.startswith(HUB):
        raise ValueError(f"{config.encoder}: give the model's name, and its weights as --pretrained")
    name = register(config.encoder)
    if "multimodal_cfg" in (get_model_config(name) or {}):
        raise ValueError(f"{name} is trained on captions that it writes: choose a model without a decoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.pretrained is None:
            _check_name(name)
            with _silent():
                model = _create(name, what=name, require_pretrained=False)
        else:
            model = _load_model(name, config.pretrained)
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
        tokenizer=_tokenizer(name),
        locked=locked,
        open_clip_config={"model_cfg": get_model_config(name), "preprocess_cfg": views},
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without open_clip's warning, through the root logger, that first weights are random."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    return _cached_or_online(lambda: open_clip.get_tokenizer(name), what=f"the tokenizer of {name}")


def _load_model(name: str, pretrained: str | None) -> Any:
    """The open_clip model in float32 on the CPU, with `visual.preprocess_cfg` from its own configuration."""
    if name.startswith(HUB):
        if pretrained is not None:
            raise ValueError(f"{name} carries its own weights: drop --pretrained")
        return _load_hub_model(name.removeprefix(HUB))
    _check_name(name)
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"{name} without --pretrained would have random weights: pass a checkpoint file"
            + (f" or one of {', '.join(tags)}" if tags else "")
        )
    tag_config = get_pretrained_cfg(name, pretrained)
    if Path(pretrained).is_file():
        path, config, quick_gelu = Path(pretrained), *_config_of_file(name, Path(pretrained))
    elif tag_config:
        path = Path(_cached_or_online(lambda: download_pretrained(tag_config), what=f"{name} {pretrained}"))
        config, quick_gelu = tag_config, bool(tag_config.get("quick_gelu"))
    else:
        raise ValueError(_unknown_weights(name, pretrained))
    _warn_activation(name, quick_gelu, weights=pretrained)
    overrides = {key: config[key] for key in PREPROCESS_KEYS if key in config}
    return _create(
        name, what=f"{name} from {pretrained}", pretrained=str(path), force_preprocess_cfg=overrides
    )


def _load_hub_model(repository: str) -> Any:
    what = f"{HUB}{repository}"
    file = _cached_or_online(
        lambda: download_pretrained_from_hf(repository, filename="open_clip_config.json"), what=what
    )
    _cached_or_online(lambda: download_pretrained_from_hf(repository), what=what)
    # Both files lie in one snapshot folder now: loading from there asks the hub nothing.
    return _create(f"local-dir:{Path(file).parent}", what=what)


def _create(name: str, *, what: str, **options: Any) -> Any:
    def create() -> Any:
        # open_clip logs every step through the root logger, and warns of what is warned of here already.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            return open_clip.create_model(name, weights_only=True, **{"require_pretrained": True, **options})

    try:
        return _cached_or_online(create, what=what)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{what}: not a file of plain weights (a pickle or TorchScript archive is never run): convert it"
            " to safetensors; OpenAI's own weights come with --pretrained openai"
        ) from error
    except (
        RuntimeError,
        SafetensorError,
        KeyError,
        AttributeError,
        EOFError,
        TypeError,
        UnicodeError,
    ) as error:
        raise ValueError(f"{what}: the weights do not fit the model ({_first_line(error)})") from error


def _check_name(name: str) -> None:
    known = open_clip.list_models()
    if name not in known:
        by_lower = {model.lower(): model for model in [*known, "lite"]}
        near = [
            by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
        ]
        hint = f": did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"unknown encoder {name!r}{hint or ': use lite, an open_clip model name or hf-hub:OWNER/NAME'}"
        )


def _unknown_weights(name: str, pretrained: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    near = difflib.get_close_matches(pretrained.lower().replace("-", "_"), tags, n=3, cutoff=0.5)
    if near:
        return (
            f"{name} has no weights {pretrained!r} and no such file exists: did you mean {', '.join(near)}?"
        )
    known = f"its tags are {', '.join(tags)}" if tags else "it has no published weights, so pass a file"
    return f"{name} has no weights {pretrained!r} and no such file exists: {known}"


def _config_of_file(name: str, path: Path) -> tuple[dict[str, Any], bool | None]:
    """Preprocessing of a local checkpoint and whether it wants QuickGELU (None: unknown).

    In this order: the open_clip_config.json beside it, the tag that its path names, and what the tags of the
    architecture have in common. open_clip itself would take OpenAI's mean and deviation for any file.
    """
    beside = path.parent / "open_clip_config.json"
    if beside.is_file():
        content = json.loads(beside.read_text())
        return content.get("preprocess_cfg", {}), bool(content.get("model_cfg", {}).get("quick_gelu", False))
    published = _published(name)
    spelled = re.sub(r"[^a-z0-9]+", "_", "/".join(path.absolute().parts[-4:]).lower())
    named = [tag for tag in published if f"_{tag}_" in f"_{spelled}_"]
    if named:
        config = published[max(named, key=len)]
        return config, bool(config.get("quick_gelu"))
    if not published:
        return {}, None
    views = [
        {key: config.get(key) for key in PREPROCESS_KEYS if key in config} for config in published.values()
    ]
    common = max(views, key=views.count)
    if any(view != common for view in views):
        warnings.warn(
            f"{path.name} does not say how its images are preprocessed, and {name}'s published weights differ"
            f" in it: assuming {common}; put its open_clip_config.json beside it to be sure",
            stacklevel=2,
        )
    activations = {bool(config.get("quick_gelu")) for config in published.values()}
    return common, activations.pop() if len(activations) == 1 else None


def _published(name: str) -> dict[str, dict[str, Any]]:
    """The published weights of an architecture by tag, with either activation."""
    base = name.removesuffix(QUICK_GELU)
    return {
        tag: get_pretrained_cfg(model, tag)
        for model in (base, base + QUICK_GELU)
        for tag in open_clip.list_pretrained_tags_by_model(model)
    }


def _warn_activation(name: str, quick_gelu: bool | None, *, weights: str) -> None:
    """Warn when the weights were trained with another activation than the model has, or may have been."""
    base = name.removesuffix(QUICK_GELU)
    has = bool((get_model_config(name) or {}).get("quick_gelu"))
    other = base if has else base + QUICK_GELU
    if quick_gelu is None and other in open_clip.list_models():
        uses = "QuickGELU" if has else "GELU"
        warnings.warn(
            f"{Path(weights).name} does not say its activation and {name} uses {uses}: if accuracy is poor,"
            f" try --encoder {other} (OpenAI's weights want QuickGELU)",
            stacklevel=2,
        )
    elif quick_gelu is not None and quick_gelu != has:
        wants = "QuickGELU" if quick_gelu else "GELU"
        hint = f": use --encoder {other}" if other in open_clip.list_models() else ""
        warnings.warn(
            f"{Path(weights).name} was trained with {wants}, which {name} does not use, so it loses"
            f" accuracy{hint}",
            stacklevel=2,
        )


def _preprocess(config: dict[str, Any]) -> Preprocess:
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"the model takes {width}x{height} images; only square ones are supported")
    return Preprocess(
        size=height,
        # open_clip's `random` is bicubic outside of training.
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        resize=config["resize_mode"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fill=config["fill_color"],
    )


def _cached_or_online(action: Callable[[], T], *, what: str) -> T:
    """Run an action on what is cached and, only if that fails, with the hub, which must answer in seconds.

    Left to itself the hub's client retries for most of a minute on a machine without a network.
    """
    try:
        with _offline():
            return action()
    except OSError as error:
        endpoint = huggingface_hub.constants.ENDPOINT
        if huggingface_hub.constants.HF_HUB_OFFLINE or not reachable(endpoint, seconds=REACH_SECONDS):
            raise ValueError(
                f"{what} is not in the Hugging Face cache and {endpoint} cannot be reached: connect to a"
                " network, set HF_HOME to a cache that has it, or pass a checkpoint file as --pretrained FILE"
            ) from error
    try:
        return action()
    except OSError as error:
        raise ValueError(f"cannot load {what}: {_first_line(error)}") from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Make the hub's client use its cache alone."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def reachable(url: str, *, seconds: float) -> bool:
    """Whether a server answers within so many seconds, whatever it answers; proxies are honoured."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except urllib.error.URLError as error:
            answers.append(isinstance(error.reason, ssl.SSLError))
        except OSError:
            answers.append(False)

    # A name look-up has no timeout of its own, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return any(answers)


def _first_line(error: BaseException) -> str:
    """What an error says first; a line that ends with a colon says nothing without the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
