"""Views are found wherever they lie, encoded where they are missing, and the same however they came about."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import draw
from PIL import Image

from lpclip.config import EncoderConfig, SourceConfig
from lpclip.encoders.head import EncoderInfo
from lpclip.features.data import Data, open_data
from lpclip.features.describe import describe_encoder
from lpclip.features.encode_stage import store_identity
from lpclip.features.find_or_encode import Encoding
from lpclip.features.store import matrix
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.features.stored_views import Encoded, Views
from lpclip.images.pixels import Preprocess
from lpclip.images.render import render
from lpclip.images.views import CORRUPTIONS, View, parse_views

pytestmark = pytest.mark.usefixtures("cluster", "lite_map")
BASE = WEAK, MIRROR = parse_views("weak,mirror")
NAMES = ("glass_blur:3", "glass_blur:3+mirror", "gaussian_noise:2", "gaussian_noise:2+mirror")
CORRUPTED = tuple(map(View.parse, NAMES))
IDS = [f"row-{i}" for i in range(7)]


@pytest.fixture(scope="module")
def info() -> EncoderInfo:
    return describe_encoder(EncoderConfig())


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven labelled images in row groups of three."""
    path = tmp_path_factory.mktemp("table") / "images.parquet"
    columns = {"id": IDS, "image": [draw(i % 3, i) for i in range(7)], "label": [i % 3 for i in range(7)]}
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def run(
    data: Data, info: EncoderInfo, folder: Path, views: tuple[View, ...], *, seed: int = 0, **config: Any
) -> Views:
    encoding = Encoding(info=info, encoder=EncoderConfig(), folder=str(folder), seed=seed, **config)
    return encoding.views_of(data, views)


def images(path: Path) -> Data:
    return open_data(str(path), config=SourceConfig(), split="test")


def times(folder: Path) -> dict[str, int]:
    """When each file below a folder was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Views in two stores of one folder: the base views, then corruptions that were asked for as well."""

    folder: Path
    first: Views
    both: Views
    written: dict[str, int]
    """Times of the first store's files before the second one was made."""


@pytest.fixture(scope="module")
def spread(table: Path, info: EncoderInfo, tmp_path_factory: pytest.TempPathFactory) -> Spread:
    folder = tmp_path_factory.mktemp("spread")
    first = run(images(table), info, folder, BASE)
    written = times(folder)
    both = run(images(table), info, folder, (*BASE, *CORRUPTED), num_actors=1)
    return Spread(folder=folder, first=first, both=both, written=written)


@pytest.mark.slow
def test_only_missing_views_are_encoded(spread: Spread, table: Path, info: EncoderInfo) -> None:
    (first,) = spread.first.stores
    assert not first.reused
    assert first.store.manifest.views == ("weak", "mirror")
    found, now = spread.both.stores
    assert (found.store.path, found.reused, now.reused) == (first.store.path, True, False)
    assert spread.both.latest is now
    assert now.store.manifest.views == ("weak", *NAMES)
    assert now.store.thumbnails() == first.store.thumbnails()
    assert sorted(now.store.thumbnails()) == IDS
    after = times(spread.folder)
    assert {name: after[name] for name in spread.written} == spread.written

    again = run(images(table), info, spread.folder, (*CORRUPTED[:2], WEAK))
    assert {item.reused for item in again.stores} == {True}
    assert times(spread.folder) == after


@pytest.mark.slow
def test_the_mean_of_weak_and_mirror_is_the_stores_base(spread: Spread) -> None:
    loaded = spread.both.stores[0].store.features()
    for views in (spread.first, spread.both):
        np.testing.assert_array_equal(views.mean(*BASE), loaded.base)
        assert views.ids.tolist() == loaded.ids.tolist()
        assert [int(name.removeprefix("row-")) % 3 for name in views.ids] == views.labels.tolist()


@pytest.mark.slow
def test_views_of_both_stores_are_in_one_order(spread: Spread) -> None:
    parts = pa.concat_tables(spread.both.stores[1].store.tables(["id", *NAMES[:2]]))
    rows = np.argsort(parts["id"].to_pylist())[np.argsort(np.argsort(spread.both.ids))]
    plain, mirrored = (matrix(parts, view, 1280)[rows] for view in NAMES[:2])
    np.testing.assert_array_equal(spread.both.mean(CORRUPTED[0]), plain)
    mean = plain.astype(np.float64) + mirrored
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(spread.both.mean(*CORRUPTED[:2]), mean, atol=1e-3)


@pytest.mark.slow
def test_corrupted_features_do_not_depend_on_actors_batches_stores_or_the_cut_into_units(
    spread: Spread, table: Path, info: EncoderInfo, tmp_path: Path
) -> None:
    data = images(table)
    assert data.source is not None
    (unit,) = data.source.units
    cut = tuple(json.dumps([span]) for span in json.loads(unit))
    assert len(cut) == 3
    pieces = Data(replace(data.source, units=cut))
    other = run(pieces, info, tmp_path, (*CORRUPTED, *BASE), num_actors=2, batch_size=5)
    (one,) = other.stores
    assert len(one.store.manifest.parts) == 3
    assert len(spread.both.stores) == 2
    assert other.ids.tolist() == spread.both.ids.tolist()
    features = {view: other.mean(view).tobytes() for view in (*BASE, *CORRUPTED)}
    assert features == {view: spread.both.mean(view).tobytes() for view in features}
    assert len(set(features.values())) == 6


