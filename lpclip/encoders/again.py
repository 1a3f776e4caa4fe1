"""The encoder that a probe was trained with, found again: on another machine, in another place, years later.

This module does not import torch.
"""

from __future__ import annotations

from typing import Any

from lpclip.config import EncoderConfig, Engine, UserError
from lpclip.encoders.engine import computes_bfloat16
from lpclip.encoders.head import EncoderInfo


def config_again(
    known: dict[str, Any], *, pretrained: str | None = None, engine: Engine = "auto", on_gpu: bool
) -> EncoderConfig:
    """The configuration of the encoder that a probe knows as `known`; `pretrained` is where its checkpoint lies now.

    Its precision is the one that the probe was trained in. A CPU that does not compute in it takes float32.
    """
    made, precision = known["config"], known["identity"]["precision"]
    if not on_gpu and (precision == "float16" or (precision == "bfloat16" and not computes_bfloat16())):
        precision = "float32"
    return EncoderConfig(
        encoder=made["encoder"],
        pretrained=pretrained or made["pretrained"],
        precision=precision,
        engine=engine,
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
