"""A sweep that was chosen without labels: its table, its pictures and its page.

All functions take the sweep's summary, the mapping that its summary.json holds. A higher criterion is better.
"""

from __future__ import annotations

import math
import numbers
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox

from lpclip.report.page import Picture, Section, render_page
from lpclip.report.style import COLOURS, INK, grid, new_figure, shortened

Summary = Mapping[str, Any]
Points = np.ndarray

ZERO_SHOT = "zero_shot"
OUTCOMES = ("trial", "criterion", "accuracy %", "ECE %", "rounds", "seconds")
CHOSEN = COLOURS["probe"]
BEST = COLOURS["supervised"]  # it takes labels to know it

MAX_NAMED = 3
MAX_ERROR = 160
MAX_REASON = 400
MAX_TRIAL_NAME = 14
MAX_TICKS = 6
MAX_CATEGORY_LABELS = 14
MIN_GAP = 0.065  # of an axis' height between two labels
OTHER_GAP = 0.13  # between names below an axis' numbers
LOG_FACTOR = 10
OVERLAP = 100.0  # the cost of a label that hides another one, in hidden points
SUBTITLE_CHARACTERS = 15.5  # in an inch


def trials_table(summary: Summary, *, limit: int = 10) -> list[dict[str, Any]]:
    """Rows for `table`: the chosen one, then the best `limit` finished trials by criterion.

    The chosen one counts among them, zero-shot does not: it always has a row, at its place in this order.
    Accuracy and ECE are fractions, and left out where no row of the sweep has them.
    """
    trials: dict[str, Mapping[str, Any]] = {trial["name"]: trial for trial in _finished(summary)}
    name = summary["chosen"]["name"]
    if name != ZERO_SHOT:
        trials.setdefault(name, summary["chosen"])
    order = sorted(trials, key=lambda key: (key != name, -_value(trials[key], "criterion", -math.inf)))
    candidates = {key: trials[key] for key in order[: max(limit, 1)]} | {ZERO_SHOT: summary["zero_shot"]}
    shown = sorted(
        candidates, key=lambda key: (key != name, -_value(candidates[key], "criterion", -math.inf))
    )
    known = [*trials.values(), summary["zero_shot"]]
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
    """How many trials finished, were stopped and failed, and why the first three of these did."""
    trials = summary["trials"]
    parts = [f"{len(_finished(summary))} of {len(trials)} trial{'s' * (len(trials) != 1)} finished"]
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


def criterion_figure(summary: Summary) -> Figure:
    """Accuracy against the criterion, a point for each finished trial; without labels the criterion by rank.

    Zero-shot, the chosen trial and, with labels, the most accurate one are marked and named.
    """
    labelled = _labelled(summary)
    keys = ("criterion", "accuracy") if labelled else ("criterion",)
    rows = {trial["name"]: trial for trial in _finished(summary)} | {ZERO_SHOT: summary["zero_shot"]}
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
        _head(axes, f"Accuracy against {criterion}", f"{guide}\n{_evidence(summary)}")
    else:
        axes.set(xlabel="rank, from the best criterion to the worst", ylabel=f"{criterion} (the criterion)")
        ticks = MaxNLocator(8, steps=[1, 2, 5, 10], integer=True).tick_values(1, max(len(points), 1))
        axes.set_xticks(sorted({1, *(int(tick) for tick in ticks if 1 <= tick <= len(points))}))
        _head(
            axes,
            f"Trials by {criterion}",
            "Each dot is a trial. Without labels their accuracy is unknown.",
        )
    axes.margins(0.09, 0.12)
    grid(axes, "both")
    if points:
        _draw_points(axes, points, _marked(summary, rows, labelled), labelled)
    return figure


