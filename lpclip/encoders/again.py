"""The encoder that a probe was trained with, found again: on another machine, in another place, years later.

This module does not import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lpclip.config import EncoderConfig, Engine, UserError
from lpclip.encoders.engine import computes_bfloat16
from lpclip.encoders.head import EncoderInfo

BESIDE = "open_clip_config.json"
"""The file beside a checkpoint that says how its images are preprocessed."""


def refuse_unknown(known: dict[str, Any]) -> None:
    """Raise UserError when a probe does not know its encoder: `lpclip.fit` trains on arrays from anywhere."""
    if not {"config", "identity", "views"} <= known.keys():
        raise UserError(
            "the probe does not say how its encoder sees images: it was trained on features from elsewhere, and a "
            "program that has such features can use it (docs/api.md)"
        )


def config_again(
    known: dict[str, Any],
    *,
    pretrained: str | None = None,
    engine: Engine = "auto",
    on_gpu: bool,
) -> EncoderConfig:
    """The configuration of the encoder that a probe knows as `known`.

    `pretrained` is where its checkpoint lies now. An encoder's own configuration is looked for beside it first. The
    precision is the one that the probe was trained in. A CPU that does not compute in it takes float32. Raises
    UserError when the probe does not know its encoder, or its checkpoint was a local file that is no longer there.
    """
    refuse_unknown(known)
    if pretrained is None:
        _refuse_missing(known, on_gpu=on_gpu)
    made, precision = known["config"], known["identity"]["precision"]
    if not on_gpu and (precision == "float16" or (precision == "bfloat16" and not computes_bfloat16())):
        precision = "float32"
    encoder = made["encoder"]
    if pretrained is not None and encoder.endswith(".json"):
        beside = Path(pretrained).with_name(Path(encoder).name)
        encoder = str(beside) if beside.is_file() else encoder
    return EncoderConfig(
        encoder=encoder,
        pretrained=pretrained or made["pretrained"],
        precision=precision,
        engine=engine,
    )


def _refuse_missing(known: dict[str, Any], *, on_gpu: bool) -> None:
    made = known["config"]["pretrained"]
    if made is None or known["identity"].get("pretrained", made) is not None or Path(made).is_file():
        return
    is_relative = not Path(made).is_absolute()
    if on_gpu and not is_relative:
        return  # the GPU may be another machine's, which has the file
    raise UserError(
        f"the probe was trained with the checkpoint {made}, which is not there"
        f"{' from this folder' if is_relative else ''}: name its place now with --pretrained"
    )


def noted_again(known: dict[str, Any], info: EncoderInfo) -> list[str]:
    """Notes on how the encoder that was found differs from the one that the probe was trained with.

    Raises UserError when it differs in more than its precision.
    """
    trained = known["identity"]
    # Earlier versions knew less of some encoders.
    others = {key for key in trained if info.identity.get(key) != trained[key]} - {"precision"}
    if others:
        raise UserError(
            f"the probe was trained on features of another encoder than {known['config']['encoder']} as it is now: "
            f"they differ in {', '.join(sorted(others))}"
        )
    used = info.identity["precision"]
    if used == trained["precision"]:
        return []
    return [
        f"the probe was trained on features in {trained['precision']}, and this machine computes them in {used}: a few "
        "labels may differ"
    ]


def own_files(known: dict[str, Any]) -> dict[str, Path | str]:
    """The files by which the encoder can be loaded anywhere, by name: paths of those that are there, texts of others.

    They are its checkpoint and, where it has one of its own, its configuration. Published weights need none.
    """
    made = known["config"]
    names = [name for name in (made["encoder"], made["pretrained"]) if name is not None]
    paths = [Path(name).expanduser() for name in names]
    found: dict[str, Path | str] = {path.name: path.absolute() for path in paths if path.is_file()}
    if made["pretrained"] is not None and Path(made["pretrained"]).name in found:
        # The preprocessing of a checkpoint may follow from where it lies.
        preprocess = known["identity"]["preprocess"]
        found[BESIDE] = json.dumps(
            {
                "model_cfg": {"quick_gelu": made["encoder"].endswith("-quickgelu")},
                "preprocess_cfg": {
                    "mean": preprocess["mean"],
                    "std": preprocess["std"],
                    "interpolation": preprocess["interpolation"],
                    "resize_mode": preprocess["resize"],
                    "fill_color": preprocess["fill"],
                },
            },
            indent=2,
        )
    return found
