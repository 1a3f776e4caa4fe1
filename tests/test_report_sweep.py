"""A sweep's table, pictures and page, whatever was searched and whatever came of it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Text

from lpclip.report.style import COLOURS, png
from lpclip.report.sweep_page import (
    criterion_figure,
    status_line,
    sweep_page,
    trials_table,
    verdict,
)
from lpclip.report.tables import format_table

NASTY = "<b>x</b> & $y$ {{ 7 }}"


def trial(
    name: str, parameters: dict[str, Any], criterion: float | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": parameters,
        "criterion": criterion,
        "criteria": {"consensus": criterion},
        "accuracy": None,
        "ece": None,
        "rounds": 12,
        "seconds": 4.24,
        "status": "finished",
        "error": None,
        **more,
    }


def sweep(trials: list[dict[str, Any]], *, chosen: str, **more: Any) -> dict[str, Any]:
    zero_shot = {"criterion": 0.5, "criteria": {}, "accuracy": None, "ece": None}
    zero_shot |= more.pop("zero_shot", {})
    found = next((row for row in trials if row["name"] == chosen), {**zero_shot, "parameters": {}})
    keys = ("parameters", "criterion", "accuracy")
    return {
        "criterion": "consensus",
        "parameters": list(dict.fromkeys(name for row in trials for name in row["parameters"])),
        "trials": trials,
        "zero_shot": zero_shot,
        "chosen": {
            "name": chosen,
            "command": "python jobs/selftrain.py --a 1",
            **{k: found[k] for k in keys},
        },
        "evidence": None,
        "evaluated_on": {"data": "cifar10-test", "images": 10000, "setting": "inductive"},
        "timings": {},
        **more,
    }


def labelled(**more: Any) -> dict[str, Any]:
    """Three trials that finished, of which "a" was chosen and "b" is the most accurate, and two that did not."""
    trials = [
        trial("b", {"factor": 10.0, "prior": "weak"}, 0.7, accuracy=0.73, ece=0.05),
        trial("a", {"factor": 0.1234, "prior": "none"}, 0.8, accuracy=0.72, ece=0.04),
        trial("c", {"factor": 1.0, "prior": "weak"}, 0.6, accuracy=0.6, ece=0.1),
        trial("d", {"factor": 2.0, "prior": "weak"}, accuracy=0.99, status="stopped"),
        trial("e", {"factor": 3.0, "prior": "weak"}, status="failed", error="ValueError: no image"),
    ]
    evidence = {"spearman": 0.83, "regret": 0.0123, "best_accuracy": 0.73, "rank": 2, "trials": 3}
    zero_shot = {"accuracy": 0.57, "ece": 0.03}
    return sweep(trials, chosen="a", zero_shot=zero_shot, evidence=evidence, **more)


def unlabelled() -> dict[str, Any]:
    summary = labelled(evaluated_on={"data": "cifar10-test", "images": 10000, "setting": None})
    for row in (*summary["trials"], summary["zero_shot"], summary["chosen"]):
        row |= {"accuracy": None, "ece": None}
    return summary | {"evidence": None}


def many(count: int, *, parameters: int = 5, seed: int = 0, name: str = "parameter") -> dict[str, Any]:
    """Trials in which every other parameter is logarithmic."""
    generator = np.random.default_rng(seed)
    trials = []
    for index in range(count):
        values = {
            f"{name}_{place}": float(10 ** generator.uniform(-4, 0) if place % 2 else generator.uniform())
            for place in range(parameters)
        }
        criterion = float(generator.uniform(0.6, 0.9))
        accuracy = criterion - 0.1 + float(generator.normal(0, 0.02))
        trials.append(trial(f"{index:012x}", values, criterion, accuracy=accuracy, ece=0.05))
    chosen = max(trials, key=lambda row: row["criterion"])["name"]
    return sweep(trials, chosen=chosen, zero_shot={"accuracy": 0.5})


def offsets(figure: Figure) -> dict[str, list[list[float]]]:
    """Points of the scatter plot by their label."""
    return {
        str(found.get_label()): np.asarray(found.get_offsets()).tolist()
        for found in figure.axes[0].collections
        if isinstance(found, PathCollection) and not str(found.get_label()).startswith("_")
    }


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def notes(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def assert_readable(figure: Figure) -> None:
    """No text is cut off, and none covers another."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    texts = [text for found in figure.legends for text in found.get_texts()]
    for axes in figure.axes:
        texts += [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label2 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts = [text for text in texts if text.get_text() and text.get_visible()]
    # An annotation's own extent would count its line to the point.
    boxes = [(text, Text.get_window_extent(text).padded(-1.5)) for text in texts]
    for text, box in boxes:
        assert (box.min > -2.5).all(), text
        assert (box.max < np.array([width, height]) + 2.5).all(), text
    for index, (text, box) in enumerate(boxes):
        for other, further in boxes[:index]:
            assert not box.overlaps(further), (text, other)


def test_the_chosen_one_comes_first_then_the_best_by_criterion() -> None:
    assert format_table(trials_table(labelled())).split("\n") == [
        "trial       factor  prior  criterion  accuracy %  ECE %  rounds  seconds",
        "----------  ------  -----  ---------  ----------  -----  ------  -------",
        "a (chosen)   0.123  none       0.800        72.0    4.0      12      4.2",
        "b               10  weak       0.700        73.0    5.0      12      4.2",
        "c                1  weak       0.600        60.0   10.0      12      4.2",
        "zero-shot        -  -          0.500        57.0    3.0       -        -",
    ]


def test_the_table_has_its_limit_but_the_chosen_one_and_zero_shot() -> None:
    trials = [trial(f"t{index}", {"x": index}, index / 100) for index in range(40)]
    rows = trials_table(sweep(trials, chosen="t3", zero_shot={"criterion": 0.375}), limit=4)
    assert [row["trial"] for row in rows] == ["t3 (chosen)", "t39", "t38", "zero-shot", "t37"]
    rows = trials_table(sweep(trials, chosen="zero_shot", zero_shot={"criterion": None}), limit=1)
    assert [row["trial"] for row in rows] == ["zero-shot (chosen)", "t39"]


def test_without_labels_the_table_has_no_columns_for_them() -> None:
    assert list(trials_table(unlabelled())[0]) == [
        "trial",
        "factor",
        "prior",
        "criterion",
        "rounds",
        "seconds",
    ]


def test_a_parameter_with_an_outcomes_name_keeps_its_own_column() -> None:
    rows = trials_table(sweep([trial("a", {"rounds": 30}, 0.9, rounds=7)], chosen="a"))
    assert rows[0] == {
        "trial": "a (chosen)", "rounds (searched)": "30", "criterion": 0.9, "rounds": 7, "seconds": "4.2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.31415, "1.31"), (0.05, "0.05"), (1234.5, "1230"), (0.000012345, "1.23e-05"), (12.0, "12"), (4096, "4096"),
        (None, "none"), (True, "true"), ("a long word that stays as it is", "a long word that stays as it is"),
    ],
)  # fmt: skip
def test_values_are_text_of_three_digits(value: Any, text: str) -> None:
    rows = trials_table(sweep([trial("a", {"x": value}, 0.9), trial("b", {}, 0.8)], chosen="a"))
    assert [row["x"] for row in rows] == [text, None, None]


