"""Small pictures for people: of the first images in row order, the same in every run, and never in a feature's way."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw, write_tar
from PIL import Image
from test_gpu_decoding import jpeg, picture, without_tables
from test_store import make, part, rows, write

from lpclip.config import SourceConfig
from lpclip.features import thumbnails
from lpclip.features.decode_stage import decode_unit
from lpclip.features.store import Store, row_order
from lpclip.features.store_writer import StoreWriter
from lpclip.features.thumbnails import MAX_BYTES, Sample, thumbnail
from lpclip.images.open import open_source
from lpclip.images.pixels import Preprocess
from lpclip.images.views import parse_views

PREPROCESS = Preprocess(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
ALL = Sample(num_rows=1, num_units=1)


def ids(count: int, *, prefix: str = "") -> list[str]:
    return [f"{prefix}{i}.jpg" for i in range(count)]


def in_row_order(names: list[str]) -> list[str]:
    array = np.array(names, dtype=object)
    return array[row_order(array)].tolist()


def test_the_first_in_row_order_are_chosen_where_the_number_of_rows_is_known() -> None:
    names = ids(50_000)
    sample = Sample(num_rows=len(names), num_units=200)
    chosen = [n for n, is_chosen in zip(names, sample.chosen(names, start=0), strict=True) if is_chosen]
    assert 19_500 < len(chosen) < 20_500
    assert set(chosen) == set(in_row_order(names)[: len(chosen)])
    # The cut into tables does not matter.
    parts = [sample.chosen(names[start : start + 300], start=start) for start in range(0, 50_000, 300)]
    assert np.concatenate(parts).tolist() == sample.chosen(names, start=0).tolist()
    assert Sample(num_rows=20_000, num_units=80).chosen(names[:20_000], start=0).all()


def test_the_first_in_row_order_are_among_those_of_tars_of_any_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thumbnails, "MOST_THUMBNAILS", 1000)
    units = [ids(10_000, prefix=f"{tar}/") for tar in range(4)]
    sample = Sample(num_rows=None, num_units=4)
    chosen = [
        name
        for names in units
        for name, is_chosen in zip(names, sample.chosen(names, start=0), strict=True)
        if is_chosen
    ]
    first = in_row_order([name for names in units for name in names])[:950]
    assert set(first) < set(chosen)
    assert len(chosen) < 6000
    again = [sample.chosen(units[1][start : start + 256], start=start) for start in range(0, 10_000, 256)]
    assert np.concatenate(again).sum() == sum(name.startswith("1/") for name in chosen)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 320), (160, 107)), ((48, 64), (48, 64)), ((1, 5000), (1, 160)), ((161, 160), (160, 159))],
)
def test_a_thumbnail_is_a_small_jpeg_and_never_enlarged(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, (200, 30, 40))
    image.info["comment"] = b"taken at home " * 1000
    data = thumbnail(image)
    assert data is not None
    assert len(data) < 1500
    with Image.open(io.BytesIO(data)) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", expected)
        np.testing.assert_allclose(np.asarray(small).mean(axis=(0, 1)), (200, 30, 40), atol=3)


def test_a_thumbnail_of_many_bytes_is_written_at_a_lower_quality_or_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (160, 160, 3)).astype(np.uint8) * 255
    first = thumbnail(Image.fromarray(noise))
    assert first is not None
    assert len(first) <= MAX_BYTES
    monkeypatch.setattr(thumbnails, "MAX_BYTES", 100)
    assert thumbnail(Image.fromarray(noise)) is None


def folder_of(path: Path, images: dict[str, bytes]) -> None:
    path.mkdir()
    for name, data in images.items():
        (path / name).write_bytes(data)


def table_of(path: Path, images: dict[str, bytes]) -> None:
    pq.write_table(pa.table({"id": list(images), "image": list(images.values())}), path)


def decoded(path: Path, *, sample: Sample | None = ALL, leave_jpegs: bool = False) -> pa.Table:
    """The one unit of the data at `path`, decoded."""
    source = open_source(str(path), config=SourceConfig())
    units = pa.table({"unit": [0], "spec": list(source.units)})
    options: dict[str, Any] = {"reader": source.reader, "limits": source.config, "preprocess": PREPROCESS}
    tables = decode_unit(
        units, **options, views=parse_views("weak"), seed=0, sample=sample, leave_jpegs=leave_jpegs
    )
    return pa.concat_tables(tables)


@pytest.mark.parametrize(
    ("name", "save"), [("photos", folder_of), ("photos.tar", write_tar), ("photos.parquet", table_of)]
)
def test_images_of_every_kind_of_source_get_one_and_damaged_images_none(
    name: str, save: Any, tmp_path: Path
) -> None:
    images = {f"{i}.png": draw(i % 3, i) for i in range(4)} | {"5.png": b"damaged"}
    save(tmp_path / name, images)
    table = decoded(tmp_path / name)
    found = {
        f"{Path(key).stem}.png": image
        for key, image in zip(table["id"].to_pylist(), table["thumbnail"].to_pylist(), strict=True)
    }
    assert found.pop("5.png") is None
    assert sorted(found) == [f"{i}.png" for i in range(4)]
    for key, data in found.items():
        with Image.open(io.BytesIO(data)) as small, Image.open(io.BytesIO(images[key])) as image:
            assert small.size == image.size
            difference = np.asarray(small).astype(float) - np.asarray(image.convert("RGB"))
            assert np.abs(difference).mean() < 12
    # Pixels are as they are without.
    without = decoded(tmp_path / name, sample=None)
    assert table.drop_columns(["thumbnail"]) == without


def test_a_jpeg_that_a_gpu_decodes_has_one_as_well(tmp_path: Path) -> None:
    whole = jpeg(picture(900, 600))
    # Only its header is looked at before the GPU has it.
    folder_of(tmp_path / "photos", {"a.jpg": whole, "b.jpg": without_tables(whole)})
    table = decoded(tmp_path / "photos", leave_jpegs=True)
    data, broken = table["thumbnail"].to_pylist()
    assert broken is None
    assert table["jpeg"].null_count == 0
    with Image.open(io.BytesIO(data)) as small:
        assert small.size == (160, 107)


def with_thumbnails(table: pa.Table, *, every: int) -> pa.Table:
    names = table["id"].to_pylist()
    images = [name.encode() if place % every == 0 else None for place, name in enumerate(names)]
    return table.append_column("thumbnail", pa.array(images, pa.binary()))


def test_a_store_gives_the_first_in_row_order_from_the_parts_that_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(make(tmp_path))
    assert store.thumbnails() == {}, "as a store of an earlier version"
    before = store.features()

    writer = StoreWriter(str(tmp_path / "mixed"), store.manifest.identity)
    writer.begin()
    write(writer, part(0, 0, 40), with_thumbnails(rows(0, 40), every=1))
    write(writer, part(1, 0, 40), rows(40, 80))
    write(writer, part(2, 0, 40), with_thumbnails(rows(80, 120), every=2))
    store = writer.finish(num_units=3, rate=None)
    there = {f"image-{i}" for i in [*range(40), *range(80, 120, 2)]}
    wanted = {name: name.encode() for name in store.ids().tolist() if name in there}
    assert list(store.thumbnails().items()) == list(wanted.items())
    monkeypatch.setattr("lpclip.features.store.MOST_THUMBNAILS", 7)
    assert list(store.thumbnails().items()) == list(wanted.items())[:7]

    whole = store.features()
    places = [whole.ids.tolist().index(name) for name in before.ids]
    assert whole.base[places].tobytes() == before.base.tobytes()
