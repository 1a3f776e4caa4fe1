"""Pictures of what happens off the beaten track: corruptions, foreign images, other test sets.

All are small, for a page that is read on a telephone as well: several of them wrap, one big picture does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from lpclip.report.style import FAINT, INK, colours, grid, new_figure, percent, shortened

# ImageNet-C's corruptions in its order, each of the four extra ones at the end of its family.
FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    "weather": ("snow", "frost", "fog", "brightness", "spatter"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
}

MAX_POINTS = 400
MAX_LEGEND_LINE = 44  # characters of two columns
LEGEND_LINE = 0.19  # inches
NUM_BINS = 40
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
EDGE = 0.002  # a logit scale has no place for 0 and 1

Place = Literal["outside upper left", "outside lower left"]
ABOVE: Place = "outside upper left"
BELOW: Place = "outside lower left"

Curves = Mapping[str, Mapping[str, Mapping[int, float]]]
Floats = NDArray[np.float64]


def severity_figures(curves: Curves, *, clean: Mapping[str, float]) -> dict[str, Figure]:
    """A small panel for each corruption: accuracy against severity, a line for each probe.

    `curves` holds accuracies in [0, 1] by corruption, probe and severity 1 to 5; `clean` those of the clean
    images by probe, drawn as severity 0. Markers stand only where something was measured. The panels come in
    ImageNet-C's order and have one range of accuracy; they have no legend: `colours(clean)` is it.
    """
    values = [
        *clean.values(),
        *(v for probes in curves.values() for line in probes.values() for v in line.values()),
    ]
    top = 1.0 if max(values, default=1) > 0.5 else 0.5
    names = _probes(curves, clean)
    return {
        corruption: _severities(corruption, curves[corruption], clean, names, top)
        for corruption in _ordered(curves)
    }


def corruption_figure(curves: Curves, *, clean: Mapping[str, float] | None = None) -> Figure:
    """Mean accuracy under each corruption: a dot for each probe on a line, the numbers beside it.

    `curves` and `clean` as in `severity_figures`. The mean is over the severities that all probes of a
    corruption have, so that it compares like with like; the best of a row, as it is printed, is bold.
    """
    colour_of = colours(_probes(curves, clean or {}))
    rows: list[tuple[str, Mapping[str, float]]] = [("clean", clean)] if clean else []
    for family in (*FAMILIES, "other"):
        means = [(name, _means(curves[name])) for name in _ordered(curves) if _family(name) == family]
        rows += [(family.upper(), {}), *means] if means else []

    column = 0.45
    figure = new_figure(max(4.4, 2.75 + column * len(colour_of)), 1.35 + 0.245 * len(rows))
    axes = figure.subplots()
    for place, (_, accuracies) in enumerate(rows):
        if accuracies:
            found = list(accuracies.values())
            axes.plot([min(found), max(found)], [place, place], color="#bfc4cb", linewidth=2.2, zorder=2)
            for probe, accuracy in accuracies.items():
                axes.scatter(
                    accuracy, place, s=38, color=colour_of[probe], edgecolor="white", linewidth=0.7, zorder=3,
                    clip_on=False,
                )  # fmt: skip
            axes.axhline(place, color=FAINT, linewidth=0.7, zorder=0)
    best = [_number(max(accuracies.values(), default=0)) for _, accuracies in rows]
    for index, (probe, colour) in enumerate(colour_of.items()):
        # Numbers are columns beside the axes, each under its probe's dot: among the dots they would overlap.
        offset = 17 + 72 * column * index
        axes.annotate(
            "●", (1, 1), (offset, 4), color=colour, fontsize=11, ha="center", va="bottom",
            xycoords="axes fraction", textcoords="offset points",
        )  # fmt: skip
        axes.annotate(
            shortened(probe, 14), (1, 1), (offset, 18), color=INK, fontsize=8, ha="left", va="bottom", rotation=40,
            rotation_mode="anchor", xycoords="axes fraction", textcoords="offset points",
        )  # fmt: skip
        for place, (_, accuracies) in enumerate(rows):
            if probe in accuracies:
                number = _number(accuracies[probe])
                axes.annotate(
                    number, (1, place), (offset, 0), color=INK, fontsize=8.5, ha="center", va="center_baseline",
                    xycoords=("axes fraction", "data"), textcoords="offset points",
                    fontweight="bold" if number == best[place] and len(accuracies) > 1 else "normal",
                )  # fmt: skip
    axes.set_yticks(range(len(rows)), [_title(name) for name, _ in rows], fontsize=8.5)
    for label, (_, accuracies) in zip(axes.get_yticklabels(), rows, strict=True):
        if not accuracies:
            label.set(color="#737a84", fontsize=7)
    axes.set(xlim=(0, 1), ylim=(max(len(rows), 1) - 0.5, -0.5))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1] if len(colour_of) <= 4 else [0, 0.5, 1])
    axes.set_xlabel("accuracy", fontsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.tick_params(axis="y", length=0)
    percent(axes, "x")
    grid(axes, "x")
    axes.spines["left"].set_visible(False)
    return figure


def risk_coverage_figure(curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Share of wrong labels against share of images kept, the most confident ones first.

    Each value is (coverage, risk), both (N,) in [0, 1] and by rising coverage. Of long curves 400 points are
    drawn.
    """
    figure = new_figure(4.4, 3.3)
    axes = figure.subplots()
    colour_of = colours(curves)
    for name, (coverage, risk) in curves.items():
        x, y = (np.asarray(values, dtype=np.float64) for values in (coverage, risk))
        kept = np.unique(np.linspace(0, max(len(x) - 1, 0), MAX_POINTS).round().astype(int))[: len(x)]
        marker = "o" if len(kept) == 1 else None
        axes.plot(
            x[kept], y[kept], color=colour_of[name], linewidth=1.9, label=shortened(name), marker=marker
        )
    axes.set(xlim=(0, 1), xlabel="coverage: share of images kept", ylabel="risk: share of them wrong")
    axes.set_ylim(0, max(axes.get_ylim()[1], 0.01) if curves else 1)
    axes.set_title("Risk and coverage", loc="left", fontsize=11)
    _finish(axes, "both")
    if curves:
        _legend(figure, axes.lines, [shortened(name) for name in curves], place=BELOW)
    return figure


