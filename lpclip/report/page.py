"""A report as one HTML file that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from lpclip.report.style import png
from lpclip.report.tables import columns

CSS_PIXELS_PER_INCH = 96
SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure, shown at its own size at most; `alt` says what it shows to those who cannot see it."""

    caption: str
    figure: Figure
    alt: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image and what became of it.

    `image` holds the bytes of a PNG or JPEG thumbnail, `predictions` by classifier the predicted class and its
    confidence in [0, 1]. Predictions are marked right or wrong where the true class is known.
    """

    image: bytes
    predictions: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    truth: str | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A chapter of the page, shown in this order; what is empty is left out.

    `text` is plain, an empty line parts paragraphs. `command` is a line for the shell, to be copied. `tables` and
    `examples` are pairs of a caption and rows, as for `table`, or images. `pairs` are a caption and two images that are
    shown beside each other. `legend` says once for all pictures which
    name has which colour, as from `colours`.
    """

    title: str
    text: str = ""
    command: str = ""
    tables: Sequence[tuple[str, Sequence[Mapping[str, Any]]]] = ()
    legend: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    examples: Sequence[tuple[str, Sequence[Example]]] = ()
    pairs: Sequence[tuple[str, Example, Example]] = ()


def render_page(title: str, *, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """An HTML page: the title, `facts` as a short list of names and values, then the sections.

    All text is shown as it is, markup in it has no effect. Raises ValueError for an example that is neither PNG
    nor JPEG.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"paragraphs": _paragraphs, "columns": columns, "picture": _picture, "uri": _uri}
    source = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(title=title, facts=facts, sections=sections)


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part]


def _picture(figure: Figure) -> dict[str, Any]:
    width, height = (round(CSS_PIXELS_PER_INCH * inches) for inches in figure.get_size_inches())
    return {"uri": _uri(png(figure)), "width": width, "height": height}


def _uri(image: bytes) -> str:
    kind = next((kind for start, kind in SIGNATURES.items() if image.startswith(start)), None)
    if kind is None:
        raise ValueError(f"an example's image must be PNG or JPEG, this one starts with {image[:8]!r}")
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"