def parallel_coordinates_figure(summary: Summary) -> Figure:
    """An axis for each searched parameter, then the criterion and, with labels, accuracy; a line for each trial.

    Lines are coloured by the last axis, the best are drawn last. Axes are logarithmic where all numbers are
    positive and span more than a factor of ten; what is no number has a place of its own. The chosen trial is
    thick, and its values are written in its colour.
    """
    labelled = _labelled(summary)
    outcomes = ["criterion", "accuracy"] if labelled else ["criterion"]
    trials = [t for t in _finished(summary) if all(_number(t.get(key)) is not None for key in outcomes)]
    names = list(summary["parameters"])
    scales = [_scale([trial["parameters"].get(name) for trial in trials]) for name in names]
    scales.append(_scale([trial["criterion"] for trial in trials], log=False))
    if labelled:
        scales.append(_scale([trial["accuracy"] for trial in trials], text=_percent_text, log=False))
    heads = [_wrapped(name) for name in names] + [_wrapped(summary["criterion"]) + "\n(criterion)"]
    heads += ["accuracy"] if labelled else []

    spacing = 1.3 if len(scales) <= 8 else 1.05
    figure = new_figure(1.6 + spacing * max(len(scales), 4), 4.8)
    axes = figure.subplots()
    axes.set(xlim=(-0.5, len(scales) - 0.8), ylim=(-0.04, 1.04), yticks=[])
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(scales)), heads, fontsize=9.5, color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.vlines(range(len(scales)), 0, 1, color="#aab0b8", linewidth=1.2, zorder=2.2)
    for label in axes.get_xticklabels()[len(names) :]:
        label.set_fontweight("bold")

    chosen = next((i for i, t in enumerate(trials) if t["name"] == summary["chosen"]["name"]), None)
    title, subtitle = _parallel_head(summary, len(trials), chosen is not None, labelled)
    lines = max(head.count("\n") + 1 for head in heads)
    _head(axes, title, subtitle, pad=8 + 14 * lines)
    if trials:
        places = np.stack([scale.places for scale in scales], axis=1)
        values = np.array([trial[outcomes[-1]] for trial in trials], dtype=np.float64)
        _draw_lines(axes, places, values, chosen, label=outcomes[-1] if labelled else summary["criterion"])
    for index, scale in enumerate(scales):
        _write_ticks(axes, index, scale, chosen, length=14 if spacing > 1.2 else 11)
    return figure


def sweep_page(summary: Summary, *, facts: Mapping[str, str]) -> str:
    """The report as one HTML page."""
    sections = [
        _choice_section(summary),
        Section(
            title="Best trials",
            text=status_line(summary).rstrip(".") + ".",
            tables=[(f"The chosen one, then by {summary['criterion']}", trials_table(summary))],
        ),
        _criterion_section(summary),
        _parameters_section(summary),
        *_failed_section(summary),
    ]
    data = summary["evaluated_on"]["data"]
    return render_page(f"Hyper-parameters chosen without labels, on {data}", facts=facts, sections=sections)


def _choice_section(summary: Summary) -> Section:
    chosen, zero_shot, criterion = summary["chosen"], summary["zero_shot"], summary["criterion"]
    if chosen["name"] == ZERO_SHOT:
        why = (
            f"by {criterion}, no trial is better"
            if summary.get("trusted", True)
            else "the rounds are not trusted"
        )
        what = f"Zero-shot itself was chosen: {why}"
    else:
        what = f"Trial {chosen['name']} was chosen by {criterion}"
    if _number(chosen.get("criterion")) is not None:
        what += f" ({chosen['criterion']:.3f}"
        if chosen["name"] != ZERO_SHOT and _number(zero_shot.get("criterion")) is not None:
            what += f"; zero-shot has {zero_shot['criterion']:.3f}"
        what += ")"
    what += ", which is computed without labels."
    if _number(chosen.get("accuracy")) is not None:
        what += f" Its accuracy is {100 * chosen['accuracy']:.1f}%"
        if chosen["name"] != ZERO_SHOT and _number(zero_shot.get("accuracy")) is not None:
            gain = 100 * (chosen["accuracy"] - zero_shot["accuracy"])
            what += f", {gain:+.1f} points from zero-shot's {100 * zero_shot['accuracy']:.1f}%"
        what += f". {_measured_on(summary)}"
    again = (
        f"This command reproduces it:\n\n{chosen['command']}"
        if chosen["command"]
        else "It needs no training."
    )
    return Section(title="What was chosen", text=f"{what}\n\n{again}")


def _measured_on(summary: Summary) -> str:
    about = summary["evaluated_on"]
    trained = {
        "inductive": ", which no trial was trained on",
        "transductive": ", which the trials were trained on as well, without their labels (transductive)",
    }
    return (
        f"Accuracies are of the {about['images']:,} images of {about['data']}"
        f"{trained.get(about.get('setting') or '', '')}."
    )


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


