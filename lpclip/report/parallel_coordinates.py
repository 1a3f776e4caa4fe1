"""Parallel coordinates: an axis for each column of a table, a line for each row."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lpclip.report.style import COLOURS, INK, headline, new_figure, shortened

CHOSEN = COLOURS["probe"]
MAX_TICKS = 6
MAX_CATEGORY_LABELS = 14
MIN_GAP = 0.065  # of an axis' height between two labels
OTHER_GAP = 0.13  # between names below an axis' numbers
LOG_FACTOR = 10


@dataclass(frozen=True)
class Scale:
    """An axis of parallel coordinates, from 0 at the bottom to 1."""

    places: np.ndarray
    """(N,) float64, of every trial's value."""
    ticks: tuple[tuple[float, str], ...]
    values: tuple[str, ...]
    """Every trial's value as text."""


def parallel_coordinates(
    parameters: Mapping[str, Scale],
    outcomes: Mapping[str, Scale],
    *,
    colour: np.ndarray,
    colour_label: str,
    chosen: int | None,
    title: str,
    subtitle: str,
) -> Figure:
    """An axis for each parameter, then for each outcome, in bold type; a line for each of N rows.

    Lines are coloured by `colour` (N,), the highest are drawn last. The chosen row is thick, and its values are
    written in its colour. An outcome's name may have a second line.
    """
    scales = [*parameters.values(), *outcomes.values()]
    heads = [_wrapped(name) for name in parameters]
    for name in outcomes:
        first, *more = name.split("\n")
        heads.append("\n".join([_wrapped(first), *more]))
    spacing = 1.3 if len(scales) <= 8 else 1.05
    figure = new_figure(1.6 + spacing * max(len(scales), 4), 4.8)
    axes = figure.subplots()
    axes.set(xlim=(-0.5, len(scales) - 0.8), ylim=(-0.04, 1.04), yticks=[])
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(scales)), heads, fontsize=9.5, color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.vlines(range(len(scales)), 0, 1, color="#aab0b8", linewidth=1.2, zorder=2.2)
    for label in axes.get_xticklabels()[len(parameters) :]:
        label.set_fontweight("bold")
    headline(axes, title, subtitle, pad=8 + 14 * max(head.count("\n") + 1 for head in heads))
    if len(colour):
        places = np.stack([scale.places for scale in scales], axis=1)
        _draw_lines(figure, axes, places, colour, chosen, label=colour_label)
    for index, found in enumerate(scales):
        _write_ticks(axes, index, found, chosen, length=14 if spacing > 1.2 else 11)
    return figure


def is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


