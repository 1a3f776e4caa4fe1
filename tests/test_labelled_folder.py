"""The names in an export of labelled images, and what an export refuses; test_workflows.py has the command itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import draw
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lpclip.config import SourceConfig, UserError
from lpclip.features.data import open_data
from lpclip.jobs.labelled_folder import MARK, LabelledFolder, file_name, folder_names

HOSTILE = (
    "../x",
    "a/b",
    "/",
    "..",
    ".",
    "",
    " ",
    "a\0b",
    "con\n",
    "A/B",
    "a\\b",
    "é" * 200,
    "\ud800",
    "class-2",
)


@settings(deadline=None)
@given(st.lists(st.text(max_size=300), unique=True, max_size=8))
@example([*HOSTILE])
def test_every_class_has_a_folder_of_its_own(names: list[str]) -> None:
    folders = folder_names(names)
    assert len({name.casefold() for name in folders}) == len(names)
    assert all(name and "/" not in name and not name.startswith(".") for name in folders)
    assert all(len(name.encode()) < 200 and name.isprintable() for name in folders)


@settings(deadline=None)
@given(st.lists(st.text(max_size=300), unique=True, max_size=8), st.booleans())
@example([*HOSTILE, "a__b", "a_b", "a__b.jpg", "a/b.jpg", "x.parquet:1", "x.parquet#1"], False)
def test_every_id_has_a_file_of_its_own(ids: list[str], numbered: bool) -> None:
    names = [file_name(name, start=b"", numbered=numbered) for name in ids]
    assert len(set(names)) == len(ids)
    assert all("/" not in name and not name.startswith(".") and name.isprintable() for name in names)
    assert all(len(name.encode()) < 200 for name in names)


@pytest.mark.parametrize(
    ("name", "start", "wanted"),
    [
        ("1.png", b"", "1.png"),
        ("cats/1.JPG", b"", "cats__1.JPG"),
        ("test.parquet:17", b"\x89PNG\r\n", "test.parquet#17.png"),
        ("17", b"RIFF\n\0\0\0WEBPVP8", "17.webp"),
        ("17", b"unknown", "17"),
    ],
)
def test_ordinary_ids_stay_readable(name: str, start: bytes, wanted: str) -> None:
    assert file_name(name, start=start) == wanted


def test_an_export_refuses_folders_that_are_none_of_its_own(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.png").write_bytes(draw(0, 0))
    named = (str(photos),)
    data = open_data(named, config=SourceConfig(), split="test")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").touch()
    for path, message in {
        photos / "sorted": "lies in the folder of the images",
        photos: "lies in the folder of the images",
        tmp_path / "other": "name an empty folder",
        tmp_path / "other" / "diary.txt": "name an empty folder",
        "s3://bucket/sorted": "must be a folder of this machine",
    }.items():
        with pytest.raises(UserError, match=message):
            LabelledFolder.begin(str(path), data=data, named=named, identity="first")
    assert [path.name for path in photos.iterdir()] == ["1.png"]
    for _ in range(2):
        LabelledFolder.begin(str(tmp_path / "new"), data=data, named=named, identity="first")
    with pytest.raises(UserError, match="name an empty folder"):
        LabelledFolder.begin(str(tmp_path / "new"), data=data, named=named, identity="second")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [MARK]