def _parameters_section(summary: Summary) -> Section:
    colour = "accuracy" if _labelled(summary) else summary["criterion"]
    return Section(
        title="Parameters and outcomes",
        text="Each line is a trial: where it crosses an axis is its value there. A parameter matters where the dark "
        "lines crowd together on its axis, and does not where they spread over all of it.",
        pictures=[
            Picture(
                caption=f"Colour: {colour}.",
                figure=parallel_coordinates_figure(summary),
                alt="Parameters, criterion and accuracy of all trials as parallel coordinates",
            )
        ],
    )


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


def _labelled(summary: Summary) -> bool:
    rows = [*_finished(summary), summary["zero_shot"]]
    return any(_number(row.get("accuracy")) is not None for row in rows)


def _number(value: Any) -> float | None:
    """The value itself, but None for what is no finite number."""
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


def _value(row: Mapping[str, Any], key: str, default: float) -> float:
    found = _number(row.get(key))
    return default if found is None else found


def _parameters(summary: Summary, trial: Mapping[str, Any]) -> dict[str, str | None]:
    """Searched parameters as text; None for what a trial does not have, as zero-shot has none."""
    found = trial.get("parameters", {})
    return {name: _text(found[name]) if name in found else None for name in summary["parameters"]}


def _column(parameter: str) -> str:
    """A parameter's column: an outcome may have its name, as the rounds allowed and the rounds run do."""
    return f"{parameter} (searched)" if parameter in OUTCOMES else parameter


def _text(value: Any) -> str:
    """A parameter's value: floats to three significant digits, whole numbers whole."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{float(f'{float(value):.3g}'):g}"
    return str(value)


def _percent_text(value: float) -> str:
    return f"{100 * value:.1f}%"


def _short(name: str) -> str:
    if name == ZERO_SHOT:
        return "zero-shot"
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


def _head(axes: Axes, title: str, subtitle: str, *, pad: float = 0) -> None:
    """A title with a smaller text below it; `pad` points make room for what else stands above the axes."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    length = int(SUBTITLE_CHARACTERS * (figure.get_size_inches()[0] - 1.2))
    lines = [line for part in subtitle.splitlines() for line in textwrap.wrap(part, length)]
    axes.set_title(title, loc="left", pad=pad + 10 + 13 * len(lines))
    note = axes.annotate(
        "\n".join(lines), (0, 1), (0, pad + 8), xycoords="axes fraction", textcoords="offset points",
        fontsize=9, color="#5c636d", linespacing=1.25,
    )  # fmt: skip
    note.set_in_layout(False)  # the title's distance has its place already


def _marked(
    summary: Summary, rows: Mapping[str, Mapping[str, Any]], labelled: bool
) -> dict[str, tuple[str, ...]]:
    """What is to be marked, by name of a row: "zero-shot", "chosen", "best"."""
    roles: dict[str, list[str]] = {ZERO_SHOT: ["zero-shot"]}
    chosen = summary["chosen"]["name"]
    roles.setdefault(chosen, []).append("chosen")
    if labelled and rows:
        # Of several that are equally good the chosen one is the best.
        best = max(rows, key=lambda name: (rows[name]["accuracy"], name == chosen))
        roles.setdefault(best, []).append("best")
    return {name: tuple(found) for name, found in roles.items() if name in rows}


