"""A bad or hostile file, row or member costs itself: not the job, not the memory, not the other rows, not an hour."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PEAK
from PIL import Image

from lpclip.config import SourceConfig, UserError
from lpclip.images import tars
from lpclip.images.fetch import fetch_all
from lpclip.images.jpegs import ordinary_jpeg
from lpclip.images.open import open_source
from lpclip.images.pixels import decode_image


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def read(path: Path) -> dict[str, str | None]:
    """The reason of each row, None for a good one, by its id."""
    source = open_source(str(path), config=SourceConfig())
    found: dict[str, str | None] = {}
    for unit in source.units:
        for table in source.reader.tables(unit):
            new = dict(zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True))
            assert len(new) == len(table)
            assert not new.keys() & found.keys()
            found |= new
    return found


def labels(path: Path) -> dict[str, str | None]:
    return open_source(str(path), config=SourceConfig()).examples(10)


class TestFiles:
    def test_what_is_no_file_is_not_read(self, tmp_path: Path) -> None:
        folder = tmp_path / "photos"
        folder.mkdir()
        (folder / "good.png").write_bytes(png(1))
        os.mkfifo(folder / "fifo.png")
        (folder / "endless.png").symlink_to("/dev/zero")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(folder / "socket.png"))
            (tmp_path / "list.csv").write_text(
                "path\n" + "\n".join(f"photos/{name}" for name in os.listdir(folder))
            )
            for path in (folder, tmp_path / "list.csv"):
                found = {os.path.basename(name): error for name, error in read(path).items()}
                assert found.pop("good.png") is None
                assert found.keys() == {"fifo.png", "endless.png", "socket.png"}
                assert all(
                    "is a FIFO, a socket or a device, and no file" in str(error) for error in found.values()
                )

    def test_a_server_that_sends_its_headers_slowly_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr("lpclip.images.fetch.RETRY_SECONDS", ())
        with socket.create_server(("127.0.0.1", 0)) as server:

            def dribble() -> None:
                connection, _ = server.accept()
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n")
                    for number in range(60):
                        connection.sendall(f"X-{number}: 0\r\n".encode())
                        time.sleep(0.2)
                except OSError:
                    connection.close()

            Thread(target=dribble, daemon=True).start()
            begin = time.monotonic()
            uri = f"http://127.0.0.1:{server.getsockname()[1]}/1.png"
            (found,) = fetch_all([uri], root="", max_bytes=1000, schemes=("http",), timeout=0.5)
            assert isinstance(found, TimeoutError), found
            assert time.monotonic() - begin < 5

    def test_what_jobs_wrote_is_no_data(self, tmp_path: Path) -> None:
        for name in ("cat/1.png", "runs/a/figures/1.png", "mlruns/1/artifacts/1.png", "photos/2.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(png(1))
        for name in ("job.json", "summary.json"):
            (tmp_path / "runs/a" / name).write_text("{}")
        (tmp_path / "photos/job.json").write_text("{}")
        assert read(tmp_path) == {"cat/1.png": None, "photos/2.png": None}

    def test_a_fifo_is_no_data(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(
            UserError, match="fifo is a FIFO, a socket or a device: save what it gives as a file"
        ):
            open_source(str(tmp_path / "fifo"), config=SourceConfig())


class TestManifests:
    def test_a_line_break_in_a_cell_ends_no_row(self, tmp_path: Path) -> None:
        # Tables are read in blocks of a megabyte or more; this one has twenty.
        text = "a caption\nof two lines, " * 40
        rows = [f'{row},{row}.png,"{text}"' for row in range(20_000)]
        path = tmp_path / "list.csv"
        path.write_text("\n".join(["id,path,text", *rows]))
        for row in range(3):
            (tmp_path / f"{row}.png").write_bytes(png(row))
        source = open_source(str(path), config=SourceConfig())
        assert source.num_rows == 20_000
        assert source.examples(2).keys() == {"0", "19999"}

    @pytest.mark.parametrize("row", ['2.png,"12 inch dog', '2.png,"a","b'])
    def test_a_quote_that_is_not_closed_swallows_no_rows(self, row: str, tmp_path: Path) -> None:
        path = tmp_path / "list.csv"
        path.write_text("\n".join(["path,text", "1.png,a", row, "3.png,c", "4.png,d"]))
        (tmp_path / "1.png").write_bytes(png(1))
        with pytest.raises(UserError, match="list.csv: .*(that is not closed|cannot be read)"):
            open_source(str(path), config=SourceConfig())

    def test_line_breaks_are_told_of(self, tmp_path: Path) -> None:
        path = tmp_path / "list.csv"
        path.write_text('path,text\n1.png,"a\nb ""c"""\n')
        (tmp_path / "1.png").write_bytes(png(1))
        (note,) = open_source(str(path), config=SourceConfig()).notes
        assert note.endswith("cells of the column 'text' hold line breaks: a cell in quotes may")

    @pytest.mark.parametrize("word", ["true,false", "True,False", "1.0,0"])
    def test_a_column_for_each_class_may_say_true(self, word: str, tmp_path: Path) -> None:
        yes, no = word.split(",")
        path = tmp_path / "list.csv"
        path.write_text(f"path,cat,dog\n1.png,{yes},{no}\n2.png,{no},{yes}\n")
        (tmp_path / "1.png").write_bytes(png(1))
        source = open_source(str(path), config=SourceConfig(label_column="cat,dog"))
        assert source.examples(2) == {"1.png": "cat", "2.png": "dog"}
        path.write_text("path,cat,dog\n1.png,yes,no\n")
        with pytest.raises(UserError, match="no row has a single 1, or true, in the columns cat, dog"):
            open_source(str(path), config=SourceConfig(label_column="cat,dog"))

    def test_columns_of_one_name_are_no_fault(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("path,x,x\n1.png,1,0\n")
        (tmp_path / "1.png").write_bytes(png(1))
        assert read(tmp_path / "list.csv") == {"1.png": None}
        with pytest.raises(UserError, match="no column 'x,x'"):
            open_source(str(tmp_path / "list.csv"), config=SourceConfig(label_column="x,x"))

    def test_a_gap_is_no_label(self, tmp_path: Path) -> None:
        path = tmp_path / "list.csv"
        path.write_text("path,label\n1.png,cat\n2.png,nan\n3.png,\n4.png,dog\n")
        (tmp_path / "1.png").write_bytes(png(1))
        assert labels(path) == {"1.png": "cat", "2.png": None, "3.png": None, "4.png": "dog"}

    def test_values_of_json_stay_as_they_are_written(self, tmp_path: Path) -> None:
        ids: list[Any] = [2**64 - 1, 2**64 - 2, "2020-01-01", "2020-01-02T10:00:00Z", 0.10, "\ud800"]
        path = tmp_path / "list.jsonl"
        path.write_text(
            "\n".join(json.dumps({"id": name, "path": "1.png", "label": 3}) for name in ids) + "\n\n"
        )
        (tmp_path / "1.png").write_bytes(png(1))
        assert labels(path) == {
            "18446744073709551615": "3",
            "18446744073709551614": "3",
            "2020-01-01": "3",
            "2020-01-02T10:00:00Z": "3",
            "0.1": "3",
            "\\ud800": "3",
        }

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            ('{"path": "1.png"}\n{"path": ', "line 2 cannot be read as JSON"),
            ('{"path": "1.png"}\n[1]', "line 2 is no JSON object"),
            ("[" * 100_000, "line 1 cannot be read as JSON"),
            ('{"path": "1.png"}\n{"path": ["1.png"]}', "column 'path' holds values of different kinds"),
        ],
    )
    def test_what_is_no_row_is_named(self, lines: str, expected: str, tmp_path: Path) -> None:
        path = tmp_path / "list.jsonl"
        path.write_text(lines)
        with pytest.raises(UserError, match=f"list.jsonl: {expected}"):
            open_source(str(path), config=SourceConfig())

    def test_a_row_without_a_path_costs_itself(self, tmp_path: Path) -> None:
        (tmp_path / "1.png").write_bytes(png(1))
        (tmp_path / "list.csv").write_text("path,label\n1.png,a\n,b\n ,c\n")
        (tmp_path / "list.jsonl").write_text('{"path": "1.png"}\n{"path": null}\n{"path": ""}\n')
        pq.write_table(pa.table({"path": ["1.png", "", " "]}), tmp_path / "list.parquet")
        for name in ("list.csv", "list.jsonl", "list.parquet"):
            found = read(tmp_path / name)
            found.pop("1.png" if name != "list.parquet" else "list.parquet:0")
            assert found == dict.fromkeys((f"{name}:1", f"{name}:2"), "no path in this row")
        (tmp_path / "list.csv").write_text("path,id\n1.png,a\n1.png,\n1.png,\n")
        with pytest.raises(UserError, match="no id in 2 rows; --id-column '' numbers the rows"):
            open_source(str(tmp_path / "list.csv"), config=SourceConfig())

    def test_a_byte_of_0_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "list.csv"
        path.write_bytes(b"path\n1.png\n2\0.png\n")
        with pytest.raises(UserError, match="list.csv holds a byte of 0 in line 3, which no text has"):
            open_source(str(path), config=SourceConfig())
        path.write_bytes("path\n1.png\n2.png\n".encode("utf-16-le"))
        with pytest.raises(UserError, match="is not UTF-8 text"):
            open_source(str(path), config=SourceConfig())

    @pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.parquet"])
    def test_columns_that_differ_in_case_are_not_guessed(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "1.png").write_bytes(png(1))

        def write(*columns: str) -> None:
            row = {"path": "1.png", **{column: column for column in columns}}
            (tmp_path / "list.csv").write_text("\n".join([",".join(row), ",".join(row.values())]))
            (tmp_path / "list.jsonl").write_text(json.dumps(row))
            pq.write_table(pa.Table.from_pylist([row]), tmp_path / "list.parquet")

        write("Label", "LABEL")
        with pytest.raises(UserError, match="the columns LABEL and Label have one name: rename all but one"):
            open_source(str(tmp_path / name), config=SourceConfig())
        assert open_source(str(tmp_path / name), config=SourceConfig(label_column="Label")).label_names == (
            "Label",
        )
        write("LABEL", "label", "Label")
        assert open_source(str(tmp_path / name), config=SourceConfig()).label_names == ("label",)


