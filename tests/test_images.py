"""Image sources: whatever holds the images, every one of them arrives once, or with a reason why not."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import tarfile
import urllib.request
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import read_unit
from PIL import Image
from pyarrow import csv, fs

from lpclip.config import SourceConfig, UserError
from lpclip.features.data import open_data
from lpclip.images.columns import Texts
from lpclip.images.fetch import fetch_all, followed
from lpclip.images.listings import SYSTEM_FOLDERS
from lpclip.images.open import open_source
from lpclip.images.source import ROWS, UNIT_ROWS, File, Source, make_identity
from lpclip.images.tars import MAX_HEADER_BYTES, MAX_MEMBERS, samples

CONFIG = SourceConfig()


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour % 256, colour // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_parquet(
    path: Path, columns: dict[str, Any], *, metadata: dict[str, str] | None = None, **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def rows(source: Source) -> list[dict[str, Any]]:
    """All rows, as workers read them: the reader travels to them by pickle."""
    reader = pickle.loads(pickle.dumps(source.reader))
    tables = [read_unit(reader, unit) for unit in source.units]
    assert all(table.schema == ROWS for table in tables)
    return pa.concat_tables(tables).to_pylist()


def by_id(source: Source) -> dict[str, dict[str, Any]]:
    read = rows(source)
    assert source.num_rows in (None, len(read))
    assert len({row["id"] for row in read}) == len(read)
    return {row["id"]: row for row in read}


class TestFolder:
    def test_subfolders_are_labels_and_every_image_is_read_once(self, tmp_path: Path) -> None:
        for n, name in enumerate(["cat/1.jpg", "cat/old/2.PNG", "dog/3.webp", "loose.gif"]):
            write(tmp_path / name, png(n))
        source = open_source(str(tmp_path), config=CONFIG)
        assert (source.kind, source.num_rows, source.has_labels) == ("folder", 4, True)
        assert source.label_names == ("cat", "dog")
        read = by_id(source)
        assert {name: row["label"] for name, row in read.items()} == {
            "cat/1.jpg": 0,
            "cat/old/2.PNG": 0,
            "dog/3.webp": 1,
            "loose.gif": None,
        }
        assert read["dog/3.webp"]["image"] == png(2)

    def test_labels_come_from_where_the_plan_says_or_from_nowhere(self, tmp_path: Path) -> None:
        write(tmp_path / "tree" / "cat" / "1.png", png(1))
        write(tmp_path / "tree" / "dog" / "2.png", png(2))
        pq.write_table(pa.table({"image": [png(1)], "cls": [3]}), tmp_path / "some.parquet")
        (tmp_path / "some.csv").write_text("path,label\ntree/cat/1.png,cat\n")
        write_tar(tmp_path / "some.tar", [("1.png", png(1)), ("1.cls", b"2")])
        for name, places, label in (
            ("tree", "the folders' names (2 names)", 0),
            ("some.parquet", "the column cls", 3),
            ("some.csv", "the column label (1 name)", 0),
            ("some.tar", "the .cls files", 2),
        ):
            data = open_data(str(tmp_path / name), config=CONFIG, split="train")
            assert data.describe().endswith(f", labels from {places})")
            assert rows(data.source)[0]["label"] == label
            none = open_data(str(tmp_path / name), config=SourceConfig(label_column=""), split="train")
            assert none.describe().endswith(", no labels)")
            assert [row["label"] for row in rows(none.source)] == [None] * len(rows(data.source))

    def test_a_flat_folder_and_a_single_image_have_no_labels(self, tmp_path: Path) -> None:
        path = write(tmp_path / "My photos!" / "a b%20?x=1.jpg", png(1))
        for data in (path, path.parent):
            source = open_source(str(data), config=CONFIG)
            assert (source.has_labels, source.label_names) == (False, None)
            assert by_id(source)["a b%20?x=1.jpg"]["image"] == png(1)
        assert source.name == "My-photos"

    def test_links_are_followed_once_and_a_link_to_nothing_is_a_missing_image(self, tmp_path: Path) -> None:
        write(tmp_path / "elsewhere" / "2.png", png(2))
        folder = tmp_path / "pets"
        write(folder / "cat" / "1.png", png(1))
        (folder / "dog").symlink_to(tmp_path / "elsewhere")
        (folder / "cat" / "all").symlink_to(folder)
        (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
        (folder / "cat" / "itself.png").symlink_to("itself.png")
        (folder / ".hidden").symlink_to(tmp_path / "nowhere")
        source = open_source(str(folder), config=CONFIG)
        read = by_id(source)
        assert set(read) == {"cat/1.png", "cat/gone.png", "cat/itself.png", "dog/2.png"}
        assert {name for name, row in read.items() if row["image"] is None} == {
            "cat/gone.png",
            "cat/itself.png",
        }
        assert "No such file" in read["cat/gone.png"]["error"]
        assert "symbolic links" in read["cat/itself.png"]["error"]
        write(tmp_path / "nowhere.png", png(3))
        assert open_source(str(folder), config=CONFIG).identity != source.identity

    def test_files_are_listed_as_before_so_that_stores_are_found_again(self, tmp_path: Path) -> None:
        for name in ("b/1.jpg", "a/2.jpg", "a/c/3.jpg", "4.jpg"):
            write(tmp_path / name, png(0))
        infos = fs.LocalFileSystem().get_file_info(fs.FileSelector(str(tmp_path), recursive=True))
        listed = sorted(
            File(str(Path(info.path).relative_to(tmp_path)), info.size, info.mtime_ns)
            for info in infos
            if info.is_file
        )
        identity = make_identity("folder", listed, config=CONFIG, limit=None)
        assert open_source(str(tmp_path), config=CONFIG).identity == identity

    def test_other_files_are_counted_and_hidden_ones_passed_by(self, tmp_path: Path) -> None:
        for name in ("1.jpg", "2.jpg", "notes.txt", "movie.mp4", ".DS_Store", ".thumbs/1.jpg"):
            write(tmp_path / name, png(0))
        source = open_source(str(tmp_path), config=CONFIG)
        assert source.num_rows == 2
        assert "2 files" in source.notes[0]
        assert ".mp4" in source.notes[0]

    @pytest.mark.parametrize("name", SYSTEM_FOLDERS)
    def test_folders_of_systems_are_hidden(self, tmp_path: Path, name: str) -> None:
        for path in ("cat/1.png", f"cat/{name}/1.png/thumb.png", f"{name}/2.png"):
            write(tmp_path / path, png(0))
        source = open_source(str(tmp_path), config=CONFIG)
        assert source.notes == ()
        assert by_id(source).keys() == {"cat/1.png"}

    def test_names_that_hold_the_folders_of_an_archive_are_told_of(self, tmp_path: Path) -> None:
        for name in ("photos\\cat\\1.png", "photos\\dog\\1.png", "2.png"):
            write(tmp_path / name, png(0))
        source = open_source(str(tmp_path), config=CONFIG)
        assert source.label_names is None
        (note,) = source.notes
        assert note == (
            "labels: a \\ in the name of a file makes no folder, and so no label; there is one in "
            "photos\\cat\\1.png and in 1 more"
        )
        assert len(by_id(source)) == 3

    def test_images_beside_the_folders_that_are_labels_are_told_of(self, tmp_path: Path) -> None:
        for name in ("pets/cat/1.png", "pets/cow/1.png", "dog/1.png", "dog/2.png"):
            write(tmp_path / name, png(0))
        source = open_source([f"{tmp_path}/dog", f"{tmp_path}/pets"], config=CONFIG)
        assert source.label_names == ("cat", "cow")
        assert source.notes == (
            "labels: none for 2 of 4 images, which lie right in a folder that is named, as dog/1.png does",
        )
        assert open_source(f"{tmp_path}/dog", config=CONFIG).notes == ()

    def test_folders_that_a_shell_named_one_by_one_are_no_labels_and_a_note_says_so(
        self, tmp_path: Path
    ) -> None:
        for name in ("pets/cat/1.png", "pets/dog/1.png"):
            write(tmp_path / name, png(0))
        source = open_source([f"{tmp_path}/pets/dog", f"{tmp_path}/pets/cat"], config=CONFIG)
        assert not source.has_labels
        (note,) = source.notes
        assert "if these (cat, dog) are the labels" in note
        assert open_source(note.split()[-1], config=CONFIG).label_names == ("cat", "dog")

    def test_a_list_beside_the_images_is_told_of(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", png(0))
        path = write(tmp_path / "metadata.csv", "file_name,label\n1.png,cat\n")
        assert open_source(str(tmp_path), config=CONFIG).notes == (
            f"left out of {tmp_path}: 1 file other than images (1 .csv); a list such as metadata.csv is read "
            "where --data names it",
        )
        assert open_source(str(path), config=CONFIG).label_names == ("cat",)

    def test_files_that_cannot_be_read_are_rows_with_reasons(self, tmp_path: Path) -> None:
        for name in ("gone.jpg", "large.jpg", "empty.jpg", "fine.jpg"):
            write(tmp_path / name, png(0))
        write(tmp_path / "large.jpg", bytes(1001))
        write(tmp_path / "empty.jpg", b"")
        source = open_source(str(tmp_path), config=SourceConfig(max_bytes=1000))
        (tmp_path / "gone.jpg").unlink()
        read = by_id(source)
        assert "No such file" in read["gone.jpg"]["error"]
        assert read["large.jpg"]["error"] == "1001 bytes, more than 1000"
        assert (read["empty.jpg"]["image"], read["empty.jpg"]["error"]) == (b"", None)
        assert (read["fine.jpg"]["image"], read["fine.jpg"]["error"]) == (png(0), None)

    def test_units_are_small(self, tmp_path: Path) -> None:
        for n in range(2 * UNIT_ROWS + 1):
            write(tmp_path / f"{n}.png", b"x")
        source = open_source(str(tmp_path), config=CONFIG)
        assert [len(read_unit(source.reader, unit)) for unit in source.units] == [UNIT_ROWS, UNIT_ROWS, 1]
        assert len(by_id(source)) == 2 * UNIT_ROWS + 1

    def test_a_file_uri_is_read_like_its_path(self, tmp_path: Path) -> None:
        write(tmp_path / "with space" / "cat" / "1.jpg", png(1))
        by_path = open_source(str(tmp_path / "with space"), config=CONFIG)
        by_uri = open_source((tmp_path / "with space").as_uri(), config=CONFIG)
        assert rows(by_uri) == rows(by_path)
        assert by_uri.identity == by_path.identity


NOT_UTF_8 = "caf\udce9"
"""A name as Python has it from a system whose file names are bytes."""


class TestNamesOfBytes:
    def test_a_name_that_is_not_utf_8_is_read_and_has_an_id_of_its_own(self, tmp_path: Path) -> None:
        names = (f"{NOT_UTF_8}/{NOT_UTF_8}.png", f"{NOT_UTF_8}/1.png", r"caf\xe9/1.png", "dog/1.png")
        for n, name in enumerate(names):
            write(tmp_path / "tree" / name, png(n))
        tree = str(tmp_path / "tree")
        for data in (tree, f"{tree}/*", f"file://{tree}", [f"{tree}/dog", tree]):
            source = open_source(data, config=CONFIG)
            assert source.label_names == (r"caf\\xe9", r"caf\xe9", "dog")
            assert {row["image"]: (row["id"], row["label"]) for row in rows(source)} == {
                png(0): (r"caf\xe9/caf\xe9.png", 1),
                png(1): (r"caf\xe9/1.png", 1),
                png(2): (r"caf\\xe9/1.png", 0),
                png(3): ("dog/1.png", 2),
            }
            (note,) = source.notes
            assert note.endswith(r"there is one in caf\\xe9/1.png")
        for data in (f"{tree}/{NOT_UTF_8}", f"{tree}/{NOT_UTF_8[:3]}*", f"{tree}/{NOT_UTF_8}/1.png"):
            assert png(1) in [row["image"] for row in rows(open_source(data, config=CONFIG))]

    @pytest.mark.parametrize("suffix", [".parquet", ".tar", ".csv"])
    def test_it_may_be_the_name_of_a_file_of_images(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"{NOT_UTF_8}{suffix}"
        if suffix == ".parquet":
            write_parquet(tmp_path / "x.parquet", {"image": [png(1)]}).rename(path)
        elif suffix == ".tar":
            write_tar(path, [("1.png", png(1))])
        else:
            write(path, "path\n1.png\n")
            write(tmp_path / "1.png", png(1))
        (row,) = rows(open_source(str(path), config=CONFIG))
        assert row["image"] == png(1)

    def test_it_may_be_the_name_of_a_member_of_a_tar(self, tmp_path: Path) -> None:
        names = (NOT_UTF_8, r"caf\xe9", "caf\udce8")
        path = write_tar(tmp_path / "x.tar", [(f"{name}.png", png(n)) for n, name in enumerate(names)])
        assert {name: row["image"] for name, row in by_id(open_source(str(path), config=CONFIG)).items()} == {
            r"x.tar/caf\xe9": png(0),
            r"x.tar/caf\\xe9": png(1),
            r"x.tar/caf\xe8": png(2),
        }

    @pytest.mark.parametrize("limit", [None, 2])
    def test_columns_of_parquet_may_hold_such_bytes(self, tmp_path: Path, limit: int | None) -> None:
        values = pa.array([b"caf\xe9", b"dog"], pa.binary())
        write(tmp_path / f"{NOT_UTF_8}.png", png(0))
        write(tmp_path / "dog.png", png(1))
        texts = pa.Array.from_buffers(pa.string(), 2, values.buffers())
        paths = pa.array([b"caf\xe9.png", b"dog.png"], pa.binary())
        columns = {"path": pa.Array.from_buffers(pa.string(), 2, paths.buffers()), "label": texts}
        for ids in (texts, values):
            path = write_parquet(tmp_path / "x.parquet", {"id": ids, **columns})
            source = open_source(str(path), config=CONFIG, limit=limit)
            assert source.label_names == (r"caf\xe9", "dog")
            expected = [(r"caf\xe9", png(0), 0), ("dog", png(1), 1)]
            assert [(row["id"], row["image"], row["label"]) for row in rows(source)] == expected
            assert source.examples(2) == {r"caf\xe9": r"caf\xe9", "dog": "dog"}

    def test_pythons_json_of_such_names_is_read(self, tmp_path: Path) -> None:
        write(tmp_path / f"{NOT_UTF_8}.png", png(0))
        write(tmp_path / "\N{SKULL}\\udce9.png", png(1))
        names = [f"{NOT_UTF_8}.png", "\N{SKULL}\\udce9.png"]
        path = write(tmp_path / "x.jsonl", "\n".join(json.dumps({"path": name}) for name in names))
        read = rows(open_source(str(path), config=CONFIG))
        assert [(row["id"], row["image"]) for row in read] == [(r"caf\xe9.png", png(0)), (names[1], png(1))]


class TestIdentity:
    def test_it_survives_a_move_but_no_change(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        write(folder / "cat" / "1.jpg", png(1))
        before = open_source(str(folder), config=CONFIG).identity
        assert json.loads(json.dumps(before)) == before
        assert str(tmp_path) not in json.dumps(before)
        folder = folder.rename(tmp_path / "b")
        assert open_source(str(folder), config=CONFIG).identity == before
        write(folder / "cat" / "1.jpg", png(2) + b"more")
        assert open_source(str(folder), config=CONFIG).identity != before

    def test_whatever_changes_the_rows_changes_it(self, tmp_path: Path) -> None:
        path = write_parquet(
            tmp_path / "a.parquet", {"image": [png(n) for n in range(9)], "other": [png(0)] * 9}
        )
        configs = [
            CONFIG,
            SourceConfig(image_column="other"),
            SourceConfig(max_pixels=1),
            SourceConfig(max_bytes=1),
        ]
        identities = [open_source(str(path), config=config).identity for config in configs]
        identities += [open_source(str(path), config=CONFIG, limit=3).identity]
        assert len({json.dumps(identity) for identity in identities}) == 5

    def test_a_manifests_files_are_part_of_it(self, tmp_path: Path) -> None:
        write(tmp_path / "1.jpg", png(1))
        path = write(tmp_path / "list.csv", "path\n1.jpg\n")
        before = open_source(str(path), config=CONFIG).identity
        write(tmp_path / "1.jpg", png(1) + b"more")
        assert open_source(str(path), config=CONFIG).identity != before


class TestParquet:
    def test_bytes_ids_labels_and_class_names(self, tmp_path: Path) -> None:
        columns = {"id": ["a", "b", "c"], "image": [png(0), png(1), None], "label": pa.array([1, 0, -1])}
        path = write_parquet(tmp_path / "x.parquet", columns, metadata={"classes": '["cat", "dog"]'})
        source = open_source(str(path), config=CONFIG)
        assert (source.name, source.kind, source.label_names) == (
            f"{tmp_path.name}-x",
            "parquet",
            ("cat", "dog"),
        )
        assert rows(source) == [
            {"id": "a", "image": png(0), "label": 1, "error": None},
            {"id": "b", "image": png(1), "label": 0, "error": None},
            {"id": "c", "image": None, "label": None, "error": "no image in this row"},
        ]

    def test_uris_are_relative_to_the_file(self, tmp_path: Path) -> None:
        write(tmp_path / "images" / "1.jpg", png(1))
        far = write(tmp_path / "far.jpg", png(2))
        uris = ["../images/1.jpg", str(far), far.as_uri(), "gone.jpg", "ftp://nowhere/1.jpg"]
        for array in (pa.array(uris), pa.array(uris).dictionary_encode(), pa.array(uris, pa.large_string())):
            write_parquet(tmp_path / "lists" / "x.parquet", {"uri": array})
            read = rows(open_source(str(tmp_path / "lists"), config=CONFIG))
            assert [row["image"] for row in read] == [png(1), png(2), png(2), None, None]
            assert [row["id"] for row in read] == [f"x.parquet:{n}" for n in range(5)]
            assert all(row["error"] for row in read[3:])

    def test_hugging_face_structs_and_class_labels(self, tmp_path: Path) -> None:
        write(tmp_path / "2.jpg", png(2))
        images = [
            {"bytes": png(1), "path": "1.jpg"},
            {"bytes": None, "path": "2.jpg"},
            {"bytes": None, "path": None},
        ]
        features = {"info": {"features": {"labels": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
        metadata = {"huggingface": json.dumps(features)}
        path = write_parquet(tmp_path / "x.parquet", {"img": images, "labels": [0, 1, 1]}, metadata=metadata)
        source = open_source(str(path), config=CONFIG)
        assert source.label_names == ("cat", "dog")
        assert [(row["image"], row["label"]) for row in rows(source)] == [(png(1), 0), (png(2), 1), (None, 1)]

    @pytest.mark.parametrize("dtype", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
    def test_labels_in_words_are_sorted_over_all_files(self, tmp_path: Path, dtype: pa.DataType) -> None:
        for n, words in enumerate((["dog", None], ["cat", "bird"])):
            labels = (
                pa.array(words).dictionary_encode()
                if pa.types.is_dictionary(dtype)
                else pa.array(words, dtype)
            )
            write_parquet(tmp_path / f"{n}.parquet", {"image": [png(0), png(1)], "label": labels})
        source = open_source(str(tmp_path), config=CONFIG)
        assert source.label_names == ("bird", "cat", "dog")
        assert [row["label"] for row in rows(source)] == [2, None, 1, 0]

    def test_columns_are_named_by_flag_and_left_out_by_an_empty_one(self, tmp_path: Path) -> None:
        columns = {
            "id": [7, 7],
            "key": [3, 4],
            "picture": [png(0), png(1)],
            "class": [1.0, None],
            "label": ["a", "b"],
        }
        path = str(write_parquet(tmp_path / "x.parquet", columns))
        config = SourceConfig(image_column="picture", id_column="key", label_column="class")
        assert [(row["id"], row["label"]) for row in rows(open_source(path, config=config))] == [
            ("3", 1),
            ("4", None),
        ]
        config = SourceConfig(image_column="picture", id_column="", label_column="")
        source = open_source(path, config=config)
        assert not source.has_labels
        assert [(row["id"], row["label"]) for row in rows(source)] == [
            ("x.parquet:0", None),
            ("x.parquet:1", None),
        ]

    @pytest.mark.parametrize("row_group_size", [100, 256, 1000, 5000])
    @pytest.mark.parametrize("limit", [None, 300])
    def test_rows_come_in_place_whatever_the_row_groups(
        self, tmp_path: Path, row_group_size: int, limit: int | None
    ) -> None:
        for part in ("a", "b"):
            images = [f"{part}{n}".encode() for n in range(1100)]
            write_parquet(tmp_path / f"{part}.parquet", {"image": images}, row_group_size=row_group_size)
        source = open_source(str(tmp_path), config=CONFIG, limit=limit)
        read = by_id(source)
        assert all(row["image"].decode() == name.replace(".parquet:", "") for name, row in read.items())
        assert len(read) == (limit or 2200)
        assert len(source.units) <= 2 * len(read) / UNIT_ROWS + 1
        # Any worker may get any unit, in any order.
        order = np.random.default_rng(0).permutation(len(source.units))
        shuffled = pa.concat_tables([read_unit(source.reader, source.units[n]) for n in order]).to_pylist()
        assert sorted(row["id"] for row in shuffled) == sorted(read)
        assert all(row == read[row["id"]] for row in shuffled)

    def test_damage_in_one_row_group_costs_only_its_rows(self, tmp_path: Path) -> None:
        images = [bytes([n]) * 500 for n in range(200)]
        path = write_parquet(
            tmp_path / "x.parquet", {"image": images}, row_group_size=100, compression="snappy"
        )
        source = open_source(str(path), config=CONFIG)
        column = pq.read_metadata(path).row_group(1).column(0)
        data = bytearray(path.read_bytes())
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        path.write_bytes(data)
        read = rows(source)
        assert [row["image"] for row in read] == images[:100] + [None] * 100
        assert [row["id"] for row in read] == [f"x.parquet:{n}" for n in range(200)]
        assert all(row["error"].startswith("Parquet: ") for row in read[100:])


class TestPatterns:
    """Files beside each other that are not one set of images."""

    def data(self, folder: Path) -> None:
        for split, places in (("train", range(3)), ("test", range(3, 5))):
            images = {"image": [png(n) for n in places], "label": list(places)}
            write_parquet(folder / f"{split}-00000-of-00001.parquet", images)

    def test_splits_beside_each_other_are_not_read_as_one(self, tmp_path: Path) -> None:
        self.data(tmp_path)
        with pytest.raises(UserError, match=r"several splits \(1 test, 1 train files\)") as caught:
            open_source(str(tmp_path), config=CONFIG)
        one, all_ = re.findall("'(.*?)'", str(caught.value))
        assert [row["label"] for row in rows(open_source(one, config=CONFIG))] == [3, 4]
        assert [row["label"] for row in rows(open_source(all_, config=CONFIG))] == [3, 4, 0, 1, 2]
        source = open_source(str(tmp_path / "train-*.parquet"), config=CONFIG)
        assert (source.num_rows, source.name) == (3, f"{tmp_path.name.strip('_')}-train")

    @pytest.mark.parametrize("tops", [("train", "test"), ("Training", "valid")])
    def test_folders_of_splits_are_no_classes(self, tmp_path: Path, tops: tuple[str, str]) -> None:
        for n, top in enumerate(tops):
            for name in ("cat", "dog"):
                write(tmp_path / top / name / "1.png", png(n))
        with pytest.raises(UserError, match="several splits") as caught:
            open_source(str(tmp_path), config=CONFIG)
        one, *both = re.findall("'(.*?)'", str(caught.value))
        assert open_source(one, config=CONFIG).num_rows == 2
        assert open_source(both, config=CONFIG).num_rows == 4
        for data in (one, both):
            assert open_source(data, config=CONFIG).label_names == ("cat", "dog")

    def test_names_that_only_look_like_splits_are_one_set(self, tmp_path: Path) -> None:
        for name in ("latest.parquet", "training.parquet", "strain-1.parquet"):
            write_parquet(tmp_path / "p" / name, {"image": [png(1)]})
        assert open_source(str(tmp_path / "p"), config=CONFIG).num_rows == 3
        for name in ("train", "bus", "test tube"):
            write(tmp_path / "f" / name / "1.png", png(1))
        assert open_source(str(tmp_path / "f"), config=CONFIG).label_names == ("bus", "test tube", "train")

    def test_a_pattern_takes_the_files_that_fit_and_what_lies_in_folders_that_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for n, name in enumerate(("2023-01/1.png", "2023-02/a/2.png", "2024-01/3.png")):
            write(tmp_path / name, png(n))
        monkeypatch.chdir(tmp_path)
        for pattern in ("2023-*", str(tmp_path / "2023-*"), f"file://{tmp_path}/2023-*"):
            assert by_id(open_source(pattern, config=CONFIG)).keys() == {"2023-01/1.png", "2023-02/a/2.png"}
        with pytest.raises(UserError, match=r"no file fits this pattern; there are 3 in"):
            open_source(str(tmp_path / "2022*"), config=CONFIG)
        write(tmp_path / "odd [1]" / "4.png", png(4))
        for data in ("odd [1]", "odd [1]/*", f"file://{tmp_path}/odd [1]"):
            assert by_id(open_source(data, config=CONFIG)).keys() == {"4.png"}
        assert by_id(open_source("odd [1*", config=CONFIG)).keys() == {"odd [1]/4.png"}

    def test_what_a_downloader_writes_beside_its_images_is_left_out_with_a_note(self, tmp_path: Path) -> None:
        about = {"url": ["http://x/1.jpg"], "key": ["0"], "caption": ["a cat"], "status": ["success"]}
        write_tar(tmp_path / "00000.tar", [("0.jpg", png(1)), ("0.txt", b"a cat"), ("0.json", b"{}")])
        write(tmp_path / "00000_stats.json", "{}")
        write_parquet(tmp_path / "00000.parquet", about)
        for data in (tmp_path, tmp_path / "*.tar"):
            source = open_source(str(data), config=CONFIG)
            assert by_id(source).keys() == {"00000.tar/0"}
        assert open_source(str(tmp_path), config=CONFIG).notes == (
            f"left out of {tmp_path}: 2 files other than tars (1 .parquet, 1 .json)",
        )
        (tmp_path / "00000.tar").unlink()
        write(tmp_path / "00000" / "0.jpg", png(1))
        assert by_id(open_source(str(tmp_path), config=CONFIG)).keys() == {"00000/0.jpg"}
        write_parquet(tmp_path / "00001.parquet", {"jpg": [png(1)], **about})
        with pytest.raises(UserError, match=r"different kinds: .* by a pattern"):
            open_source(str(tmp_path), config=CONFIG)

    def test_a_folder_without_images_is_no_label_and_a_note_says_so(self, tmp_path: Path) -> None:
        for folder in ("cat", "dog"):
            write(tmp_path / "pets" / folder / "1.png", png(1))
        for folder in ("zebra", ".ipynb_checkpoints", "__MACOSX"):
            (tmp_path / "pets" / folder).mkdir()
        note = ("labels: 1 folder without an image in pets (zebra): no class, unless --classes names it",)
        for data in (str(tmp_path / "pets"), (tmp_path / "pets").as_uri()):
            source = open_source(data, config=CONFIG)
            assert (source.label_names, source.notes) == (("cat", "dog"), note)
        # A pattern leaves folders out on purpose.
        assert open_source(str(tmp_path / "pets" / "*"), config=CONFIG).notes == ()
        write(tmp_path / "pets" / "zebra" / "1.png", png(1))
        assert open_source(str(tmp_path / "pets"), config=CONFIG).notes == ()

    def test_a_folder_without_images_beside_images_without_labels_is_not_worth_a_note(
        self, tmp_path: Path
    ) -> None:
        write(tmp_path / "1.png", png(1))
        (tmp_path / "empty").mkdir()
        assert open_source(str(tmp_path), config=CONFIG).notes == ()


class TestLimit:
    def test_it_takes_a_fair_and_nested_sample(self, tmp_path: Path) -> None:
        for label in "abcd":
            for n in range(100):
                write(tmp_path / label / f"{n}.png", b"x")
        small, large = (open_source(str(tmp_path), config=CONFIG, limit=limit) for limit in (50, 200))
        assert (small.num_rows, large.num_rows) == (50, 200)
        assert by_id(small).keys() < by_id(large).keys()
        counts = np.bincount([row["label"] for row in rows(large)], minlength=4)
        assert counts.min() > 35
        assert large.label_names == ("a", "b", "c", "d")

    def test_the_sample_is_the_same_from_every_kind_of_source(self, tmp_path: Path) -> None:
        names = [f"{n}.png" for n in range(50)]
        for name in names:
            write(tmp_path / "folder" / name, png(0))
        write_parquet(tmp_path / "x.parquet", {"id": names, "image": [png(0)] * 50})
        write(tmp_path / "folder.csv", "id,path\n" + "\n".join(f"{name},folder/{name}" for name in names))
        samples = [
            by_id(open_source(str(tmp_path / data), config=CONFIG, limit=10)).keys()
            for data in ("folder", "x.parquet", "folder.csv")
        ]
        assert samples[0] == samples[1] == samples[2]
        assert len(samples[0]) == 10

    def test_a_limit_above_the_number_of_rows_changes_no_row(self, tmp_path: Path) -> None:
        path = str(write_parquet(tmp_path / "x.parquet", {"image": [png(0), png(1)]}))
        assert rows(open_source(path, config=CONFIG, limit=5)) == rows(open_source(path, config=CONFIG))


class TestWebDataset:
    def test_samples_are_grouped_by_key(self, tmp_path: Path) -> None:
        members = [
            *[("a/1.cls", b"3"), ("a/1.jpg", png(1)), ("a/1.json", b"{}")],
            *[("a/2.seg.png", png(2)), ("._2.jpg", b"mac"), ("b/1.webp", png(3)), ("b/1.cls", b"-1")],
        ]
        for name, mode in (("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz")):
            path = write_tar(tmp_path / name, members, mode)
            source = open_source(str(path), config=CONFIG)
            assert (source.kind, source.num_rows, source.has_labels) == ("webdataset", None, True)
            read = by_id(source)
            assert {key: (row["image"], row["label"]) for key, row in read.items()} == {
                f"{name}/a/1": (png(1), 3),
                f"{name}/a/2.seg": (png(2), None),
                f"{name}/b/1": (png(3), None),
            }

    def test_labels_in_words_are_told_of_and_not_read(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("1.png", png(1)), ("1.cls", b"cat\n")])
        source = open_source(str(path), config=CONFIG)
        (note,) = source.notes
        assert note.endswith("hold words such as 'cat'; only numbers are labels there")
        assert source.labels_from is None
        assert [row["label"] for row in rows(source)] == [None]

    def test_a_byte_order_mark_is_no_part_of_a_label(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("1.png", png(1)), ("1.cls", b"\xef\xbb\xbf7\r\n")])
        source = open_source(str(path), config=CONFIG)
        assert (source.labels_from, source.notes) == ("the .cls files", ())
        assert [row["label"] for row in rows(source)] == [7]

    def test_shards_may_use_the_same_keys(self, tmp_path: Path) -> None:
        for shard in range(2):
            write_tar(tmp_path / f"{shard}.tar", [("0.png", png(shard)), ("1.png", png(shard))])
        assert by_id(open_source(str(tmp_path), config=CONFIG)).keys() == {
            "0.tar/0",
            "0.tar/1",
            "1.tar/0",
            "1.tar/1",
        }

    def test_what_is_no_sample_is_told(self, tmp_path: Path) -> None:
        members = [
            *[("1.jpg", png(1)), ("2.jpg", bytes(2000)), ("3.txt", b"text"), ("1.jpg", png(4))],
            *[("5.jpg", png(5)), ("5.jpg", png(6)), ("3.txt", b"text")],
        ]
        path = write_tar(tmp_path / "x.tar", members)
        read = rows(open_source(str(path), config=SourceConfig(max_bytes=1000)))
        assert [(row["id"], row["error"]) for row in read] == [
            ("x.tar/1", None),
            ("x.tar/2", "2000 bytes, more than 1000"),
            ("x.tar/3", "no image in txt"),
            ("x.tar/1//2", "duplicate id"),
            ("x.tar/5", None),
            ("x.tar/5//2", "duplicate id"),
            ("x.tar/3//2", "no image in txt"),
        ]
        assert read[4]["image"] == png(5)

    def test_archives_in_a_tar_are_told_of_with_what_to_do(self, tmp_path: Path) -> None:
        inner = write_tar(tmp_path / "00000.tar", [("1.png", png(1))]).read_bytes()
        path = write_tar(tmp_path / "x.tar", [("shards/00000.tar", inner), ("shards/00001.tar.gz", b"")])
        source = open_source(str(path), config=CONFIG)
        (note,) = source.notes
        assert note.startswith("x.tar begins with an archive, shards/00000.tar: unpack it")
        assert [(row["id"], row["error"]) for row in rows(source)] == [
            (
                f"x.tar/shards/0000{n}",
                f"an archive in a tar ({what}): unpack x.tar, and name the folder with what is in it",
            )
            for n, what in enumerate(("tar", "tar.gz"))
        ]

    @pytest.mark.parametrize("count", [8, MAX_MEMBERS, 3 * MAX_MEMBERS + 5])
    def test_names_with_dots_are_images_of_their_own(self, tmp_path: Path, count: int) -> None:
        members = [
            member
            for n in range(count)
            for member in ((f"IMG 2023.05.{n:03d}.jpg", png(n)), (f"IMG 2023.05.{n:03d}.cls", b"%d" % n))
        ]
        path = write_tar(tmp_path / "x.tar", members)
        source = open_source(str(path), config=CONFIG)
        assert source.has_labels
        assert {key: (row["image"], row["label"]) for key, row in by_id(source).items()} == {
            f"x.tar/IMG 2023.05.{n:03d}": (png(n), n) for n in range(count)
        }

    def test_every_image_of_a_tar_is_a_row_or_a_quarantined_row(self, tmp_path: Path) -> None:
        members = [
            *[("_DSC1.jpg", png(1)), ("__index__", b"meta"), ("2.cls", b"7"), ("2.left.jpg", png(2))],
            *[("2.right.jpg", png(3)), ("4.jpg", png(4)), ("4.seg.png", png(5)), ("4.png", png(6))],
        ]
        path = write_tar(tmp_path / "x.tar", members)
        with tarfile.open(path, "a") as tar:
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.LNKTYPE, "4.jpg"
            tar.addfile(link)
        read = by_id(open_source(str(path), config=CONFIG))
        assert {key: row["label"] for key, row in read.items() if row["error"] is None} == {
            "x.tar/_DSC1": None,
            "x.tar/2.left": 7,
            "x.tar/2.right": 7,
            "x.tar/4": None,
        }
        assert read["x.tar/4.seg.png"]["error"].startswith("a further image of one sample, which has a .jpg")
        assert "--image-column png reads it" in read["x.tar/4.png"]["error"]
        assert read["x.tar/link"]["error"] == "a link, which is not followed"
        config = SourceConfig(image_column="seg.png")
        assert by_id(open_source(str(path), config=config))["x.tar/4"]["image"] == png(5)

    @pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
    def test_a_cut_tar_gives_what_it_has_and_says_so(self, tmp_path: Path, suffix: str) -> None:
        noise = np.random.default_rng(0).bytes(30_000)
        path = tmp_path / f"x{suffix}"
        for size in (0, 100, 40_000):
            write_tar(path, [("1.jpg", noise), ("2.jpg", noise[::-1])], f"w:{suffix[5:]}")
            path.write_bytes(path.read_bytes()[:size])
            read = rows(open_source(str(path), config=CONFIG))
            assert read[-1]["id"] == f"x{suffix}/(rest)"
            assert read[-1]["error"].startswith("tar: ")
            assert [row["image"] for row in read[:-1]] == [noise][: size // 40_000]

    def test_a_tar_without_its_end_is_not_taken_for_a_whole_one(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("1.jpg", png(1)), ("2.jpg", png(2))])
        path.write_bytes(path.read_bytes()[:1024])
        read = rows(open_source(str(path), config=CONFIG))
        assert read[0]["image"] == png(1)
        assert "cut or damaged" in read[-1]["error"]

    def test_nothing_is_written_outside(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        path = write_tar(tmp_path / "in" / "x.tar", [("../../evil.jpg", png(1)), ("/evil.jpg", png(2))])
        with tarfile.open(path, "a") as tar:
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        read = rows(open_source(str(path), config=CONFIG))
        assert [row["image"] for row in read] == [png(1), png(2), None]
        assert [entry.name for entry in tmp_path.rglob("*")] == ["in", "x.tar"]

    def test_a_limit_takes_the_first_samples_and_says_so(self, tmp_path: Path) -> None:
        for shard in range(3):
            write_tar(
                tmp_path / f"{shard}.tar", [(f"{n}.{e}", png(n)) for n in range(4) for e in ("png", "cls")]
            )
        source = open_source(str(tmp_path), config=CONFIG, limit=6)
        assert [row["id"] for row in rows(source)] == [f"{n // 4}.tar/{n % 4}" for n in range(6)]
        assert "first 6 images" in source.notes[0]

    def test_one_of_several_images_is_named_by_flag(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [("1.input.jpg", png(1)), ("1.target.jpg", png(2))])
        config = SourceConfig(image_column="target.jpg")
        assert [row["image"] for row in rows(open_source(str(path), config=config))] == [png(2)]

    def test_a_sample_of_very_many_files_is_not_gathered(self, tmp_path: Path) -> None:
        many = [("1.jpg", png(1)), *((f"1.{n}", b"x") for n in range(3 * MAX_MEMBERS))]
        path = write_tar(tmp_path / "x.tar", many)
        with tarfile.open(path) as tar:
            found = list(samples(tar, read=lambda *_: b""))
        assert [len(sample.members) for sample in found] == [MAX_MEMBERS] * 3 + [1]
        assert by_id(open_source(str(path), config=CONFIG))["x.tar/1"]["image"] == png(1)

    def test_a_header_that_would_fill_the_memory_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "x.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, note in (("1.jpg", ""), ("2.jpg", "x" * (MAX_HEADER_BYTES + 1)), ("3.jpg", "")):
                info = tarfile.TarInfo(name)
                info.size = len(png(1))
                info.pax_headers = {"comment": note}
                tar.addfile(info, io.BytesIO(png(1)))
        first, rest = rows(open_source(str(path), config=SourceConfig()))
        assert (first["id"], first["error"]) == ("x.tar.gz/1", None)
        assert re.fullmatch(r"tar: a header of \d+ bytes, more than 1048576", rest["error"])

    def test_large_tars_are_read_in_tables_of_bounded_size(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", [(f"{n:04d}.png", b"x") for n in range(UNIT_ROWS + 10)])
        source = open_source(str(path), config=CONFIG)
        (unit,) = source.units
        assert [len(table) for table in source.reader.tables(unit)] == [UNIT_ROWS, 10]


class TestManifest:
    def test_csv_tsv_and_jsonl_say_the_same(self, tmp_path: Path) -> None:
        for n in (1, 2):
            write(tmp_path / "images" / f"{n}.jpg", png(n))
        lines = [
            ("007", "images/1.jpg", "dog"),
            ("008", str(tmp_path / "images/2.jpg"), "cat"),
            ("9", "gone.jpg", ""),
        ]
        header = ("id", "path", "label")
        write(tmp_path / "x.csv", "\n".join(",".join(line) for line in (header, *lines)))
        write(tmp_path / "x.tsv", "\n".join("\t".join(line) for line in (header, *lines)))
        write(
            tmp_path / "x.jsonl",
            "\n".join(json.dumps(dict(zip(header, line, strict=True))) for line in lines),
        )
        for name in ("x.csv", "x.tsv", "x.jsonl"):
            source = open_source(str(tmp_path / name), config=CONFIG)
            assert (source.kind, source.num_rows, source.label_names) == ("manifest", 3, ("cat", "dog"))
            read = rows(source)
            assert [(row["id"], row["image"], row["label"]) for row in read] == [
                ("007", png(1), 1),
                ("008", png(2), 0),
                ("9", None, None),
            ]
            assert "No such file" in read[2]["error"]

    def test_the_uri_names_the_row_and_numbers_are_labels_as_they_are(self, tmp_path: Path) -> None:
        write(tmp_path / "1.jpg", png(1))
        path = write(tmp_path / "x.csv", "uri,label\n1.jpg,12\n2.jpg,-1\n")
        source = open_source(str(path), config=CONFIG)
        assert source.label_names is None
        assert [(row["id"], row["label"]) for row in rows(source)] == [("1.jpg", 12), ("2.jpg", None)]

    @pytest.mark.parametrize(
        ("name", "separator", "told"),
        [
            ("x.csv", "\t", "tabs"),
            ("x.CSV", ";", "semicolons"),
            ("x.csv", "|", "vertical bars"),
            ("x.tsv", ",", "commas"),
            ("x.csv", ",", None),
            ("x.tsv", "\t", None),
        ],
    )
    def test_the_header_tells_what_separates_the_columns(
        self, tmp_path: Path, name: str, separator: str, told: str | None
    ) -> None:
        write(tmp_path / "1.jpg", png(1))
        # The columns of open_clip's own manifests.
        lines = [
            ("filepath", "title", "label"),
            ("1.jpg", "a,cat\tsits; there|".replace(separator, ""), "cat"),
        ]
        path = write(tmp_path / name, "\ufeff" + "\r\n".join(map(separator.join, lines)))
        source = open_source(str(path), config=CONFIG, texts=Texts())
        (row,) = (row for unit in source.units for row in source.reader.rows(unit))
        assert (row.id, row.image, row.label, row.texts) == ("1.jpg", png(1), 0, (lines[1][1],))
        expected = (f"{name}: its columns are separated by {told}, and read like that",) if told else ()
        assert source.notes == expected

    @pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
    def test_a_column_for_each_class_is_told_of_and_read_where_it_is_named(
        self, tmp_path: Path, name: str
    ) -> None:
        rows_ = [("1.jpg", 30, 1, 0), ("2.jpg", 1, 0, 1)]
        for file, *_ in rows_:
            write(tmp_path / file, png(1))
        text = {
            "x.csv": "image,age,MEL,NV\n1.jpg,30,1.0,0.0\n2.jpg,1,0.0,1.0\n",
            "x.jsonl": "".join(
                json.dumps(dict(zip(("image", "age", "MEL", "NV"), row, strict=True))) + "\n" for row in rows_
            ),
        }[name]
        path = write(tmp_path / name, text)
        source = open_source(str(path), config=CONFIG)
        (note,) = source.notes
        assert not source.has_labels
        columns = re.search("--label-column (\\S+)", note)[1]
        source = open_source(str(path), config=SourceConfig(label_column=columns))
        assert (source.labels_from, source.label_names) == ("the columns MEL, NV", ("MEL", "NV"))
        assert [row["label"] for row in rows(source)] == [0, 1]
        write(path, text.replace("1.0,0.0", "1.0,1.0").replace('"NV": 0', '"NV": 1'))
        assert open_source(str(path), config=CONFIG).notes == ()
        source = open_source(str(path), config=SourceConfig(label_column=columns))
        assert [row["label"] for row in rows(source)] == [None, 1]
        none = open_source(str(path), config=SourceConfig(label_column=""))
        assert (none.has_labels, none.notes) == (False, ())

    @pytest.mark.parametrize("hint", ["sep=;\n", "\ufeffsep=;\r\n", '"sep=;"\n'])
    def test_a_line_for_spreadsheets_is_no_header(self, tmp_path: Path, hint: str) -> None:
        write(tmp_path / "1.jpg", png(1))
        path = write(tmp_path / "x.csv", f"{hint}path;label\n1.jpg;cat, grey\n")
        source = open_source(str(path), config=CONFIG)
        assert source.label_names == ("cat, grey",)
        assert [row["image"] for row in rows(source)] == [png(1)]

    @pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
    def test_columns_are_known_in_any_case_and_with_blanks(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / "1.jpg", png(1))
        write(tmp_path / "x.csv", "Path, Label\n1.jpg, cat\n")
        write_parquet(tmp_path / "x.parquet", {"Path": ["1.jpg"], " Label": ["cat"]})
        source = open_source(str(tmp_path / name), config=CONFIG)
        assert source.label_names == ("cat",)
        assert [(row["image"], row["label"]) for row in rows(source)] == [(png(1), 0)]

    @pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
    def test_paths_that_windows_wrote_are_found(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / "photos" / "cat" / "1.jpg", png(1))
        write(tmp_path / "photos\\cat\\2.jpg", png(2))  # as unpacking an archive of Windows may name it
        paths = ["photos\\cat\\1.jpg", "photos\\cat\\2.jpg"]
        write(tmp_path / "x.csv", "\n".join(["path", *paths]))
        write_parquet(tmp_path / "x.parquet", {"path": paths, "id": paths})
        source = open_source(str(tmp_path / name), config=CONFIG)
        assert source.notes == ()
        assert {row["id"]: row["image"] for row in rows(source)} == {paths[0]: png(1), paths[1]: png(2)}

    def test_a_change_to_a_file_is_seen_through_a_path_that_windows_wrote(self, tmp_path: Path) -> None:
        image = write(tmp_path / "a" / "1.jpg", png(1))
        path = write(tmp_path / "x.csv", "path\na\\1.jpg\n")
        before = open_source(str(path), config=CONFIG).identity
        write(image, png(1) + b"changed")
        assert open_source(str(path), config=CONFIG).identity != before

    def test_the_plan_counts_the_paths_that_are_no_files(self, tmp_path: Path) -> None:
        write(tmp_path / "1.jpg", png(1))
        path = write(tmp_path / "x.csv", "path\n1.jpg\n2.jpg\n3.jpg\n")
        source = open_source(str(path), config=CONFIG)
        assert source.notes == (
            f"x.csv: 2 of its 3 paths will be quarantined for lack of a file, such as {tmp_path}/2.jpg",
        )
        assert len(rows(source)) == 3

    @pytest.mark.parametrize("prefix", ["data:image/png;base64,", ""])
    def test_images_in_base64_are_read_from_parquet_alone(self, tmp_path: Path, prefix: str) -> None:
        texts = [prefix + base64.b64encode(png(n)).decode() for n in range(2)]
        path = write_parquet(tmp_path / "x.parquet", {"image": texts})
        assert [row["image"] for row in rows(open_source(str(path), config=CONFIG))] == [png(0), png(1)]
        write(path.with_suffix(".csv"), "\n".join(["id,image", f'a,"{texts[0]}"', f'b,"{texts[1]}"']))
        with pytest.raises(UserError, match=r"x\.csv: column 'image' holds images in base64"):
            open_source(str(path.with_suffix(".csv")), config=CONFIG)

    def test_a_single_column_has_no_separator(self, tmp_path: Path) -> None:
        write(tmp_path / "3,4.jpg", png(0))
        path = write(tmp_path / "x.csv", 'file_name\n1;2\t.jpg\n"3,4.jpg"\n')
        assert by_id(open_source(str(path), config=CONFIG)).keys() == {"1;2\t.jpg", "3,4.jpg"}


class TestNumbersWithGaps:
    """A column of numbers with gaps is one of fractions to most programs."""

    EXPECTED = (0, 1, None, 12, None)

    def labels(self, path: Path) -> list[int | None]:
        write(path.parent / "0.jpg", png(0))
        source = open_source(str(path), config=CONFIG)
        assert source.label_names is None
        labels = [row["label"] for row in rows(source)]
        if source.labels_there is not None:
            assert source.labels_there == tuple(sorted({*labels} - {None}))
        return labels

    @pytest.mark.parametrize("gap", ["", "nan", "NaN"])
    def test_in_csv(self, tmp_path: Path, gap: str) -> None:
        labels = ("0.0", "1.0", gap, "12.", "-1.0")
        lines = [f"{n}.jpg,{label}" for n, label in enumerate(labels)]
        assert self.labels(write(tmp_path / "x.csv", "\n".join(["path,label", *lines]))) == [*self.EXPECTED]

    @pytest.mark.parametrize("gap", ["null", "NaN"])
    def test_in_jsonl(self, tmp_path: Path, gap: str) -> None:
        labels = ("0.0", "1.0", gap, "12.0", "-1")
        lines = [f'{{"path": "{n}.jpg", "label": {label}}}' for n, label in enumerate(labels)]
        assert self.labels(write(tmp_path / "x.jsonl", "\n".join(lines))) == [*self.EXPECTED]

    @pytest.mark.parametrize("gap", [None, float("nan")])
    @pytest.mark.parametrize("dtype", [pa.float32(), pa.float64()])
    def test_in_parquet(self, tmp_path: Path, gap: float | None, dtype: pa.DataType) -> None:
        labels = pa.array([0, 1, gap, 12, -1], dtype)
        path = write_parquet(tmp_path / "x.parquet", {"image": [png(n) for n in range(5)], "label": labels})
        assert self.labels(path) == [*self.EXPECTED]

    def test_in_tars(self, tmp_path: Path) -> None:
        labels = (b"0.0", b"1.0\n", b"", b"12.", b"-1")
        members = [
            (f"{n}.{suffix}", data)
            for n, label in enumerate(labels)
            for suffix, data in (("png", png(n)), ("cls", label))
        ]
        assert self.labels(write_tar(tmp_path / "x.tar", members)) == [*self.EXPECTED]

    def test_fractions_and_other_words_are_names(self, tmp_path: Path) -> None:
        write(tmp_path / "1.jpg", png(0))
        path = write(tmp_path / "x.csv", "path,label\n1.jpg,0.5\n2.jpg,1.0\n3.jpg,nan\n")
        assert open_source(str(path), config=CONFIG).label_names == ("0.5", "1.0")

    def test_a_number_that_is_too_large_is_no_label(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.csv", "path,label\n1.jpg,99999999999\n")
        table = write_parquet(tmp_path / "x.parquet", {"image": [png(0)], "label": [99999999999]})
        for data in (path, table):
            with pytest.raises(UserError, match="'label' is no column of labels"):
                open_source(str(data), config=CONFIG)


class TestBadInput:
    def message(self, data: Path | str, **options: Any) -> str:
        config = options.pop("config", CONFIG)
        with pytest.raises(ValueError) as caught:
            open_source(str(data), config=config, **options)
        return str(caught.value)

    def test_paths(self, tmp_path: Path) -> None:
        assert "no such path, nor one of the data sets fashion-mnist, cifar10" in self.message(
            tmp_path / "nowhere"
        )
        assert "no such path" in self.message((tmp_path / "nowhere").as_uri())
        assert "cannot be listed" in self.message("gopher://nowhere/x")
        assert "there are cifar10:train and cifar10:test" in self.message("cifar10:val")
        assert "at least 1, not 0" in self.message(tmp_path, limit=0)

    def test_folders(self, tmp_path: Path) -> None:
        assert "holds nothing" in self.message(tmp_path)
        write(tmp_path / "a.txt", "x")
        assert "1 file, and no image" in self.message(tmp_path)
        assert "unknown kind of file" in self.message(tmp_path / "a.txt")
        write(tmp_path / "a.jpg", png(0))
        write_parquet(tmp_path / "a.parquet", {"image": [png(0)]})
        assert "different kinds: 1 image (a.jpg), 1 Parquet file (a.parquet); move the" in self.message(
            tmp_path
        )

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [
            ("a.zip", "unpack it first"),
            ("labels.csv.gz", "unpack it first"),
            ("annotations.json", "a list of images is a CSV, TSV or JSONL file with a column of paths"),
            ("train.txt", "a list of images is a CSV, TSV or JSONL file with a column of paths"),
            ("IMG_1.HEIC", "save as JPEG or PNG first"),
            ("x.npy", "write the images as files, or to Parquet"),
        ],
    )
    def test_what_holds_images_in_another_way(self, tmp_path: Path, name: str, remedy: str) -> None:
        path = write(tmp_path / name, "x")
        assert self.message(path) == f"{path}: unknown kind of file; {remedy}"
        assert self.message(tmp_path) == (
            f"{tmp_path}: the folder holds 1 file, and no image, Parquet file or tar (1 {path.suffix}): {remedy}"
        )

    def test_a_folder_of_nothing_but_a_list(self, tmp_path: Path) -> None:
        write(tmp_path / "a.csv", "path\n")
        assert self.message(tmp_path).endswith("(1 .csv): name the list itself")

    def test_parquet(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "x.parquet", {"a": [1], "b": [2], "label": ["x"]})
        assert "no column of images; there are a, b, label" in self.message(path)
        assert "no column 'c'; there are a, b, label" in self.message(
            path, config=SourceConfig(image_column="c")
        )
        assert "column 'a' holds int64" in self.message(path, config=SourceConfig(image_column="a"))
        assert "no rows" in self.message(write_parquet(path, {"image": pa.array([], pa.binary())}))
        fractions = write_parquet(path, {"image": [png(0)], "label": [0.5]})
        assert "is no column of labels" in self.message(fractions)
        write_parquet(tmp_path / "y.parquet", {"image": ["uri"], "label": [0.0]})
        assert "y.parquet: column 'image' is not there as binary" in self.message(tmp_path)
        assert "not a Parquet file" in self.message(write(path, "PAR1 nothing"))

    def test_duplicate_and_missing_ids(self, tmp_path: Path) -> None:
        columns = {"id": ["a", "b", "a", "c"], "image": [png(n) for n in range(4)]}
        path = write_parquet(tmp_path / "x.parquet", columns)
        message = self.message(path)
        assert "duplicates of 1 id, such as a" in message
        assert "--id-column ''" in message
        assert len(by_id(open_source(str(path), config=SourceConfig(id_column="")))) == 4
        assert "no id in 1 row" in self.message(write_parquet(path, {**columns, "id": ["a", None, "b", "c"]}))
        write_parquet(tmp_path / "x.parquet", {"id": ["a"], "image": [png(0)]})
        write_parquet(tmp_path / "y.parquet", {"id": ["a"], "image": [png(0)]})
        assert "such as a" in self.message(tmp_path)
        write(tmp_path / "1.jpg", png(0))
        manifest = write(tmp_path / "x.csv", "uri\n1.jpg\n1.jpg\n")
        assert "such as 1.jpg" in self.message(manifest)
        assert len(by_id(open_source(str(manifest), config=SourceConfig(id_column="")))) == 2

    def test_manifests(self, tmp_path: Path) -> None:
        assert "cannot be read" in self.message(write(tmp_path / "x.csv", ""))
        assert "no rows" in self.message(write(tmp_path / "x.csv", "uri\n"))
        assert "no column of URIs or paths; there are a, b" in self.message(
            write(tmp_path / "x.csv", "a,b\n1,2\n")
        )
        assert "cannot be read" in self.message(write(tmp_path / "x.jsonl", '{"uri": '))
        assert "has no first line with the names" in self.message(write(tmp_path / "x.csv", "1.jpg,0\n"))
        assert "several columns are called 'path'" in self.message(
            write(tmp_path / "x.csv", "path,path\n1.jpg,1.jpg\n")
        )

    @pytest.mark.parametrize("path", ["000bec", "C:\\photos\\1.jpg", "/data/upload/1/a.jpg", "x" * 5000])
    def test_a_manifest_of_which_no_path_is_a_file(self, tmp_path: Path, path: str) -> None:
        write(tmp_path / "train" / "000bec.jpg", png(0))
        manifest = write(tmp_path / "x.csv", f"path\n{path}\n")
        message = self.message(manifest)
        assert message.startswith("x.csv: no file is at any path in its column 'path' (1 row), such as ")
        assert message.endswith("a path is relative to the folder of this list, and has its suffix (.jpg)")
        assert len(message) < 600

    @pytest.mark.parametrize("column", ["image", "id", "label"])
    @pytest.mark.parametrize("cell", ['["a.jpg"]', '{"path": "a.jpg"}'])
    def test_columns_of_lists_and_structs(self, tmp_path: Path, column: str, cell: str) -> None:
        path = write(tmp_path / "x.jsonl", json.dumps({"image": "a.jpg", column: json.loads(cell)}))
        write(tmp_path / "a.jpg", png(0))
        assert f"x.jsonl: column '{column}' holds " in self.message(path)

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("x.csv", "path,label\n1.jpg,caf\u00e9\n"),
            ("x.csv", "path,caf\u00e9\n1.jpg,a\n"),
            ("x.tsv", "path\tlabel\n1.jpg\tcaf\u00e9\n"),
            ("x.jsonl", '{"path": "1.jpg", "label": "caf\u00e9"}\n'),
            ("x.jsonl", '{"path": "1.jpg", "caf\u00e9": "a"}\n'),
        ],
    )
    def test_manifests_that_are_not_utf_8(self, tmp_path: Path, name: str, text: str, encoding: str) -> None:
        path = write(tmp_path / name, text.encode(encoding))
        assert self.message(path) == f"{path} is not UTF-8 text: save it as UTF-8"


class Answers(BaseHTTPRequestHandler):
    """/NUMBER.png is an image, and /to/URI sends on to the URI. Who does not say who asks gets nothing."""

    def do_GET(self) -> None:
        _, _, target = self.path.partition("/to/")
        is_named = "urllib" not in self.headers["User-Agent"]
        self.send_response((302 if target else 200) if is_named else 403)
        data = b"" if target else png(int(Path(self.path.partition("?")[0]).stem))
        self.send_header("Location", target)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


class TestSchemes:
    """URIs in manifests and Parquet are followed only by the schemes that the user names."""

    def test_others_are_quarantined_and_the_plan_says_so(self, server: str, tmp_path: Path) -> None:
        write(tmp_path / "1.png", png(1))
        uris = ["1.png", (tmp_path / "1.png").as_uri(), f"{server}/2.png", "s3://bucket/3.png"]
        path = write(tmp_path / "list.csv", "\n".join(["uri", *uris]))
        source = open_source(str(path), config=CONFIG)
        (note,) = source.notes
        assert note == (
            "list.csv: 1 at http://, 1 at s3:// will be quarantined, as their scheme is not followed "
            "(--schemes http,https,s3 follows it)"
        )
        read = rows(source)
        assert [row["image"] for row in read] == [png(1), png(1), None, None]
        assert [row["error"] for row in read[2:]] == [
            f"{s}:// is not followed (--schemes)" for s in ("http", "s3")
        ]
        asked = open_source(str(path), config=SourceConfig(schemes="http"))
        assert [row["image"] for row in rows(asked)] == [png(1), png(1), png(2), None]
        assert asked.identity != source.identity

        table = write_parquet(tmp_path / "list.parquet", {"uri": uris})
        assert [row["error"] for row in rows(open_source(str(table), config=CONFIG))] == [
            r["error"] for r in read
        ]
        assert rows(open_source(str(table), config=SourceConfig(schemes="HTTP, https")))[2]["image"] == png(2)

    def test_uris_are_written_as_people_read_them(self, server: str, tmp_path: Path) -> None:
        uris = [f"{server}/caf\u00e9 \u732b/1.png", f"{server}/caf%C3%A9/2.png?a=b&c=d%20e#f"]
        path = write(tmp_path / "list.csv", "\n".join(["uri", *uris]))
        read = rows(open_source(str(path), config=SourceConfig(schemes="http")))
        assert [row["image"] for row in read] == [png(1), png(2)]

    def test_a_manifest_of_nothing_else_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "list.csv", "uri\nhttp://x/1.png\nhttp://x/2.png\n")
        with pytest.raises(ValueError, match=r"unless you say so: 2 at http:// \(--schemes http,https\)"):
            open_source(str(path), config=CONFIG)
        with pytest.raises(ValueError, match="'s3://' is no scheme"):
            open_source(str(path), config=SourceConfig(schemes="http,s3://"))

    def test_a_server_cannot_lead_elsewhere(self, server: str, tmp_path: Path) -> None:
        targets = [f"{server}/1.png", "https://127.0.0.1:9/1.png", "ftp://127.0.0.1:9/1.png"]
        path = write(tmp_path / "list.csv", "\n".join(["uri", *(f"{server}/to/{t}" for t in targets)]))
        read = rows(open_source(str(path), config=SourceConfig(schemes="http")))
        assert read[0]["image"] == png(1)
        assert [row["error"] for row in read[1:]] == [
            f"{s}:// is not followed (--schemes)" for s in ("https", "ftp")
        ]

    def test_a_remote_list_names_no_local_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "1.png", png(1))
        root = "s3://bucket/lists"
        schemes = followed("https", root=root)
        assert schemes == ("https", "s3")
        for found in fetch_all(
            [str(path), path.as_uri()], root=root, max_bytes=1000, schemes=schemes, timeout=30
        ):
            assert str(found) == "file:// is not followed (--schemes)"


class TestNamed:
    @pytest.mark.slow
    def test_fashion_mnist_is_had_and_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LPCLIP_CACHE", str(tmp_path))
        source = open_source("fashion-mnist:test", config=CONFIG)
        assert (source.name, source.num_rows, source.label_names[-1]) == (
            "fashion-mnist-test",
            10_000,
            "ankle boot",
        )
        read = by_id(source)
        labels = np.array([row["label"] for row in read.values()])
        assert np.bincount(labels).tolist() == [1000] * 10
        assert labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
        assert Image.open(io.BytesIO(read["test/00000"]["image"])).size == (28, 28)
        assert open_source("fashion-mnist", config=CONFIG, split="train", limit=7).num_rows == 7
        assert open_source("fashion-mnist", config=CONFIG, split="test").identity == source.identity
        files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
        assert sorted(files) == ["test.parquet", "train.parquet"]

    def test_a_path_goes_before_a_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "fashion-mnist" / "1.jpg", png(0))
        assert open_source("fashion-mnist", config=CONFIG).kind == "folder"

    @pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
    def test_without_a_network_it_ends_soon_and_clearly(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LPCLIP_CACHE", str(tmp_path))
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
        for name_of_exceptions in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name_of_exceptions, raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first use
        with pytest.raises(ValueError, match=f"{name} cannot be downloaded .*refused.* copy train.parquet"):
            open_source(name, config=CONFIG)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("limit", [None, 2])
def test_the_labels_that_are_there_are_known_before_reading(tmp_path: Path, limit: int | None) -> None:
    words, numbers = ["dog", None, "cat", "dog", "eel"], [3, -1, 0, 3, 7]
    ids, images = list("abcde"), [png(n) for n in range(5)]
    for name, label in ("words", words), ("numbers", numbers):
        write_parquet(tmp_path / f"{name}.parquet", {"id": ids, "image": images, "label": label})
        table = pa.table({"id": ids, "path": [f"folder/{i}.png" for i in "1234a"], "label": label})
        csv.write_csv(table, tmp_path / f"{name}.csv")
    for name in ("cat/1.png", "dog/2.png", "eel/3.png", "4.png"):
        write(tmp_path / "folder" / name, png(0))
    for name in ("words.parquet", "numbers.parquet", "words.csv", "numbers.csv", "folder"):
        source = open_source(str(tmp_path / name), config=CONFIG, limit=limit)
        assert source.labels_there == tuple(sorted({row["label"] for row in rows(source)} - {None})), name