def _draw_points(
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    marked: Mapping[str, tuple[str, ...]],
    labelled: bool,
) -> None:
    plain = np.array([point for name, point in points.items() if name not in marked]).reshape(-1, 2)
    size = 34 if len(plain) <= 150 else 16
    axes.scatter(
        plain[:, 0],
        plain[:, 1],
        s=size,
        color=CHOSEN,
        alpha=0.4,
        linewidth=0,
        zorder=2,
        label="trials",
        clip_on=False,
    )
    if labelled and ZERO_SHOT in points:
        axes.axhline(points[ZERO_SHOT][1], color=COLOURS["zero-shot"], linewidth=1, linestyle=(0, (4, 3)))
    labels = []
    for name, roles in marked.items():
        x, y = points[name]
        if "best" in roles:
            axes.scatter(
                x, y, s=190, facecolor="none", edgecolor=BEST, linewidth=2.4, zorder=3, label="best",
                clip_on=False,
            )  # fmt: skip
        if "zero-shot" in roles:
            edge = CHOSEN if "chosen" in roles else "white"
            axes.scatter(
                x, y, s=95, marker="D", color=COLOURS["zero-shot"], edgecolor=edge, linewidth=2, zorder=4,
                label=", ".join(role for role in roles if role != "best"), clip_on=False,
            )  # fmt: skip
        elif "chosen" in roles:
            axes.scatter(
                x, y, s=105, color=CHOSEN, edgecolor=INK, linewidth=1.4, zorder=5, label="chosen",
                clip_on=False,
            )  # fmt: skip
        elif "best" in roles:
            axes.scatter(x, y, s=size, color=CHOSEN, alpha=0.4, linewidth=0, zorder=2, clip_on=False)
        who = ", ".join(role if role != "best" else "best by accuracy" for role in roles)
        value = _percent_text(y) if labelled else f"{y:.3f}"
        text = f"{who}: {value}" if name == ZERO_SHOT else f"{who}: {value}\n{shortened(_short(name))}"
        colour = CHOSEN if "chosen" in roles else "#8a5a10" if roles == ("best",) else "#5c636d"
        labels.append((text, (x, y), colour, "bold" if "chosen" in roles else "normal"))
    labels.sort(key=lambda label: -label[1][1])  # the highest has the least room: it is first to choose
    _name_points(axes, labels, np.array(list(points.values())))


def _name_points(
    axes: Axes, labels: Sequence[tuple[str, tuple[float, float], str, str]], crowd: Points
) -> None:
    """Write each label (text, point, colour, weight) near its point, where it hides the least.

    `crowd` (N, 2) holds all points in data coordinates.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides where the points are
    unit = figure.dpi / 72  # pixels of a point
    anchors = axes.transData.transform([point for _, point, _, _ in labels])
    written = []
    for text, point, colour, weight in labels:
        note = axes.annotate(
            text, point, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=9,
            fontweight=weight, color=colour, zorder=6,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 1, "shrinkB": 7},
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
        note.set_in_layout(False)
        written.append(note)
    extents = [Text.get_window_extent(note) for note in written]  # without the line to the point
    room = _Room(
        inside=axes.get_window_extent(),
        points=axes.transData.transform(crowd),
        marks=[
            *(Bbox.from_extents(*(anchor - 9 * unit), *(anchor + 9 * unit)) for anchor in anchors),
            *(line.get_window_extent().padded(unit) for line in axes.lines),
        ],
        unit=unit,
    )
    halves = [np.array([extent.width, extent.height]) / 2 for extent in extents]
    best, least = room.centres(anchors, halves, range(len(labels)))
    for order in permutations(range(len(labels))):
        if least < OVERLAP:
            break
        # Who comes first has the best place, and may leave none for the others.
        found, cost = room.centres(anchors, halves, order)
        if cost < least:
            best, least = found, cost
    for index, note in enumerate(written):
        note.set_position(tuple((best[index] - anchors[index]) / unit))


@dataclass(frozen=True, kw_only=True)
class _Room:
    """Where labels may stand, in pixels; `unit` is how many make a point of 1/72 inch."""

    inside: Bbox
    points: Points
    """(N, 2), better not hidden."""
    marks: Sequence[Bbox]
    """Never to be hidden."""
    unit: float

    def centres(
        self, anchors: Points, halves: Sequence[Points], order: Iterable[int]
    ) -> tuple[dict[int, Points], float]:
        """Centres (2,) of the labels, by index, of points (L, 2), placed in that order, and what they cost."""
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        centres: dict[int, Points] = {}
        boxes: list[Bbox] = []
        leaders: list[Points] = []
        total = 0.0
        for index in order:
            anchor, half = anchors[index], halves[index]
            candidates = [
                anchor + direction * (distance * self.unit + half)
                for distance in (13, 20, 30, 45, 65, 90, 120)
                for direction in directions
            ]
            costs = [self._cost(anchor, centre, half, boxes, leaders) for centre in candidates]
            centres[index] = candidates[int(np.argmin(costs))]
            total += min(costs)
            boxes.append(_box(centres[index], half + 2 * self.unit))
            leaders.append(_between(anchor, centres[index]))
        return centres, total

    def _cost(
        self, anchor: Points, centre: Points, half: Points, boxes: Sequence[Bbox], leaders: Sequence[Points]
    ) -> float:
        """How bad it is to write a label there, whose line comes from `anchor`, beside other labels and their lines."""
        box = _box(centre, half + 2 * self.unit)
        leader = _between(anchor, centre)
        overlaps = sum(box.overlaps(other) for other in (*self.marks, *boxes))
        overlaps += sum(bool(_inside(leader, other).any()) for other in boxes)
        overlaps += sum(bool(_inside(other, box).any()) for other in leaders)
        overlaps += sum(_cross(leader[0], leader[-1], other[0], other[-1]) for other in leaders)
        out = bool(np.any(box.min < self.inside.min) or np.any(box.max > self.inside.max))
        gap = np.maximum(np.abs(centre - anchor) - half, 0)
        hidden = _inside(self.points, box).sum()
        return float(OVERLAP * overlaps + 4 * OVERLAP * out + hidden + np.hypot(*gap) / (15 * self.unit))


def _box(centre: Points, half: Points) -> Bbox:
    return Bbox.from_extents(*(centre - half), *(centre + half))


def _between(a: Points, b: Points) -> Points:
    """Points (50, 2) on the line from a to b."""
    return a + np.linspace(0, 1, 50)[:, None] * (b - a)


def _inside(points: Points, box: Bbox) -> np.ndarray:
    """Which of the points (N, 2) are in the box, (N,) bool."""
    return np.all((points >= box.min) & (points <= box.max), axis=1)


def _cross(a: Points, b: Points, c: Points, d: Points) -> bool:
    """Whether the lines from a to b and from c to d meet, all (2,)."""

    def side(p: Points, q: Points, r: Points) -> float:
        return float((q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]))

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


@dataclass(frozen=True)
class Scale:
    """An axis of parallel coordinates, from 0 at the bottom to 1."""

    places: np.ndarray
    """(N,) float64, of every trial's value."""
    ticks: tuple[tuple[float, str], ...]
    values: tuple[str, ...]
    """Every trial's value as text."""