def ood_figure(
    scores: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    score: str,
    names: tuple[str, str],
    auroc: Mapping[str, float] | None = None,
) -> Figure:
    """Histograms of the scores of known and of foreign images, two for each probe.

    Each value holds the scores of images inside (N,) and outside (M,); what is not finite is left out. `score`
    says what they are, `names` which images are inside and outside, `auroc` in [0, 1] stands in the titles.
    """
    found = {name: tuple(_finite(values) for values in pair) for name, pair in scores.items()}
    ranges = {name: _range(pair) for name, pair in found.items()}
    # One axis compares best, but temperatures set a score's scale: then each probe has an axis of its own.
    low, high = (
        min((r[0] for r in ranges.values()), default=0),
        max((r[1] for r in ranges.values()), default=1),
    )
    if all(3 * (r[1] - r[0]) >= high - low for r in ranges.values()):
        ranges = dict.fromkeys(ranges, (low, high))
    figure = new_figure(4.4, 0.65 + 1.25 * max(len(found), 1))
    for axes, (name, colour) in zip(_stack(figure, len(found)), colours(found).items(), strict=True):
        bins = np.linspace(*ranges[name], NUM_BINS + 1).tolist()
        inside, outside = found[name]
        if len(inside):
            axes.hist(inside, bins, density=True, color=colour, alpha=0.55, linewidth=0)
        if len(outside):
            axes.hist(outside, bins, density=True, histtype="step", color=INK, linewidth=1.4)
        axes.set(xlim=ranges[name], yticks=[])
        known = "" if auroc is None or name not in auroc else f", AUROC {auroc[name]:.3f}"
        axes.set_title(f"{shortened(name)}{known}", loc="left", fontsize=9.5)
        axes.tick_params(labelsize=8.5)
        grid(axes, "x")
        axes.spines["left"].set_visible(False)
    if figure.axes:
        figure.axes[-1].set_xlabel(shortened(score, 50), fontsize=9)
    labels = [f"{shortened(names[0])} (inside)", f"{shortened(names[1])} (outside)"]
    _legend(figure, [Patch(color="#b9bec6"), Line2D([], [], color=INK, linewidth=1.4)], labels, place=ABOVE)
    return figure


