"""Labels that people give: files with them, runs that use them, and the images that are asked for next."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import refusal, run
from PIL import Image
from test_store import make
from test_training_page import Page
from test_tune import NAMES, ROWS, WORDS, Work, info, work  # noqa: F401

from lpclip import files
from lpclip.config import SelftrainJob, UserError, to_dict
from lpclip.features.store import Store
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.features.thumbnails import thumbnail
from lpclip.jobs.corrections import NONE
from lpclip.jobs.given_labels import left_out, read_given_labels
from lpclip.method import confirmation, few_labels
from lpclip.method.few_labels import NONE_OF_THESE, FewLabels
from lpclip.method.probe import Probe, load_probe

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("tabby cat", "dog", "snow_leopard")


def write(path: Path, labels: Mapping[str, str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "label"), *labels.items()])
    return path


GOOD = {
    "as it is": "id,label\na,dog\nb,none of these\n",
    "other columns and order": 'why,label,note,id\nx,dog,,a\ny,none of these,"1, 2",b\n',
    "semicolons": "id;label;why\na;dog;x\nb;none of these;y\n",
    "tabs": "id\tlabel\na\tdog\nb\tnone of these\n",
    "a mark and other line ends": "\ufeffid,label\r\na,dog\r\nb,none of these\r\n",
    "capitals and spaces": "id,label\na, Dog \nb,None of These\n",
    "a row twice": "id,label\na,dog\na,dog\nb,none of these\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_files_as_people_and_spreadsheets_write_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(GOOD[name].encode())
    found = read_given_labels(str(path), CLASSES)
    assert found is not None
    assert found.by_id == {"a": 1, "b": NONE_OF_THESE}
    assert found.summary()["by_class"] == {"dog": 1, NONE: 1}


def test_blank_rows_and_rows_without_a_label_are_counted_and_names_are_read_as_prompts_are(
    tmp_path: Path,
) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,label\n\na,snow leopard\nb,\nc,  \nd\n,,\ne,Tabby_Cat\n")
    found = read_given_labels(str(path), CLASSES)
    assert found is not None
    assert found.by_id == {"a": 2, "e": 0}
    assert found.told() == f"2 images of 2 classes; 4 rows without a label ({path})"
    assert read_given_labels(None, CLASSES) is None


def test_the_digest_is_of_the_labels_and_not_of_their_file(tmp_path: Path) -> None:
    texts = ("id,label\na,dog\nb,tabby cat\n", "label;id\ntabby cat;b\n;c\ndog;a\n", "id,label\na,dog\n")
    digests = []
    for place, text in enumerate(texts):
        (tmp_path / f"{place}.csv").write_text(text)
        found = read_given_labels(str(tmp_path / f"{place}.csv"), CLASSES)
        assert found is not None
        digests.append(found.digest)
    assert digests[0] == digests[1] != digests[2]


def test_names_that_differ_in_letters_alone_are_not_taken_for_each_other(tmp_path: Path) -> None:
    names, path = ("Turkey", "turkey", "dog"), tmp_path / "labels.csv"
    found = read_given_labels(str(write(path, {"a": "turkey", "b": "Turkey", "c": "DOG"})), names)
    assert found is not None
    assert found.by_id == {"a": 1, "b": 0, "c": 2}
    with pytest.raises(UserError, match="the label 'TURKEY' of 'a' is no class"):
        read_given_labels(str(write(path, {"a": "TURKEY"})), names)


BAD = {
    "nothing": (b"", "has no column id: its first line must name id and label, each once, and names nothing"),
    "other columns": (b"name,class\na,dog\n", "has no column id: .*, each once, and names name, class"),
    "two label columns": (b"id,label,label\na,dog,cat\n", "has two columns label"),
    "too many cells": (b"id,label\na,dog,cat\n", "line 2, has more cells than the first line names columns"),
    "no label column": (b"id,guess\na,dog\n", "has no column label"),
    "no row": (b"id,label\n", "has no label: fill in the column `label`, or leave --labels out"),
    "no answer": (b"id,label\na,\nb, \n", "has no label: fill in the column `label`"),
    "a typing error": (b"id,label\na,dgo\n", "the label 'dgo' of 'a' is no class and .*, did you mean dog?"),
    "no class": (b"id,label\na,42\n", "the label '42' of 'a' is no class .*; the classes are tabby cat, dog, snow_"),
    "two labels": (b"id,label\na,dog\nb,dog\na,tabby cat\n", "has two labels for 'a': keep one of them"),
    "of none and a class": (b"id,label\na,none of these\na,dog\n", "has two labels for 'a'"),
    "UTF-16": ("id,label\na,dog\n".encode("utf-16"), "is not UTF-8 text: save it as UTF-8"),
    "Latin": ("id,label\nä,dog\n".encode("latin-1"), "is not UTF-8 text"),
    "an open quote": (b'id,label\n"a,dog\n', "is no CSV file that can be read: line 2: unexpected end of data"),
    "an open quote in the first line": (b'"id,label\na,dog\n', "is no CSV file that can be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_one_sentence(name: str, tmp_path: Path) -> None:
    data, sentence = BAD[name]
    path = tmp_path / "labels.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=sentence) as caught:
        read_given_labels(str(path), CLASSES)
    assert "labels.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_none_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--labels .*nothing\.csv cannot be read: No such file"):
        read_given_labels(str(tmp_path / "nothing.csv"), CLASSES)
    with pytest.raises(UserError, match="is a folder, and a file is wanted$"):
        read_given_labels(str(tmp_path), CLASSES)


def test_a_class_may_be_called_none_of_these(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", {"a": NONE, "b": "dog"})
    found = read_given_labels(str(path), (*CLASSES, "None of these"))
    assert found is not None
    assert found.by_id == {"a": 3, "b": 1}


def test_a_class_that_present_leaves_out_is_one_sentence(tmp_path: Path) -> None:
    found = read_given_labels(str(write(tmp_path / "labels.csv", {"a": "dog", "b": NONE})), CLASSES)
    assert found is not None
    found.check_present(None)
    found.check_present(np.array([1, 2]))
    with pytest.raises(UserError, match="has images of 'dog', which --present leaves out"):
        found.check_present(np.array([0, 2]))
    assert found.among(np.array([1, 2])) == {"a": 0, "b": NONE_OF_THESE}


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (
            {"image-0": "dog", "image_1": "dog"},
            "1 id of 2 is not among the images of photos, the first is 'image_1', did you mean image-1?",
        ),
        (
            {"image-0": "dog", "q": "dog", "p": NONE},
            "2 ids of 3 are not among the images of photos, the first is 'p'$",
        ),
        (
            {"1.jpg": "dog", "2.jpg": "dog"},
            "2 ids of 2 are not among .* the first is '1.jpg'; these seem to be labels of other images",
        ),
        (
            {"image-0": "dog", "x": "dog"},
            r"has a label for x, which is an image of photos that could not be read: remove its row \(1 row of",
        ),
    ],
    ids=["a typing error", "some unknown", "another data set", "quarantined"],
)
def test_a_label_of_an_image_that_is_not_there_is_one_sentence(
    labels: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    found = read_given_labels(str(write(tmp_path / "labels.csv", labels)), CLASSES)
    assert found is not None
    with pytest.raises(UserError, match=sentence):
        found.check_images(Store.open(make(tmp_path)), data="photos")


def test_images_with_a_given_label_are_left_out_of_the_evaluation_under_any_name() -> None:
    x = np.eye(4, dtype=np.float16)[[0, 1, 2, 1, 3]]
    given = FewLabels.of_rows(np.array([2, -1, NONE_OF_THESE]), np.eye(4, dtype=np.float16)[[1, 2, 3]])
    y = np.array([0, 1, -1, 1, 2])
    assert left_out(y, x, given).tolist() == [0, -1, -1, -1, -1]
    assert left_out(y, x, None).tolist() == y.tolist()


# Runs on 600 planted images, which zero-shot half understands.
Summary = dict[str, Any]
FLAGS = f"--classes {WORDS} --neighbours 0"


@pytest.fixture(scope="module")
def given(work: Work) -> dict[str, str]:  # noqa: F811
    """The labels of 24 images, the last 2 of no class."""
    rows = range(0, 72, 3)
    labels = {f"{row:04d}": NAMES[work.labels[row]] for row in rows}
    return labels | dict.fromkeys(list(labels)[-2:], NONE)


@pytest.fixture(scope="module")
def finished(work: Work, given: dict[str, str]) -> tuple[Path, Summary, str]:  # noqa: F811
    """A run with labels: its folder, its summary and its command."""
    path, out = write(work.folder / "given.csv", given), work.folder / "given"
    command = f"selftrain.py --data {work.folder}/labelled {FLAGS} --labels {path} --out {out}"
    with pytest.MonkeyPatch.context() as patch:
        return out, run(command, patch), command


def pseudo_labels(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(out / "pseudo_labels.parquet").to_pylist()}


def answers(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_close(found: Probe, expected: Probe) -> None:
    torch.testing.assert_close(
        found.weight, expected.weight, rtol=0, atol=1e-4 * float(expected.weight.abs().max())
    )
    assert found.temperature == pytest.approx(expected.temperature, rel=1e-3)


def test_a_run_with_labels_uses_them_and_reports_them_apart(
    finished: tuple[Path, Summary, str], given: dict[str, str]
) -> None:
    out, summary, _ = finished
    assert summary["labels"]["images"] == 24
    assert summary["labels"]["by_class"][NONE] == 2
    assert sum(summary["labels"]["by_class"].values()) == 24
    assert summary["evaluated_on"]["images"] == ROWS - 24
    assert summary["prior"]["trusted"]
    (tried, *_) = summary["prior"]["tried"].values()
    assert tried["labelled"] == 22
    factor = summary["prior"]["labelled_factor"]
    assert factor not in (0, 1)
    assert json.loads((out / "prior.json").read_text())["labelled_factor"] == factor
    found = pseudo_labels(out)
    for name, label in given.items():
        if label == NONE:
            assert not found[name]["kept"]
        else:
            row = found[name]
            assert (NAMES[row["label"]], row["confidence"], row["kept"]) == (label, 1.0, True)
    assert summary["probe"]["accuracy"] > summary["zero_shot"]["accuracy"] + 0.1
    assert {row["id"]: row["label"] for row in answers(out / "corrections.csv")} == given


@pytest.mark.slow
def test_the_same_command_reuses_and_other_labels_are_other_work(
    finished: tuple[Path, Summary, str],
    given: dict[str, str],
    work: Work,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, summary, command = finished
    probe = (out / "probe" / "probe.safetensors").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (out / "rounds").iterdir()}
    # The same labels from another file, in another order.
    moved = write(work.folder / "moved.csv", dict(reversed(given.items())))
    again = run(command.replace("given.csv", "moved.csv"), monkeypatch)
    assert moved.exists()
    assert again["probe"] == summary["probe"]
    assert (out / "probe" / "probe.safetensors").read_bytes() == probe
    assert {path: path.stat().st_mtime_ns for path in (out / "rounds").iterdir()} == times
    write(work.folder / "fewer.csv", dict(list(given.items())[1:]))
    for other in (
        command.replace("given.csv", "fewer.csv"),
        command.replace(f"--labels {work.folder}/given.csv ", ""),
    ):
        assert "choose another --out" in refusal(other, monkeypatch, capsys)
    write(work.folder / "foreign.csv", {**given, "0000.png": NAMES[0]})
    said = refusal(command.replace("given.csv", "foreign.csv"), monkeypatch, capsys)
    assert (
        "1 id of 25 is not among the images of labelled, the first is '0000.png', did you mean 0000?" in said
    )


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_probe(
    finished: tuple[Path, Summary, str],
    work: Work,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, summary, command = finished
    probe = (out / "probe" / "probe.safetensors").read_bytes()
    before = (out / "rounds" / "round-001.json").stat().st_mtime_ns
    (out / "rounds" / "finished.json").unlink()
    for path in [*out.glob("rounds/round-*")]:
        if path.name >= "round-003":
            path.unlink()
    assert run(command, monkeypatch)["probe"] == summary["probe"]
    assert (out / "probe" / "probe.safetensors").read_bytes() == probe
    assert (out / "rounds" / "round-001.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_workers_give_the_same_probe(
    finished: tuple[Path, Summary, str],
    work: Work,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, summary, command = finished
    other = work.folder / "workers"
    found = run(f"{command} --num-workers 2".replace(f"--out {out}", f"--out {other}"), monkeypatch)
    assert_close(load_probe(f"{other}/probe"), load_probe(f"{out}/probe"))
    assert found["labels"] == summary["labels"]
    ours, theirs = pseudo_labels(other), pseudo_labels(out)
    assert sum(ours[name]["label"] != theirs[name]["label"] for name in theirs) <= 1


@pytest.mark.slow
def test_a_run_that_falls_back_corrects_zero_shot_with_the_labels(
    work: Work,  # noqa: F811
    given: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Nothing satisfies the guard, and labels do not overrule it.
    monkeypatch.setattr(confirmation, "MIN_KAPPA", 2.0)
    monkeypatch.setattr(few_labels, "CHANCE", 0.0)
    labels, out = write(work.folder / "same.csv", given), work.folder / "fallback"
    summary = run(
        f"selftrain.py --data {work.folder}/labelled {FLAGS} --labels {labels} --out {out}", monkeypatch
    )
    assert "the probe will be zero-shot with the given labels alone" in capsys.readouterr().out
    assert not summary["prior"]["trusted"]
    assert summary["probe"]["accuracy"] > summary["zero_shot"]["accuracy"] + 0.02
    probe, features = load_probe(f"{out}/probe"), Store.open(f"{work.folder}/labelled").features()
    found = pseudo_labels(out)
    expected = dict(zip(features.ids.tolist(), probe.predict(features.base).tolist(), strict=True))
    # As in a run that is trusted, an image with a label keeps it.
    expected |= {name: NAMES.index(label) for name, label in given.items() if label != NONE}
    assert {name: row["label"] for name, row in found.items()} == expected
    assert {name for name, row in found.items() if not row["kept"]} == {
        name for name, label in given.items() if label == NONE
    }
    # A sweep falls back to the same.
    space = work.space("one", '"rounds": tune.choice([3])')
    command = (
        f"tune.py --space {space} --data {work.folder}/labelled --classes {WORDS} --trials 1 --neighbours 0"
    )
    swept = run(f"{command} --labels {labels} --out {work.folder}/tune-fallback", monkeypatch)
    assert swept["chosen"]["name"] == "zero_shot"
    assert_close(load_probe(f"{work.folder}/tune-fallback/probe"), probe)
    assert swept["chosen"]["accuracy"] == pytest.approx(summary["probe"]["accuracy"])


@pytest.mark.slow
def test_a_sweep_with_labels(
    work: Work,  # noqa: F811
    given: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = work.folder / "three.csv", work.folder / "swept"
    space = work.space("two", '"rounds": tune.grid_search([3, 5])')
    present = WORDS.rpartition(",")[0]
    labels = {name: label for name, label in given.items() if label != NAMES[-1]}
    write(path, labels)
    command = f"tune.py --space {space} --data {work.folder}/labelled --classes {WORDS} --trials 2 --present {present}"
    found = run(f"{command} --labels {path} --out {out}", monkeypatch)
    assert found["labels"]["images"] == len(labels)
    assert found["evaluated_on"]["images"] == ROWS - len(labels)
    assert f"--labels {path}" in found["chosen"]["command"]
    (tried, *_) = found["prior"]["tried"].values()
    assert tried["labelled"] == len(labels) - 2
    store, probe = Store.open(f"{work.folder}/labelled").features(), load_probe(f"{out}/probe")
    told = dict(zip(store.ids.tolist(), probe.predict(store.base).tolist(), strict=True))
    named = {name: label for name, label in labels.items() if label != NONE}
    assert np.mean([NAMES[told[name]] == label for name, label in named.items()]) > 0.9
    write(path, dict(list(labels.items())[1:]))
    assert "choose another --out" in refusal(f"{command} --labels {path} --out {out}", monkeypatch, capsys)


# What is asked for next.
HOSTILE = (
    "</title><script>alert(1)</script>.png",
    '"><img src=x onerror=alert(1)>.png',
    "=1+1.png",
    "a,b\nc.png",
)
COUNT = 12


def made(out: Path, *, thumbnails: bool, names: tuple[str, ...] = CLASSES) -> Path:
    """A run of twelve images, the first four with hostile names."""
    ids = [*HOSTILE, *(f"{number}.png" for number in range(COUNT - len(HOSTILE)))]
    rng = np.random.default_rng(0)
    rows = np.eye(16)[np.arange(COUNT) % 3] + 0.1 * rng.normal(size=(COUNT, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    source = {"label_names": None}
    identity = {"encoder": {"dim": 16}, "views": ["weak"], "seed": None, "source": source}
    writer = StoreWriter(str(out / "features" / "photos"), identity)
    writer.begin()
    table: dict[str, Any] = {"id": ids, "weak": pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 16)}
    if thumbnails:
        small = thumbnail(Image.new("RGB", (80, 60), (200, 30, 30)))
        # One is damaged, one is missing.
        table["thumbnail"] = pa.array([small] * (COUNT - 2) + [b"no picture", None], pa.binary())
    part = Part(unit=0, start=0, stop=COUNT, last=True)
    writer.write_part(part, rows=pa.table(table), quarantine=[], content_digest=0)
    writer.finish(num_units=1, rate=None, known={})
    Probe(weight=4 * torch.eye(3, 16), bias=torch.zeros(3), class_names=names).save(str(out / "probe"))
    config = to_dict(SelftrainJob(data=("photos",), out=str(out)))
    features = {"train": str(out / "features" / "photos"), "eval": None}
    files.write_json(str(out / "summary.json"), {"config": config, "features": features})
    return out


def test_suggestions_are_a_file_to_fill_in_and_a_page_on_which_all_names_are_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path / "run", thumbnails=True, names=("<b>cat</b>", "dog", "<script>x</script>"))
    found = run(f"suggest.py --run {out} --count 50", monkeypatch)
    # The image without a thumbnail cannot be shown.
    assert found == {"images": COUNT - 1, "suggested": COUNT - 1}
    rows = answers(out / "suggested.csv")
    assert list(rows[0]) == ["id", "label", "guess", "confidence", "why"]
    assert {row["id"] for row in rows} >= set(HOSTILE)
    assert all(row["label"] == "" and 0 < float(row["confidence"]) <= 1 for row in rows)
    assert "stands for 1 image, of which the probe is" in rows[0]["why"]
    text = (out / "suggested.html").read_text()
    page = Page(text)
    assert not [tag for tag, about in page.tags if tag in ("script", "b") or "onerror" in about]
    assert len(page.images()) == COUNT - 2
    for place, row in enumerate(rows, 1):
        if row["id"] in HOSTILE[:3]:
            assert f"{place}. {row['id']}" in page.text
    printed = capsys.readouterr().out
    assert f"11 images to label: {out}/suggested.csv, with pictures in {out}/suggested.html" in printed
    assert f"review --run {out}" in printed
    assert f"--labels {out}/suggested.csv" in printed


def test_images_with_an_answer_are_not_asked_for_and_answers_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path / "run", thumbnails=False)
    command = f"suggest.py --run {out} --count 4"
    assert run(command, monkeypatch)["suggested"] == 4
    assert (
        "There are no pictures, because the feature store has no thumbnails"
        in (out / "suggested.html").read_text()
    )
    first = {row["id"] for row in answers(out / "suggested.csv")}
    write(out / "corrections.csv", dict.fromkeys(first, "dog") | {"elsewhere.png": "dog"})
    assert run(command, monkeypatch) == {"images": COUNT - 4, "suggested": 4}
    second = answers(out / "suggested.csv")
    assert not first.intersection(row["id"] for row in second)
    printed = capsys.readouterr().out
    # With the file alone, the next training would lose the earlier answers.
    assert printed.count("or in the file, then:") == 1
    assert "labels that the file has by then, to the 5 answers in" in printed
    for between in (",", ";"):
        with (out / "suggested.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(second[0]), delimiter=between)
            table.writeheader()
            table.writerows([second[0] | {"label": "dog"}, *second[1:]])
        before = (out / "suggested.csv").read_bytes()
        said = refusal(command, monkeypatch, capsys)
        assert said == f"{out}/suggested.csv has labels that were filled in: move it, and give it to --labels"
        assert (out / "suggested.csv").read_bytes() == before
    (out / "suggested.csv").unlink()
    known = Store.open(str(out / "features" / "photos")).ids().tolist()
    write(out / "corrections.csv", dict.fromkeys(known, NONE))
    assert "have a label already" in refusal(command, monkeypatch, capsys)


def test_a_run_that_was_moved_is_asked_about_and_what_is_no_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path / "run", thumbnails=False)
    moved = shutil.move(out, tmp_path / "elsewhere")
    assert run(f"suggest.py --run {moved} --count 3", monkeypatch)["suggested"] == 3
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "summary.json").write_text(json.dumps({"trials": []}))
    for name in ("run", "empty", "sweep"):
        said = refusal(f"suggest.py --run {tmp_path}/{name}", monkeypatch, capsys)
        assert said.startswith(f"{tmp_path}/{name} holds no finished run of lpclip selftrain: --run takes")
    assert "--count must be at least 1" in refusal(f"suggest.py --run {moved} --count 0", monkeypatch, capsys)
    shutil.rmtree(tmp_path / "elsewhere" / "features")
    assert "the features of the run are not at" in refusal(f"suggest.py --run {moved}", monkeypatch, capsys)


def test_the_next_turn_goes_on_with_the_labels_of_the_last(
    finished: tuple[Path, Summary, str], given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = finished
    found = run(f"suggest.py --run {out} --count 9", monkeypatch)
    assert found == {"images": ROWS - 24, "suggested": 9}
    assert not {row["id"] for row in answers(out / "suggested.csv")}.intersection(given)