def _scale(values: Sequence[Any], *, text: Callable[[Any], str] = _text, log: bool | None = None) -> Scale:
    """Numbers on a linear or logarithmic scale, what is none of them evenly spaced by name, below numbers if any."""
    texts = tuple(_text(value) if not _is_number(value) else text(value) for value in values)
    found = sorted({float(value) for value in values if _is_number(value)})
    others = sorted({label for value, label in zip(values, texts, strict=True) if not _is_number(value)})
    if "none" in others:  # it has the lowest place
        others = ["none", *(label for label in others if label != "none")]
    if not found or len(others) > 3:
        by_size = sorted((float(v), label) for v, label in zip(values, texts, strict=True) if _is_number(v))
        labels = list(dict.fromkeys([*others, *(label for _, label in by_size)]))
        place_of = dict(zip(labels, _spread(len(labels)), strict=True))
        step = max(1, -(-len(labels) // MAX_CATEGORY_LABELS))
        ticks = [(place_of[label], label) for label in labels[::step]]
        return Scale(np.array([place_of[label] for label in texts]), tuple(ticks), texts)
    bottom = OTHER_GAP * len(others)
    position, number_ticks = _number_scale(
        found, text, integers=all(isinstance(v, numbers.Integral) for v in values if _is_number(v)), log=log
    )
    place_of = {label: OTHER_GAP * index for index, label in enumerate(others)}
    places = [
        bottom + (1 - bottom) * position(float(value)) if _is_number(value) else place_of[label]
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
    suffix, factor = ("%", 100) if text is _percent_text else ("", 1)
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


def _parallel_head(summary: Summary, trials: int, chosen: bool, labelled: bool) -> tuple[str, str]:
    if not trials:
        return "Parameters and outcomes", "No trial finished"
    by = "accuracy" if labelled else shortened(summary["criterion"])
    subtitle = f"Each line is a trial, the darker the higher its {by}."
    if chosen:
        subtitle += " Thick and blue: the one chosen without labels, and its values."
    elif summary["chosen"]["name"] == ZERO_SHOT:
        subtitle += " Zero-shot was chosen, which has no line."
    return f"Parameters and outcomes of {trials} trial{'s' * (trials != 1)}", subtitle


def _draw_lines(
    axes: Axes, places: np.ndarray, values: np.ndarray, chosen: int | None, *, label: str
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
    figure = axes.get_figure(root=True)
    assert figure is not None
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
