"""The picture at the top of the README, from the summaries of finished runs.

python benchmarks/results_figure.py docs/results.png "CIFAR-10=runs/c10" "PACS photo*=runs/pacs"
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lpclip.report.style import INK, colours, grid, new_figure, percent, save, shortened

METHODS = {"zero_shot": "zero-shot", "probe": "probe", "supervised": "supervised"}


def main(target: str, *runs: str) -> None:
    """Draw the accuracies of runs given as NAME=OUT."""
    accuracies = {}
    for run in runs:
        name, _, out = run.rpartition("=")
        summary = json.loads((Path(out) / "summary.json").read_text())
        accuracies[name] = {text: summary[key]["accuracy"] for key, text in METHODS.items() if key in summary}
    title = "Accuracy on lite features (only supervised saw labels)"
    save(comparison_figure(accuracies, title=title), target)


def comparison_figure(accuracies: Mapping[str, Mapping[str, float | None]], *, title: str) -> Figure:
    """Bars of accuracy: one group for each data set, one bar for each method in it; None leaves a gap."""
    methods = list(dict.fromkeys(name for group in accuracies.values() for name in group))
    figure = new_figure(max(5.0, 1.4 + 0.62 * len(accuracies) * (len(methods) + 0.6)), 3.9)
    axes = figure.subplots()
    width = 0.8 / max(len(methods), 1)
    colour_of = colours(methods)
    for index, method in enumerate(methods):
        values = [group.get(method) for group in accuracies.values()]
        places = np.arange(len(values)) + (index - (len(methods) - 1) / 2) * width
        heights = [value or 0.0 for value in values]
        bars = axes.bar(places, heights, 0.92 * width, color=colour_of[method], label=shortened(method))
        labels = ["" if value is None else f"{100 * value:.1f}" for value in values]
        axes.bar_label(bars, labels, padding=2, fontsize=9, color=INK)
    axes.set_xticks(range(len(accuracies)), [shortened(name) for name in accuracies])
    axes.set(xlim=(-0.7, len(accuracies) - 0.3), ylim=(0, 1), ylabel="accuracy")
    axes.set_title(title, loc="left", pad=26)
    axes.legend(frameon=False, ncols=len(methods), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    percent(axes, "y")
    grid(axes)
    axes.tick_params(axis="x", length=0)
    return figure


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
