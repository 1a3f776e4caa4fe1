"""A sweep that was chosen without labels: its table, its pictures and its page.

All functions take the sweep's summary, the mapping that its summary.json holds. A higher criterion is better.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lpclip.config import counted
from lpclip.report.page import Picture, Section, render_page
from lpclip.report.style import COLOURS, INK, grid, headline, new_figure, shortened

Summary = Mapping[str, Any]

ZERO_SHOT_KEY = "zero_shot"
# The recipe without a sweep: a candidate of every sweep.
DEFAULT_KEY = "default"
PLAIN_NAMES = {ZERO_SHOT_KEY: "zero-shot", DEFAULT_KEY: "default recipe"}
OUTCOMES = ("trial", "criterion", "accuracy %", "ECE %", "rounds", "seconds")
CHOSEN = COLOURS["probe"]
BEST = COLOURS["supervised"]  # it takes labels to know it

MAX_NAMED = 3
MAX_ERROR = 160
MAX_REASON = 400
MAX_TRIAL_NAME = 14


def trials_table(summary: Summary, *, limit: int = 10) -> list[dict[str, Any]]:
    """Rows for `table`: the chosen one, then the best `limit` finished trials by criterion.

    The chosen one counts among them. Zero-shot and the default recipe do not: they always have a row, at their place in
    this order.
    Accuracy and ECE are fractions, and left out where no row of the sweep has them.
    """
    trials: dict[str, Mapping[str, Any]] = {trial["name"]: trial for trial in _finished(summary)}
    name, always = summary["chosen"]["name"], _always_there(summary)
    if name not in always:
        trials.setdefault(name, summary["chosen"])
    order = sorted(trials, key=lambda key: (key != name, -_value(trials[key], "criterion", -math.inf)))
    candidates = {key: trials[key] for key in order[: max(limit, 1)]} | always
    shown = sorted(
        candidates, key=lambda key: (key != name, -_value(candidates[key], "criterion", -math.inf))
    )
    known = [*trials.values(), *always.values()]
    hidden = {
        column
        for column, key in (("accuracy %", "accuracy"), ("ECE %", "ece"))
        if all(_number(row.get(key)) is None for row in known)
    }
    rows = []
    for key in shown:
        trial = candidates[key]
        seconds = _number(trial.get("seconds"))
        row = {
            "trial": _short(key) + (" (chosen)" if key == name else ""),
            **{_column(parameter): value for parameter, value in _parameters(summary, trial).items()},
            "criterion": _number(trial.get("criterion")),
            "accuracy %": _number(trial.get("accuracy")),
            "ECE %": _number(trial.get("ece")),
            "rounds": trial.get("rounds"),
            "seconds": None if seconds is None else f"{seconds:,.1f}",
        }
        rows.append({column: cell for column, cell in row.items() if column not in hidden})
    return rows


def status_line(summary: Summary) -> str:
    """A line with the numbers of finished, stopped and failed trials, and why the first three failed."""
    trials = summary["trials"]
    parts = [f"{len(_finished(summary))} of {counted(len(trials), 'trial')} finished"]
    stopped = sum(trial["status"] == "stopped" for trial in trials)
    if stopped:
        parts.append(f"{stopped} stopped early")
    failed = [trial for trial in trials if trial["status"] == "failed"]
    if failed:
        reasons = [f"{trial['name']}: {_reason(trial, MAX_ERROR)}" for trial in failed[:MAX_NAMED]]
        if len(failed) > MAX_NAMED:
            reasons.append(f"and {len(failed) - MAX_NAMED} more")
        parts.append(f"{len(failed)} failed: {'; '.join(reasons)}")
    return ", ".join(parts)


def verdict(summary: Summary) -> str:
    """A line that compares the chosen one with the default recipe and zero-shot by the criterion."""
    criterion, chosen = summary["criterion"], summary["chosen"]["name"]
    values = {key: _number(row.get("criterion")) for key, row in _always_there(summary).items()}
    values = {"chosen": _number(summary["chosen"].get("criterion"))} | values
    shown = ", ".join(
        f"{PLAIN_NAMES.get(key, key)} {value:.3f}" for key, value in values.items() if value is not None
    )
    own, won = values.get(DEFAULT_KEY), values["chosen"]
    if own is None or won is None:
        default = summary.get("default") or {}
        reason = f": {_reason(default, MAX_ERROR)}" if default.get("status") == "failed" else ""
        end = f"the default recipe did not finish{reason}"
    elif chosen == DEFAULT_KEY:
        end = "the default recipe itself is chosen"
    elif won > own:
        end = "the choice beats the default recipe"
    else:
        end = "the choice does not beat the default recipe"
    return f"{criterion}: {shown}; {end}"


def criterion_figure(summary: Summary) -> Figure:
    """Accuracy against the criterion, a point for each finished trial; without labels the criterion by rank.

    Zero-shot, the chosen trial and, with labels, the most accurate one are marked and named.
    """
    labelled = _labelled(summary)
    keys = ("criterion", "accuracy") if labelled else ("criterion",)
    rows = {trial["name"]: trial for trial in _finished(summary)} | _always_there(summary)
    rows = {name: row for name, row in rows.items() if all(_number(row.get(key)) is not None for key in keys)}
    if labelled:
        points = {name: (row["criterion"], row["accuracy"]) for name, row in rows.items()}
    else:
        ranked = sorted(rows, key=lambda name: -rows[name]["criterion"])
        points = {name: (rank, rows[name]["criterion"]) for rank, name in enumerate(ranked, start=1)}

    figure = new_figure(6.4, 4.6)
    axes = figure.subplots()
    criterion = shortened(summary["criterion"])
    if labelled:
        axes.set(xlabel=f"{criterion}: the criterion, computed without labels", ylabel="accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        guide = "Each dot is a trial: further right was judged better, higher up is better."
        headline(axes, f"Accuracy against {criterion}", f"{guide}\n{_evidence(summary)}")
    else:
        axes.set(xlabel="rank, from the best criterion to the worst", ylabel=f"{criterion} (the criterion)")
        ticks = MaxNLocator(8, steps=[1, 2, 5, 10], integer=True).tick_values(1, max(len(points), 1))
        axes.set_xticks(sorted({1, *(int(tick) for tick in ticks if 1 <= tick <= len(points))}))
        headline(
            axes,
            f"Trials by {criterion}",
            "Each dot is a trial. Without labels their accuracy is unknown.",
        )
    axes.margins(0.09, 0.12)
    grid(axes, "both")
    if points:
        _draw_points(figure, axes, points, _marked(summary, rows, labelled), labelled)
    return figure


def sweep_page(summary: Summary, *, facts: Mapping[str, str]) -> str:
    """The report as one HTML page."""
    sections = [
        _choice_section(summary),
        Section(
            title="Best trials",
            text=f"{status_line(summary).rstrip('.')}. By {verdict(summary)}.",
            tables=[(f"The chosen one, then by {summary['criterion']}", trials_table(summary))],
        ),
        _criterion_section(summary),
        *_failed_section(summary),
    ]
    data = summary["evaluated_on"]["data"]
    return render_page(f"Hyper-parameters chosen without labels, on {data}", facts=facts, sections=sections)


def _choice_section(summary: Summary) -> Section:
    chosen, zero_shot, criterion = summary["chosen"], summary["zero_shot"], summary["criterion"]
    if chosen["name"] == ZERO_SHOT_KEY:
        why = "the rounds are not trusted"
        if summary.get("trusted", True):
            why = f"by {criterion}, no trial whose rounds are trusted is better"
        what = f"Zero-shot itself was chosen: {why}"
    elif chosen["name"] == DEFAULT_KEY:
        what = f"The default recipe, the one without a sweep, was chosen by {criterion}"
    else:
        what = f"Trial {chosen['name']} was chosen by {criterion}"
    if _number(chosen.get("criterion")) is not None:
        what += f" ({chosen['criterion']:.3f}"
        if chosen["name"] != ZERO_SHOT_KEY and _number(zero_shot.get("criterion")) is not None:
            what += f"; zero-shot has {zero_shot['criterion']:.3f}"
        what += ")"
    what += ", which is computed without labels."
    if _number(chosen.get("accuracy")) is not None:
        what += f" Its accuracy is {100 * chosen['accuracy']:.1f}%"
        if chosen["name"] != ZERO_SHOT_KEY and _number(zero_shot.get("accuracy")) is not None:
            gain = 100 * (chosen["accuracy"] - zero_shot["accuracy"])
            what += f", {gain:+.1f} points from zero-shot's {100 * zero_shot['accuracy']:.1f}%"
        what += f". {_measured_on(summary)}"
    again = "This command reproduces it:" if chosen["command"] else "It needs no training."
    return Section(title="What was chosen", text=f"{what}\n\n{again}", command=chosen["command"] or "")


def _measured_on(summary: Summary) -> str:
    about = summary["evaluated_on"]
    trained = {
        "inductive": ", which no trial was trained on",
        "transductive": ", which the trials were trained on as well, without their labels (transductive)",
    }
    setting = about.get("setting") or ""
    but = f" but for {about['shared']:,}" if setting == "inductive" and about.get("shared") else ""
    images = counted(about["images"], "image")
    return f"Accuracies are of the {images} of {about['data']}{trained.get(setting, '')}{but}."


def _criterion_section(summary: Summary) -> Section:
    name = summary["criterion"]
    if _labelled(summary):
        title, caption = "Accuracy against the criterion", "Dashed: zero-shot's accuracy."
        alt = f"Accuracy against {name}, a point for each trial"
        text = (
            f"The criterion, {name}, never sees labels; labels served only to draw this picture. The more the points "
            "rise from left to right, the better the criterion tells good trials from bad ones. Spearman's "
            "correlation measures that: 1 if both order the trials alike, 0 if the criterion says nothing about "
            "accuracy. Regret is what choosing without labels costs: by how many points of accuracy the chosen trial "
            "stays below the most accurate one."
        )
    else:
        title, caption, alt = "The criterion", "", f"Values of {name} of all trials, sorted"
        text = (
            f"The criterion, {name}, never sees labels, and without labels nobody knows how well it orders the trials. "
            "With labels, this picture would show accuracy against it, Spearman's correlation of the two, and the "
            "regret: by how many points of accuracy the chosen trial stays below the most accurate one."
        )
    picture = Picture(caption=caption, figure=criterion_figure(summary), alt=alt)
    return Section(title=title, text=text, pictures=[picture])


def _failed_section(summary: Summary) -> Iterator[Section]:
    rows = []
    for trial in summary["trials"]:
        if trial["status"] == "failed":
            found = _parameters(summary, trial).items()
            text = ", ".join(f"{name} {value}" for name, value in found if value is not None)
            rows.append(
                {"trial": trial["name"], "parameters": text or None, "reason": _reason(trial, MAX_REASON)}
            )
    if rows:
        yield Section(title="Failed trials", tables=[("Trials that ended with an error", rows)])


def _finished(summary: Summary) -> list[Mapping[str, Any]]:
    return [trial for trial in summary["trials"] if trial["status"] == "finished"]


def _always_there(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """Zero-shot and, where it finished, the default recipe. Sweeps of earlier versions had none."""
    default = summary.get("default")
    finished = default is not None and default["status"] == "finished"
    return {ZERO_SHOT_KEY: summary["zero_shot"], **({DEFAULT_KEY: default} if finished else {})}


def _labelled(summary: Summary) -> bool:
    rows = [*_finished(summary), *_always_there(summary).values()]
    return any(_number(row.get("accuracy")) is not None for row in rows)


def _number(value: Any) -> float | None:
    """The value itself, but None for what is no finite number."""
    number = not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    return value if number else None


def _value(row: Mapping[str, Any], key: str, default: float) -> float:
    found = _number(row.get(key))
    return default if found is None else found


def _parameters(summary: Summary, trial: Mapping[str, Any]) -> dict[str, str | None]:
    """Searched parameters as text; None for what a trial does not have, as zero-shot has none."""
    found = trial.get("parameters", {})
    return {name: _value_text(found[name]) if name in found else None for name in summary["parameters"]}


def _value_text(value: Any) -> str:
    """A parameter's value: floats to three significant digits, whole numbers whole."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{float(f'{float(value):.3g}'):g}"
    return str(value)