class TestLabels:
    @pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
    @pytest.mark.parametrize(
        ("cells", "names", "note"),
        [
            (["cat", "", " nan ", "dog "], ("cat", "dog"), None),
            ([True, False, True, None], ("false", "true"), None),
            (["0", "1", "cat", ""], ("0", "1", "cat"), "labels: 0 in the column 'label' of "),
            (["1.5", "2", "1.5", "2"], ("1.5", "2"), "labels: 1.5 in the column 'label' of "),
            (["cat", "dog2", "3d", "a 1"], ("3d", "a 1", "cat", "dog2"), None),
        ],
    )
    def test_they_are_the_same_in_every_kind_of_list(
        self, form: str, cells: list[Any], names: tuple[str, ...], note: str | None, tmp_path: Path
    ) -> None:
        path = tmp_path / f"list.{form}"
        rows = [{"path": f"{row}.png", "label": cell} for row, cell in enumerate(cells)]
        for row in rows:
            (tmp_path / row["path"]).write_bytes(png(1))
        if form == "csv":
            text = [
                f"{row['path']},{'' if row['label'] is None else str(row['label']).lower()}" for row in rows
            ]
            path.write_text("\n".join(["path,label", *text]))
        elif form == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        source = open_source(str(path), config=SourceConfig())
        assert source.label_names == names
        words = [None if cell is None else str(cell).strip().lower() for cell in cells]
        expected = [names.index(word) if word in names else None for word in words]
        assert [row.label for unit in source.units for row in source.reader.rows(unit)] == expected
        assert [text[: len(note or "")] for text in source.notes] == ([note] if note else [])


