"""From a source's labels to class indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lpclip.config import ClassConfig
from lpclip.images.classes import ClassList, map_labels, read_classes, resolve_classes

ANIMALS = ClassList(names=("cat", "dog", "aquarium fish"))


def mapped(labels: list[int], names: tuple[str, ...] | None, classes: ClassList = ANIMALS) -> list[int]:
    found = map_labels(np.array(labels, np.int32), label_names=names, classes=classes, data="toys")
    assert found.dtype == np.int64
    return found.tolist()


def test_the_data_names_its_own_classes():
    assert resolve_classes(ClassConfig(), label_names=("cat", "dog")).names == ("cat", "dog")


def test_names_that_are_given_come_before_the_data_s_own(tmp_path: Path):
    found = resolve_classes(ClassConfig(classes="dog, cat, fish"), label_names=("cat", "dog"))
    assert found.names == ("dog", "cat", "fish")
    (tmp_path / "names.txt").write_text("n01\tcat\nn02\tdog\n")
    found = resolve_classes(ClassConfig(classes=str(tmp_path / "names.txt")), label_names=None)
    assert (found.names, found.labels) == (("cat", "dog"), ("n01", "n02"))


def test_without_any_names_the_user_is_told_what_to_give():
    with pytest.raises(ValueError, match="--classes"):
        resolve_classes(ClassConfig(), label_names=None)


def test_data_with_one_class_name_makes_no_classifier():
    with pytest.raises(ValueError, match="at least two"):
        resolve_classes(ClassConfig(), label_names=("cat",))


def test_names_meet_by_name_whatever_their_order():
    assert mapped([0, 1, 2, 0], ("dog", "aquarium fish", "cat")) == [1, 2, 0, 1]


def test_names_meet_across_case_and_underscores():
    assert mapped([0, 1, 2], ("Aquarium_Fish", "CAT", "Dog ")) == [2, 0, 1]


def test_names_that_never_occur_need_no_class():
    assert mapped([0, 2, 2], ("cat", "unicorn", "dog")) == [0, 1, 1]


def test_numbers_are_places_in_the_class_list():
    assert mapped([2, 0, 1], None) == [2, 0, 1]


def test_rows_without_a_label_stay_without():
    assert mapped([-1, 1, -1], ("cat", "dog")) == [-1, 1, -1]
    assert mapped([-1, 2, -1], None) == [-1, 2, -1]
    assert mapped([-1, -1], None) == [-1, -1]
    assert mapped([-1, -1], ("cat",)) == [-1, -1]
    assert mapped([], None) == []


def test_a_class_file_maps_the_data_s_labels_to_names(tmp_path: Path):
    (tmp_path / "names.tsv").write_text("n02\tdog\nn01\tcat\n")
    classes = read_classes(str(tmp_path / "names.tsv"))
    assert mapped([0, 1, -1], ("n01", "n02"), classes) == [1, 0, -1]


def test_a_class_file_maps_numbers_too(tmp_path: Path):
    (tmp_path / "names.tsv").write_text("7\tdog\n100\tcat\n")
    assert mapped([100, 7, 7, -1], None, read_classes(str(tmp_path / "names.tsv"))) == [1, 0, 0, -1]


@pytest.mark.parametrize(
    ("labels", "names", "unknown"),
    [([0, 1], ("cat", "cow"), "cow"), ([0, 3], None, "3"), ([0, 1], ("cats", "dogs"), "cats, dogs")],
)
def test_a_label_that_is_no_class_is_refused_by_name(
    labels: list[int], names: tuple[str, ...] | None, unknown: str
):
    with pytest.raises(ValueError, match=rf"labels of toys are not in the class list \({unknown}\)"):
        mapped(labels, names)


def test_a_label_that_the_class_file_lacks_is_refused(tmp_path: Path):
    (tmp_path / "names.tsv").write_text("n02\tdog\nn01\tcat\n")
    with pytest.raises(ValueError, match="n03"):
        mapped([0, 1], ("n01", "n03"), read_classes(str(tmp_path / "names.tsv")))


def test_of_many_unknown_labels_five_are_named():
    with pytest.raises(ValueError, match=r"20 labels .* \(a0, a1, a2, a3, a4\)"):
        mapped(list(range(20)), tuple(f"a{i}" for i in range(20)))