def value_text(value: Any) -> str:
    """A parameter's value: floats to three significant digits, whole numbers whole."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{float(f'{float(value):.3g}'):g}"
    return str(value)


def percent_text(value: float) -> str:
    return f"{100 * value:.1f}%"


def scale(
    values: Sequence[Any], *, text: Callable[[Any], str] = value_text, log: bool | None = None
) -> Scale:
    """Numbers on a linear or logarithmic scale, what is none of them evenly spaced by name, below numbers if any."""
    texts = tuple(value_text(value) if not is_number(value) else text(value) for value in values)
    found = sorted({float(value) for value in values if is_number(value)})
    others = sorted({label for value, label in zip(values, texts, strict=True) if not is_number(value)})
    if "none" in others:  # it has the lowest place
        others = ["none", *(label for label in others if label != "none")]
    if not found or len(others) > 3:
        by_size = sorted((float(v), label) for v, label in zip(values, texts, strict=True) if is_number(v))
        labels = list(dict.fromkeys([*others, *(label for _, label in by_size)]))
        place_of = dict(zip(labels, _spread(len(labels)), strict=True))
        step = max(1, -(-len(labels) // MAX_CATEGORY_LABELS))
        ticks = [(place_of[label], label) for label in labels[::step]]
        return Scale(np.array([place_of[label] for label in texts]), tuple(ticks), texts)
    bottom = OTHER_GAP * len(others)
    position, number_ticks = _number_scale(
        found, text, integers=all(isinstance(v, numbers.Integral) for v in values if is_number(v)), log=log
    )
    place_of = {label: OTHER_GAP * index for index, label in enumerate(others)}
    places = [
        bottom + (1 - bottom) * position(float(value)) if is_number(value) else place_of[label]
        for value, label in zip(values, texts, strict=True)
    ]
    ticks = [(place, label) for label, place in place_of.items()]
    ticks += [(bottom + (1 - bottom) * position(tick), label) for tick, label in number_ticks]
    return Scale(np.array(places), tuple(ticks), texts)


def _spread(count: int) -> list[float]:
    return [0.5] if count == 1 else [float(place) for place in np.linspace(0, 1, count)]


def _number_scale(
    found: Sequence[float], text: Callable[[Any], str], *, integers: bool, log: bool | None
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Where a number lies in [0, 1], and ticks with their texts, for distinct numbers by rising size."""
    if len(found) == 1:
        return (lambda _: 0.5), [(found[0], text(int(found[0]) if integers else found[0]))]
    if log is None:
        log = found[0] > 0 and found[-1] / found[0] > LOG_FACTOR
    warp: Callable[[float], float] = math.log if log else float

    def between(low: float, high: float) -> Callable[[float], float]:
        return lambda value: (warp(value) - warp(low)) / (warp(high) - warp(low))

    # Few numbers are their own ticks, if their labels differ and do not overlap.
    position = between(found[0], found[-1])
    labels = [text(int(number) if integers else number) for number in found]
    gaps = np.diff([position(number) for number in found])
    if len(found) <= MAX_TICKS and len(set(labels)) == len(labels) and gaps.min() >= MIN_GAP:
        return position, list(zip(found, labels, strict=True))
    if log:
        ticks = _log_ticks(found[0], found[-1])
    else:
        locator = MaxNLocator(MAX_TICKS - 1, steps=[1, 2, 2.5, 5, 10], integer=integers, min_n_ticks=2)
        ticks = [float(tick) for tick in locator.tick_values(found[0], found[-1])]
    suffix, factor = ("%", 100) if text is percent_text else ("", 1)
    return between(min(ticks[0], found[0]), max(ticks[-1], found[-1])), [
        (tick, f"{factor * tick:.6g}{suffix}") for tick in ticks
    ]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers around and between two positive ones: 1, 2 and 5 in each decade, or the first, or fewer."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in (1, 2, 5)]
    start = max(index for index, tick in enumerate(fine) if tick <= low)
    end = min(index for index, tick in enumerate(fine) if tick >= high)
    if end - start < MAX_TICKS:
        return fine[start : end + 1]
    step = -(-(last - first) // (MAX_TICKS - 1))
    return [float(f"1e{power}") for power in range(first, last + step, step)]


def _draw_lines(
    figure: Figure, axes: Axes, places: np.ndarray, values: np.ndarray, chosen: int | None, *, label: str
) -> None:
    """Lines (N, D) coloured by `values` (N,), the highest on top of the others and the chosen one on top of all."""
    # No blue among the colours, nor anything too light for a white page; lightness alone tells them apart.
    colour_map = ListedColormap(_colour_ramp())
    low, high = float(values.min()), float(values.max())
    room = 0.0 if high > low else max(0.01, abs(high) / 100)
    norm = Normalize(low - room, high + room)
    order = [index for index in np.argsort(values, kind="stable") if index != chosen]
    across = np.arange(places.shape[1], dtype=np.float64)
    alpha = 0.85 if len(order) <= 20 else max(0.3, 0.7 - len(order) / 800)
    lines = LineCollection(
        [np.column_stack([across, places[index]]) for index in order],
        colors=[colour_map(norm(values[index])) for index in order],
        alpha=alpha,
        linewidths=1.5 if len(order) <= 100 else 1.0,
        zorder=2,
        label="trials",
    )
    axes.add_collection(lines, autolim=False)
    if chosen is not None:
        axes.plot(
            across, places[chosen], color=CHOSEN, linewidth=3.6, marker="o", markersize=8, markeredgecolor="white",
            zorder=3, label="chosen", clip_on=False, path_effects=[withStroke(linewidth=6.5, foreground="white")],
        )  # fmt: skip
    if not order:
        return
    bar = figure.colorbar(
        ScalarMappable(norm, colour_map), ax=axes, fraction=0.025, pad=0.015, aspect=28, shrink=0.9
    )
    bar.set_label(shortened(label), fontsize=9.5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5)
    if high == low:
        bar.set_ticks([low])
    if label == "accuracy":
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1))


def _colour_ramp() -> np.ndarray:
    return colormaps["YlOrBr"](np.linspace(0.28, 1, 256))


def _write_ticks(axes: Axes, index: int, scale: Scale, chosen: int | None, *, length: int) -> None:
    """Labels at the left of axis `index`; the chosen trial's value takes the place of those near it."""
    ticks = [(place, text, False) for place, text in scale.ticks]
    if chosen is not None:
        own = float(scale.places[chosen])
        ticks = [tick for tick in ticks if abs(tick[0] - own) >= MIN_GAP]
        ticks.append((own, scale.values[chosen], True))
    for place, text, is_chosen in ticks:
        axes.plot([index - 0.03, index], [place, place], color="#aab0b8", linewidth=1.2, zorder=2.2)
        axes.annotate(
            shortened(text, length), (index, place), (-9, 0), textcoords="offset points", ha="right",
            va="center", fontsize=9, color=CHOSEN if is_chosen else INK,
            fontweight="bold" if is_chosen else "normal", zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
        )  # fmt: skip


def _wrapped(name: str) -> str:
    """A parameter's name on lines of at most 13 characters where its underscores allow it."""
    lines = [""]
    for part in shortened(name, 30).replace("_", "_ ").split(" "):
        if lines[-1] and len(lines[-1]) + len(part) > 13:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