class TestParquet:
    @pytest.mark.parametrize(
        "metadata",
        [
            {"classes": "5"},
            {"classes": "{"},
            {"classes": "[1, 2]"},
            {"classes": '["\\ud800", "b"]'},
            {"classes": "[" * 100_000},
            {"huggingface": "[]"},
            {"huggingface": b"\xff"},
            {"huggingface": '{"info": null}'},
            {"huggingface": '{"info": {"features": {"label": {"names": 5}}}}'},
        ],
    )
    def test_metadata_that_are_no_names_are_none(self, metadata: dict[str, Any], tmp_path: Path) -> None:
        table = pa.table({"image": [png(0), png(1)], "label": [0, 1]}).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / "a.parquet")
        assert labels(tmp_path / "a.parquet") == {"a.parquet:0": "0", "a.parquet:1": "1"}

    def test_a_label_without_a_name_is_refused(self, tmp_path: Path) -> None:
        table = pa.table({"image": [png(0)], "label": [2]}).replace_schema_metadata(
            {"classes": '["cat", "dog"]'}
        )
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(
            UserError, match="column 'label' has the label 2, and names for the labels 0 to 1 alone"
        ):
            open_source(str(tmp_path / "a.parquet"), config=SourceConfig())

    def test_views_are_read_like_other_strings_and_bytes(self, tmp_path: Path) -> None:
        struct = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
        images = {"image": pa.array([png(0), png(1)], pa.binary_view())}
        structs = {
            "image": pa.array([{"bytes": png(0), "path": None}, {"bytes": png(1), "path": "x"}], struct)
        }
        for number, column in enumerate((images, structs)):
            words = {
                "id": pa.array(["a", "b"], pa.string_view()),
                "label": pa.array(["x", "y"], pa.string_view()),
            }
            path = tmp_path / f"{number}.parquet"
            pq.write_table(pa.table(words | column), path)
            assert read(path) == {"a": None, "b": None}
            assert labels(path) == {"a": "x", "b": "y"}


