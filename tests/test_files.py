"""Files are there whole or not at all, by path and by URI alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lpclip import files
from lpclip.config import UserError


@pytest.fixture(params=["path", "uri"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "path" else tmp_path.as_uri()


def test_bytes_come_back_and_nothing_else_is_left(folder: str):
    path = files.join(folder, "data.bin")
    for data in (b"", b"\x00\xff" * 1000, b"shorter"):
        files.write_bytes(path, data)
        assert files.read_bytes(path) == data
        assert files.list_names(folder) == ["data.bin"]


def test_a_memory_view_is_written_as_its_bytes(folder: str):
    files.write_bytes(files.join(folder, "data.bin"), memoryview(b"abcd")[1:3])
    assert files.read_bytes(files.join(folder, "data.bin")) == b"bc"


def test_json_comes_back(folder: str):
    value = {"a": [1, 2.5, None, True], "Ünïcode": "雪", "nested": {"b": 1e-300}}
    files.write_json(files.join(folder, "value.json"), value)
    assert files.read_json(files.join(folder, "value.json")) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_what_is_no_json_is_refused_and_the_old_file_stays(value: object, folder: str):
    path = files.join(folder, "value.json")
    files.write_json(path, {"old": 1})
    with pytest.raises(ValueError):
        files.write_json(path, value)
    assert files.read_json(path) == {"old": 1}
    assert files.list_names(folder) == ["value.json"]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"{} {}"])
def test_damaged_json_is_named(data: bytes, folder: str):
    path = files.join(folder, "value.json")
    files.write_bytes(path, data)
    with pytest.raises(ValueError, match="value.json is not valid JSON"):
        files.read_json(path)


def test_what_is_not_there_is_a_missing_file(folder: str):
    path = files.join(folder, "nowhere", "data.bin")
    assert not files.exists(path)
    assert files.list_names(files.join(folder, "nowhere")) == []
    with pytest.raises(FileNotFoundError):
        files.read_bytes(path)
    with pytest.raises(FileNotFoundError):
        files.read_json(path)


def test_folders_are_made_with_their_parents_and_again_without_harm(folder: str):
    path = files.join(folder, "a", "b")
    for _ in range(2):
        files.make_folder(path)
        files.write_bytes(files.join(path, "data.bin"), b"1")
    assert files.exists(path)
    assert files.list_names(path) == ["data.bin"]


def test_names_are_sorted_and_hold_no_folders(folder: str):
    for name in ("b", "a", "c"):
        files.write_bytes(files.join(folder, name), b"")
    files.make_folder(files.join(folder, "below"))
    assert files.list_names(folder) == ["a", "b", "c"]


def test_deleting_takes_a_file_or_a_folder_and_no_more(folder: str):
    below = files.join(folder, "below")
    files.make_folder(below)
    for path in (files.join(folder, "a"), files.join(folder, "b"), files.join(below, "c")):
        files.write_bytes(path, b"")
    files.delete(files.join(folder, "a"))
    files.delete_folder(below)
    assert files.list_names(folder) == ["b"]
    assert not files.exists(below)


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(UserError, match=f"cannot write to the output folder {folder}: {file} is a file$"):
            files.make_folder(str(folder))
    with pytest.raises(UserError, match="the name is not UTF-8"):
        files.make_folder(str(tmp_path / "caf\udce9"))


def test_a_folder_of_the_system_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="cannot write to the output folder /proc/nope: [A-Z]"):
        files.make_folder("/proc/nope")


def test_a_changed_byte_in_a_table_is_a_sentence_with_the_way_out(folder: str):
    path = files.join(folder, "table.parquet")
    table = pa.table({"confidence": np.random.default_rng(0).random(1000)})
    files.write_parquet(path, table)
    with files.open_parquet(path, remedy="remove it") as found:
        assert found.read() == table
    data = bytearray(files.read_bytes(path))
    data[len(data) // 2] ^= 1
    files.write_bytes(path, bytes(data))
    with (
        pytest.raises(UserError, match=r"table\.parquet is damaged \(.*CRC.*\): remove it"),
        files.open_parquet(path, remedy="remove it") as found,
    ):
        found.read()


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="cannot open 'nosuch://bucket/a'"):
        files.resolve("nosuch://bucket/a")


def test_home_and_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert files.resolve("a/b")[1] == str(tmp_path / "a" / "b")
    assert files.resolve("~/a")[1] == str(Path.home() / "a")


def test_paths_are_joined_with_one_slash():
    assert files.join("a/", "b", "c") == "a/b/c"
    assert files.join("s3://bucket/a", "b") == "s3://bucket/a/b"


FULL_DISK = """
import resource, signal, sys
from lpclip import files
from lpclip.config import UserError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.write_bytes(sys.argv[1], b"new" * 10_000)
except UserError as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_the_old_file_and_no_half_of_the_new_one(folder: str):
    path = files.join(folder, "data.bin")
    files.write_bytes(path, b"old")
    # A limit on the size of files fails like a full disk does: in the middle of writing.
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert f"cannot write {path}" in done.stdout
    assert files.read_bytes(path) == b"old"
    assert files.list_names(folder) == ["data.bin"]
