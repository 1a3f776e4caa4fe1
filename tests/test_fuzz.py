"""Whatever bytes come in: the right rows, a reason for a row, or a sentence, and never another error or result."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import make

from lpclip.config import SourceConfig, UserError
from lpclip.features.store import Store
from lpclip.images.classes import read_classes
from lpclip.images.open import open_source
from lpclip.method.probe import Probe
from lpclip.report.page import Section, render_page
from lpclip.training.search_space import read_space

CONFIG = SourceConfig(max_pixels=10**6, max_bytes=10**6)
COLUMNS = st.sampled_from(["path", "Path", "image", "id", "label", "LABEL", "cls", "text", "x", ""])
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
PATHS = st.sampled_from(
    ["1.png", "./1.png", "a\\1.png", "gone.png", "", " ", "https://127.0.0.1:9/1.png", "x://y"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXTS, below, max_size=3),
    max_leaves=4,
)
PICTURE = draw(0, 1)

few, many = settings(max_examples=30, deadline=None), settings(max_examples=100, deadline=None)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with some of them changed, or cut off."""
    found = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        # The ends of files hold what tells where everything is.
        far = draw(st.integers(0, len(found) - 1))
        place = draw(st.sampled_from([far, len(found) - 1 - far % 600, far % 600])) % len(found)
        found[place] ^= draw(st.integers(1, 255))
    return bytes(found[: draw(st.integers(0, len(found)))] if draw(st.integers(0, 9)) == 0 else found)


