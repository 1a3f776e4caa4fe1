"""Texts come with their images from every kind of source, and a pair without either is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw, write_tar

from lpclip.config import PairsConfig, SourceConfig
from lpclip.images.columns import Texts
from lpclip.images.open import open_source
from lpclip.images.source import PAIRS, ROWS

CONFIG = SourceConfig()
TEXTS = {"a": ["one ball"], "b": ["a sign", "two words"], "c": []}
IMAGES = {name: draw(place, 0) for place, name in enumerate(TEXTS)}


def write_folder(path: Path) -> Path:
    (path / "data").mkdir()
    for name, image in IMAGES.items():
        (path / "data" / f"{name}.png").write_bytes(image)
    (path / "data" / "a.txt").write_text("one ball\n")
    (path / "data" / "b.TXT").write_text("\n  a sign \n\ntwo words")
    return path / "data"


def write_tars(path: Path) -> Path:
    members: dict[str, bytes] = {}
    for name, image in IMAGES.items():
        members[f"{name}.png"] = image
        if TEXTS[name]:
            members[f"{name}.txt"] = "\n".join(TEXTS[name]).encode()
    (path / "data").mkdir()
    write_tar(path / "data" / "0.tar", members)
    return path / "data"


def write_parquet(path: Path, texts: list[Any] | None = None, column: str = "caption") -> Path:
    columns = {"id": list(IMAGES), "image": list(IMAGES.values()), column: texts or list(TEXTS.values())}
    pq.write_table(pa.table(columns), path / "data.parquet")
    return path / "data.parquet"


def write_jsonl(path: Path) -> Path:
    folder = write_folder(path)
    lines = [{"id": name, "path": f"{name}.png", "texts": texts} for name, texts in TEXTS.items()]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "list.jsonl"


def pairs(data: Path, *, column: str | None = None) -> dict[str, dict[str, Any]]:
    source = open_source(str(data), config=CONFIG, texts=Texts(column=column))
    assert source.has_texts
    tables = [table for unit in source.units for table in source.reader.tables(unit)]
    assert all(table.schema == PAIRS for table in tables)
    return {Path(row["id"]).stem: row for row in pa.concat_tables(tables).to_pylist()}


@pytest.mark.parametrize("write", [write_folder, write_tars, write_parquet, write_jsonl])
def test_texts_come_with_their_images(write: Any, tmp_path: Path) -> None:
    found = pairs(write(tmp_path))
    assert {name: row["texts"] for name, row in found.items()} == TEXTS
    assert [found[name]["image"] for name in "ab"] == [IMAGES[name] for name in "ab"]
    assert [found[name]["error"] for name in "abc"] == [None, None, "no text"]
    assert found["c"]["image"] is None


def test_texts_are_utf8_with_or_without_a_mark_of_it_or_no_texts(tmp_path: Path) -> None:
    texts = {"a": b"\xef\xbb\xbfcaf\xc3\xa9\r\nsign\r\n", "b": b"fine\ncaf\xe9", "c": b"\xef\xbb\xbf"}
    write_tar(
        tmp_path / "0.tar",
        {f"{name}.{kind}": data[name] for name in IMAGES for kind, data in (("png", IMAGES), ("txt", texts))},
    )
    folder = write_folder(tmp_path)
    (folder / "b.TXT").unlink()
    for name, data in texts.items():
        (folder / f"{name}.txt").write_bytes(data)
    for found in (pairs(tmp_path / "0.tar"), pairs(folder)):
        assert [row["texts"] for row in found.values()] == [["café", "sign"], [], []]
        errors = [None, "text is not UTF-8: byte 8 is 0xe9", "no text"]
        assert [row["error"] for row in found.values()] == errors


@pytest.mark.parametrize("write", [write_folder, write_tars, write_parquet, write_jsonl])
def test_other_jobs_read_the_images_alone(write: Any, tmp_path: Path) -> None:
    data = str(write(tmp_path))
    source = open_source(data, config=CONFIG)
    assert not source.has_texts
    tables = [table for unit in source.units for table in source.reader.tables(unit)]
    assert all(table.schema == ROWS for table in tables)
    assert pa.concat_tables(tables)["error"].null_count == 3
    # The flag for the column of texts asks for no texts: the job does.
    config = PairsConfig(text_column="caption")
    assert open_source(data, config=config) == replace(source, config=config)


def test_a_csv_has_one_text_a_row(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "list.csv").write_text('path,title\na.png,"one, ball"\nb.png,\n')
    found = pairs(folder / "list.csv", column="title")
    assert found["a"]["texts"] == ["one, ball"]
    assert found["b"]["error"] == "no text"


def test_nulls_and_blanks_are_no_texts(tmp_path: Path) -> None:
    found = pairs(write_parquet(tmp_path, [["x", None, " "], None, ["  "]]))
    assert [row["texts"] for row in found.values()] == [["x"], [], []]
    assert [row["error"] for row in found.values()] == [None, "no text", "no text"]


def test_an_image_that_is_gone_keeps_its_own_reason(tmp_path: Path) -> None:
    listing = write_jsonl(tmp_path)
    (tmp_path / "data" / "a.png").unlink()
    assert "No such file" in pairs(listing)["a"]["error"]


@pytest.mark.parametrize("write", [write_folder, write_tars, write_parquet, write_jsonl])
def test_pairs_are_another_source_than_their_images(write: Any, tmp_path: Path) -> None:
    data = str(write(tmp_path))
    identities = [open_source(data, config=CONFIG, texts=texts).identity for texts in (Texts(), None)]
    assert identities[0] != identities[1]


def test_a_change_of_texts_is_a_change_of_the_source(tmp_path: Path) -> None:
    data = str(write_folder(tmp_path))
    before = open_source(data, config=CONFIG, texts=Texts()).identity
    (tmp_path / "data" / "a.txt").write_text("another ball")
    assert open_source(data, config=CONFIG, texts=Texts()).identity != before


@pytest.mark.parametrize(
    ("texts", "column", "wanted", "told"),
    [
        (None, "words", None, "no column of texts; there are id, image, words (--text-column)"),
        (None, "words", "title", "no column 'title'; there are id, image, words"),
        ([1, 2, 3], "text", None, "column 'text' holds int64, neither texts nor lists of texts"),
        ([[1], [2], []], "text", None, "column 'text' holds list<element: int64>, neither texts nor"),
    ],
)
def test_what_is_no_text_is_refused(
    texts: list[Any] | None, column: str, wanted: str | None, told: str, tmp_path: Path
) -> None:
    data = write_parquet(tmp_path, texts, column)
    with pytest.raises(ValueError) as error:
        open_source(str(data), config=CONFIG, texts=Texts(column=wanted))
    assert told in str(error.value)


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES["a"])
    with pytest.raises(ValueError, match=r"no \.txt file with the texts of an image"):
        open_source(str(tmp_path), config=CONFIG, texts=Texts())
