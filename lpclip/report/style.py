"""The style of all pictures (colours, sizes, axes), and the way to a file."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lpclip import files

# Colours that stay apart for colour-blind readers, by hue or by lightness; zero-shot is grey everywhere.
COLOURS = {"zero-shot": "#8a9099", "probe": "#1f6fb4", "supervised": "#e59f3c"}
MORE_COLOURS = ("#7a1022", "#101a5c", "#9b3fe0", "#c2410c", "#4a1c3e")
INK = "#2b2f36"
FAINT = "#d9dce1"

MAX_NAME = 24
SUBTITLE_CHARACTERS = 15.5  # in an inch
MAX_PICTURE_BYTES = 300_000
PAGE_DPI = 192  # two dots for each CSS pixel, as telephones and most laptops have


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: its own in COLOURS, else the next of MORE_COLOURS, from the first again at the end."""
    names = list(names)
    others = [name for name in names if name not in COLOURS]
    more = {name: MORE_COLOURS[index % len(MORE_COLOURS)] for index, name in enumerate(others)}
    return {name: COLOURS.get(name) or more[name] for name in names}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches that belongs to no global state, so that any thread may draw."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def shortened(name: str, length: int = MAX_NAME) -> str:
    """A name of at most `length` characters that matplotlib shows as it is."""
    short = name if len(name) <= length else name[: length - 1] + "…"
    return short.replace("$", r"\$")  # a pair of dollars would be taken for mathematics


def percent(axes: Axes, which: str) -> None:
    """Label the axis `which`, "x" or "y", of fractions in per cent."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")


def grid(axes: Axes, which: str = "y") -> None:
    """Faint lines across the axis `which`, "x", "y" or "both", and no frame at the top and on the right."""
    axes.grid(axis=which, color=FAINT, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aab0b8")


def headline(axes: Axes, title: str, subtitle: str) -> None:
    """Write a title with a smaller text below it."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    length = int(SUBTITLE_CHARACTERS * (figure.get_size_inches()[0] - 1.2))
    lines = [line for part in subtitle.splitlines() for line in textwrap.wrap(part, length)]
    axes.set_title(title, loc="left", pad=10 + 13 * len(lines))
    note = axes.annotate(
        "\n".join(lines), (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points",
        fontsize=9, color="#5c636d", linespacing=1.25,
    )  # fmt: skip
    note.set_in_layout(False)  # the title's distance already makes room for it


def png(figure: Figure, *, dpi: int = PAGE_DPI) -> bytes:
    """A PNG of exactly the figure's size, with 256 colours: a third of the bytes, and no difference to the eye."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        small, "png", optimize=True
    )
    return small.getvalue()


def save(figure: Figure, path: str) -> None:
    """Write a PNG under 300 KB, coarser if need be, to any file system that pyarrow reaches."""
    data = b""
    for dpi in (150, 110, 80, 60):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
        data = buffer.getvalue()
        if len(data) <= MAX_PICTURE_BYTES:
            break
    files.write_bytes(path, data)
