"""Tables line up and pictures can be drawn, whatever the run looked like."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from results_figure import comparison_figure

from lpclip.evaluation.evidence import Reliability
from lpclip.images.views import CORRUPTIONS
from lpclip.report.evaluation_figures import (
    corruption_figure,
    effective_robustness_figure,
    ood_figure,
    risk_coverage_figure,
    severity_figures,
)
from lpclip.report.style import COLOURS, MORE_COLOURS, colours, png, save
from lpclip.report.tables import format_table
from lpclip.report.training_figures import (
    confusion_matrix_figure,
    reliability_figure,
    rounds_figure,
)

PROBES = {"zero-shot": 0.57, "probe": 0.72, "supervised": 0.8}
CURVES = {
    corruption: {
        name: {severity: accuracy - 0.05 * severity for severity in (1, 3, 5)}
        for name, accuracy in PROBES.items()
    }
    for corruption in reversed(CORRUPTIONS)
}


def saved(figure: Figure, folder: Path) -> Image.Image:
    path = folder / "picture.png"
    save(figure, str(path))
    assert path.stat().st_size < 300_000
    return Image.open(io.BytesIO(path.read_bytes()))


def test_a_table_lines_up() -> None:
    rows = [
        {"classifier": "zero-shot", "accuracy %": 0.4712, "nll": 1.2345, "images": 6000},
        {"classifier": "probe", "accuracy %": None, "nll": np.float32(0.5)},
    ]
    assert format_table(rows).split("\n") == [
        "classifier  accuracy %    nll  images",
        "----------  ----------  -----  ------",
        "zero-shot         47.1  1.234   6,000",
        "probe                -  0.500       -",
    ]


def test_numbers_written_as_text_are_aligned_as_numbers() -> None:
    rows = [{"name": "a", "gain": "-", "n": np.int64(1234)}, {"name": "bc", "gain": "+7.1 (5.0 to 9.2) *"}]
    assert format_table(rows).split("\n") == [
        "name                 gain      n",
        "----  -------------------  -----",
        "a                       -  1,234",
        "bc    +7.1 (5.0 to 9.2) *      -",
    ]
    assert format_table([]) == "\n"


@pytest.mark.parametrize("num_classes", [2, 15, 16, 50, 51, 1000])
def test_confusion_matrices_of_any_size(num_classes: int, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (num_classes, num_classes))
    names = [f"a rather long class name of $ and {index}" for index in range(num_classes)]
    picture = saved(confusion_matrix_figure(counts, names), tmp_path)
    assert min(picture.size) > 400


def test_a_rare_confusion_of_a_thousand_classes_is_visible(tmp_path: Path) -> None:
    counts = np.zeros((1000, 1000), dtype=int)
    counts[np.arange(1000), np.arange(1000)] = 50
    names = [str(index) for index in range(1000)]
    before = np.asarray(saved(confusion_matrix_figure(counts, names), tmp_path))
    counts[700, 200] = 20
    after = np.asarray(saved(confusion_matrix_figure(counts, names), tmp_path))
    height, width = before.shape[:2]
    corner = (slice(int(0.5 * height), int(0.9 * height)), slice(int(0.1 * width), int(0.4 * width)))
    assert (before[corner] != after[corner]).any()


def test_classes_without_images_have_no_shares(tmp_path: Path) -> None:
    with np.errstate(all="raise"):
        saved(confusion_matrix_figure(np.zeros((3, 3), dtype=int), ["a", "b", "c"]), tmp_path)


def bins(confidence: list[float], accuracy: list[float], count: list[int]) -> Reliability:
    return Reliability(
        confidence=np.array(confidence), accuracy=np.array(accuracy), count=np.array(count, dtype=np.int64)
    )


def test_empty_confidence_bins_are_not_drawn() -> None:
    figure = reliability_figure({"probe": bins([0.0, 0.5, 0.9], [0.0, 0.4, 0.8], [0, 3, 7])})
    line = figure.axes[0].lines[1]
    assert line.get_xydata().tolist() == [[0.5, 0.4], [0.9, 0.8]]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.3, 0.7]


def test_rounds_without_labels_have_no_accuracy_line(tmp_path: Path) -> None:
    rounds = [
        {"round": step, "accuracy": None, "coverage": 1.0, "mean_confidence": 0.5, "flip_rate": flips}
        for step, flips in enumerate([None, 0.2, 0.1])
    ]
    figure = rounds_figure(rounds)
    assert [line.get_label() for line in figure.axes[0].lines] == [
        "mean confidence",
        "coverage: share of images kept",
        "share of labels that changed",
    ]
    saved(figure, tmp_path)
    saved(rounds_figure(rounds[:1]), tmp_path)
    saved(rounds_figure([]), tmp_path)
    assert figure.axes[0].get_xlabel() == "round"
    marked = rounds_figure(rounds, with_last_student=True)
    assert "last student" in marked.axes[0].get_xlabel()
    assert len(marked.axes[0].lines) == len(figure.axes[0].lines) + 1


def test_bars_carry_their_accuracy_in_per_cent(tmp_path: Path) -> None:
    figure = comparison_figure(
        {"CIFAR-10": {"zero-shot": 0.502, "probe": 0.671}, "PACS": {"zero-shot": 0.86, "probe": None}},
        title="Accuracy",
    )
    assert [text.get_text() for text in figure.axes[0].texts] == ["50.2", "86.0", "67.1", ""]
    saved(figure, tmp_path)


def test_zero_shot_is_grey_and_others_take_the_next_colour() -> None:
    assert colours(["b", "zero-shot", "a"]) == {
        "b": MORE_COLOURS[0],
        "zero-shot": COLOURS["zero-shot"],
        "a": MORE_COLOURS[1],
    }
    assert colours(str(number) for number in range(9))["8"] == MORE_COLOURS[3]


def drawn(figure: Figure) -> Image.Image:
    """A page's picture, which has the figure's size and something on its white ground."""
    picture = Image.open(io.BytesIO(png(figure)))
    inches = figure.get_size_inches()
    assert picture.size == tuple(int(192 * side) for side in inches)
    shades = np.asarray(picture.convert("L"))
    assert shades[0, 0] == 255
    assert shades.min() < 100
    border = np.concatenate([shades[[0, -1]].ravel(), shades[:, [0, -1]].ravel()])
    assert border.min() > 200, "something is cut off at the edge"
    return picture


def test_a_pages_picture_keeps_its_colours() -> None:
    figure = severity_figures(CURVES, clean=PROBES)["fog"]
    data = png(figure)
    assert len(data) < 15_000
    seen = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in COLOURS.values():
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(seen - wanted).max(axis=1) <= 3).sum() > 50


def test_each_corruption_has_a_panel_with_what_was_measured() -> None:
    panels = severity_figures(CURVES, clean=PROBES)
    assert list(panels)[:4] == ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"]
    assert set(panels) == set(CORRUPTIONS)
    for figure in panels.values():
        (axes,) = figure.axes
        assert axes.get_ylim() == (0, 1)
        assert [line.get_label() for line in axes.lines] == list(PROBES)
        for line, accuracy in zip(axes.lines, PROBES.values(), strict=True):
            assert line.get_xdata().tolist() == [0, 1, 3, 5]
            assert line.get_ydata() == pytest.approx([accuracy - 0.05 * step for step in (0, 1, 3, 5)])
    drawn(panels["jpeg_compression"])


def test_panels_of_few_measurements() -> None:
    curves = {"my_own": {"zero-shot": {5: 0.0}, "probe": {}, "other": {2: 1.0}}}
    (axes,) = severity_figures(curves, clean={"zero-shot": 0.3})["my_own"].axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 0.3], [5, 0]], [[2, 1]]]
    assert [line.get_color() for line in axes.lines] == [COLOURS["zero-shot"], MORE_COLOURS[0]]
    assert axes.get_title(loc="left") == "my own"
    assert severity_figures({}, clean={}) == {}
    low = severity_figures({"fog": {"probe": {1: 0.1, 2: 0.02}}}, clean={})["fog"]
    assert low.axes[0].get_ylim() == (0, 0.5)
    drawn(low)


def numbers(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text() != "●"]


def test_the_overview_has_means_of_what_all_probes_share() -> None:
    curves = {
        "fog": {"zero-shot": {1: 0.2, 3: 0.4, 5: 0.9}, "probe": {1: 0.5, 3: 0.7}},
        "shot_noise": {"zero-shot": {1: 0.0}, "probe": {1: 1.0}},
        "mine": {"zero-shot": {1: 0.25}, "probe": {2: 0.5}},
    }
    figure = corruption_figure(curves, clean={"zero-shot": 0.5, "probe": 0.6})
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["clean", "NOISE", "shot noise", "WEATHER", "fog", "OTHER", "mine"]
    assert numbers(figure) == ["zero-shot", "50.0", "0.0", "30.0", "probe", "60.0", "100", "60.0"]
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"]
    assert bold == ["60.0", "100", "60.0"]
    places = [dots.get_offsets()[0].tolist() for dots in figure.axes[0].collections]
    assert np.allclose(places, [[0.5, 0], [0.6, 0], [0, 2], [1, 2], [0.3, 4], [0.6, 4]])
    drawn(figure)


@pytest.mark.parametrize("num_probes", [1, 3, 5, 8])
def test_the_overviews_numbers_do_not_overlap(num_probes: int) -> None:
    names = [f"probe {number}" for number in range(num_probes)]
    curves = {name: {probe: {3: 0.999} for probe in names} for name in CORRUPTIONS[:15]}
    figure = corruption_figure(curves, clean=dict.fromkeys(names, 0.999))
    drawn(figure)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text() == "99.9"]
    assert len(boxes) == 16 * num_probes
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])


def test_an_overview_of_nothing() -> None:
    drawn(corruption_figure({}))
    drawn(corruption_figure({"fog": {"probe": {}}}))


def test_long_risk_curves_are_thinned_and_keep_their_ends() -> None:
    coverage = np.linspace(1e-5, 1, 100_000)
    figure = risk_coverage_figure({"zero-shot": (coverage, coverage / 2), "probe": ([1.0], [0.0])})
    long, single = (line.get_xydata() for line in figure.axes[0].lines)
    assert len(long) == 400
    assert long[[0, -1]].tolist() == [[1e-5, 5e-6], [1, 0.5]]
    assert single.tolist() == [[1, 0]]
    drawn(figure)
    few = risk_coverage_figure({"a": ([0.5, 1.0], [0.0, 0.0])})
    assert few.axes[0].lines[0].get_xydata().tolist() == [[0.5, 0], [1, 0]]
    for curves in ({}, {"a": ([], [])}, {f"a rather long name {n}": ([1], [1]) for n in range(6)}):
        drawn(risk_coverage_figure(curves))


def test_histograms_of_scores_are_densities_over_common_bins() -> None:
    generator = np.random.default_rng(0)
    inside, outside = generator.normal(1, 0.2, 4000), generator.normal(0, 0.2, 1000)
    figure = ood_figure(
        {"zero-shot": (inside, outside), "probe": (inside + 0.1, outside)},
        score="energy",
        names=("known", "foreign"),
        auroc={"probe": 0.98765},
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["zero-shot", "probe, AUROC 0.988"]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    for axes in figure.axes:
        bars = axes.patches[:-1]  # the last one is the outline of the images outside
        assert len(bars) == 40
        assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(1)
        ends = np.sort(axes.patches[-1].get_xy()[:, 0])
        assert (bars[0].get_x(), bars[-1].get_x() + bars[-1].get_width()) == pytest.approx(
            (ends[0], ends[-1])
        )
    drawn(figure)


def test_scores_of_different_scales_have_axes_of_their_own() -> None:
    scores = np.linspace(0, 1, 50)
    figure = ood_figure(
        {"zero-shot": (100 * scores, 90 * scores), "probe": (scores, scores / 2)},
        score="logit",
        names=("a", "b"),
    )
    assert figure.axes[0].get_xlim()[1] > 90
    assert figure.axes[1].get_xlim()[1] < 1.1


@pytest.mark.filterwarnings("error")
def test_scores_that_are_few_or_equal_or_not_finite() -> None:
    for scores in (
        {},
        {"probe": ([], [])},
        {"probe": ([0.5, 0.5], [0.5])},
        {"probe": ([np.nan, np.inf, 1.0], [])},
        {"probe": (np.linspace(0, 1, 5000), [77.0])},
    ):
        drawn(ood_figure(scores, score="score", names=("in", "out")))


def test_shifted_accuracy_against_clean_accuracy() -> None:
    points = {
        "zero-shot": {"v2": (0.6, 0.5), "sketch": (0.6, 0.45)},
        "probe": {"v2": (0.7, 0.6)},
        "supervised": {"v2": (0.8, 0.65), "sketch": (0.8, 0.3)},
    }
    figure = effective_robustness_figure(points, fits={"v2": (0.9, -0.5), "unseen": (1, 1)})
    (axes,) = figure.axes
    diagonal, fit = axes.lines
    x, y = np.asarray(diagonal.get_data())
    assert (x == y).all()
    x, y = np.asarray(fit.get_data())
    assert np.log(y / (1 - y)) == pytest.approx(0.9 * np.log(x / (1 - x)) - 0.5)
    places = [dots.get_offsets()[0].tolist() for dots in axes.collections]
    assert places == [list(pair) for sets in points.values() for pair in sets.values()]
    assert axes.get_ylim()[0] < 0.3
    assert axes.get_ylim()[1] >= axes.get_xlim()[1]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["zero-shot", "probe", "supervised", "v2, published fit", "sketch"]
    drawn(figure)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pair", [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_a_single_point_even_at_the_ends_of_the_scale(pair: tuple[float, float]) -> None:
    drawn(effective_robustness_figure({"probe": {"a": pair}}, fits={"a": (0.9, -0.4)}))
    drawn(effective_robustness_figure({}, fits={}))


def test_names_with_dollars_are_no_mathematics() -> None:
    name = r"$x^2$ & <b>_y_</b>"
    for figure in (
        *severity_figures({name: {name: {1: 0.5}}}, clean={}).values(),
        corruption_figure({name: {name: {1: 0.5}}}),
        risk_coverage_figure({name: ([0, 1], [0, 1])}),
        ood_figure({name: ([0, 1], [0, 1])}, score=name, names=(name, name)),
        effective_robustness_figure({name: {name: (0.5, 0.5)}}, fits={}),
        reliability_figure({name: bins([0.5], [0.5], [1])}),
        confusion_matrix_figure([[1, 0], [0, 1]], [name, "$"]),
        comparison_figure({name: {name: 0.5}}, title="Accuracy"),
    ):
        drawn(figure)
        texts = [text.get_text() for text in figure.findobj(lambda item: hasattr(item, "get_text"))]
        assert any(r"\$x" in text for text in texts)
        assert not any("$x" in text.replace(r"\$", "") for text in texts)


def test_one_figure_is_the_same_bytes_in_any_thread(tmp_path: Path) -> None:
    rounds = [{"round": step, "accuracy": step / 4} for step in range(4)]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    threads = [
        threading.Thread(target=lambda path=path: save(rounds_figure(rounds), str(path))) for path in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in paths}) == 1
