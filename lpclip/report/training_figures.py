"""Pictures of one run: its rounds, its confusions and its calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from lpclip.config import counted
from lpclip.evaluation.evidence import Reliability
from lpclip.report.style import (
    COLOURS,
    FAINT,
    INK,
    MORE_COLOURS,
    colours,
    grid,
    new_figure,
    percent,
    shortened,
)

MAX_TICK_LABELS = 50
MAX_CELL_NUMBERS = 15
MAX_CELLS = 250


def confusion_matrix_figure(matrix: ArrayLike, class_names: Sequence[str]) -> Figure:
    """Shares of each true class by predicted class.

    `matrix` is (K, K) counts, rows true and columns predicted. Cells have numbers (per cent) up to 15 classes and axes
    have class names up to 50; beyond that the colours alone speak, on a scale that shows small shares. Above
    250 classes a cell is the largest share in a square of classes, so that no confusion fades away.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    num_classes = len(class_names)
    assert counts.shape == (num_classes, num_classes), (counts.shape, num_classes)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    side = 3.6 + 0.15 * num_classes if num_classes <= MAX_TICK_LABELS else 6.5
    written = num_classes <= MAX_CELL_NUMBERS
    figure = new_figure(side if written else side + 0.6, side)
    axes = figure.subplots()
    picture = axes.imshow(
        _pooled(shares), cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest"
    )
    accuracy = np.trace(counts) / counts.sum() if counts.sum() else 0.0
    axes.set_title(
        f"Confusion matrix\n{accuracy:.1%} of {counted(int(counts.sum()), 'image')} right", loc="left"
    )
    suffix = "" if num_classes <= MAX_TICK_LABELS else f" ({num_classes:,})"
    axes.set_xlabel(f"predicted class{suffix}")
    axes.set_ylabel(f"true class{suffix}")
    if num_classes <= MAX_TICK_LABELS:
        size = 9 if num_classes <= 25 else 6.5
        labels = [shortened(name) for name in class_names]
        axes.set_xticks(
            range(num_classes), labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=size
        )
        axes.set_yticks(range(num_classes), labels, fontsize=size)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if written:
        _write_shares(axes, shares)
    else:
        bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.ax.set_yticklabels(["0", "1%", "10%", "25%", "50%", "100%"])
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8)
    return figure


def reliability_figure(bins_by_name: Mapping[str, Reliability]) -> Figure:
    """Accuracy against confidence, and below it the share of images with each confidence; empty bins are left out.

    On the diagonal, a classifier is right as often as its confidence says.
    """
    figure = new_figure(4.4, 4.9)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color=FAINT, linewidth=1.5, zorder=1)
    top.text(0.03, 0.09, "well calibrated", color="#9aa0a8", fontsize=8, rotation=38, rotation_mode="anchor")
    colour_of = colours(bins_by_name)
    for name, bins in bins_by_name.items():
        count = np.asarray(bins.count, dtype=np.float64)
        full = count > 0
        confidence, accuracy = bins.confidence[full], bins.accuracy[full]
        share = count[full] / max(count.sum(), 1)
        colour = colour_of[name]
        top.plot(confidence, accuracy, color=colour, linewidth=1.8, zorder=2)
        top.scatter(
            confidence,
            accuracy,
            s=12 + 160 * share,
            color=colour,
            edgecolor="white",
            zorder=3,
            label=shortened(name),
        )
        bottom.plot(confidence, share, color=colour, linewidth=1.8)
        bottom.fill_between(confidence, share, color=colour, alpha=0.15, linewidth=0)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    top.set_title("Reliability", loc="left")
    legend = top.legend(loc="upper left", frameon=False)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_sizes([40])
    bottom.set(xlabel="confidence", ylabel="share of images", ylim=(0, None))
    for axes in (top, bottom):
        percent(axes, "y")
        grid(axes)
    percent(bottom, "x")
    return figure


def rounds_figure(rounds: Sequence[Mapping[str, Any]], *, with_last_student: bool = False) -> Figure:
    """The course of self-training: a line for each of `LINES` that the rounds have, by `round`.

    A key that is missing or None in every round, as accuracy is without labels, has no line. `with_last_student` marks
    the last entry as the student beyond the rounds, who has seen the strong views.
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    steps = [row.get("round", index) for index, row in enumerate(rounds)]
    for name, (label, colour) in LINES.items():
        values = [row.get(name) for row in rounds]
        if all(value is None for value in values):
            continue
        numbers = [np.nan if value is None else value for value in values]
        axes.plot(
            steps, numbers, color=colour, linewidth=2, marker="o", markersize=4, label=label, clip_on=False
        )
    axes.set(ylim=(0, 1), xlabel="round", xlim=(min(steps, default=0) - 0.4, max(steps, default=0) + 0.4))
    if with_last_student:
        axes.axvline(steps[-1] - 0.5, color=FAINT, linewidth=1.5, zorder=1)
        axes.set_xlabel("round; right of the line the last student, with the strong views")
    axes.set_title("Self-training, round by round", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    percent(axes, "y")
    grid(axes)
    if axes.lines:
        axes.legend(frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0)
    return figure


LINES = {
    "accuracy": ("accuracy on labelled images", COLOURS["probe"]),
    "mean_confidence": ("mean confidence", COLOURS["supervised"]),
    "coverage": ("coverage: share of images kept", MORE_COLOURS[0]),
    "flip_rate": ("share of labels that changed", MORE_COLOURS[1]),
}


def _pooled(shares: np.ndarray) -> np.ndarray:
    """Maxima over squares, so that at most MAX_CELLS of them lie along a side."""
    num_classes = len(shares)
    size = -(-num_classes // MAX_CELLS)
    padded = np.pad(shares, (0, -num_classes % size))
    side = len(padded) // size
    return padded.reshape(side, size, side, size).max(axis=(1, 3))


def _write_shares(axes: Axes, shares: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
        share = shares[row, column]
        colour = "white" if share > 0.35 else INK
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