def sparse(path: Path, kind: str) -> None:
    (path.parent / "hole.png").write_bytes(b"")
    os.truncate(path.parent / "hole.png", 1 << 30)
    command = ["tar", "--sparse", f"--format={kind}", "-cf", str(path), "-C", str(path.parent), "hole.png"]
    subprocess.run(command, check=True)


class TestTars:
    @pytest.mark.parametrize("kind", ["gnu", "posix"])
    def test_sparse_members_are_not_filled(self, kind: str, tmp_path: Path) -> None:
        sparse(tmp_path / "a.tar", kind)
        found = read(tmp_path / "a.tar")
        assert found == {"a.tar/hole": "a sparse file, of which parts are left out"}

    @pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "w"])
    def test_a_tar_that_unpacks_to_very_much_is_left(
        self, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tars, "FREE_BYTES", 1 << 20)
        path = tmp_path / "a.tar"
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            for name, data in (("good.png", png(1)), *((f"{i}.png", bytes(1 << 20)) for i in range(10))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found = read(path)
        assert found["a.tar/good"] is None
        if mode == "w":
            assert len(found) == 11
        else:
            assert found.get("a.tar/(rest)") == "tar: unpacks to more than 100 times its size"

    def test_a_label_that_is_too_large_costs_its_row(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in (
                ("1.png", png(1)),
                ("1.cls", b"99999999999"),
                ("2.png", png(2)),
                ("2.cls", b"7"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found = read(tmp_path / "a.tar")
        assert found == {"a.tar/1": "the label 99999999999 is above 2147483647", "a.tar/2": None}

    def test_no_label_is_lost_without_a_word(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:

            def add(name: str, data: bytes, *, link: str = "") -> None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if link:
                    info.type, info.linkname = tarfile.LNKTYPE, link
                tar.addfile(info, io.BytesIO(data))

            add("0.png", png(0))
            add("1.png", png(1))
            add("1.cls", b"7")
            add("2.png", png(2))
            add("2.cls", b"cat")
            add("3.png", png(3))
            add("3.cls", b"", link="1.cls")
            add("4.png", png(4))
            add("4.cls", b"nan")
            add("0.cls", b"3")
            add("4.json", b"{}")
        assert read(tmp_path / "a.tar") == {
            "a.tar/0": None,
            "a.tar/1": None,
            "a.tar/2": "the label in its .cls is no whole number: 'cat'",
            "a.tar/3": "its .cls is a link, which is not followed",
            "a.tar/4": None,
            "a.tar/0//2": "its .cls lies apart from its image: the files of a sample must lie side by side",
        }
        source = open_source(str(tmp_path / "a.tar"), config=SourceConfig())
        assert (source.labels_from, source.notes) == ("the .cls files", ())
        source = open_source(str(tmp_path / "a.tar"), config=SourceConfig(label_column=""))
        rows = [row for unit in source.units for row in source.reader.rows(unit)]
        assert [(row.error, row.label) for row in rows] == [(None, None)] * 5

    @pytest.mark.parametrize(
        "headers", [{"GNU.sparse.map": "0,"}, {"size": "-1"}, {"GNU.sparse.size": "x"}, {"size": "9" * 5000}]
    )
    def test_headers_that_are_no_numbers_cost_the_rest(self, headers: dict[str, str], tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name in ("1.png", "2.png"):
                info = tarfile.TarInfo(name)
                info.size = len(png(1))
                info.pax_headers = headers if name == "2.png" else {}
                tar.addfile(info, io.BytesIO(png(1)))
        found = read(tmp_path / "a.tar")
        assert found.pop("a.tar/1") is None
        assert any(found.values())

    def test_words_in_all_of_a_tar_cost_no_row(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in (("0.png", png(0)), ("1.png", png(1)), ("1.cls", b"cat"), ("2.png", png(2))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        (note,) = open_source(str(tmp_path / "a.tar"), config=SourceConfig()).notes
        assert note.endswith("hold words such as 'cat'; only numbers are labels there")
        assert read(tmp_path / "a.tar") == dict.fromkeys(("a.tar/0", "a.tar/1", "a.tar/2"))


class TestImages:
    def test_an_image_of_nothing_but_nan_is_not_drawn_black(self) -> None:
        limits = {"max_pixels": 10**8, "max_bytes": 10**8}
        for values, is_good in (((np.nan, 0.5), True), ((np.nan, np.nan), False), ((np.inf, -np.inf), False)):
            buffer = io.BytesIO()
            Image.fromarray(np.array([values], np.float32)).save(buffer, "TIFF")
            if is_good:
                assert decode_image(buffer.getvalue(), **limits).size == (2, 1)
                continue
            with pytest.raises(UserError, match="no pixel has a value"):
                decode_image(buffer.getvalue(), **limits)

    def test_a_jpeg_of_very_many_scans_is_not_decoded(self) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (400, 400)).save(buffer, "JPEG", progressive=True)
        data = buffer.getvalue()
        last = data[data.rindex(b"\xff\xda") : -2]
        limits = {"max_pixels": 10**8, "max_bytes": 10**8}
        assert decode_image(data, **limits).size == (400, 400)
        with pytest.raises(UserError, match="a JPEG of more than 100 scans"):
            decode_image(data[:-2] + 5000 * last + data[-2:], **limits)
        assert ordinary_jpeg(data, **limits) is not None
        assert ordinary_jpeg(data[:-2] + 5000 * last + data[-2:], **limits) is None


MEASURE = """
import sys
from lpclip.config import SourceConfig
from lpclip.images.open import open_source

source = open_source(sys.argv[1], config=SourceConfig())
before, rows = peak(), 0
for unit in source.units:
    for table in source.reader.tables(unit):
        rows += len(table)
print(rows, (peak() - before) / 1e6)
"""


def write_parquet(path: Path) -> None:
    pages = {"write_batch_size": 1, "data_page_size": 1 << 20, "use_dictionary": False}
    pq.write_table(pa.table({"image": [bytes(20 << 20)] * 32}), path, **pages)


def write_list(path: Path) -> None:
    (path.parent / "0.png").write_bytes(np.random.default_rng(0).bytes(30 << 20))
    for row in range(1, 64):
        os.link(path.parent / "0.png", path.parent / f"{row}.png")
    path.write_text("path\n" + "\n".join(f"{row}.png" for row in range(64)))


@pytest.mark.parametrize(("name", "write"), [("a.parquet", write_parquet), ("a.csv", write_list)])
def test_large_images_are_in_memory_a_few_at_a_time(
    name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / name)
    command = [sys.executable, "-c", PEAK + MEASURE, str(tmp_path / name)]
    rows, megabytes = map(
        float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    # A table takes 128 MB and one image more, twice for a moment, beside what is read ahead.
    # All of a unit would take 2,500 or 1,600 MB.
    assert rows == {"a.parquet": 32, "a.csv": 64}[name]
    assert megabytes < {"a.parquet": 900, "a.csv": 1250}[name]
