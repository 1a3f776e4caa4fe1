"""From a source's labels to class indices."""

from __future__ import annotations

import io
import re
import tarfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import read_unit
from PIL import Image

from lpclip.config import ClassConfig, SelfTrainingConfig, SelftrainJob, SourceConfig, UserError
from lpclip.encoders.prompts import templates
from lpclip.features.data import open_data
from lpclip.images.captions import with_captions
from lpclip.images.classes import ClassList, map_labels, read_classes, readable, resolve_classes
from lpclip.images.open import open_source
from lpclip.jobs.evaluate_sets import EvaluationSet, checked_set
from lpclip.jobs.inputs import class_indices, open_inputs, with_checked_labels
from lpclip.jobs.settle_prior import load_prior

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


@pytest.mark.parametrize("names", [("2023", "2024"), ("00000", "00001"), ("01", "02", "3")])
def test_numbers_are_no_class_names(names: tuple[str, ...]):
    with pytest.raises(UserError, match=rf"numbers \({names[0]}, .*--classes"):
        resolve_classes(ClassConfig(), label_names=names)
    digits = tuple(map(str, range(10)))
    assert resolve_classes(ClassConfig(), label_names=digits).names == digits


def write_images(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / path)
    return folder


@pytest.mark.parametrize("paths", [("2023/05/1.png", "2024/1.png"), ("images/1.png",), ("train/cat/1.png",)])
def test_folders_of_which_none_is_a_class_are_no_labels(tmp_path: Path, paths: tuple[str, ...]):
    data = str(write_images(tmp_path / "photos", *paths))
    job = SelftrainJob(data=(data,), names=ClassConfig(classes="cat,dog"))
    found = open_inputs(job).data
    assert not found.has_labels
    assert found.source is not None
    assert [row.label for unit in found.source.units for row in found.source.reader.rows(unit)] == [
        None
    ] * len(paths)
    assert found.source.notes[-1].startswith(
        f"labels: none, as none of the folders in photos ({paths[0].split('/')[0]}"
    )
    with pytest.raises(UserError, match="--classes"):
        open_inputs(SelftrainJob(data=(data,)))
    with pytest.raises(UserError, match="not in the class list"):
        open_inputs(replace(job, supervised=True))
    with pytest.raises(UserError, match="not in the class list"):
        open_inputs(replace(job, eval_data=(data,)))


def test_folders_of_which_some_are_classes_must_all_be(tmp_path: Path):
    data = str(write_images(tmp_path, "cat/1.png", "2023/1.png"))
    with pytest.raises(UserError, match=r"1 label of .* is not .* \(2023\)"):
        open_inputs(SelftrainJob(data=(data,), names=ClassConfig(classes="cat,dog")))


def test_names_in_two_unicode_forms_are_one(tmp_path: Path):
    composed, apart = (unicodedata.normalize(form, "Fusée à eau") for form in ("NFC", "NFD"))
    assert composed != apart
    for one, other in ((composed, apart), (apart, composed)):
        assert mapped([0, -1], (one.upper(),), ClassList(names=("cat", other))) == [1, -1]
        assert mapped([0], (one,), ClassList(names=("cat", "dog"), labels=("x", other))) == [1]
    assert readable(apart) == composed
    with pytest.raises(UserError, match="occurs twice"):
        ClassList(names=(composed, apart))
    with pytest.raises(UserError, match="occurs twice"):
        ClassList(names=("a", "b"), labels=(composed, apart))


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


