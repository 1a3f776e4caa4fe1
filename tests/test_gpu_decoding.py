"""JPEGs decoded on the encoder's device have the pixels that Pillow gives them, and Pillow decodes all else.

Without a GPU the same code runs on the CPU, where torchvision has libjpeg in place of nvJPEG.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import pyvips
import torch
from PIL import ExifTags, Image, ImageOps

from lpclip.config import EncodeConfig, EncoderConfig, PredictJob, SourceConfig, UserError
from lpclip.config import check as check_config
from lpclip.encoders.head import EncoderInfo
from lpclip.features.data import Data
from lpclip.features.decode_stage import decode_unit
from lpclip.features.device_decoding import DeviceDecoder, Undecoded, _to_pixels, resized, upright
from lpclip.features.find_or_encode import Encoding
from lpclip.features.store import Store
from lpclip.images.jpegs import MAX_AREA, ordinary_jpeg
from lpclip.images.open import open_source
from lpclip.images.pixels import Preprocess, decode_image
from lpclip.images.render import weak_view
from lpclip.images.views import WEAK, parse_views

LIMITS = SourceConfig()
CPU = torch.device("cpu")


def preprocess(size: int = 32, **others: object) -> Preprocess:
    return Preprocess(size=size, mean=(0.5,) * 3, std=(0.5,) * 3, **others)  # type: ignore[arg-type]


def picture(width: int = 60, height: int = 40, *, seed: int = 0) -> Image.Image:
    """A smooth random picture with edges."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 10, 30), (width // 4, height // 4, width // 2, height // 2))
    return image