def effective_robustness_figure(
    points: Mapping[str, Mapping[str, tuple[float, float]]], *, fits: Mapping[str, tuple[float, float]]
) -> Figure:
    """Accuracy on shifted sets against accuracy on the clean one, on logit scales as Taori et al. (2020) have it.

    `points` holds (clean, shifted) in [0, 1] by probe and set. `fits` holds (a, b) of the published
    line logit(shifted) = a logit(clean) + b of a set: what is above it is effective robustness.
    The solid diagonal is accuracy that the shift leaves alone.
    """
    sets = list(dict.fromkeys(name for by_set in points.values() for name in by_set))
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(sets)}
    dashes = {name: DASHES[i % len(DASHES)] for i, name in enumerate(name for name in sets if name in fits)}
    colour_of = colours(points)
    pairs = [pair for by_set in points.values() for pair in by_set.values()] or [(0.5, 0.5)]
    x_low, x_high = _logit_range([clean for clean, _ in pairs])
    y_low, y_high = _logit_range([shifted for _, shifted in pairs])
    y_low, y_high = min(y_low, x_low), max(y_high, x_high)  # the whole diagonal is in the picture

    figure = new_figure(4.4, 4.2)
    axes = figure.subplots()
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("function", functions=(_logit, _sigmoid))
    line = _sigmoid(np.linspace(_logit(x_low), _logit(x_high), 100))
    axes.plot(line, line, color="#aab0b8", linewidth=1.2, zorder=1)
    for name, dash in dashes.items():
        a, b = fits[name]
        axes.plot(line, _sigmoid(a * _logit(line) + b), color=INK, linewidth=1.2, linestyle=dash, zorder=1)
    for probe, by_set in points.items():
        for name, pair in by_set.items():
            x, y = np.clip(pair, EDGE, 1 - EDGE)
            axes.scatter(
                x, y, s=62, marker=markers[name], color=colour_of[probe], edgecolor="white",
                linewidth=0.8, zorder=3, clip_on=False,
            )  # fmt: skip
    axes.set(
        xlim=(x_low, x_high),
        ylim=(y_low, y_high),
        xlabel="accuracy on clean images",
        ylabel="on shifted images",
    )
    axes.set_title("Effective robustness", loc="left", fontsize=11)
    _finish(axes, "both")
    for axis, (low, high) in ((axes.xaxis, (x_low, x_high)), (axes.yaxis, (y_low, y_high))):
        axis.set_major_locator(FixedLocator(_logit_ticks(low, high)))
        axis.set_minor_locator(NullLocator())
    if points:
        handles = [_probe_handle(probe, colour) for probe, colour in colour_of.items()]
        handles += [_set_handle(name, marker, dashes.get(name)) for name, marker in markers.items()]
        _legend(figure, handles, [str(handle.get_label()) for handle in handles], place=BELOW)
    return figure


def _probe_handle(probe: str, colour: str) -> Line2D:
    """A classifier in a legend: a dot of its colour."""
    return Line2D([], [], color=colour, marker="o", markersize=7, linestyle="none", label=shortened(probe))


def _set_handle(name: str, marker: str, dash: Any) -> Line2D:
    """A shifted set in a legend: its marker, on the dashes (None for none) of its published fit."""
    label = shortened(name) if dash is None else f"{shortened(name)}, published fit"
    style: Any = "none" if dash is None else dash
    return Line2D([], [], color=INK, marker=marker, markersize=6, linestyle=style, linewidth=1.2, label=label)


