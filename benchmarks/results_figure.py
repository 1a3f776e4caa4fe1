"""The picture at the top of the README, from the summaries of finished runs.

python benchmarks/results_figure.py docs/results.png "CIFAR-10=runs/c10" "PACS photo*=runs/pacs"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lpclip.report.style import save
from lpclip.report.training_figures import comparison_figure

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


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