def jpeg(image: Image.Image, *, orientation: int | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    if orientation is not None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    image.save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()


def without_tables(data: bytes) -> bytes:
    """A JPEG that nothing can decode, though its header is all right: its Huffman tables are unreadable."""
    parts = data.split(b"\xff\xc4")
    return parts[0] + b"".join(b"\xff\xc4" + part[:2] + b"\x0f" + part[3:] for part in parts[1:])


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_array(data: bytes | None) -> np.ndarray | None:
    return None if data is None else np.frombuffer(bytearray(data), np.uint8)


def header_of(data: bytes, **limits: int):
    return ordinary_jpeg(data, **{"max_pixels": 10**8, "max_bytes": 10**8, **limits})


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference between pixels."""
    return float(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_turns_them(orientation: int) -> None:
    image = Image.open(io.BytesIO(jpeg(picture(), orientation=orientation)))
    assert header_of(jpeg(picture(), orientation=orientation)).orientation == orientation
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = upright(tensor, orientation).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(60, 40), (41, 97), (20, 30), (500, 375), (32, 32), (33, 401)])
def test_images_are_resized_as_pillow_resizes_them(
    size: tuple[int, int], resize: str, interpolation: str
) -> None:
    image = picture(*size)
    form = preprocess(resize=resize, interpolation=interpolation, fill=7)
    found = _to_pixels([resized(torch.from_numpy(np.array(image)).permute(2, 0, 1), form)])[0]
    assert found.dtype == torch.uint8
    expected = weak_view(image, form)
    # Beside the edge of the rectangle, bicubic values go beyond black and white.
    assert distance(found.numpy(), expected) <= 12
    assert np.abs(found.numpy().astype(int) - expected).mean() < 0.3


@pytest.mark.parametrize(
    "data",
    [
        png(picture()),
        jpeg(picture().convert("CMYK")),
        jpeg(picture())[:-40],  # cut off
        jpeg(picture())[:300],
        b"\xff\xd8 nothing \xff\xd9",
        b"",
        jpeg(picture(640, 32)),  # is trimmed
        jpeg(picture(), keep_rgb=True),
        jpeg(picture(), orientation=9),
        jpeg(Image.new("RGB", (4200, 4000))),
        jpeg(picture(), icc_profile=pyvips.Image.profile_load("p3")),
    ],
    ids=str,
)
def test_what_is_not_ordinary_is_left_to_pillow(data: bytes) -> None:
    assert header_of(data) is None


def test_limits_hold_before_anything_is_decoded() -> None:
    data = jpeg(picture())
    assert header_of(data).area == 60 * 40 < MAX_AREA
    assert header_of(jpeg(picture(), icc_profile=pyvips.Image.profile_load("srgb"))).area == 60 * 40
    assert header_of(data, max_pixels=60 * 40 - 1) is None
    assert header_of(data, max_bytes=len(data) - 1) is None
    assert header_of(jpeg(picture().convert("L"))) is not None
    assert header_of(jpeg(picture(), progressive=True)) is not None
    # Two pictures one after the other are one JPEG and bytes that nobody reads.
    assert header_of(jpeg(picture()) + jpeg(picture())) is not None


def test_a_batch_with_broken_images_keeps_its_places() -> None:
    form = preprocess()
    good = [jpeg(picture(seed=seed), subsampling=seed % 3) for seed in range(3)]
    broken = without_tables(good[0])
    assert header_of(broken) is not None
    own = weak_view(picture(seed=9), form)
    images = Undecoded(
        jpegs=[as_array(data) for data in (good[0], broken, None, good[1], good[2])],
        areas=[2400] * 5,
        orientations=[1, 1, 1, 6, 1],
        pixels=[None, None, own, None, None],
    )
    found = DeviceDecoder(form, limits=LIMITS, device=CPU)(images).numpy()
    assert set(images.errors) == {1}
    assert not found[1].any()
    assert np.array_equal(found[2], own)
    for row, data in ((0, good[0]), (4, good[2])):
        image = decode_image(data, max_pixels=10**8, max_bytes=10**8)
        assert distance(found[row], weak_view(image, form)) <= 3
    turned = decode_image(
        jpeg(picture(seed=1), subsampling=1, orientation=6), max_pixels=10**8, max_bytes=10**8
    )
    assert distance(found[3], weak_view(turned, form)) <= 3


def test_large_jpegs_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpclip.features.device_decoding.AT_ONCE", 5000)
    data = [jpeg(picture(seed=seed)) for seed in range(5)]
    images = Undecoded(
        jpegs=[as_array(item) for item in data], areas=[2400] * 5, orientations=[1] * 5, pixels=[None] * 5
    )
    decoder = DeviceDecoder(preprocess(), limits=LIMITS, device=CPU)
    calls = []
    decode = decoder._decode
    monkeypatch.setattr(decoder, "_decode", lambda rows: calls.append(len(rows)) or decode(rows))
    found = decoder(images)
    assert calls == [2, 2, 1]
    monkeypatch.undo()
    whole = Undecoded(
        jpegs=[as_array(item) for item in data], areas=[2400] * 5, orientations=[1] * 5, pixels=[None] * 5
    )
    assert torch.equal(found, decoder(whole))


def folder_of_all_kinds(folder: Path) -> Path:
    folder.mkdir()
    contents = {
        "0.jpg": jpeg(picture(seed=1)),
        "1.png": png(picture(seed=2)),
        "2.jpg": jpeg(picture(seed=3).convert("L")),
        "3.jpg": jpeg(picture(seed=4).convert("CMYK")),
        "4.jpg": jpeg(picture(seed=5), orientation=8),
        "5.jpg": jpeg(picture(seed=6))[:200],
        "6.jpg": b"no image",
        "7.jpg": jpeg(picture(300, 200, seed=7), progressive=True),
        "8.jpg": without_tables(jpeg(picture(seed=8))),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def test_units_keep_jpegs_and_slices_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(folder_of_all_kinds(tmp_path / "images")), config=LIMITS)
    assert len(source.units) == 1

    def tables() -> list[pa.Table]:
        unit = pa.table({"unit": [0], "spec": [source.units[0]]})
        decode = decode_unit(
            unit,
            reader=source.reader,
            limits=LIMITS,
            views=(WEAK,),
            preprocess=preprocess(),
            seed=0,
            leave_jpegs=True,
        )
        return list(decode)

    (whole,) = tables()
    names = [Path(name).name for name in whole["id"].to_pylist()]
    kept = [name for name, data in zip(names, whole["jpeg"].to_pylist(), strict=True) if data is not None]
    assert kept == ["0.jpg", "2.jpg", "4.jpg", "7.jpg", "8.jpg"]
    bad = [name for name, error in zip(names, whole["error"].to_pylist(), strict=True) if error is not None]
    assert bad == ["5.jpg", "6.jpg"]
    decoded = [
        name for name, data in zip(names, whole["pixels:weak"].to_pylist(), strict=True) if data is not None
    ]
    assert decoded == ["1.png", "3.jpg"]

    monkeypatch.setattr("lpclip.features.decode_stage.PIXEL_BYTES", 8 * 32 * 32 * 3)
    parts = tables()
    assert len(parts) > 1
    assert pa.concat_tables(parts)["id"].to_pylist() == whole["id"].to_pylist()
    assert [part["last"].to_pylist()[-1] for part in parts] == [False] * (len(parts) - 1) + [True]


CODE = """
import json, sys
from lpclip.config import EncodeConfig, EncodeJob, SourceConfig
from lpclip.jobs.encode import encode_job
out, data, decode = sys.argv[1:]
encode = EncodeConfig(views="weak,mirror", batch_size=4, decode=decode, features=out + "/features")
print(json.dumps(encode_job(EncodeJob(data=(data,), out=out, encode=encode))["features"]))
"""


def encode(out: Path, data: Path, decode: str, *, gpus: int = 1) -> subprocess.CompletedProcess[str]:
    """Encode with Ray told of a GPU."""
    resources = json.dumps({"CPU": 4, **({"GPU": gpus} if gpus else {})})
    return subprocess.run(
        [sys.executable, "-c", CODE, str(out), str(data), decode],
        env={**os.environ, "RAY_OVERRIDE_RESOURCES": resources},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_features_of_the_two_ways_to_decode_are_alike_and_never_mixed(tmp_path: Path) -> None:
    data, out = folder_of_all_kinds(tmp_path / "images"), tmp_path / "out"
    stores = {}
    for decode in ("cpu", "gpu"):
        done = encode(out, data, decode)
        assert done.returncode == 0, done.stderr
        stores[decode] = Store.open(json.loads(done.stdout.splitlines()[-1]))
    assert stores["cpu"].path != stores["gpu"].path
    assert stores["gpu"].manifest.identity["decoded_by"] == "gpu"
    assert stores["cpu"].ids().tolist() == stores["gpu"].ids().tolist()
    assert len(stores["cpu"].ids()) == 6
    # The reasons are Pillow's own.
    quarantines = [
        sorted((row["id"], row["stage"], row["error"]) for row in _quarantine(store))
        for store in stores.values()
    ]
    assert quarantines[0] == quarantines[1]
    assert len(quarantines[0]) == 3
    # A store that is given is taken, whoever decoded its images.
    made = stores["gpu"].manifest.identity
    form = {k: tuple(v) if isinstance(v, list) else v for k, v in made["preprocessing"].items()}
    info = EncoderInfo(
        name="lite", identity=made["encoder"], preprocess=Preprocess(**form), logit_scale=1.0, head=None
    )
    encoding = Encoding(info=info, encoder=EncoderConfig(), folder=str(tmp_path))
    given = encoding.one_store_of(Data(stores["gpu"]), parse_views("weak,mirror"))
    assert given.store.path == stores["gpu"].path
    a, b = (store.mean("weak").astype(np.float32) for store in stores.values())
    assert (a * b).sum(1).min() > 0.99


def _quarantine(store: Store) -> list[dict[str, str]]:
    import pyarrow.parquet as pq

    return pq.read_table(Path(store.path, "quarantine.parquet")).to_pylist()


@pytest.mark.slow
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    done = encode(tmp_path / "out", folder_of_all_kinds(tmp_path / "images"), "gpu", gpus=0)
    assert done.returncode != 0
    assert "UserError: --decode gpu needs a GPU, and there is none" in done.stderr


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match="--device cpu takes none"):
        EncodeConfig(views="weak", device="cpu", decode="gpu").check()
    with pytest.raises(UserError, match="are made on CPUs: add --views weak,mirror"):
        EncodeConfig(decode="gpu").check()
    EncodeConfig(views="weak, mirror", decode="gpu").check()
    with pytest.raises(UserError, match="--device cpu takes none"):
        check_config(PredictJob(probe="p", data=("d",), out="x.parquet", device="cpu", decode="gpu"))