def _column(parameter: str) -> str:
    """A parameter's column: an outcome may have its name, as the rounds allowed and the rounds run do."""
    return f"{parameter} (searched)" if parameter in OUTCOMES else parameter


def _short(name: str) -> str:
    if name in PLAIN_NAMES:
        return PLAIN_NAMES[name]
    return name if len(name) <= MAX_TRIAL_NAME else name[: MAX_TRIAL_NAME - 1] + "…"


def _reason(trial: Mapping[str, Any], length: int) -> str:
    """A failed trial's error on one line; of a traceback the last one, which says what happened."""
    lines = (trial.get("error") or "").strip().splitlines() or ["no reason given"]
    text = " ".join((lines[-1] if lines[0].startswith("Traceback") else " ".join(lines)).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _evidence(summary: Summary) -> str:
    evidence = summary.get("evidence")
    if not evidence:
        return ""
    parts = []
    if _number(evidence.get("spearman")) is not None:
        parts.append(f"Spearman correlation {evidence['spearman']:.2f}")
    if _number(evidence.get("regret")) is not None:
        parts.append(f"regret {100 * evidence['regret']:.1f} points")
    if evidence.get("rank") is not None:
        parts.append(f"the chosen one ranks {evidence['rank']} of {evidence['trials']}")
    return ", ".join(parts)


def _marked(
    summary: Summary, rows: Mapping[str, Mapping[str, Any]], labelled: bool
) -> dict[str, tuple[str, ...]]:
    """Marks of rows by name: "zero-shot", "chosen", "best"."""
    roles: dict[str, list[str]] = {key: [PLAIN_NAMES[key]] for key in _always_there(summary)}
    chosen = summary["chosen"]["name"]
    roles.setdefault(chosen, []).append("chosen")
    if labelled and rows:
        # Among equally good ones the chosen one is called the best.
        best = max(rows, key=lambda name: (rows[name]["accuracy"], name == chosen))
        roles.setdefault(best, []).append("best")
    return {name: tuple(found) for name, found in roles.items() if name in rows}


def _draw_points(
    figure: Figure,
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    marked: Mapping[str, tuple[str, ...]],
    labelled: bool,
) -> None:
    plain = np.array([point for name, point in points.items() if name not in marked]).reshape(-1, 2)
    dot: dict[str, Any] = {
        "s": 34 if len(plain) <= 150 else 16,
        "color": CHOSEN,
        "alpha": 0.4,
        "linewidth": 0,
    }
    axes.scatter(plain[:, 0], plain[:, 1], **dot, clip_on=False, label="trials")
    if labelled and ZERO_SHOT_KEY in points:
        axes.axhline(points[ZERO_SHOT_KEY][1], color=COLOURS["zero-shot"], linewidth=1, linestyle=(0, (4, 3)))
    for name, roles in marked.items():
        x, y = points[name]
        who = ", ".join("best by accuracy" if role == "best" else role for role in roles)
        if name not in PLAIN_NAMES:
            who += f", {shortened(_short(name))}"
        styles: list[dict[str, Any]] = []
        if "best" in roles:
            styles.append({"s": 190, "facecolor": "none", "edgecolor": BEST, "linewidth": 2.4})
        if "zero-shot" in roles:
            edge = CHOSEN if "chosen" in roles else "white"
            styles.append(
                {"s": 95, "marker": "D", "color": COLOURS["zero-shot"], "edgecolor": edge, "linewidth": 2}
            )
        elif "chosen" in roles:
            styles.append({"s": 105, "color": CHOSEN, "edgecolor": INK, "linewidth": 1.4})
        else:
            styles.insert(0, dot)
        value = f"{100 * y:.1f}%" if labelled else f"{y:.3f}"
        for place, style in enumerate(reversed(styles)):  # the last one is in the legend
            axes.scatter(
                x, y, **style, zorder=4 - place, clip_on=False, label=None if place else f"{who}: {value}"
            )
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, labelspacing=0.8)