@pytest.mark.parametrize(
    ("name", "text", "names", "labels"),
    [
        ("a.txt", "# of COCO\ncat\n#\ndog\n", ("cat", "dog"), None),
        ("a.txt", "#1 fan\n#2 fan\n", ("#1 fan", "#2 fan"), None),
        ("a.csv", "# id,name\n7,cat\n8,dog\n", ("cat", "dog"), ("7", "8")),
        ("a.txt", "0 cat\n1 dog\n2  red fox\n", ("cat", "dog", "red fox"), ("0", "1", "2")),
        ("a.txt", "1. cat\n2. dog\n", ("cat", "dog"), ("1", "2")),
        ("a.txt", "0: cat\n1: 5 dogs\n", ("cat", "5 dogs"), ("0", "1")),
        ("a.txt", "3 musketeers\n101 dalmatians\n", ("3 musketeers", "101 dalmatians"), None),
        ("a.txt", "0 cat\ndog\n", ("0 cat", "dog"), None),
        ("a.json", '{"0": "cat", "1": "dog"}', ("cat", "dog"), ("0", "1")),
    ],
)
def test_comments_and_numbers_in_class_files(
    name: str, text: str, names: tuple[str, ...], labels: tuple[str, ...] | None, tmp_path: Path
):
    (tmp_path / name).write_text(text)
    found = read_classes(str(tmp_path / name))
    assert (found.names, found.labels) == (names, labels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": "cat", "0": "dog"}', "label '0' occurs twice"),
        ('[["0", "cat"]]', "expected is a JSON list of class names"),
        ('{"0": {"name": "cat"}}', "expected is a JSON list of class names"),
        ("[" * 100_000, "the JSON cannot be read"),
    ],
)
def test_json_that_is_no_class_list(text: str, message: str, tmp_path: Path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(str(tmp_path / "a.json"))


def test_a_class_file_maps_numbers_too(tmp_path: Path):
    # A table of all labels up to the largest would take 17 GB.
    (tmp_path / "names.tsv").write_text("7\tdog\n2147483647\tcat\n")
    assert mapped([2**31 - 1, 7, 7, -1], None, read_classes(str(tmp_path / "names.tsv"))) == [1, 0, 0, -1]


@pytest.mark.parametrize(
    ("labels", "names", "unknown"),
    [([0, 1], ("cat", "cow"), "cow"), ([0, 3], None, "3"), ([0, 1], ("cats", "dogs"), "cats, dogs")],
)
def test_a_label_that_is_no_class_is_refused_by_name(
    labels: list[int], names: tuple[str, ...] | None, unknown: str
):
    with pytest.raises(ValueError, match=rf"labels? of toys (are|is) not in the class list \({unknown}\)"):
        mapped(labels, names)


def test_numbers_that_are_too_large_are_refused_with_how_they_count():
    with pytest.raises(
        UserError, match=r"\(3\).*numbers count from 0, so these are 0 to 2; map other numbers"
    ):
        mapped([1, 2, 3], None)


@pytest.mark.parametrize(
    ("name", "text", "labels", "names"),
    [
        (
            "class-descriptions.csv",
            "/m/01yrx,Cat\n/m/0bt9lr,Dog\n",
            ("/m/01yrx", "/m/0bt9lr"),
            ("Cat", "Dog"),
        ),
        ("v7.csv", "LabelName,DisplayName\n/m/01,Cat\n/m/02,Dog\n", ("/m/01", "/m/02"), ("Cat", "Dog")),
        ("x.tsv", "Class ID\tDescription\n1\tcat\n2\tname\n", ("1", "2"), ("cat", "name")),
        ("x.csv", "class_name\ncat\nlabel\n", None, ("cat", "label")),
        ("x.txt", "label\nname\n", None, ("label", "name")),
        ("x.csv", "label,Cat\nid,Dog\n", ("label", "id"), ("Cat", "Dog")),
        ("x.csv", '"tench, Tinca tinca"\ngoldfish\n', None, ("tench, Tinca tinca", "goldfish")),
        ("x.csv", "n01\ttench, Tinca\nn02\tgoldfish\n", ("n01", "n02"), ("tench, Tinca", "goldfish")),
        ("names.json", '[\n  "cat",\n  "dog"\n]\n', None, ("cat", "dog")),
        ("id2label.json", '{"0": "cat", "1": "dog"}', ("0", "1"), ("cat", "dog")),
    ],
)
def test_class_files_of_publishers_are_read(
    tmp_path: Path, name: str, text: str, labels: tuple[str, ...] | None, names: tuple[str, ...]
):
    (tmp_path / name).write_text(text)
    classes = read_classes(str(tmp_path / name))
    assert (classes.labels, classes.names) == (labels, names)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "cat\nwolf, grey wolf\n", "or every line label,name"),
        ("x.csv", "cat\n\ndog\n", "class name 2 of 3 is empty"),
        ("x.json", '{"0": ["n01440764", "tench"]}', "an object with the name of each label"),
        ("x.json", '["cat",', "the JSON cannot be read"),
        ("data.yaml", "names:\n  0: cat\n", "write one name a line"),
    ],
)
def test_class_files_that_are_not_read_are_told_so(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(str(tmp_path / name))


def test_a_class_file_may_be_imagenet_s_own(tmp_path: Path):
    path = tmp_path / "LOC_synset_mapping.txt"
    path.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    classes = read_classes(str(path))
    assert classes.labels == ("n01440764", "n01443537")
    assert classes.names == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    path.write_text("n01440764\nn01443537\n")
    assert read_classes(str(path)).names == ("n01440764", "n01443537")
    path.write_text("n01440764 tench\ngoldfish\n")
    assert read_classes(str(path)).labels is None


@pytest.mark.parametrize(
    ("words", "places"), [(["0", "2", None], [0, 2, -1]), (["01", "-1", "1.0"], [1, -1, 1])]
)
def test_strings_that_are_numbers_are_places_where_they_are_no_class_names(
    tmp_path: Path, words: list[str | None], places: list[int]
):
    path = tmp_path / "toys.parquet"
    pq.write_table(pa.table({"image": [b""] * 3, "label": pa.array(words, pa.string())}), path)
    data = open_data(str(path), config=SourceConfig(), split="test")
    assert data.source is not None
    rows = [row for unit in data.source.units for row in read_unit(data.source.reader, unit).to_pylist()]
    labels = np.array([-1 if row["label"] is None else row["label"] for row in rows], np.int32)
    assert class_indices(labels, data=data, classes=ANIMALS).tolist() == places
    note = f"labels: the numbers in {data.name} are no class names but count the classes, from 0 (cat) on"
    counts_from_1 = [] if "0" in words else [COUNTS_FROM_1.format(data=data.name)]
    assert with_checked_labels(data, ANIMALS).source.notes == (note, *counts_from_1)
    # Where one of them is a class name, all are names.
    names = ClassList(names=tuple(sorted({word for word in words if word}, reverse=True)))
    found = class_indices(labels, data=data, classes=names)
    assert [names.names[place] if place >= 0 else None for place in found] == words


def test_a_class_file_writes_a_number_as_it_likes(tmp_path: Path):
    (tmp_path / "names.tsv").write_text("001\tcat\n2.0\tdog\n")
    assert mapped([2, 1, -1], None, read_classes(str(tmp_path / "names.tsv"))) == [1, 0, -1]


COUNTS_FROM_1 = (
    "labels: 0 does not occur in {data}, and numbers count from 0, so that 1 is dog; if yours count from 1, a "
    "--classes file with lines label<TAB>name says so"
)


def numbered(folder: Path, *labels: int) -> str:
    """A manifest `numbered-LABELS` of images with these labels."""
    name = "-".join(map(str, ("numbered", *labels)))
    write_images(folder, *(f"{label}.png" for label in labels))
    lines = [f"{label}.png,{label}" for label in labels]
    (folder / f"{name}.csv").write_text("\n".join(["path,label", *lines]))
    return str(folder / f"{name}.csv")


def test_numbers_that_seem_to_count_from_1_get_a_note_in_the_plan(tmp_path: Path):
    def notes(job: SelftrainJob) -> list[str]:
        found = open_inputs(job)
        return [
            note for item in (found.data, found.test) if item and item.source for note in item.source.notes
        ]

    names = ClassConfig(classes="cat,dog,aquarium fish")
    shifted = numbered(tmp_path / "toys", 1, 2)
    data = "toys-numbered-1-2"
    assert notes(SelftrainJob(data=(shifted,), names=names)) == [COUNTS_FROM_1.format(data=data)]
    images = str(write_images(tmp_path / "images", "1.png"))
    assert notes(SelftrainJob(data=(images,), eval_data=(shifted,), names=names)) == [
        COUNTS_FROM_1.format(data=data)
    ]
    for labels in ((0, 1, 2), (2, -1), (-1,)):
        assert notes(SelftrainJob(data=(numbered(tmp_path / "toys", *labels),), names=names)) == []
    (tmp_path / "names.tsv").write_text("1\tcat\n2\tdog\n")
    assert notes(SelftrainJob(data=(shifted,), names=ClassConfig(classes=str(tmp_path / "names.tsv")))) == []


def test_an_evaluation_s_plan_has_the_note_as_well(tmp_path: Path):
    data = open_data(numbered(tmp_path / "toys", 1, 2), config=SourceConfig(), split="test")
    item = EvaluationSet(name="toys", kind="shift", data=data, cells={})
    source = checked_set(item, ANIMALS).data.source
    assert source is not None
    assert source.notes == (COUNTS_FROM_1.format(data=data.name),)


def test_numbers_that_only_reading_shows_get_the_note_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with tarfile.open(tmp_path / "toys.tar", "w") as tar:
        for name, content in ("1.png", b""), ("1.cls", b"1"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = open_data(str(tmp_path / "toys.tar"), config=SourceConfig(), split="test")
    labels = np.array([1, 2, -1], np.int32)
    assert class_indices(labels, data=data, classes=ANIMALS).tolist() == [1, 2, -1]
    assert capsys.readouterr().out == COUNTS_FROM_1.format(data=data.name) + "\n"
    known = open_data(numbered(tmp_path / "toys", 1, 2), config=SourceConfig(), split="test")
    assert class_indices(labels, data=known, classes=ANIMALS).tolist() == [1, 2, -1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("names", "is_noted"),
    [
        (("001.Black_footed_Albatross", "002.Laysan_Albatross"), True),
        (("00_cat", "01_dog"), True),
        (("n02085620-Chihuahua", "n02085782-Japanese_spaniel"), True),
        (("n01440764", "n01443537"), True),
        (("cat", "101 dalmatians"), False),
        (("0", "1"), False),
        (("cat", "dog"), False),
    ],
)
def test_names_that_all_begin_with_numbers_get_a_note(tmp_path: Path, names: tuple[str, ...], is_noted: bool):
    data = str(write_images(tmp_path / "photos", *(f"{name}/1.png" for name in names)))
    for job in (
        SelftrainJob(data=(data,)),
        SelftrainJob(data=(data,), names=ClassConfig(classes=",".join(names))),
    ):
        source = open_inputs(job).data.source
        assert source is not None
        assert source.notes == (
            (
                f"classes: the names begin with numbers, as {names[0]} does, and prompts hold these too: a --classes "
                "file with lines label<TAB>name gives other names",
            )
            if is_noted
            else ()
        )
        captions = with_captions(open_source(data, config=SourceConfig()), templates=("a {}", "{{}, {}"))
        assert captions.notes == source.notes
        first = min(names)
        assert captions.identity["captions"][0] == [f"a {first}", f"{{{first}, {first}"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_files_of_text_that_are_not_utf_8_are_named(tmp_path: Path, encoding: str):
    path = tmp_path / "lines.txt"
    path.write_bytes("ein caf\u00e9 {}\nein K\u00f6ter {}\n".encode(encoding))
    for read in (
        read_classes,
        templates,
        lambda spec: load_prior(spec, ("cat", "dog")),
        lambda spec: open_inputs(
            SelftrainJob(data=(str(tmp_path),), training=SelfTrainingConfig(present=spec))
        ),
    ):
        write_images(tmp_path, "cat/1.png", "dog/1.png")
        with pytest.raises(UserError, match=rf"{re.escape(str(path))} is not UTF-8 text: save it as UTF-8"):
            read(str(path))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path):
    path = tmp_path / "lines.txt"
    path.write_text("cat\t3\ndog\t1\n", encoding="utf-8-sig")
    prior = load_prior(str(path), ("cat", "dog"))
    assert prior is not None
    assert prior.shares is not None
    assert prior.shares.tolist() == [0.75, 0.25]
    assert read_classes(str(path)).labels == ("cat", "dog")


def test_a_label_that_the_class_file_lacks_is_refused(tmp_path: Path):
    (tmp_path / "names.tsv").write_text("n02\tdog\nn01\tcat\n")
    with pytest.raises(ValueError, match="n03"):
        mapped([0, 1], ("n01", "n03"), read_classes(str(tmp_path / "names.tsv")))


def test_of_many_unknown_labels_five_are_named():
    with pytest.raises(ValueError, match=r"20 labels .* \(a0, a1, a2, a3, a4\)"):
        mapped(list(range(20)), tuple(f"a{i}" for i in range(20)))
