"""Features depend on images, encoder and views alone; a bad image costs itself, and interrupted work goes on."""

from __future__ import annotations

import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from conftest import CLASSES, ROOT, draw, write_tar
from PIL import Image, ImageOps

import lpclip.images
from lpclip.config import EncodeConfig, EncoderConfig, SourceConfig
from lpclip.encoders.engine import CPU_BATCH
from lpclip.encoders.head import EncoderInfo, Head, make_head
from lpclip.encoders.load import load_encoder
from lpclip.encoders.prompts import DEFAULT_TEMPLATES
from lpclip.features.commit_stage import commit
from lpclip.features.data import open_data
from lpclip.features.decode_stage import decode_unit
from lpclip.features.describe import describe_encoder
from lpclip.features.device_passes import DevicePasses
from lpclip.features.encode_stage import EncodeStage, plan_actors
from lpclip.features.find_or_encode import Encoding
from lpclip.features.pipeline import units_at_once
from lpclip.features.store import Manifest, Store, matrix
from lpclip.features.store_writer import StoreWriter
from lpclip.features.zero_shot_labels import ZeroShotLabels, pseudo_label
from lpclip.images.open import open_source
from lpclip.images.views import WEAK, View, parse_views
from lpclip.jobs.cli import users_mistake

pytestmark = pytest.mark.usefixtures("cluster", "lite_map")
LITE = EncoderConfig()
VIEWS = ("weak", "mirror", "strong")
CONFIG = EncodeConfig(views=",".join(VIEWS))


@dataclass(frozen=True, kw_only=True)
class Made:
    """A feature store, and what it was made with."""

    path: Path
    manifest: Manifest
    head: Head
    scores: Path


@pytest.fixture(scope="module")
def info() -> EncoderInfo:
    return describe_encoder(LITE, class_names=CLASSES, templates=DEFAULT_TEMPLATES)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of 8, 9 and 10 images: three units of work."""
    folder = tmp_path_factory.mktemp("tars")
    for tar in range(3):
        images = {f"{i:03d}.png": draw(i % 3, 10 * tar + i) for i in range(8 + tar)}
        labels = {f"{i:03d}.cls": str(i % 3).encode() for i in range(8 + tar)}
        write_tar(folder / f"{tar}.tar", dict(sorted({**images, **labels}.items())))
    return folder


@pytest.fixture(scope="module")
def made(tars: Path, info: EncoderInfo, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The tars' features and zero-shot pseudo-labels."""
    folder = tmp_path_factory.mktemp("made")
    head = make_head(info, CLASSES, temperature=None)
    labels = ZeroShotLabels(head=head, folder=str(folder / "scores"))
    store = run(tars, info, folder / "store", zero_shot=labels)
    return Made(path=folder / "store", manifest=store.manifest, head=head, scores=folder / "scores")


def encoding(info: EncoderInfo, folder: Path, config: EncodeConfig = CONFIG) -> Encoding:
    return Encoding(
        info=info,
        encoder=LITE,
        folder=str(folder),
        batch_size=config.batch_size,
        num_actors=config.num_actors,
    )


def run(data: Path, info: EncoderInfo, path: Path, config: EncodeConfig = CONFIG, **options: Any) -> Store:
    limits = options.pop("source", SourceConfig())
    source = open_source(str(data), config=limits)
    return encoding(info, path.parent, config).encode(
        source, views=parse_views(config.views), path=str(path), **options
    )


def features(path: Path) -> dict[str, bytes]:
    """Bytes of all views by id."""
    table = pa.concat_tables(Store.open(str(path)).tables(["id", *VIEWS]))
    rows = np.concatenate([matrix(table, view, 1280) for view in VIEWS], axis=1)
    return dict(zip(table["id"].to_pylist(), (row.tobytes() for row in rows), strict=True))


