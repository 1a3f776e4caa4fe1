"""What holds for any folders, tars, Parquet and manifests: counts add up, and equal bytes have equal features."""

from __future__ import annotations

import csv
import io
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw, read_unit

from lpclip.config import EncoderConfig, SourceConfig
from lpclip.encoders.head import EncoderInfo
from lpclip.features.data import Data, open_data
from lpclip.features.describe import describe_encoder
from lpclip.features.find_or_encode import Encoding
from lpclip.images.pixels import decode_image
from lpclip.images.source import Source
from lpclip.images.views import parse_views

CONFIG = SourceConfig(max_bad_fraction=1.0)
ODD = ("{}", "a b {}", "{}.05.22", "é{}", "{}%20", "{}?x=1", "o'{}", '"{}"', "{},{}", "[{}]", "#{}")
"""Forms of names; no two members have the same number."""


@dataclass(kw_only=True)
class Container:
    """A container of generated members, and what the reader should find in it."""

    path: Path
    found: int = 0
    """Files, rows or samples, hidden ones not counted."""
    good: dict[str, bytes] = field(default_factory=dict)
    """The pictures by their ids."""


def members(random: random.Random) -> dict[str, bytes]:
    """Pictures, some of them twice, and files that are none, by their names; some names are hidden."""
    found: dict[str, bytes] = {}
    for number in range(random.randint(3, 24)):
        name = random.choice(ODD).format(number, number)
        folder = random.choice(("", "", "cat/", "dog/", "dog/old/"))
        picture = draw(number % 3, random.randrange(5))
        kind = random.choices(("good", "bad", "other", "hidden"), (6, 2, 1, 1))[0]
        if kind == "good" or number == 0:
            found[f"{folder}{name}.{random.choice(('png', 'PNG'))}"] = picture
        elif kind == "bad":
            found[f"{folder}{name}.png"] = random.choice((b"", b"no image", picture[:200]))
        elif kind == "other":
            found[f"{folder}{name}.{random.choice(('txt', 'json'))}"] = b"{}"
        else:
            found[f"{folder}.{number}.png"] = picture
    return found


def containers(folder: Path, seed: int) -> Iterator[Container]:
    """The same members as a folder, a tar, Parquet and a manifest, each with what only it can have."""
    generator = random.Random(seed)
    there = {name: data for name, data in members(generator).items() if "/." not in f"/{name}"}
    images = {name: data for name, data in there.items() if name.lower().endswith(".png")}
    good = {name: data for name, data in images.items() if is_picture(data)}

    files = Container(path=folder / "files", found=len(there), good=good)
    for name, data in members(random.Random(seed)).items():
        (files.path / name).parent.mkdir(parents=True, exist_ok=True)
        (files.path / name).write_bytes(data)
    yield files

    packed = Container(path=folder / "packed.tar", found=len(there))
    packed.good = {f"packed.tar/{name.rpartition('.')[0]}": data for name, data in good.items()}
    twice = generator.choices(sorted(images), k=generator.randint(0, 2))
    packed.found += len(twice)
    with tarfile.open(packed.path, "w") as tar:
        for name in [*members(random.Random(seed)), *twice]:
            info = tarfile.TarInfo(name)
            data = (files.path / name).read_bytes()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    yield packed

    rows = Container(path=folder / "rows.parquet", found=len(images) + 1, good=good)
    table = pa.table({"id": [*images, "null"], "image": pa.array([*images.values(), None], pa.binary())})
    pq.write_table(table, rows.path, row_group_size=generator.randint(1, 9))
    yield rows

    listed = Container(path=files.path / "listed.csv", found=len(images) + 1, good=good)
    with listed.path.open("w", newline="") as file:
        csv.writer(file).writerows([("path",), *((name,) for name in images), ("gone.png",)])
    yield listed


def is_picture(data: bytes) -> bool:
    try:
        decode_image(data, max_pixels=CONFIG.max_pixels, max_bytes=CONFIG.max_bytes, size=32)
    except ValueError:
        return False
    return True


def opened(container: Container, limit: int | None = None) -> Source:
    source = open_data(str(container.path), config=CONFIG, split="train", limit=limit).source
    assert source is not None
    return source


def read(source: Source) -> tuple[dict[str, bytes], int]:
    """The pictures by their ids, and the number of rows that are none."""
    rows = [row for unit in source.units for row in read_unit(source.reader, unit).to_pylist()]
    good = {row["id"]: row["image"] for row in rows if row["image"] and is_picture(row["image"])}
    ids = [row["id"] for row in rows if row["error"] is None]
    assert len(set(ids)) == len(ids)
    assert source.num_rows in (None, len(rows))
    return good, len(rows) - len(good)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_is_left_out_or_quarantined_or_encoded(tmp_path: Path, seed: int) -> None:
    for container in containers(tmp_path, seed):
        source = opened(container)
        good, num_bad = read(source)
        assert good == container.good
        assert source.left_out is not None
        assert container.found == sum(source.left_out.values()) + num_bad + len(good)
        again = opened(container)
        assert (again.units, again.identity) == (source.units, source.identity)
        if source.num_rows is not None:
            limited = opened(container, limit=2)
            sample, num_bad = read(limited)
            assert limited.left_out is not None
            assert container.found == sum(limited.left_out.values()) + num_bad + len(sample)
            assert sample.items() <= good.items()


@pytest.fixture(scope="module")
def info(lite_map: None) -> EncoderInfo:
    return describe_encoder(EncoderConfig())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_bytes_have_the_same_features_wherever_they_lie(
    cluster: None, info: EncoderInfo, tmp_path: Path, seed: int
) -> None:
    encoding = Encoding(info=info, encoder=EncoderConfig(), folder=str(tmp_path / "features"))
    seen: dict[bytes, bytes] = {}
    for container in containers(tmp_path, seed):
        source = opened(container)
        store = encoding.store_of(Data(source), views=parse_views("weak,mirror")).store
        found = store.features()
        assert set(found.ids) == set(container.good)
        assert source.left_out is not None
        counted = sum(source.left_out.values()) + store.manifest.num_quarantined + store.manifest.num_rows
        assert counted == container.found
        for name, feature in zip(found.ids, found.base, strict=True):
            own = seen.setdefault(container.good[name], feature.tobytes())
            assert np.array_equal(np.frombuffer(own, np.float16), feature), name
