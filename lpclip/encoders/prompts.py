"""Class names times prompt templates: the zero-shot head."""

from __future__ import annotations

from lpclip.config import UserError
from lpclip.images.classes import names_a_file, read_lines

DEFAULT_TEMPLATES = (
    "a {}",
    "a photo of a {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
)


def templates(spec: str) -> tuple[str, ...]:
    """Prompt templates, `{}` for the class name: default, simple, openai, or the lines of a text file.

    Raises UserError when the file is missing or empty, or a template has no `{}`.
    """
    if spec == "default":
        return DEFAULT_TEMPLATES
    if spec in ("simple", "openai"):
        import open_clip

        known = {"simple": open_clip.SIMPLE_IMAGENET_TEMPLATES, "openai": open_clip.OPENAI_IMAGENET_TEMPLATES}
        return tuple(template("{}") for template in known[spec])
    if not names_a_file(spec):
        raise UserError(f"unknown templates {spec!r}: use default, simple, openai or a text file")
    lines = tuple(line.strip() for line in read_lines(spec) if line.strip())
    if not lines:
        raise UserError(f"{spec} holds no templates")
    for line in lines:
        if "{}" not in line:
            raise UserError(f"{spec}: template {line!r} has no {{}} for the class name")
    return lines