def test_every_image_is_encoded_once_in_every_view(made: Made) -> None:
    found = Store.open(str(made.path)).features()
    assert sorted(found.ids) == sorted(f"{t}.tar/{i:03d}" for t in range(3) for i in range(8 + t))
    assert [int(name[-3:]) % 3 for name in found.ids] == found.labels.tolist()
    assert set(found.strong) == {"strong"}
    for view in (found.base, found.strong["strong"]):
        np.testing.assert_allclose(np.linalg.norm(view.astype(float), axis=1), 1, atol=2e-3)
    assert made.manifest.num_rows == 27
    assert made.manifest.num_quarantined == 0
    assert made.manifest.images_per_second
    assert made.manifest.images_per_second > 0
    assert list(Store.open(str(made.path)).thumbnails()) == found.ids.tolist()


@pytest.mark.slow
def test_features_do_not_depend_on_batches_actors_or_the_order_of_work(
    made: Made, tars: Path, info: EncoderInfo, tmp_path: Path
) -> None:
    other = EncodeConfig(views=CONFIG.views, batch_size=5, num_actors=2)
    manifest = run(tars, info, tmp_path / "store", other).manifest
    assert features(tmp_path / "store") == features(made.path)
    assert replace(manifest, images_per_second=None) == replace(made.manifest, images_per_second=None)


@pytest.mark.parametrize("rows_at_once", [1, 3, 8])
def test_a_table_is_cut_where_its_pixels_would_be_too_many(
    tars: Path, info: EncoderInfo, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(tars / "0.tar"), config=SourceConfig())
    views = parse_views("weak,gaussian_noise:3")

    def decode() -> list[pa.Table]:
        unit = pa.table({"unit": [0], "spec": list(source.units)})
        options: dict[str, Any] = {"reader": source.reader, "limits": source.config, "seed": 0}
        return list(decode_unit(unit, views=views, preprocess=info.preprocess, **options))

    (whole,) = decode()
    assert whole["row"].to_pylist() == list(range(8))
    assert whole["last"].to_pylist() == [False] * 7 + [True]
    image_bytes = len(views) * info.preprocess.size**2 * 3
    monkeypatch.setattr("lpclip.features.decode_stage.PIXEL_BYTES", (rows_at_once + 1) * image_bytes - 1)
    pieces = decode()
    assert max(len(piece) for piece in pieces) == rows_at_once
    assert pa.concat_tables(pieces) == whole


def test_a_task_decodes_several_units_as_several_tasks_do(tars: Path, info: EncoderInfo) -> None:
    source = open_source(str(tars), config=SourceConfig())

    def decode(*units: int) -> list[pa.Table]:
        table = pa.table({"unit": units, "spec": [source.units[unit] for unit in units]})
        options: dict[str, Any] = {"reader": source.reader, "limits": source.config, "seed": 0}
        return list(decode_unit(table, views=(WEAK,), preprocess=info.preprocess, **options))

    assert decode(0, 2) == decode(0) + decode(2)


@pytest.mark.parametrize(
    ("gpus", "cpus", "units", "expected"),
    [
        (0, 1024, 390_625, 1),  # encoders on CPUs are slow
        (1, 16, 390_625, 1),
        (8, 128, 390_625, 4),
        (64, 1024, 390_625, 28),
        (64, 1024, 40_960, 10),
        (64, 1024, 5005, 1),  # four tasks for each CPU
    ],
)
def test_many_gpus_take_several_units_at_once(gpus: int, cpus: int, units: int, expected: int) -> None:
    assert units_at_once(units, num_gpus=gpus, num_cpus=cpus) == expected


def table_of_pixels(pixels: dict[str, np.ndarray], errors: list[str | None]) -> pa.Table:
    """What a decode task hands on: a row an image, its pixels (N, S, S, 3) by view."""
    dtype = pa.binary(next(iter(pixels.values()))[0].size)
    columns = {"id": [str(row) for row in range(len(errors))], "error": pa.array(errors, pa.string())}
    for view, images in pixels.items():
        columns[f"pixels:{view}"] = pa.array([image.tobytes() for image in images], dtype)
    return pa.table(columns)


