"""Words of a sweep on the terminal."""

from __future__ import annotations

from typing import Any

from lpclip.config import TuneJob, counted
from lpclip.jobs import tracking
from lpclip.jobs.console import measured_on, print_places
from lpclip.report.sweep_page import status_line, trials_table, verdict
from lpclip.report.tables import format_table
from lpclip.training.search_space import SearchSpace


def print_sweep_plan(job: TuneJob, space: SearchSpace, *, count: int, concurrent: int) -> None:
    """Print the plan of a sweep, but for its images, encoder and classes."""
    fixed = "".join(f", {name}={value}" for name, value in space.fixed.items())
    print(f"space     {job.space}: {', '.join(space.searched)}{fixed}")
    scheduler = "no trial is stopped early" if job.scheduler == "none" else f"{job.scheduler} stops the worst"
    print(
        f"sweep     {counted(count, 'trial')} and the default recipe, {concurrent} at a time, {job.search} search, "
        f"{scheduler}; the winner is chosen by {job.criterion}, without labels (docs/tuning.md)",
        flush=True,
    )


def print_sweep(summary: dict[str, Any], *, out: str, run: tracking.Run) -> None:
    """Print the best trials of a sweep, the worth of its choice, and the command that repeats it."""
    print(f"\n{format_table(trials_table(summary))}\n\n{status_line(summary)}\n{verdict(summary)}")
    where, evidence, chosen = summary["evaluated_on"], summary["evidence"], summary["chosen"]
    if where["setting"] is None:
        print("there are no labels: the criterion has chosen, and nothing measures how well")
    elif evidence is None:
        print("there are too few trials to measure how well the criterion chose")
    else:
        print(
            f"{measured_on(where)}: zero-shot "
            f"{summary['zero_shot']['accuracy']:.1%}, chosen {chosen['accuracy']:.1%}, best trial "
            f"{evidence['best_accuracy']:.1%}: regret {100 * evidence['regret']:.1f} points, rank {evidence['rank']} "
            f"of {evidence['trials']}"
        )
        if evidence["spearman"] is not None:
            print(f"Spearman correlation of {summary['criterion']} with accuracy: {evidence['spearman']:.2f}")
    if not summary["trusted"]:
        print("WARNING: the rounds cannot be trusted on these images (see above): zero-shot is chosen")
    print(f"\nagain    {chosen['command'] or 'zero-shot needs no training'}")
    print_places(out, run, probe="probe", report="report.html", summary="summary.json")
