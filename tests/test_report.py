"""Tables line up and pictures can be drawn, whatever the run looked like."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lpclip.report import (
    comparison_figure,
    confusion_matrix_figure,
    reliability_figure,
    rounds_figure,
    save,
    table,
)


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
    assert table(rows).split("\n") == [
        "classifier  accuracy %    nll  images",
        "----------  ----------  -----  ------",
        "zero-shot         47.1  1.234   6,000",
        "probe                -  0.500       -",
    ]


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


def test_empty_confidence_bins_are_not_drawn() -> None:
    bins = {"confidence": [0.0, 0.5, 0.9], "accuracy": [0.0, 0.4, 0.8], "count": [0, 3, 7]}
    figure = reliability_figure({"probe": bins})
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


def test_bars_carry_their_accuracy_in_per_cent(tmp_path: Path) -> None:
    figure = comparison_figure(
        {"CIFAR-10": {"zero-shot": 0.502, "probe": 0.671}, "PACS": {"zero-shot": 0.86, "probe": None}},
        title="Accuracy",
    )
    assert [text.get_text() for text in figure.axes[0].texts] == ["50.2", "86.0", "67.1", ""]
    saved(figure, tmp_path)


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