# Without bfloat16 in hardware it takes half a minute.
@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("openvino", "float32"),
        ("torch", "float32"),
        pytest.param("torch", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_features_are_the_same_bits_for_any_batch_size_number_of_threads_and_company(
    engine: Literal["openvino", "torch"], precision: Literal["float32", "bfloat16"]
) -> None:
    encoder = replace(LITE, engine=engine, precision=precision)
    described = describe_encoder(encoder)
    size = described.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (9, size, size, 3), np.uint8)
    views = ("weak", "mirror")

    def bits(batch_size: int, num_threads: int, rows: slice) -> list[bytes]:
        stage = EncodeStage(encoder, described, parse_views(",".join(views)), batch_size, num_threads)
        found = stage(table_of_pixels({"weak": pixels[rows]}, [None] * len(pixels[rows])))
        features = np.concatenate([matrix(found, view, described.identity["dim"]) for view in views], axis=1)
        return [row.tobytes() for row in features]

    whole = bits(64, 1, slice(None))
    assert len(set(whole)) == 9
    assert bits(5, 3, slice(None)) == whole
    assert bits(64, 2, slice(3, 5)) == whole[3:5]


OTHER_CPU = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
"""An x86-64 CPU that computes as one without AVX would. An arm64 CPU knows neither variable, and computes as ever."""