def check(path: Path) -> None:
    """A source is refused in a sentence, or each of its rows has an id of its own and an image or a reason."""
    with contextlib.suppress(UserError):
        source = open_source(str(path), config=CONFIG)
        source.examples(3)
        rows = [
            row for unit in source.units for table in source.reader.tables(unit) for row in table.to_pylist()
        ]
        assert source.num_rows in (None, len(rows))
        assert rows
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert row["id"] is not None
            assert (row["image"] is None) == (row["error"] is not None)
            assert row["label"] is None or 0 <= row["label"] < len(source.label_names or range(2**31))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 1.png."""
    found = tmp_path_factory.mktemp("fuzz")
    (found / "1.png").write_bytes(PICTURE)
    return found


@pytest.fixture(scope="module", autouse=True)
def no_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpclip.images.fetch.RETRY_SECONDS", ())
        yield


@many
@given(data=st.data())
def test_lists(folder: Path, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["csv", "tsv", "jsonl"]))
    names = data.draw(st.lists(COLUMNS, min_size=1, max_size=4))
    rows = data.draw(st.lists(st.lists(PATHS | TEXTS, min_size=len(names), max_size=len(names)), max_size=4))
    if form == "jsonl":
        text = "\n".join(
            json.dumps(dict(zip(names, [cell, *data.draw(st.lists(JSON, max_size=3))], strict=False)))
            for cell, *_ in rows
        )
    else:
        mark = data.draw(st.sampled_from(",\t;|"))
        text = "\n".join(mark.join(cells) for cells in (names, *rows))
    (folder / f"list.{form}").write_bytes(data.draw(damaged(text.encode() + b"\n")))
    check(folder / f"list.{form}")


VALUES = st.sampled_from(
    [
        pa.array([PICTURE, b"", None]),
        pa.array(["1.png", None, "gone.png"]),
        pa.array(["1.png", "1.png", ""], pa.large_string()).dictionary_encode(),
        pa.array([{"bytes": PICTURE, "path": "1.png"}, {"bytes": None, "path": "1.png"}, None]),
        pa.array([{"bytes": "x", "path": 1}] * 3),
        pa.array([0, -1, None]),
        pa.array([1.5, float("nan"), 2.0]),
        pa.array([True, None, False]),
        pa.array(["cat", "", "nan"]),
        pa.array([["a"], [], None]),
        pa.array([b"\xff", b"a", b"\xff"]),
        pa.nulls(3),
    ]
)


@many
@given(data=st.data())
def test_parquet(folder: Path, data: st.DataObject) -> None:
    names = data.draw(st.lists(COLUMNS.filter(bool), min_size=1, max_size=4, unique=True))
    table = pa.table({name: data.draw(VALUES) for name in names})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=data.draw(st.integers(1, 3)))
    (folder / "table.parquet").write_bytes(sink.getvalue())
    check(folder / "table.parquet")


@many
@given(data=st.data())
def test_tars(folder: Path, data: st.DataObject) -> None:
    sink = io.BytesIO()
    suffixes = st.sampled_from([".png", ".cls", ".seg.png", ".PNG", "", ".txt", ".tar", "/"])
    kinds = st.sampled_from(
        [tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, b"Z", b"S", b"x", b"g"]
    )
    form = data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
    mode = data.draw(st.sampled_from(["w", "w", "w:gz"]))
    with tarfile.open(fileobj=sink, mode=mode, format=form) as tar:  # type: ignore[call-overload]
        for stem in data.draw(st.lists(st.sampled_from(["1", "2", "a/1.2", ".h", "é" * 40]), max_size=5)):
            info = tarfile.TarInfo(stem + data.draw(suffixes))
            content = data.draw(st.sampled_from([PICTURE, b"", b"3", b"cat", b"\xff", b"1" * 30]))
            info.size = len(content)
            info.type = data.draw(st.just(tarfile.REGTYPE) | kinds)
            tar.addfile(info, io.BytesIO(content))
    (folder / "a.tar").write_bytes(data.draw(damaged(sink.getvalue())))
    check(folder / "a.tar")


@many
@given(data=st.data())
def test_class_files(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["a.txt", "a.csv", "a.json", "a.tsv"]))
    lines = st.lists(
        TEXTS | st.sampled_from(["0 cat", "1 dog", "# a", "cat\tdog", '"', "a,b", "n01440764 x"])
    )
    text = json.dumps(data.draw(JSON)) if name == "a.json" else "\n".join(data.draw(lines))
    (folder / name).write_bytes(data.draw(damaged(text.encode() + b"\n")))
    with contextlib.suppress(UserError):
        found = read_classes(str(folder / name))
        assert len(found.names) >= 2
        assert found.labels is None or len(found.labels) == len(found.names)


@few
@given(
    st.dictionaries(TEXTS | st.sampled_from(["rounds", "temperature_factor", "seed"]), JSON, max_size=3)
    | JSON,
    st.sampled_from(
        ["SPACE = {!r}", "from ray import tune\nSPACE = {{'rounds': tune.choice({!r})}}", "{!r}(", "x = {!r}"]
    ),
)
def test_search_spaces(space: object, form: str) -> None:
    with TemporaryDirectory() as folder, contextlib.suppress(UserError):
        path = Path(folder, "space.py")
        path.write_text(form.format(space))
        found = read_space(str(path))
        for name in found.searched:
            found.values(name)


def flipped(folder: Path, content: Callable[[str], Any]) -> None:
    """Whatever byte of the files below is changed, their content is as it was, or refused."""
    wanted = content(str(folder))
    files = {path: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "identity.json"}

    @many
    @given(data=st.data())
    def look(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(list(files)))
        path.write_bytes(data.draw(damaged(files[path])))
        try:
            with contextlib.suppress(UserError):
                assert content(str(folder)) == wanted
        finally:
            path.write_bytes(files[path])

    look()


def stored(path: str) -> Any:
    store = Store.open(path)
    found = store.features()
    arrays = [
        found.ids.tolist(),
        found.labels.tolist(),
        found.base.tobytes(),
        found.strong["strong"].tobytes(),
    ]
    return arrays, store.quarantined(), store.manifest, store.has_labels(), store.mean("weak").tobytes()


def test_stores(tmp_path: Path) -> None:
    flipped(Path(make(tmp_path)), stored)


def test_a_page_that_is_passed_over_is_noticed(tmp_path: Path) -> None:
    store = Path(make(tmp_path))
    file = store / "quarantine.parquet"
    place = pq.read_metadata(file).row_group(0).column(1).data_page_offset
    for offset in range(place, place + 20):
        data = bytearray(file.read_bytes())
        data[offset] ^= 27
        before, _ = file.read_bytes(), file.write_bytes(data)
        with contextlib.suppress(UserError):
            assert Store.open(str(store)).quarantined() == {"decode": 1}
        file.write_bytes(before)


def probed(path: str) -> Any:
    probe = Probe.load(path)
    return (
        probe.weight.tolist(),
        probe.bias.tolist(),
        probe.temperature,
        probe.class_names,
        probe.encoder,
        probe.summary,
    )


def test_probes(tmp_path: Path) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32))
    about: dict[str, Any] = {
        "class_names": ("a", "b", "c"),
        "encoder": {"name": "é"},
        "summary": {"x": [1, 0.5]},
    }
    Probe(weight=weight, bias=torch.zeros(3), temperature=0.01, **about).save(str(tmp_path))
    flipped(tmp_path, probed)


@few
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20))
def test_names_in_a_page_stay_text(name: str) -> None:
    section = Section(title="x", text="", tables=[("x", [{"class": f"<b>{name}</b>"}])])
    page = render_page("x", facts={}, sections=[section])
    assert "<b>" not in page
    assert f"<b>{name}</b>" in unescape(page)