def test_the_status_names_what_failed() -> None:
    assert (
        status_line(labelled())
        == "3 of 5 trials finished, 1 stopped early, 1 failed: e: ValueError: no image"
    )
    assert status_line(many(1)) == "1 of 1 trial finished"


def test_the_status_names_three_failures_at_most_on_one_line() -> None:
    errors = [
        None,
        "out of\n  memory",
        "Traceback (most recent call last):\n  File\nOSError: full",
        "x",
        "y" * 999,
    ]
    trials = [trial(f"t{i}", {}, status="failed", error=error) for i, error in enumerate(errors)]
    assert status_line(sweep(trials, chosen="zero_shot")) == (
        "0 of 5 trials finished, 5 failed: t0: no reason given; t1: out of memory; t2: OSError: full; and 2 more"
    )
    assert len(status_line(sweep(trials[4:], chosen="zero_shot"))) < 250


def test_the_verdict_says_whether_the_choice_beats_the_default_recipe() -> None:
    default = trial("default", {"x": 1}, 0.75, accuracy=0.7)
    trials = [trial("a", {"x": 2}, 0.8, accuracy=0.72), trial("b", {"x": 3}, 0.7, accuracy=0.6)]
    better = sweep(trials, chosen="a", default=default)
    assert verdict(better) == (
        "consensus: chosen 0.800, zero-shot 0.500, default recipe 0.750; the choice beats the default recipe"
    )
    assert [row["trial"] for row in trials_table(better)] == [
        "a (chosen)",
        "default recipe",
        "b",
        "zero-shot",
    ]
    assert "default recipe: 70.0%" in offsets(criterion_figure(better))
    own = better | {"chosen": {**default, "command": "lpclip selftrain"}}
    assert verdict(own).endswith("the default recipe itself is chosen")
    assert "The default recipe, the one without a sweep, was chosen" in sweep_page(own, facts={})
    failed = sweep(trials, chosen="a", default=trial("default", {}, status="failed", error="too few"))
    assert verdict(failed).endswith("the default recipe did not finish: too few")
    assert [row["trial"] for row in trials_table(failed)] == ["a (chosen)", "b", "zero-shot"]