def _severities(
    corruption: str,
    by_probe: Mapping[str, Mapping[int, float]],
    clean: Mapping[str, float],
    names: Sequence[str],
    top: float,
) -> Figure:
    figure = new_figure(2.1, 1.8)
    axes = figure.subplots()
    for name, colour in colours(names).items():
        measured = dict(by_probe.get(name, {}))
        if not measured:
            continue
        if name in clean:
            measured[0] = clean[name]
        steps = sorted(measured)
        axes.plot(
            steps, [measured[step] for step in steps], color=colour, linewidth=1.8, marker="o", markersize=4.2,
            label=shortened(name), clip_on=False,
        )  # fmt: skip
    axes.set(xlim=(-0.25, 5.25), ylim=(0, top))
    axes.set_xticks(range(6), ["clean", *"12345"])
    axes.set_yticks(np.linspace(0, top, 5 if top == 1 else 6))
    axes.set_title(_title(corruption), loc="left", fontsize=10)
    _finish(axes)
    return figure


def _probes(curves: Curves, clean: Mapping[str, float]) -> list[str]:
    return list(dict.fromkeys([*clean, *(name for probes in curves.values() for name in probes)]))


def _family(corruption: str) -> str:
    return next((family for family, names in FAMILIES.items() if corruption in names), "other")


def _ordered(curves: Curves) -> list[str]:
    order = [name for names in FAMILIES.values() for name in names]
    return sorted(curves, key=lambda name: order.index(name) if name in order else len(order))


def _title(corruption: str) -> str:
    return shortened(corruption.replace("_", " ").replace("jpeg", "JPEG"), 20)


def _number(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}" if accuracy < 0.9995 else "100"


def _means(by_probe: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    measured = {name: line for name, line in by_probe.items() if line}
    common = set.intersection(*(set(line) for line in measured.values())) if measured else set()
    return {
        name: float(np.mean([line[s] for s in sorted(common)])) for name, line in measured.items() if common
    }


def _finish(axes: Axes, which: str = "y") -> None:
    """Per cent, a grid and text that can still be read when the picture shrinks to a telephone's width."""
    percent(axes, "y")
    if which == "both":
        percent(axes, "x")
    grid(axes, which)
    axes.tick_params(labelsize=8.5)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(9)


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], *, place: Place) -> None:
    """A legend outside the axes, which grows the figure by its lines; in two columns where they are wide enough."""
    half = -(-len(labels) // 2)
    widths = [max(map(len, part), default=0) for part in (labels[:half], labels[half:])]
    columns = 2 if sum(widths) <= MAX_LEGEND_LINE else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_LINE * (half if columns == 2 else len(labels)))
    figure.legend(
        handles=handles, labels=labels, loc=place, ncols=columns, frameon=False, fontsize=8.5,
        handlelength=2.4 if place == BELOW else 1.4, columnspacing=1.2,
    )  # fmt: skip


def _stack(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(count, 1, squeeze=False)[:, 0]) if count else []


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def _range(samples: Sequence[Floats]) -> tuple[float, float]:
    """All values of the samples but stragglers that would squeeze the rest into a few bins."""
    full = [values for values in samples if len(values)] or [np.array([0.0, 1.0])]
    low = float(min(np.percentile(values, 0.2, method="lower") for values in full))
    high = float(max(np.percentile(values, 99.8, method="higher") for values in full))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _logit(p: ArrayLike) -> Floats:
    clipped = np.clip(np.asarray(p, dtype=np.float64), EDGE / 2, 1 - EDGE / 2)
    return np.log(clipped / (1 - clipped))


def _sigmoid(z: ArrayLike) -> Floats:
    return 1 / (1 + np.exp(-np.asarray(z, dtype=np.float64)))


def _logit_range(accuracies: Sequence[float]) -> tuple[float, float]:
    """The accuracies' range with room around it, at least two units of logit wide."""
    found = _logit(np.clip(accuracies, EDGE, 1 - EDGE))
    room = max(0.35, 1 - np.ptp(found) / 2)
    return float(_sigmoid(found.min() - room)), float(_sigmoid(found.max() + room))


def _logit_ticks(low: float, high: float) -> list[float]:
    """Round accuracies that lie well apart on the scale."""
    ticks: list[float] = []
    for tick in (0.5, 0.6, 0.4, 0.7, 0.3, 0.8, 0.2, 0.9, 0.1, 0.95, 0.05, 0.99, 0.01):
        apart = all(abs(_logit(tick) - _logit(other)) > (_logit(high) - _logit(low)) / 12 for other in ticks)
        if low <= tick <= high and apart:
            ticks.append(tick)
    return sorted(ticks)
