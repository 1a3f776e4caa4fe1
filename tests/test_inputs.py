"""Several values of `--data`: one set of images, however they are named and in whatever order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw, read_unit, write_tar

from lpclip.config import SourceConfig, UserError
from lpclip.features.data import open_data
from lpclip.images.listings import merge
from lpclip.images.open import open_source
from lpclip.images.source import Listing, Source

CONFIG = SourceConfig()


def write(path: Path, *, seed: int = 0) -> Path:
    """A picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(draw(0, seed))
    return path


def write_parquet(path: Path, *, metadata: dict[str, str] | None = None, **columns: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def opened(*values: Path | str, config: SourceConfig = CONFIG, limit: int | None = None) -> Source:
    return open_source([str(value) for value in values], config=config, limit=limit)


def labels(source: Source) -> dict[str, str | int | None]:
    """The label of each image, by its name if it has one; the ids are distinct."""
    rows = [row for unit in source.units for row in read_unit(source.reader, unit).to_pylist()]
    assert all(row["error"] is None for row in rows)
    found = {row["id"]: row["label"] for row in rows}
    assert len(found) == len(rows)
    names = source.label_names
    return {name: names[label] if names and label is not None else label for name, label in found.items()}


def make(folder: Path, kind: str) -> list[Path]:
    """Three files or folders of one kind, of which the first two are to be read as one."""
    folder.mkdir()
    if kind == "folders":
        for name, seed in itertools.product("abc", range(2)):
            write(folder / name / f"{seed}.png", seed=seed)
        return [folder / name for name in "abc"]
    if kind == "tars":
        for seed, name in enumerate("abc"):
            write_tar(folder / f"{name}.tar", {"0.png": draw(0, seed), "0.cls": b"1"})
        return [folder / f"{name}.tar" for name in "abc"]
    return [write_parquet(folder / f"{name}.parquet", image=[draw(0, 1)], label=[1]) for name in "abc"]


@pytest.mark.parametrize("kind", ["folders", "tars", "Parquet"])
def test_what_is_named_one_by_one_is_read_as_if_a_pattern_took_it(tmp_path: Path, kind: str) -> None:
    one, two, _ = make(tmp_path / "set", kind)
    source = opened(one, two)
    again = opened(two, one, one)
    assert (again.identity, again.name, again.units) == (source.identity, source.name, source.units)
    assert source.name == f"{opened(one).name}-and-1-more"
    pattern = opened(tmp_path / "set" / f"*{one.suffix}")
    assert pattern.identity != source.identity
    both = {name: label for name, label in labels(pattern).items() if not name.startswith("c")}
    if kind == "folders":
        assert labels(source) == dict.fromkeys(both), "folders that are named are no labels"
    else:
        assert labels(source) == both
        two.with_stem("c").unlink()
        assert opened(tmp_path / "set" / "*").identity == source.identity


def test_a_single_value_is_what_it_was(tmp_path: Path) -> None:
    for value in make(tmp_path / "set", "folders"):
        source, alone = open_source(str(value), config=CONFIG), opened(value)
        assert (source.identity, source.units, source.name) == (alone.identity, alone.units, alone.name)


def test_labels_are_the_folders_in_each_that_is_named(tmp_path: Path) -> None:
    """As data sets have them whose splits are folders: labels are in each, and equal file names stay apart."""
    for split, names in (("train", ("cat", "dog")), ("val", ("dog", "fox"))):
        for name in names:
            write(tmp_path / split / name / "1.png")
    write(tmp_path / "val" / "loose.png")
    source = opened(tmp_path / "val", tmp_path / "train")
    assert source.label_names == ("cat", "dog", "fox")
    assert labels(source) == {
        "train/cat/1.png": "cat",
        "train/dog/1.png": "dog",
        "val/dog/1.png": "dog",
        "val/fox/1.png": "fox",
        "val/loose.png": None,
    }
    sample = labels(opened(tmp_path / "val", tmp_path / "train", limit=3))
    assert len(sample) == 3
    assert sample.items() < labels(source).items()
    # A folder in one that is named as well is read once, and files may be named too.
    whole = labels(opened(tmp_path / "train"))
    for more in (tmp_path / "train" / "cat", tmp_path / "train" / "cat" / "1.png"):
        assert labels(opened(more, tmp_path / "train")) == whole


def test_the_same_files_with_other_labels_are_another_set(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / name / "1.png")
    by_pattern, by_name = opened(tmp_path / "*"), opened(tmp_path / "a", tmp_path / "b")
    assert labels(by_pattern) == labels(by_name) == {"a/a/1.png": "a", "b/b/1.png": "b"}
    assert by_pattern.identity != by_name.identity


def test_parquet_in_several_places_keeps_its_rows_apart(tmp_path: Path) -> None:
    one = write_parquet(tmp_path / "a" / "data.parquet", image=[draw(0, 1)] * 2, label=["cat", None])
    two = write_parquet(tmp_path / "b" / "c" / "data.parquet", image=[draw(0, 2)], label=["dog"])
    assert labels(opened(one, two.parent)) == {
        "a/data.parquet:0": "cat",
        "a/data.parquet:1": None,
        "b/c/data.parquet:0": "dog",
    }


def test_values_that_make_no_one_set_are_refused_in_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "photos" / "1.png")
    write_tar(tmp_path / "some.tar", {"1.png": draw(0, 1)})
    (tmp_path / "list.csv").write_text("path\nphotos/1.png\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    image = {"image": [draw(0, 1)], "id": ["same"], "label": [0]}
    one = write_parquet(tmp_path / "1.parquet", metadata={"classes": json.dumps(["cat", "dog"])}, **image)
    two = write_parquet(tmp_path / "2.parquet", metadata={"classes": json.dumps(["dog", "cat"])}, **image)
    write_parquet(tmp_path / "3.parquet", **image)
    photos = tmp_path / "photos"
    for values, sentence in (
        (
            (photos, tmp_path / "some.tar"),
            r"photos and 1 more: these are files of different kinds: \d+ images? \(.*, 1 tar \(some.tar\); name",
        ),
        ((photos, tmp_path / "list.csv"), "a manifest is read alone: put the lines of all in one file"),
        (
            (photos, tmp_path / "empty"),
            "empty: holds no images, as what is named beside it does: leave it out",
        ),
        ((photos, tmp_path / "gone"), "gone: no such path"),
        ((photos, tmp_path / "store"), "store is a feature store: it can only be named alone"),
        ((one, two), "duplicates of 1 id"),
        ((tmp_path / "3.parquet", one), "duplicates of 1 id, such as same; --id-column"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_data([str(value) for value in values], config=CONFIG, split="train")
    assert opened(photos, f"file://{photos}").num_rows == opened(photos).num_rows
    with pytest.raises(UserError, match="lie on different file systems: name those of one of them"):
        merge([Listing("a", str(tmp_path), []), Listing("b", "s3://bucket/b", [])])
    with pytest.raises(UserError, match="the files disagree on the names of the classes"):
        opened(one, two, config=SourceConfig(id_column=""))


def test_the_plan_shows_three_images_with_their_labels(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for seed in range(3):
            write(tmp_path / "photos" / name / f"{seed}.png", seed=seed)
    write(tmp_path / "photos" / "loose.png")
    images = [draw(0, seed) for seed in range(5)]
    write_parquet(tmp_path / "numbers.parquet", image=images, label=[0, 1, None, 3, 4])
    write_parquet(tmp_path / "named.parquet", image=images[:2], id=["a", "b"], label=["cat", "dog"])
    write_parquet(tmp_path / "bare.parquet", image=images, row_group=list("abcde"))
    signed = "https://host/dir/" + "x" * 40 + ".png?X-Signature=secret"
    (tmp_path / "list.csv").write_text(f"url,label\n{signed},cat\nphotos/loose.png,\n")
    write_tar(tmp_path / "some.tar", {"1.png": images[0], "1.cls": b"1"})
    for name, examples in (
        ("photos", "cat/0.png (cat), dog/0.png (dog), loose.png (no label)"),
        ("photos/cat", "0.png, 1.png, 2.png"),
        ("numbers.parquet", "numbers.parquet:0 (0), numbers.parquet:2 (no label), numbers.parquet:4 (4)"),
        ("named.parquet", "a (cat), b (dog)"),
        ("bare.parquet", "bare.parquet:0, bare.parquet:2, bare.parquet:4"),
        ("list.csv", f"...{'x' * 36}.png (cat), photos/loose.png (no label)"),
        ("some.tar", ""),
    ):
        assert open_data(str(tmp_path / name), config=CONFIG, split="train").examples() == examples
    plain = SourceConfig(label_column="")
    found = open_data(str(tmp_path / "photos"), config=plain, split="train", limit=1).examples()
    assert found in labels(opened(tmp_path / "photos"))
