"""Weights of open_clip models: found by tag, on the Hugging Face hub or in a local checkpoint, and never unpickled."""

from __future__ import annotations

import difflib
import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import get_model_config
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg
from safetensors import SafetensorError
from torch import Tensor

from lpclip.config import UserError
from lpclip.encoders.hub import HUB, cached_or_online, first_line, repository_of

QUICK_GELU = "-quickgelu"


PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


def load_model(name: str, pretrained: str | None) -> Any:
    """The open_clip model in float32 on the CPU, with `visual.preprocess_cfg` from its own configuration."""
    if name.startswith(HUB):
        if pretrained is not None:
            raise UserError(f"{name} carries its own weights: drop --pretrained")
        return _load_hub_model(repository_of(name, what="an encoder"))
    check_name(name)
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise UserError(
            f"{name} without --pretrained would have random weights: pass a checkpoint file"
            + (f" or one of {', '.join(tags)}" if tags else "")
        )
    tag_config = get_pretrained_cfg(name, pretrained)
    if Path(pretrained).is_file():
        path, config, quick_gelu = Path(pretrained), *_config_of_file(name, Path(pretrained))
    elif tag_config:
        path = Path(cached_or_online(lambda: download_pretrained(tag_config), what=f"{name} {pretrained}"))
        config, quick_gelu = tag_config, bool(tag_config.get("quick_gelu"))
    else:
        raise UserError(_unknown_weights(name, pretrained))
    _warn_activation(name, quick_gelu, weights=pretrained)
    overrides = {key: config[key] for key in PREPROCESS_KEYS if key in config}
    return create_model(
        name, what=f"{name} from {pretrained}", pretrained=str(path), force_preprocess_cfg=overrides
    )


def _load_hub_model(repository: str) -> Any:
    what = f"{HUB}{repository}"
    file = cached_or_online(
        lambda: download_pretrained_from_hf(repository, filename="open_clip_config.json"), what=what
    )
    cached_or_online(lambda: download_pretrained_from_hf(repository), what=what)
    # Both files lie in one snapshot folder now: loading from there asks the hub nothing.
    return create_model(f"local-dir:{Path(file).parent}", what=what)


def create_model(name: str, *, what: str, **options: Any) -> Any:
    """open_clip's model of that name; `what` names it in errors. Raises UserError when its weights do not fit it."""

    def create() -> Any:
        # open_clip logs every step through the root logger, and warns of what is warned of here already.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            return open_clip.create_model(name, weights_only=True, **{"require_pretrained": True, **options})

    try:
        return cached_or_online(create, what=what)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
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
        raise UserError(f"{what}: the weights do not fit the model ({first_line(error)})") from error
    except ValueError as error:  # such as a text tower that comes with code of its own
        raise UserError(f"{what}: {first_line(error)}") from error


def load_tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of an open_clip model. Raises UserError when it cannot be had, or comes with code of its own."""

    def load() -> Any:
        # A configuration may ask transformers to run code that lies beside the tokenizer.
        from_hub = get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
        options = {"trust_remote_code": False} if from_hub else {}
        return open_clip.get_tokenizer(name, **options)

    what = f"the tokenizer of {name}"
    try:
        return cached_or_online(load, what=what)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what}: {first_line(error)}") from error


def check_name(name: str) -> None:
    """Raise UserError, with names that are near, when open_clip knows no model of this name."""
    known = open_clip.list_models()
    if name not in known:
        by_lower = {model.lower(): model for model in [*known, "lite"]}
        near = [
            by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
        ]
        hint = f": did you mean {', '.join(near)}?" if near else ""
        raise UserError(
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
