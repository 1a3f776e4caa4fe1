"""A feature store is whole, or says that it is not; its rows come back bit for bit, each once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lpclip.config import digest
from lpclip.encoders.passes import mean_view
from lpclip.features.store import CHECKSUMS, Store, fingerprint, matrix, row_order
from lpclip.features.store_writer import DIGEST_MODULUS, Part, StoreWriter, list_parts

DIM = 8
IDENTITY: dict[str, Any] = {
    "encoder": {"name": "toy", "dim": DIM},
    "preprocessing": {"size": 4},
    "views": ["weak", "mirror", "strong"],
    "seed": 0,
    "source": {"files": "abc", "label_names": None},
}
VIEWS = tuple(IDENTITY["views"])


def rows(start: int, stop: int, *, seed: int = 0) -> pa.Table:
    """Rows `start` to before `stop` of one endless table, every third without a label."""
    columns: dict[str, Any] = {
        "id": [f"image-{i}" for i in range(start, stop)],
        "label": pa.array([None if i % 3 == 2 else i % 3 for i in range(start, stop)], pa.int32()),
    }
    for place, view in enumerate(VIEWS):
        found = [np.random.default_rng([seed, place, i]).normal(size=DIM) for i in range(start, stop)]
        matrix = np.array(found, np.float64).reshape(-1, DIM)
        matrix = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
        columns[view] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), DIM)
    return pa.table(columns)


def write(
    writer: StoreWriter, part: Part, table: pa.Table, *, bad: tuple[str, ...] = (), digest: int = 1
) -> None:
    quarantine = [{"id": name, "stage": "decode", "error": f"{name} is broken"} for name in bad]
    writer.write_part(part, rows=table, quarantine=quarantine, content_digest=digest)


def part(unit: int, start: int, stop: int, *, last: bool = True) -> Part:
    return Part(unit=unit, start=start, stop=stop, last=last)


def make(path: Path, *, sizes: tuple[int, ...] = (5, 7, 1)) -> str:
    """A complete store with a unit of so many rows each; the second unit has two parts and a bad image."""
    writer = StoreWriter(str(path / "store"), IDENTITY)
    writer.begin()
    first = 0
    for unit, size in enumerate(sizes):
        if unit == 1:
            write(writer, part(unit, 0, 3, last=False), rows(first, first + 3))
            write(writer, part(unit, 3, size + 1), rows(first + 3, first + size), bad=("x",))
        else:
            write(writer, part(unit, 0, size), rows(first, first + size))
        first += size
    return writer.finish(num_units=len(sizes), rate=1.0).path


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint16)


def test_a_parts_name_tells_its_place_and_other_files_are_not_parts(tmp_path: Path) -> None:
    parts = [part(0, 0, 256), part(2, 0, 100, last=False), part(2, 100, 130), part(1_000_000, 0, 1)]
    assert parts[1].name == "part-000002-000000-000100.parquet"
    assert parts[2].name == "part-000002-000100-000130-last.parquet"
    for name in [p.name for p in reversed(parts)] + ["quarantine.parquet", f"{parts[0].name}.4f.tmp"]:
        (tmp_path / name).touch()
    assert list_parts(str(tmp_path)) == parts


def test_what_lies_in_the_parts_comes_back(tmp_path: Path) -> None:
    store = Store.open(make(tmp_path))
    manifest = store.manifest
    assert (manifest.num_rows, manifest.num_quarantined, len(manifest.parts)) == (13, 1, 4)
    assert (manifest.views, manifest.dim, manifest.seed, manifest.label_names) == (VIEWS, DIM, 0, None)
    found = pa.concat_tables(store.tables(["id", "label"]))
    assert found["id"].to_pylist() == [f"image-{i}" for i in range(13)]
    assert found["label"].to_pylist() == [None if i % 3 == 2 else i % 3 for i in range(13)]
    assert pq.read_table(f"{store.path}/quarantine.parquet").to_pylist() == [
        {"id": "x", "stage": "decode", "error": "x is broken"}
    ]


def test_arrays_come_in_row_order_and_labels_only_when_asked_for(tmp_path: Path) -> None:
    path = make(tmp_path)
    whole = Store.open(path).features()
    ids, labels = Store.open(path).ids_and_labels()
    assert ids.tolist() == Store.open(path).ids().tolist() == whole.ids.tolist()
    assert labels.tolist() == whole.labels.tolist()
    assert labels.dtype == np.int32
    assert {-1, 0, 1} == set(labels.tolist())
    assert Store.open(path).has_labels()
    assert (Store.open(path).features(with_labels=False).labels == -1).all()
    # Each from a store of its own: no order of calls matters.
    assert np.array_equal(bits(Store.open(path).mean("weak", "mirror")), bits(whole.base))
    assert np.array_equal(bits(Store.open(path).mean("strong")), bits(whole.strong["strong"]))


def test_the_manifest_on_disk_is_that_of_format_3(tmp_path: Path) -> None:
    store = Store.open(make(tmp_path))
    found = json.loads(Path(store.path, "manifest.json").read_text())
    assert found.pop("digest") == digest({key: found[key] for key in found if key != "format"})
    assert list(found.items()) == [
        ("format", 3),
        ("fingerprint", "f3895ddff6ee2774337009f0568a0c1a59d418e57e47f0772edfe6b7d115838f"),
        ("identity", IDENTITY),
        (
            "parts",
            [
                "part-000000-000000-000005-last.parquet",
                "part-000001-000000-000003.parquet",
                "part-000001-000003-000008-last.parquet",
                "part-000002-000000-000001-last.parquet",
            ],
        ),
        ("num_rows", 13),
        ("num_quarantined", 1),
        ("content_digest", f"{4:032x}"),
        ("images_per_second", 1.0),
        ("num_labelled", 9),
    ]


def test_a_store_of_format_1_is_read_and_keeps_its_fingerprint(tmp_path: Path) -> None:
    path = make(tmp_path)
    expected = Store.open(path)
    manifest = Path(path) / "manifest.json"
    text = json.loads(manifest.read_text())
    manifest.write_text(
        json.dumps({key: text[key] for key in text if key not in ("num_labelled", "digest")} | {"format": 1})
    )
    for file in Path(path).glob("part-*.parquet"):
        table = pq.read_table(file)
        meta = {key: value for key, value in table.schema.metadata.items() if key != b"labelled"}
        pq.write_table(table.replace_schema_metadata(meta), file)
    found = Store.open(path)
    assert found.manifest.fingerprint == expected.manifest.fingerprint == fingerprint(IDENTITY)
    assert found.manifest.num_labelled is None
    assert found.has_labels()
    assert np.array_equal(bits(found.features().base), bits(expected.features().base))
    again = StoreWriter(path, IDENTITY).finish(num_units=3, rate=1.0).manifest
    assert (again.num_labelled, again.content_digest) == (None, expected.manifest.content_digest)


def test_parts_that_were_written_now_are_not_opened_again(tmp_path: Path) -> None:
    writer = StoreWriter(str(tmp_path), IDENTITY)
    writer.begin()
    known = {
        item.name: writer.write_part(item, rows=rows(first, first + 4), quarantine=[], content_digest=unit)
        for unit, first in enumerate((0, 4))
        for item in [part(unit, 0, 4)]
    }
    expected = writer.finish(num_units=2, rate=1.0).manifest
    for name in known:
        (tmp_path / name).write_bytes(b"")
    assert writer.finish(num_units=2, rate=1.0, known=known).manifest == expected
    with pytest.raises(ValueError, match="is damaged"):
        writer.finish(num_units=2, rate=1.0)


def test_every_float16_comes_back_bit_for_bit(tmp_path: Path) -> None:
    finite = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)].reshape(-1, DIM)
    column = pa.FixedSizeListArray.from_arrays(pa.array(finite.reshape(-1)), DIM)
    ids = [f"{i}" for i in range(len(finite))]
    table = pa.table({"id": ids, "label": pa.nulls(len(ids), pa.int32()), "weak": column, "strong": column})
    identity = {**IDENTITY, "views": ["weak", "strong"]}
    writer = StoreWriter(str(tmp_path), identity)
    writer.begin()
    write(writer, part(0, 0, len(ids)), table)
    found = writer.finish(num_units=1, rate=0).features()
    order = found.ids.astype(int)
    assert np.array_equal(bits(found.base), bits(finite[order]))
    assert np.array_equal(bits(found.strong["strong"]), bits(finite[order]))
    assert (found.labels == -1).all()


@pytest.mark.parametrize("num_workers", [1, 2, 3, 20])
def test_shares_of_the_parts_hold_every_row_once(tmp_path: Path, num_workers: int) -> None:
    store = Store.open(make(tmp_path))
    shares = [store.share(worker, num_workers=num_workers) for worker in range(num_workers)]
    assert sorted(name for share in shares for name in share.manifest.parts) == sorted(store.manifest.parts)
    found = [share.features() for share in shares]
    assert sorted(name for item in found for name in item.ids) == sorted(store.ids())
    for item in found:
        assert item.ids.tolist() == item.ids[row_order(item.ids)].tolist()
        assert item.base.shape == item.strong["strong"].shape == (len(item.ids), DIM)


def test_features_stay_with_their_ids(tmp_path: Path) -> None:
    found = Store.open(make(tmp_path)).features()
    table = rows(0, 13)
    place = [int(name.removeprefix("image-")) for name in found.ids]
    weak, mirror, strong = (matrix(table, view, DIM)[place] for view in VIEWS)
    assert np.array_equal(bits(found.strong["strong"]), bits(strong))
    assert np.array_equal(bits(found.base), bits(mean_view([weak, mirror])))
    np.testing.assert_allclose(np.linalg.norm(found.base.astype(float), axis=1), 1, atol=2e-3)


def test_the_row_order_depends_on_ids_alone() -> None:
    ids = np.array([f"class-{i // 10}/{i}" for i in range(100)])
    shuffled = np.random.default_rng(0).permutation(ids)
    assert ids[row_order(ids)].tolist() == shuffled[row_order(shuffled)].tolist()
    classes = [name[6] for name in ids[row_order(ids)][:20]]
    assert len(set(classes)) > 4, "the order mixes the classes"


def test_the_content_digest_does_not_depend_on_the_cut(tmp_path: Path) -> None:
    digests = []
    for name, cut in {"whole": [(0, 9)], "pieces": [(0, 4), (4, 9)]}.items():
        writer = StoreWriter(str(tmp_path / name), IDENTITY)
        writer.begin()
        for start, stop in cut:
            total = sum((i + 1) << 125 for i in range(start, stop)) % DIGEST_MODULUS
            write(writer, part(0, start, stop, last=stop == 9), rows(start, stop), digest=total)
        digests.append(writer.finish(num_units=1, rate=0).manifest.content_digest)
    assert digests[0] == digests[1]


def test_an_interrupted_store_goes_on_with_its_whole_units(tmp_path: Path) -> None:
    path = str(tmp_path)
    writer = StoreWriter(path, IDENTITY)
    assert writer.begin() == {}
    write(writer, part(0, 0, 2, last=False), rows(0, 2))
    write(writer, part(0, 2, 5), rows(2, 5))
    write(writer, part(1, 0, 4, last=False), rows(5, 9))  # its end is missing
    write(writer, part(2, 2, 4), rows(11, 13))  # its beginning is missing
    write(writer, part(3, 0, 1, last=False), rows(13, 14))  # its middle is missing
    write(writer, part(3, 2, 3), rows(15, 16))
    write(writer, part(4, 0, 0), rows(0, 0))  # an empty unit
    assert writer.begin() == {0: 5, 4: 0}
    assert [p.unit for p in list_parts(path)] == [0, 0, 4]
    assert Store.find(path) is None


def test_an_interrupted_store_is_not_taken_for_a_complete_one(tmp_path: Path) -> None:
    path = make(tmp_path)
    (Path(path) / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"not a complete feature store: it has no manifest\.json"):
        Store.open(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder", {"name": "other", "dim": DIM}),
        ("preprocessing", {"size": 5}),
        ("views", ["weak"]),
        ("seed", 1),
        ("source", {"files": "abd", "label_names": None}),
    ],
)
def test_features_of_another_origin_are_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    path, other = make(tmp_path), {**IDENTITY, key: value}
    assert fingerprint(other) != fingerprint(IDENTITY)
    for check in (lambda: StoreWriter(path, other).begin(), lambda: Store.open(path).require(other)):
        with pytest.raises(ValueError, match=f"was made with another {key}; features of different origin"):
            check()
    Store.open(path).require({k: v for k, v in IDENTITY.items() if k != key})


def test_a_folder_of_foreign_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / part(0, 0, 1).name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"parts without identity\.json"):
        StoreWriter(str(tmp_path), IDENTITY).begin()
    assert (tmp_path / part(0, 0, 1).name).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON .* damaged"),
        (lambda text: "", "is not valid JSON .* damaged"),
        (lambda text: "[]", "is not of format 3"),
        (lambda text: text.replace('"format": 3', '"format": 4'), "is not of format 3"),
        (lambda text: text.replace('"toy"', '"joy"'), "does not fit its own fingerprint"),
        (lambda text: text.replace('"num_rows"', '"rows"'), "does not fit its own fingerprint"),
        (lambda text: text.replace('"num_rows": 13', '"num_rows": 12'), "does not fit its own fingerprint"),
        (lambda text: text.replace('"format": 3', '"format": 2'), "does not fit its own fingerprint"),
    ],
)
def test_a_changed_or_damaged_manifest_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = make(tmp_path)
    manifest = Path(path) / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(ValueError, match=message):
        Store.find(path)
    with pytest.raises(ValueError, match=message):
        Store.open(path)


def test_a_damaged_identity_is_refused(tmp_path: Path) -> None:
    StoreWriter(str(tmp_path), IDENTITY).begin()
    (tmp_path / "identity.json").write_text(json.dumps(IDENTITY)[:-5])
    with pytest.raises(ValueError, match=r"identity\.json is not valid JSON"):
        StoreWriter(str(tmp_path), IDENTITY).begin()


def test_a_lost_part_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path)
    (Path(path) / part(0, 0, 5).name).unlink()
    with pytest.raises(
        ValueError, match=r"has lost part-000000-000000-000005-last\.parquet: run the command that made"
    ):
        Store.open(path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_part_is_noticed(tmp_path: Path, keep: float) -> None:
    path = make(tmp_path)
    file = Path(path) / part(1, 3, 8).name
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .* remove this file"):
        Store.open(path).features()


@pytest.mark.parametrize("column", ["id", "label", "weak", "strong"])
@pytest.mark.parametrize("last", [True, False])
def test_a_changed_byte_is_noticed_by_whoever_reads_it(tmp_path: Path, column: str, last: bool) -> None:
    """The last byte of the data, or the last byte of the dictionary (labels alone have one)."""
    path = make(tmp_path)
    file = Path(path) / part(1, 3, 8).name
    group = pq.read_metadata(file).row_group(0)
    place = next(
        c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith(column)
    )
    data = bytearray(file.read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    end = start + place.total_compressed_size if last else place.data_page_offset
    data[end - 1 if end > start else end + place.total_compressed_size - 1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*CRC.*: remove this file and run"):
        Store.open(path).features()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
@pytest.mark.parametrize("mark", [{}, {CHECKSUMS: b"1"}])
def test_features_that_are_none_are_refused_in_parts_of_earlier_versions(
    tmp_path: Path, value: float, mark: dict[bytes, bytes]
) -> None:
    path = make(tmp_path)
    expected = Store.open(path).features()
    for file in Path(path).glob("part-*.parquet"):
        table = pq.read_table(file)
        meta = {key: text for key, text in table.schema.metadata.items() if key != CHECKSUMS} | mark
        pq.write_table(table.replace_schema_metadata(meta), file)
    assert np.array_equal(bits(Store.open(path).features().base), bits(expected.base))
    table = pq.read_table(file := Path(path) / part(1, 3, 8).name)
    damaged = matrix(table, "strong", DIM).copy()
    damaged[2, 3] = value
    column = pa.FixedSizeListArray.from_arrays(pa.array(damaged.reshape(-1)), DIM)
    pq.write_table(table.set_column(table.column_names.index("strong"), "strong", column), file)
    with pytest.raises(
        ValueError, match=rf"{file.name} is damaged \(a feature is not of unit norm\): remove"
    ):
        Store.open(path).features()


def test_a_removed_part_alone_is_made_again(tmp_path: Path) -> None:
    path = make(tmp_path)
    before, manifest = Store.open(path).features(), Store.open(path).manifest
    (Path(path) / part(1, 3, 8).name).unlink()
    assert Store.find(path) is None
    writer = StoreWriter(path, IDENTITY)
    assert writer.begin() == {0: 5, 2: 1}
    write(writer, part(1, 0, 8), rows(5, 12), bad=("x",), digest=2)
    after = writer.finish(num_units=3, rate=1.0)
    assert after.manifest.content_digest == manifest.content_digest
    assert np.array_equal(bits(after.features().base), bits(before.base))


def test_one_long_id_makes_no_other_longer(tmp_path: Path) -> None:
    writer = StoreWriter(str(tmp_path), IDENTITY)
    writer.begin()
    table = rows(0, 300)
    ids = [*table["id"].to_pylist()[:-1], "x" * 1024]
    write(writer, part(0, 0, 300), table.set_column(0, "id", pa.array(ids)))
    store = writer.finish(num_units=1, rate=0)
    for found in (store.ids(), store.ids_and_labels()[0], store.features().ids):
        assert sorted(found) == sorted(ids)
        assert found.nbytes == 8 * 300


def test_a_store_of_bad_images_alone_is_empty(tmp_path: Path) -> None:
    writer = StoreWriter(str(tmp_path), IDENTITY)
    writer.begin()
    write(writer, part(0, 0, 2), rows(0, 0), bad=("a", "b"))
    store = writer.finish(num_units=1, rate=0)
    assert (store.manifest.num_rows, store.manifest.num_quarantined) == (0, 2)
    assert not store.has_labels()
    assert store.mean("weak", "mirror").shape == (0, DIM)
    found = store.features()
    assert found.base.shape == found.strong["strong"].shape == (0, DIM)


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the output folder"):
        StoreWriter(str(tmp_path / "file" / "store"), IDENTITY).begin()
