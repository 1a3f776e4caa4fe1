"""A feature store is found again only where its images are as they were, as far as their sizes and times tell."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw

from lpclip.config import SourceConfig
from lpclip.images.open import open_source
from lpclip.images.parquet_paths import PATH_BYTES
from lpclip.images.source import Source

FORMS = ("csv", "jsonl", "parquet", "struct.parquet", "other/list.parquet", "uri.csv", "uri.parquet")


def write_list(folder: Path, form: str) -> Path:
    """A list of 1.png and 2.png in a folder."""
    path = folder / (form if "/" in form else f"list.{form}")
    path.parent.mkdir(exist_ok=True)
    start = f"file://{folder}" if form.startswith("uri") else os.path.relpath(folder, path.parent)
    paths = [f"{start}/{number}.png" for number in (1, 2)]
    if form.endswith("csv"):
        path.write_text("\n".join(["path", *paths]))
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps({"path": place}) for place in paths))
    else:
        column: Any = paths
        if form.startswith("struct"):
            column = [{"bytes": None, "path": place} for place in paths]
        pq.write_table(pa.table({"path": column}), path)
    return path


def opened(path: Path, **config: Any) -> Source:
    return open_source(str(path), config=SourceConfig(**config))


@pytest.mark.parametrize("form", FORMS)
def test_a_change_behind_a_path_in_a_list_is_seen(form: str, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(draw(0, number))
    path = write_list(tmp_path, form)
    before = opened(path)
    assert all(row.error is None for unit in before.units for row in before.reader.rows(unit))
    assert opened(path).identity == before.identity
    (tmp_path / "1.png").write_bytes(draw(1, 1) + b"more")
    larger = opened(path).identity
    os.utime(tmp_path / "2.png", (1, 1))
    assert len({json.dumps(identity) for identity in (before.identity, larger, opened(path).identity)}) == 3


def test_of_a_sample_of_parquet_the_paths_that_are_read_are_looked_at(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(40)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(draw(0, number))
    for file in ("a", "b"):
        half = names[:20] if file == "a" else names[20:]
        pq.write_table(
            pa.table({"id": half, "path": half}), tmp_path / f"list-{file}.parquet", row_group_size=7
        )
    pattern = str(tmp_path / "list-*.parquet")
    source = open_source(pattern, config=SourceConfig(), limit=5)
    read = {row.id for unit in source.units for row in source.reader.rows(unit)}
    for name in names:
        os.utime(tmp_path / name, (1, 1))
        other = open_source(pattern, config=SourceConfig(), limit=5)
        assert (other.identity != source.identity) == (name in read)
        source = other


@pytest.mark.parametrize("kind", ["bytes", "struct", "base64"])
def test_images_in_parquet_need_no_look_at_files(kind: str, tmp_path: Path) -> None:
    """Their names are often those of files that were once packed; these may lie anywhere."""
    data = draw(0, 1)
    text = base64.b64encode(data).decode()
    assert len(text) > PATH_BYTES
    cell: Any = {"bytes": data, "struct": {"bytes": data, "path": "1.png"}, "base64": text}[kind]
    (tmp_path / "1.png").write_bytes(data)
    pq.write_table(pa.table({"image": [cell]}), tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet").identity["num_files"] == 1


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_links_are_told_of_and_no_server_is_asked(form: str, tmp_path: Path) -> None:
    links = ["https://127.0.0.1:9/1.png", "HTTPS://127.0.0.1:9/2.png"]
    path = tmp_path / f"list.{form}"
    if form == "csv":
        path.write_text("\n".join(["url", *links]))
    else:
        pq.write_table(pa.table({"url": links}), path)
    (note,) = opened(path).notes
    assert note == (
        f"list.{form}: 2 images behind http(s) links are taken as unchanged where a feature store of this list is "
        "there: remove the store to read them again"
    )


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_numbered_rows_are_other_rows_than_named_ones(form: str, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(draw(0, number))
    path = write_list(tmp_path, form)
    if form == "parquet":
        pq.write_table(pa.table({"id": ["a", "b"], "path": ["1.png", "2.png"]}), path)
    assert opened(path).identity != opened(path, id_column="").identity