def test_points_are_criterion_and_accuracy_of_finished_trials() -> None:
    figure = criterion_figure(labelled())
    assert offsets(figure) == {
        "trials": [[0.6, 0.6]],
        "zero-shot: 57.0%": [[0.5, 0.57]],
        "chosen, a: 72.0%": [[0.8, 0.72]],
        "best by accuracy, b: 73.0%": [[0.7, 0.73]],
    }
    assert sorted(legend(figure)) == sorted(offsets(figure))
    (subtitle,) = notes(figure.axes[0])
    assert subtitle.endswith("Spearman correlation 0.83, regret 1.2 points, the chosen one ranks 2 of 3")
    colour = {str(c.get_label()): c.get_facecolor() for c in figure.axes[0].collections}
    assert same_color(colour["zero-shot: 57.0%"][0], COLOURS["zero-shot"])
    assert same_color(colour["chosen, a: 72.0%"][0], COLOURS["probe"])
    assert [text.get_text()[-1] for text in figure.axes[0].get_yticklabels()] == ["%"] * len(
        figure.axes[0].get_yticks()
    )
    assert_readable(figure)


def test_a_chosen_trial_as_good_as_the_best_is_the_best() -> None:
    summary = labelled()
    summary["trials"][0]["accuracy"] = 0.72
    assert offsets(criterion_figure(summary)) == {
        "trials": [[0.7, 0.72], [0.6, 0.6]],
        "zero-shot: 57.0%": [[0.5, 0.57]],
        "chosen, best by accuracy, a: 72.0%": [[0.8, 0.72]],
    }


def test_zero_shot_can_be_chosen_and_best() -> None:
    summary = labelled()
    summary["zero_shot"] |= {"accuracy": 0.9, "criterion": 0.95}
    summary["chosen"] = {**summary["chosen"], "name": "zero_shot", "accuracy": 0.9, "criterion": 0.95}
    figure = criterion_figure(summary)
    assert offsets(figure)["zero-shot, chosen, best by accuracy: 90.0%"] == [[0.95, 0.9]]
    assert "Zero-shot itself was chosen" in sweep_page(summary, facts={})


def test_without_labels_the_criterion_is_drawn_by_rank() -> None:
    figure = criterion_figure(unlabelled())
    assert offsets(figure) == {
        "trials": [[2, 0.7], [3, 0.6]],
        "zero-shot: 0.500": [[4, 0.5]],
        "chosen, a: 0.800": [[1, 0.8]],
    }
    assert_readable(figure)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("count", [1, 3, 64, 500])