@pytest.mark.slow
def test_another_kind_of_cpu_gives_features_within_the_documented_tolerance_and_equal_predictions(
    tmp_path: Path,
) -> None:
    code = f"""
import sys, numpy as np, torch
from conftest import CLASSES, draw
from lpclip.config import EncoderConfig
from lpclip.encoders.load import load_encoder
from lpclip.encoders.prompts import DEFAULT_TEMPLATES
from lpclip.encoders.zero_shot import zero_shot_weights
from lpclip.images.render import weak_view
from lpclip.images.pixels import decode_image
encoder = load_encoder(EncoderConfig(precision="float32"))
options = dict(max_pixels=10**6, max_bytes=10**6, size=encoder.preprocess.size)
images = [weak_view(decode_image(draw(i % 3, i), **options), encoder.preprocess) for i in range({CPU_BATCH})]
torch.set_num_threads(1)
features = encoder.encode_image(torch.from_numpy(np.stack(images))).numpy()
head = zero_shot_weights(encoder, CLASSES, templates=DEFAULT_TEMPLATES).numpy()
np.savez(sys.argv[1], features=features, predicted=(features @ head.T).argmax(axis=1))
"""
    found = []
    for name, variables in (("this", {}), ("other", OTHER_CPU)):
        environment = {
            **os.environ,
            **variables,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        subprocess.run([sys.executable, "-c", code, f"{tmp_path}/{name}.npz"], env=environment, check=True)
        found.append(np.load(tmp_path / f"{name}.npz"))
    # docs/method.md, "Reproducibility".
    np.testing.assert_allclose(found[0]["features"], found[1]["features"], atol=2.5e-4)
    assert found[0]["predicted"].tolist() == found[1]["predicted"].tolist()


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_batches_run_on_from_view_to_view(info: EncoderInfo, batch_size: int) -> None:
    views = ("weak", "mirror", "gaussian_noise:3", "gaussian_noise:3+mirror")
    stage = EncodeStage(LITE, info, parse_views(",".join(views)), batch_size, 1)
    encoder = load_encoder(LITE)
    # As on a GPU: a CPU has its own passes.
    stage.passes = DevicePasses(encoder, batch_size=batch_size, device=torch.device("cpu"))
    sizes: list[int] = []
    encode_image = encoder.encode_image
    size = info.preprocess.size
    random = np.random.default_rng(0)
    pixels = {view: random.integers(0, 256, (3, size, size, 3), np.uint8) for view in views[::2]}

    def counted(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return encode_image(batch)

    encoder.encode_image = counted  # type: ignore[method-assign]
    found = stage(table_of_pixels(pixels, [None, "damaged", None]))
    # Two good images in four views; every batch has one shape.
    assert sizes == [batch_size] * -(-8 // batch_size)
    assert found.column_names == ["id", "error", *views]
    for view in views:
        images = pixels[view.removesuffix("+mirror") if view != "mirror" else "weak"]
        flipped = images[:, :, ::-1] if view.endswith("mirror") else images
        expected = encode_image(torch.from_numpy(flipped.copy())).float().cpu().numpy()
        features = matrix(found, view, 1280)
        assert (features[1] == 0).all()
        np.testing.assert_allclose(features[[0, 2]], expected[[0, 2]], atol=4e-3)


def test_a_gpu_is_given_a_large_table_in_pieces(info: EncoderInfo) -> None:
    stage = EncodeStage(LITE, info, parse_views("weak,mirror"), 4, None)
    dim, size = info.identity["dim"], info.preprocess.size
    given: list[int] = []

    def passes(pixels: Mapping[View, np.ndarray], views: Sequence[View]) -> np.ndarray:
        images = pixels[WEAK]
        given.append(len(images))
        found = np.zeros((2 * len(images), dim), np.float16)
        found[range(len(found)), [int(image[0, 0, 0]) for image in images] * 2] = 1
        return found

    stage.passes = passes
    pixels = np.arange(9, dtype=np.uint8).repeat(size * size * 3).reshape(9, size, size, 3)
    table = table_of_pixels({"weak": pixels}, [None] * 9)
    found = stage(pa.concat_tables([table.slice(0, 6), table.slice(6)]))
    assert given == [4, 4, 1]
    assert found["id"].to_pylist() == table["id"].to_pylist()
    assert matrix(found, "mirror", dim).argmax(axis=1).tolist() == list(range(9))
    assert len(stage(table.slice(0, 0))) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_an_image_without_a_feature_is_quarantined(info: EncoderInfo, tmp_path: Path, value: float) -> None:
    views = parse_views("weak,mirror")
    stage = EncodeStage(LITE, info, views, 8, 1)
    dim, size = info.identity["dim"], info.preprocess.size

    def passes(pixels: Mapping[View, np.ndarray], views: Sequence[View]) -> np.ndarray:
        found = np.eye(2 * len(pixels[views[0]]), dim, dtype=np.float16)
        # The last image has them, in its second view alone.
        found[-1, found[-1] == 1] = value
        return found

    stage.passes = passes
    pixels = table_of_pixels({"weak": np.zeros((3, size, size, 3), np.uint8)}, [None, "damaged", None])
    places = {"unit": [0, 0, 0], "row": [0, 1, 2], "last": [False, False, True], "digest": [b"a", b"b", b"c"]}
    for name, column in {**places, "stage": pa.array([None, "decode", None], pa.string())}.items():
        pixels = pixels.append_column(name, pa.array(column))
    identity = {"encoder": info.identity, "views": ["weak", "mirror"], "seed": None, "source": {}}
    writer = StoreWriter(str(tmp_path), identity)
    writer.begin()
    commit(stage(pixels), writer=writer, columns=("id", "weak", "mirror"))
    store = writer.finish(num_units=1, rate=None)
    assert store.ids().tolist() == ["0"]
    quarantine = {row["id"]: row for row in pq.read_table(tmp_path / "quarantine.parquet").to_pylist()}
    assert (quarantine["1"]["stage"], quarantine["1"]["error"]) == ("decode", "damaged")
    assert quarantine["2"]["stage"] == "encode"
    assert "NaN" in quarantine["2"]["error"]


def test_a_class_name_without_an_embedding_is_refused(info: EncoderInfo) -> None:
    assert info.head is not None
    head = info.head.copy()
    head[1, 5] = np.nan
    with pytest.raises(ValueError, match=f"infinite embedding of '{CLASSES[1]}'"):
        make_head(replace(info, head=head), CLASSES, temperature=None)


@pytest.mark.slow
def test_a_node_with_another_encoder_is_refused(tars: Path, info: EncoderInfo, tmp_path: Path) -> None:
    began_with = replace(info, identity={**info.identity, "weights": "of yesterday"})
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        run(tars, began_with, tmp_path / "store")
    assert re.match("another encoder was found on .* have the same", users_mistake(raised.value) or "")


def test_processes_that_read_decode_and_commit_do_without_torch() -> None:
    # A Ray Data stage pickles a function or a reader by the name of its module, which its processes import.
    stages = ("decode_stage", "commit_stage", "zero_shot_labels", "pairs")
    names = [f"lpclip.features.{stage}" for stage in stages]
    names += [f"lpclip.images.{module.name}" for module in pkgutil.iter_modules(lpclip.images.__path__)]
    assert len(names) > 12
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_an_interrupted_encoding_goes_on_with_the_missing_units_alone(
    made: Made, tars: Path, info: EncoderInfo, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    shutil.copytree(made.path, path)
    kept, lost, damaged = (path / name for name in made.manifest.parts)
    lost.unlink()
    damaged.rename(path / damaged.name.replace("-last", ""))  # a unit of which the rest is to come
    (path / "manifest.json").unlink()
    before = kept.stat()
    manifest = run(tars, info, path).manifest
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert replace(manifest, images_per_second=None) == replace(made.manifest, images_per_second=None)
    assert features(path) == features(made.path)
    for name in made.manifest.parts:
        assert (path / name).read_bytes() == (made.path / name).read_bytes()


def test_pseudo_labels_of_the_pass_equal_those_of_the_store(made: Made) -> None:
    assert sorted(path.name for path in made.scores.iterdir()) == list(made.manifest.parts)
    for name, table in zip(
        made.manifest.parts, Store.open(str(made.path)).tables(["id", *VIEWS]), strict=True
    ):
        written = pq.read_table(made.scores / name)
        assert written == pseudo_label(table, head=made.head, dim=1280)
    found = Store.open(str(made.path)).features()
    written = pq.read_table(made.scores)
    labels = dict(zip(written["id"].to_pylist(), written["label"].to_pylist(), strict=True))
    zero_shot = (found.base.astype(np.float32) @ made.head.weight.T).argmax(axis=1)
    assert [labels[name] for name in found.ids] == zero_shot.tolist()
    assert 0 < min(written["confidence"].to_pylist()) <= max(written["confidence"].to_pylist()) <= 1


def save(image: Image.Image, format: str, **options: Any) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def drawn(seed: int) -> Image.Image:
    """A red octagon."""
    with Image.open(io.BytesIO(draw(1, seed))) as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd images and a mirrored one, each of which can be encoded, and bad ones, none of which can."""
    folder = tmp_path_factory.mktemp("mixed")
    image = drawn(0)
    grey = Image.fromarray(np.arange(48 * 48, dtype=np.uint16).reshape(48, 48) * 28)
    odd = {
        "cmyk.jpg": save(image.convert("CMYK"), "JPEG"),
        "deep.png": save(grey, "PNG"),
        "palette.png": save(image.convert("P"), "PNG"),
        "moving.gif": save(image, "GIF", save_all=True, append_images=[Image.new("RGB", (48, 48))]),
        "mirrored.png": save(ImageOps.mirror(drawn(1)), "PNG"),
        "dot.png": save(Image.new("RGB", (1, 1)), "PNG"),
    }
    bad = {
        "empty.png": b"",
        "text.png": b"these are my notes",
        "truncated.png": save(image, "PNG")[:500],
        "vast.png": save(Image.new("1", (30_000, 30_000)), "PNG"),
    }
    for name, data in {**odd, **bad}.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def kept(mixed: Path, info: EncoderInfo) -> Store:
    """The store of the images that can be encoded."""
    before = list(warnings.filters)
    data = open_data(str(mixed), config=SourceConfig(), split="train")
    found = encoding(info, mixed.parent / "stores").store_of(data, views=parse_views(CONFIG.views))
    assert [one for one in warnings.filters if one not in before] == [], "they are left as they were"
    return found.store


def test_the_mirror_view_is_the_mirrored_image(made: Made, kept: Store) -> None:
    mirrored, upright = features(Path(kept.path))["mirrored.png"], features(made.path)["0.tar/001"]
    weak, mirror = (np.frombuffer(found, np.float16).reshape(3, 1280) for found in (mirrored, upright))
    np.testing.assert_allclose(weak[0], mirror[1], atol=2e-3)


def test_bad_images_are_quarantined_with_their_reason(mixed: Path, kept: Store, info: EncoderInfo) -> None:
    assert (kept.manifest.num_rows, kept.manifest.num_quarantined) == (6, 4)
    found = kept.features()
    good = ["cmyk.jpg", "deep.png", "dot.png", "mirrored.png", "moving.gif", "palette.png"]
    assert sorted(found.ids) == good
    assert np.isfinite(found.base.astype(float)).all()
    assert list(kept.thumbnails()) == found.ids.tolist()
    quarantine = {row["id"]: row for row in pq.read_table(f"{kept.path}/quarantine.parquet").to_pylist()}
    assert set(quarantine) == {"empty.png", "text.png", "truncated.png", "vast.png"}
    assert {row["stage"] for row in quarantine.values()} == {"decode"}
    assert all(row["error"] for row in quarantine.values())
    assert "more than 100000000 pixels" in quarantine["vast.png"]["error"]

    # Now the store is complete: a stricter limit refuses it all the same, encoded or found.
    strict = SourceConfig(max_bad_fraction=0.25)
    message = r"4 of 10 images of mixed\d* cannot be used, more than --max-bad-fraction 0.25 allows"
    with pytest.raises(ValueError, match=message):
        run(mixed, info, Path(kept.path), source=strict)
    data = open_data(str(mixed), config=strict, split="train")
    with pytest.raises(ValueError, match=message):
        encoding(info, Path(kept.path).parent).store_of(data, views=parse_views(CONFIG.views))


def test_bad_images_alone_are_refused_however_often_one_tries(info: EncoderInfo, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / "images" / name, {"0.png": b"no image", "1.png": b""})
    data = open_data(str(tmp_path / "images"), config=SourceConfig(max_bad_fraction=1.0), split="train")
    for _ in range(2):
        with pytest.raises(ValueError, match="4 of 4 images of images cannot be used"):
            encoding(info, tmp_path / "features").store_of(data, views=parse_views(CONFIG.views))


@pytest.mark.slow
def test_an_empty_tar_among_others_is_no_obstacle(info: EncoderInfo, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_tar(tmp_path / "images" / "a.tar", {"0.png": draw(0, 0)})
    write_tar(tmp_path / "images" / "b.tar", {})
    manifest = run(tmp_path / "images", info, tmp_path / "store").manifest
    assert (manifest.num_rows, manifest.num_quarantined) == (1, 1)
    (row,) = pq.read_table(tmp_path / "store" / "quarantine.parquet").to_pylist()
    assert row == {"id": "b.tar/(empty)", "stage": "read", "error": "tar: holds no samples"}


def test_a_store_of_other_views_or_seeds_is_not_gone_on_with(
    made: Made, tars: Path, info: EncoderInfo, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    shutil.copytree(made.path, path)
    with pytest.raises(ValueError, match="was made with another views and another seed"):
        run(tars, info, path, EncodeConfig(views="weak"))
    other = replace(info, identity={**info.identity, "weights": "others"})
    with pytest.raises(ValueError, match="was made with another encoder"):
        run(tars, other, path)
    assert features(path) == features(made.path)


def test_actors_leave_cpus_to_the_tasks_that_feed_them() -> None:
    for num_actors in (None, 1, 2, 5):
        plan = plan_actors(num_actors)
        assert plan.num_actors * plan.cpus_per_actor <= 1
    with pytest.raises(ValueError, match="--num-actors must be at least 1, not 0"):
        EncodeConfig(num_actors=0).check()