@pytest.mark.slow
def test_a_worker_corrupts_an_image_as_this_process_does() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((80, 64), Image.Resampling.BICUBIC)
    options: dict[str, Any] = {"id": "a", "preprocess": Preprocess(size=64, mean=(0,) * 3, std=(1,) * 3)}
    views = [View(name=name, level=4) for name in CORRUPTIONS[:15]]
    task = ray.remote(num_cpus=1)(render)
    there = [task.remote(image, view=view, seed=0, **options) for view in views]
    # Backwards here: neither the order nor the company of views changes them.
    here = {view: render(image, view=view, seed=0, **options).tobytes() for view in reversed(views)}
    assert len(set(here.values())) == 15
    assert [pixels.tobytes() for pixels in ray.get(there)] == [here[view] for view in views]


def written(
    path: Path, identity: dict[str, Any], *, ids: list[str], features: np.ndarray, labels: list[int] | None
) -> Encoded:
    """A complete store of features (V, N, d) of the identity's V views."""
    writer = StoreWriter(str(path), identity)
    writer.begin()
    columns: dict[str, Any] = {"id": ids, "label": pa.array(labels or [None] * len(ids), pa.int32())}
    for view, rows in zip(identity["views"], features, strict=True):
        flat = pa.array(rows.astype(np.float16).reshape(-1))
        columns[view] = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    part = Part(unit=0, start=0, stop=len(ids), last=True)
    writer.write_part(part, rows=pa.table(columns), quarantine=[], content_digest=0)
    return Encoded(store=writer.finish(num_units=1, rate=None), seconds=0, reused=True, rate=None)


def small_store(path: Path, ids: list[str], view: str) -> Encoded:
    """A complete store of two-dimensional features."""
    identity = {"views": [view], "encoder": {"dim": 2}, "source": {}}
    return written(path, identity, ids=ids, features=np.ones((1, len(ids), 2)), labels=None)


def test_stores_of_different_images_are_never_put_together(tmp_path: Path) -> None:
    weak = small_store(tmp_path / "a", ["x", "y", "z"], "weak")
    mirror = small_store(tmp_path / "b", ["z", "x", "y"], "mirror")
    assert Views({WEAK: weak, MIRROR: mirror}).mean(WEAK, MIRROR).shape == (3, 2)
    for number, ids in enumerate((["x", "y"], ["x", "y", "q"])):
        other = small_store(tmp_path / f"other-{number}", ids, "mirror")
        with pytest.raises(
            ValueError, match=f"{weak.store.path} and {other.store.path} do not hold the same images"
        ):
            Views({WEAK: weak, MIRROR: other})


@pytest.fixture(scope="module")
def given(table: Path, info: EncoderInfo, tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    """A store of the table's weak view and corruptions with seed 0, as encoding leaves it, of random features."""
    data = images(table)
    identity = store_identity(data.source, info, (WEAK, *CORRUPTED), seed=0)
    features = np.random.default_rng(0).normal(size=(5, 7, 1280))
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    path = tmp_path_factory.mktemp("given") / f"{data.name}-0"
    return written(path, identity, ids=IDS, features=features, labels=[i % 3 for i in range(7)])


def test_views_that_lie_in_a_folder_are_found_and_not_encoded(
    given: Encoded, table: Path, info: EncoderInfo
) -> None:
    folder = Path(given.store.path).parent
    before = times(folder)
    found = run(images(table), info, folder, (WEAK, *CORRUPTED))
    assert [(item.store.path, item.reused) for item in found.stores] == [(given.store.path, True)]
    assert times(folder) == before


def test_a_given_store_must_hold_every_view_of_the_seed(
    given: Encoded, info: EncoderInfo, tmp_path: Path
) -> None:
    path = given.store.path
    data = open_data(path, config=SourceConfig(), split="test")
    assert (data.source, data.has_labels) == (None, True)
    found = run(data, info, tmp_path, (WEAK, *CORRUPTED))
    assert [item.store.path for item in found.stores] == [path]
    order = [IDS.index(name) for name in found.ids]
    for view in CORRUPTED:
        (rows,) = given.store.tables([str(view)])
        np.testing.assert_array_equal(found.mean(view), matrix(rows, str(view), 1280)[order])
    message = (
        f"{path} is a feature store without the view fog:1: name the images, or encode them with --views"
    )
    with pytest.raises(ValueError, match=f"{message} weak,fog:1"):
        run(data, info, tmp_path, (WEAK, View(name="fog", level=1)))
    # Other seeds draw other noise; what draws nothing is the same under all of them.
    assert run(data, info, tmp_path, (WEAK,), seed=1).mean(WEAK).tobytes() == found.mean(WEAK).tobytes()
    with pytest.raises(ValueError, match="without the view glass_blur:3"):
        run(data, info, tmp_path, (WEAK, *CORRUPTED), seed=1)
    other = replace(info, identity={**info.identity, "weights": "others"})
    with pytest.raises(ValueError, match="was made with another encoder"):
        run(data, other, tmp_path, (WEAK,))
    assert list(tmp_path.iterdir()) == []


def test_a_cut_manifest_is_told_with_the_way_out(
    given: Encoded, table: Path, info: EncoderInfo, tmp_path: Path
) -> None:
    path = Path(given.store.path)
    shutil.copytree(path, tmp_path / "stores" / path.name)
    manifest = tmp_path / "stores" / path.name / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(ValueError, match="is not valid JSON .* remove the store .* it is encoded again"):
        run(images(table), info, tmp_path / "stores", BASE)