def test_pictures_of_any_number_of_trials_can_be_read(with_labels: bool, count: int) -> None:
    summary = many(count)
    if not with_labels:
        for row in (*summary["trials"], summary["zero_shot"]):
            row["accuracy"] = None
    figure = criterion_figure(summary)
    assert_readable(figure)
    assert png(figure, dpi=50)


def test_a_criterion_that_tells_nothing_apart_can_be_drawn() -> None:
    summary = labelled()
    summary["evidence"] = {"spearman": None, "regret": 0.0, "best_accuracy": 0.73, "rank": 1, "trials": 3}
    for row in (*summary["trials"], summary["zero_shot"], summary["chosen"]):
        row |= {"criterion": 0.8, "accuracy": 0.7}
    figure = criterion_figure(summary)
    assert "nan" not in " ".join(notes(figure.axes[0]))
    assert_readable(figure)
    png(figure, dpi=50)


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_sweep_of_which_nothing_finished_has_a_page(status: str) -> None:
    trials = [trial(f"t{index}", {"x": index}, status=status) for index in range(3)]
    for accuracy in (0.5, None):
        summary = sweep(trials, chosen="zero_shot", zero_shot={"accuracy": accuracy})
        html = sweep_page(summary, facts={})
        assert f"0 of 3 trials finished, 3 {status}" in html
    summary["zero_shot"]["criterion"] = None
    assert "0 of 3 trials finished" in sweep_page(summary, facts={})


def texts(html: str, tag: str) -> list[str]:
    return [
        " ".join(re.sub(r"<[^>]+>", "", found).split())
        for found in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    ]


def test_the_page_says_what_was_chosen_and_how_to_get_it() -> None:
    html = sweep_page(labelled(), facts={"seed": "17"})
    assert texts(html, "h2") == [
        "What was chosen",
        "Best trials",
        "Accuracy against the criterion",
        "Failed trials",
    ]
    paragraphs = texts(html, "p")
    assert texts(html, "pre") == ["python jobs/selftrain.py --a 1"]
    assert paragraphs[:2] == [
        "Trial a was chosen by consensus (0.800; zero-shot has 0.500), which is computed without labels. Its "
        "accuracy is 72.0%, +15.0 points from zero-shot&#39;s 57.0%. Accuracies are of the 10,000 images of "
        "cifar10-test, which no trial was trained on.",
        "This command reproduces it:",
    ]
    assert paragraphs[2].startswith("3 of 5 trials finished")
    assert "never sees labels" in paragraphs[3]
    assert texts(html, "dd") == ["17"]
    assert texts(html, "tr")[-1] == "e factor 3, prior weak ValueError: no image"
    assert html.count("<img") == 1


def test_the_page_without_labels_claims_no_accuracy() -> None:
    html = sweep_page(unlabelled(), facts={})
    assert "The criterion" in texts(html, "h2")
    assert "accuracy %" not in texts(html, "th")
    assert not any("Its accuracy is" in text or "Accuracies are" in text for text in texts(html, "p"))


def test_a_page_without_failures_has_no_section_for_them() -> None:
    assert "Failed trials" not in texts(sweep_page(many(3), facts={}), "h2")


def test_any_text_is_shown_as_it_is() -> None:
    trials = [
        trial(NASTY, {NASTY: NASTY}, 0.9, accuracy=0.5),
        trial("b", {NASTY: "x"}, 0.8, accuracy=0.4),
        trial("c", {NASTY: NASTY}, status="failed", error=f"Error: {NASTY}"),
    ]
    summary = sweep(trials, chosen=NASTY, criterion=NASTY, evaluated_on={"data": NASTY, "images": 3})
    summary["chosen"]["command"] = f"run --x '{NASTY}'"
    html = sweep_page(summary, facts={NASTY: NASTY})
    assert "<b>" not in html
    escaped = "&lt;b&gt;x&lt;/b&gt; &amp; $y$ {{ 7 }}"
    assert f"run --x &#39;{escaped}&#39;" in html
    assert f"Error: {escaped}" in texts(html, "tr")[-1]
    figure = criterion_figure(summary)
    assert "$" not in figure.axes[0].get_xlabel().replace(r"\$", "")
