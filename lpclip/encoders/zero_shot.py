"""From the encoder's configuration and class names to the zero-shot head, in this process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpclip.config import EncoderConfig, UserError, readable, to_dict
from lpclip.encoders import prompts
from lpclip.encoders.encoder import Encoder
from lpclip.encoders.head import EncoderInfo, Head, make_head
from lpclip.encoders.load import full_identity, load_encoder


def describe(
    config: EncoderConfig, names: tuple[str, ...], templates: tuple[str, ...], *, device: str | None = None
) -> EncoderInfo:
    """Load an encoder to learn its identity, its preprocessing and, with class names, zero-shot weights.

    `device` is a GPU by default, where there is one. Raises UserError when the encoder cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder, info = load_noting(config, device=device)
    head = zero_shot_weights(encoder, names, templates=templates).numpy() if names else None
    return replace(info, head=head)


def load_noting(config: EncoderConfig, *, device: str) -> tuple[Encoder, EncoderInfo]:
    """An encoder, and what there is to say of it but for a head. Raises UserError when it cannot be loaded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        encoder = load_encoder(config, device=device)
    return encoder, EncoderInfo(
        name=encoder.name,
        identity=full_identity(encoder),
        preprocess=encoder.preprocess,
        logit_scale=encoder.logit_scale,
        head=None,
        # A worker's warnings end in Ray's logs, where nobody looks. These belong in the plan.
        notes=tuple(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning)),
    )


def zero_shot_weights(
    encoder: Encoder, class_names: Sequence[str], *, templates: Sequence[str], batch_size: int = 256
) -> Tensor:
    """The zero-shot head, float32 (K, d) on the CPU, rows of unit norm.

    A row is the mean of the class's unit-norm prompt embeddings, normalised again (CLIP, arXiv 2103.00020,
    section 3.1.4). Zero-shot is the argmax of features @ head.T.
    """
    texts = [template.replace("{}", readable(name)) for name in class_names for template in templates]
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    embeddings = torch.cat([encoder.encode_text(batch).cpu() for batch in batches])
    return F.normalize(embeddings.view(len(class_names), len(templates), -1).mean(1), dim=1)


def zero_shot_head(
    class_names: Sequence[str],
    *,
    encoder: str = "lite",
    pretrained: str | None = None,
    templates: str | Sequence[str] = "default",
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str | None = None,
) -> Head:
    """The zero-shot head of K class names: weights (K, d) float32 of unit norm, and the encoder's own temperature.

    `encoder`, `pretrained` and `precision` name the encoder as the jobs' flags do: `lite` is embedded and not CLIP.
    `templates` are default, simple, openai, a text file, or prompts with {} for the class name. `device` is a GPU by
    default, where there is one. Raises UserError when there are fewer than two names, or a name or a template cannot
    be used, or the encoder cannot be loaded.
    """
    names = (class_names,) if isinstance(class_names, str) else tuple(class_names)
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(
            f"a zero-shot head needs two or more different class names, not {', '.join(names) or 'none'}"
        )
    used = prompts.templates(templates) if isinstance(templates, str) else tuple(templates)
    if not used or not all("{}" in template for template in used):
        raise UserError("each prompt template needs {} for the class name, and there must be one")
    config = EncoderConfig(encoder=encoder, pretrained=pretrained, precision=precision)
    info = describe(config, names, used, device=device)
    origin = {
        "config": to_dict(config),
        "identity": info.identity,
        "templates": list(used),
        "logit_scale": info.logit_scale,
    }
    return replace(make_head(info, names, temperature=None), encoder=origin)
