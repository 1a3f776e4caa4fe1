"""Class names times prompt templates: the zero-shot head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, cat

if TYPE_CHECKING:
    from lpclip.encoders.encoder import Encoder

DEFAULT_TEMPLATES = (
    "a {}",
    "a photo of a {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
)


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Class names in the order of the head's rows, and what the data calls them if it is something else.

    Raises ValueError for fewer than two classes, an empty name, and names or labels that occur twice.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ValueError(f"at least two class names are needed, got {len(self.names)}")
        for position, name in enumerate(self.names, start=1):
            if not readable(name):
                raise ValueError(f"class name {position} of {len(self.names)} is empty")
        _refuse_duplicates("class name", [readable(name).casefold() for name in self.names])
        if self.labels is not None:
            assert len(self.labels) == len(self.names)
            _refuse_duplicates("label", self.labels)


def read_classes(spec: str) -> ClassList:
    """Class names from a comma list or a text file, one a line, each a `name` or a `label<TAB>name`.

    Raises ValueError when the file cannot be read, mixes the two forms, or its names are no ClassList.
    """
    if not _is_file(spec):
        return ClassList(names=tuple(name.strip() for name in spec.split(",")) if spec.strip() else ())
    rows = [line.split("\t") for line in _read_lines(spec)]
    widths = {len(row) for row in rows}
    if widths == {2}:
        labels, names = zip(*rows, strict=True)
        return ClassList(names=tuple(map(str.strip, names)), labels=tuple(map(str.strip, labels)))
    if widths - {1}:
        raise ValueError(f"{spec}: every line must be a class name, or every line label<TAB>name")
    return ClassList(names=tuple(row[0].strip() for row in rows))


def templates(spec: str) -> tuple[str, ...]:
    """Prompt templates, `{}` for the class name: default, simple, openai, or the lines of a text file.

    Raises ValueError when the file is missing or empty, or a template has no `{}`.
    """
    if spec == "default":
        return DEFAULT_TEMPLATES
    if spec in ("simple", "openai"):
        import open_clip

        known = {"simple": open_clip.SIMPLE_IMAGENET_TEMPLATES, "openai": open_clip.OPENAI_IMAGENET_TEMPLATES}
        return tuple(template("{}") for template in known[spec])
    if not _is_file(spec):
        raise ValueError(f"unknown templates {spec!r}: use default, simple, openai or a text file")
    lines = tuple(line.strip() for line in _read_lines(spec) if line.strip())
    if not lines:
        raise ValueError(f"{spec} holds no templates")
    for line in lines:
        if "{}" not in line:
            raise ValueError(f"{spec}: template {line!r} has no {{}} for the class name")
    return lines


def zero_shot_head(
    encoder: Encoder, class_names: Sequence[str], *, templates: Sequence[str], batch_size: int = 256
) -> Tensor:
    """The zero-shot head, float32 (K, d) on the CPU, rows of unit norm.

    A row is the mean of the class's unit-norm prompt embeddings, normalised again (CLIP, arXiv 2103.00020,
    section 3.1.4). Zero-shot is the argmax of features @ head.T.
    """
    prompts = [template.replace("{}", readable(name)) for name in class_names for template in templates]
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    embeddings = cat([encoder.encode_text(batch).cpu() for batch in batches])
    return F.normalize(embeddings.view(len(class_names), len(templates), -1).mean(1), dim=1)


def readable(name: str) -> str:
    """A class name as a prompt has it: `aquarium_fish` reads "aquarium fish"."""
    return " ".join(name.replace("_", " ").split())


def _is_file(spec: str) -> bool:
    """Whether `spec` means a file; ValueError when it looks like one that is not there."""
    if "," not in spec and (Path(spec).suffix in (".txt", ".tsv", ".csv") or os.sep in spec):
        if not Path(spec).is_file():
            raise ValueError(f"no such file: {spec}")
        return True
    return len(spec) < 256 and Path(spec).is_file()


def _read_lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as text: {error}") from error
    return text.rstrip().splitlines()


def _refuse_duplicates(kind: str, values: Sequence[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{kind} {value!r} occurs twice")
        seen.add(value)
