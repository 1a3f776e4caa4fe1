"""Pictures of every kind, against libvips' rendering of the same bytes, or against the scene that was drawn."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms

from lpclip.config import UserError
from lpclip.images.pixels import decode_image

WIDTH, HEIGHT = 192, 128
Make = Callable[[], bytes]


def scene() -> np.ndarray:
    """A sky of two gradients, fourteen shaded discs, ripples, white and black: colours (H, W, 3) from 0 to 1."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / np.array([HEIGHT, WIDTH])[:, None, None]
    colours = np.stack([0.25 + 0.5 * y, 0.35 + 0.3 * x, 0.75 - 0.5 * y], -1)
    for _ in range(14):
        colour, (left, top), radius = rng.uniform(0, 1, 3), rng.uniform(0, 1, 2), rng.uniform(0.05, 0.2)
        disc = (x - left) ** 2 + ((y - top) * HEIGHT / WIDTH) ** 2 < radius**2
        colours[disc] = colour * (0.7 + 0.3 * np.cos(9 * x[disc] + 5 * y[disc]))[:, None]
    colours[:16, :16], colours[-16:, -16:] = 2, -1  # white, black
    return np.clip(colours + 0.03 * np.sin(60 * x)[..., None], 0, 1)


COLOUR = scene()
GREY = COLOUR @ (0.3, 0.59, 0.11)
ALPHA = np.tile(np.linspace(0.2, 1, WIDTH), (HEIGHT, 1))


def levels(values: np.ndarray, white: float = 255, dtype: Any = np.uint8) -> np.ndarray:
    return np.round(values * white).astype(dtype)


COLOUR8, GREY8, ALPHA8 = levels(COLOUR), levels(GREY), levels(ALPHA)
COLOUR16, GREY16, ALPHA16 = (levels(values, 65535, np.uint16) for values in (COLOUR, GREY, ALPHA))
PICTURE, CMYK = Image.fromarray(COLOUR8), np.asarray(Image.fromarray(COLOUR8).convert("CMYK"))


def pillow(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(*pages: np.ndarray, first: dict[str, Any] | None = None, **options: Any) -> bytes:
    """A TIFF of pages (H, W, C), or (C, H, W) in separate planes; `first` are options of the first page alone."""
    buffer = io.BytesIO()
    file = {name: options.pop(name) for name in ("byteorder", "bigtiff") if name in options}
    with tifffile.TiffWriter(buffer, **file) as writer:
        for number, page in enumerate(pages):
            writer.write(page, metadata=None, **options | ((first or {}) if number == 0 else {}))
    return buffer.getvalue()


def vips(values: np.ndarray, interpretation: str) -> pyvips.Image:
    return pyvips.Image.new_from_array(values, interpretation=interpretation)


def planes(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, 2, 0)


def icc_profile(gamma: float, *primaries: tuple[float, float, float]) -> bytes:
    """A profile with the XYZ of red, green and blue under D50, or of grey where there are none."""
    white = (0.9642, 1.0, 0.8249)

    def xyz(values: tuple[float, ...]) -> bytes:
        return struct.pack(">3i", *(round(value * 65536) for value in values))

    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))
    tags = {
        b"desc": b"desc" + struct.pack(">II", 0, 2) + b"x\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + xyz(white),
        **{bytes([c]) + b"XYZ": b"XYZ " + bytes(4) + xyz(p) for c, p in zip(b"rgb", primaries, strict=False)},
        **{bytes([c]) + b"TRC": curve for c in (b"rgb" if primaries else b"k")},
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"RGB " if primaries else b"GRAY"
    head = struct.pack(
        ">II4s4s4s4s12x4s", start + len(body), 0, b"\2\x40\0\0", b"mntr", space, b"XYZ ", b"acsp"
    )
    return head.ljust(68, b"\0") + xyz(white).ljust(60, b"\0") + table + body


PROFILES = {
    "display-p3": pyvips.Image.profile_load("p3"),
    "adobe-rgb": icc_profile(
        2.2, (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
    ),
    "prophoto": icc_profile(1.8, (0.79767, 0.28804, 0), (0.13519, 0.71188, 0), (0.03134, 0.00009, 0.82491)),
    "linear": icc_profile(
        1.0, (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)
    ),
}


def deep_png(values: np.ndarray, kind: int, key: tuple[int, ...]) -> bytes:
    """A PNG of 16 bits of which the colour `key` is transparent."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, kind, 0, 0, 0),
        b"tRNS": struct.pack(f">{len(key)}H", *key),
        b"IDAT": zlib.compress(lines),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def subsampled_ycbcr() -> bytes:
    """An uncompressed TIFF with one pair of colour differences for four pixels, between their brightnesses."""
    ycbcr = np.asarray(PICTURE.convert("YCbCr"))
    fours = (
        ycbcr[..., 0]
        .reshape(HEIGHT // 2, 2, WIDTH // 2, 2)
        .swapaxes(1, 2)
        .reshape(HEIGHT // 2, WIDTH // 2, 4)
    )
    data = np.concatenate([fours, ycbcr[::2, ::2, 1:]], axis=2).tobytes()
    numbers = {256: WIDTH, 257: HEIGHT, 258: 8, 259: 1, 262: 6, 273: 134, 277: 3, 278: HEIGHT, 279: len(data)}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in numbers.items())
    tags += struct.pack("<HHIHH", 530, 3, 2, 2, 2)
    return b"II*\0" + struct.pack("<IH", 8, len(numbers) + 1) + tags + bytes(4) + data


def ycck_jpeg() -> bytes:
    """A JPEG of brightness, colour differences and black, which its Adobe marker tells."""
    inks = 255 - COLOUR8
    black = inks.min(axis=2)
    inks = levels((inks - black[..., None]) / np.maximum(255 - black, 1)[..., None])
    inks = np.asarray(Image.fromarray(inks).convert("YCbCr"))
    stored = np.dstack([inks, 255 - black])
    data = pillow(Image.frombytes("CMYK", PICTURE.size, (255 - stored).tobytes()), "JPEG", quality=95)
    place = data.index(b"Adobe") + 11
    return data[:place] + b"\2" + data[place + 1 :]


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, max_pixels=10**6, max_bytes=10**7))


def by_vips(data: bytes) -> np.ndarray:
    """libvips' rendering in sRGB, on white, uint8 (H, W, 3)."""
    image = pyvips.Image.new_from_buffer(data, "").copy_memory()
    if image.get_typeof("icc-profile-data"):
        image = image.icc_transform("srgb", embedded=True, depth=8)
    image = image.colourspace("srgb")
    if image.hasalpha():
        image = image.flatten(background=255)
    return np.asarray(image.cast("uchar"))


def assert_alike(found: np.ndarray, expected: np.ndarray) -> None:
    """Cosines of at least 0.99: of the pixels, which shows a veil, and less their means, which shows all else."""
    assert found.shape == expected.shape
    for mean in (0, 1):
        a, b = (
            pixels.ravel() - mean * pixels.mean() for pixels in (found.astype(float), expected.astype(float))
        )
        assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-9) >= 0.99


AS_VIPS: dict[str, Make] = {
    "grey-16-png": lambda: pillow(GREY16, "PNG"),
    "grey-16-tiff-tiled": lambda: tiff(GREY16, tile=(64, 64)),
    "grey-16-tiff-white-is-zero": lambda: tiff(65535 - GREY16, photometric="miniswhite"),
    "grey-8-tiff-white-is-zero": lambda: tiff(255 - GREY8, photometric="miniswhite"),
    "grey-16-png-one-transparent": lambda: deep_png(GREY16 // 4096 * 4096, 0, (GREY16[5, 5] // 4096 * 4096,)),
    "grey-1-tiff": lambda: pillow(PICTURE.convert("1"), "TIFF", compression="group4"),
    "grey-4-tiff": lambda: vips(GREY8, "b-w").tiffsave_buffer(bitdepth=4),
    "grey-alpha-16-png": lambda: vips(np.dstack([GREY16, ALPHA16]), "grey16").pngsave_buffer(),
    "grey-alpha-8-tiff-premultiplied": lambda: tiff(
        levels(np.dstack([GREY * ALPHA, ALPHA])), planarconfig="contig", extrasamples=["assocalpha"]
    ),
    "colour-16-png": lambda: vips(COLOUR16, "rgb16").pngsave_buffer(),
    "colour-16-tiff-planes": lambda: tiff(planes(COLOUR16), photometric="rgb"),
    "colour-16-tiff-planes-big-endian": lambda: tiff(planes(COLOUR16), photometric="rgb", byteorder=">"),
    "colour-16-tiff-predictor": lambda: tiff(COLOUR16, photometric="rgb", compression="zlib", predictor=2),
    "colour-alpha-16-png": lambda: vips(np.dstack([COLOUR16, ALPHA16]), "rgb16").pngsave_buffer(),
    "colour-alpha-16-tiff-planes": lambda: tiff(
        planes(np.dstack([COLOUR16, ALPHA16])), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "colour-alpha-16-tiff-premultiplied": lambda: tiff(
        levels(np.dstack([COLOUR * ALPHA[..., None], ALPHA]), 65535, np.uint16),
        photometric="rgb",
        extrasamples=["assocalpha"],
    ),
    "colour-alpha-webp": lambda: pillow(np.dstack([COLOUR8, ALPHA8]), "WEBP"),
    "colour-8-tiff-planes-tiled": lambda: tiff(COLOUR8, photometric="rgb", tile=(32, 48)),
    "colour-bigtiff": lambda: tiff(COLOUR8, photometric="rgb", bigtiff=True),
    "colour-pyramid": lambda: vips(COLOUR8, "srgb").tiffsave_buffer(tile=True, pyramid=True, tile_width=64),
    "colour-jpeg-in-tiff": lambda: vips(COLOUR8, "srgb").tiffsave_buffer(compression="jpeg"),
    "colour-subsampled-tiff": subsampled_ycbcr,
    "colour-10-avif": lambda: vips(COLOUR16, "rgb16").heifsave_buffer(
        compression="av1", bitdepth=10, effort=0
    ),
    "colour-progressive-jpeg": lambda: pillow(PICTURE, "JPEG", progressive=True),
    "palette-tiff": lambda: pillow(PICTURE.quantize(256), "TIFF"),
    "palette-gif-transparent": lambda: pillow(PICTURE.quantize(99), "GIF", transparency=3),
    **{
        f"palette-{bits}-png-transparent": lambda bits=bits: pillow(
            PICTURE.quantize(2**bits),
            "PNG",
            bits=bits,
            transparency=bytes(np.linspace(40, 255, 2**bits).astype(np.uint8)),
        )
        for bits in (1, 2, 4, 8)
    },
    **{
        f"{name}-{format}".lower(): lambda profile=profile, kind=format: pillow(
            PICTURE, kind, icc_profile=profile
        )
        for name, profile in PROFILES.items()
        for format in ("JPEG", "PNG", "TIFF", "WEBP")  # noqa: A001
    },
    "display-p3-alpha-png": lambda: pillow(
        np.dstack([COLOUR8, ALPHA8]), "PNG", icc_profile=PROFILES["display-p3"]
    ),
    "display-p3-palette-png": lambda: pillow(
        PICTURE.quantize(256), "PNG", icc_profile=PROFILES["display-p3"]
    ),
    "display-p3-16-png": lambda: vips(COLOUR16, "rgb16").pngsave_buffer(profile="p3"),
    "grey-linear-png": lambda: pillow(GREY8, "PNG", icc_profile=icc_profile(1.0)),
    "grey-linear-16-png": lambda: pillow(GREY16, "PNG", icc_profile=icc_profile(1.0)),
    "grey-with-a-profile-of-colours": lambda: pillow(GREY8, "PNG", icc_profile=PROFILES["display-p3"]),
    "cmyk-profile-jpeg": lambda: vips(COLOUR8, "srgb").icc_export(output_profile="cmyk").jpegsave_buffer(),
    "cmyk-profile-tiff": lambda: vips(COLOUR8, "srgb").icc_export(output_profile="cmyk").tiffsave_buffer(),
}


@pytest.mark.parametrize("make", AS_VIPS.values(), ids=AS_VIPS)
def test_pictures_look_as_libvips_renders_them(make: Make) -> None:
    data = make()
    assert_alike(decoded(data), by_vips(data))


AS_DRAWN: dict[str, Make] = {
    **{
        f"grey-{bits}-in-16-{format}": lambda bits=bits, kind=format: pillow(
            GREY16 >> (16 - bits), kind.upper()
        )
        for bits in (10, 12)
        for format in ("png", "tiff")  # noqa: A001
    },
    "grey-float-negative": lambda: tiff((GREY * 2 - 1).astype(np.float32)),
    "grey-float-predictor": lambda: vips(GREY.astype(np.float32), "b-w").tiffsave_buffer(
        compression="deflate", predictor="float"
    ),
    **{
        f"grey-{name}-big-endian": lambda values=values: tiff(values, byteorder=">", compression="zlib")
        for name, values in {
            "float": GREY.astype(np.float32),
            "int32": levels(GREY, 4095, np.int32),
            "int16": levels(GREY, 4095, np.int16) - 1024,
            "uint16": GREY16,
        }.items()
    },
    "grey-uint32": lambda: tiff(levels(GREY, 2**32 - 1, np.uint32)),
    "grey-int8-negative": lambda: tiff((GREY8.astype(int) - 128).astype(np.int8)),
    "colour-16-tiff-planes-tiled": lambda: tiff(planes(COLOUR16), photometric="rgb", tile=(64, 64)),
    "colour-16-ppm": lambda: f"P6 {WIDTH} {HEIGHT} 65535\n".encode() + COLOUR16.astype(">u2").tobytes(),
    "grey-16-jpeg2000": lambda: pillow(GREY16, "JPEG2000"),
    "colour-ycbcr-tiff": lambda: pillow(PICTURE.convert("YCbCr"), "TIFF"),
    "colour-lab-tiff": lambda: pillow(
        ImageCms.profileToProfile(PICTURE, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB"),
        "TIFF",
    ),
    "colour-8-and-an-unnamed-channel": lambda: tiff(
        np.dstack([COLOUR8, ALPHA8]), photometric="rgb", extrasamples=["unspecified"]
    ),
    "cmyk-tiff": lambda: pillow(Image.frombytes("CMYK", PICTURE.size, CMYK.tobytes()), "TIFF"),
    "cmyk-16-tiff-planes": lambda: tiff(planes(CMYK.astype(np.uint16) * 257), photometric="separated"),
    "cmyk-jpeg": lambda: pillow(PICTURE.convert("CMYK"), "JPEG", quality=95),
    "ycck-jpeg": ycck_jpeg,
    "thumbnail-first": lambda: tiff(COLOUR8[::4, ::4], COLOUR8, photometric="rgb", first={"subfiletype": 1}),
    "thumbnail-of-old-kind-first": lambda: tiff(
        COLOUR8[::4, ::4], COLOUR8, photometric="rgb", first={"extratags": [(255, 3, 1, 2, True)]}
    ),
    "thumbnail-alone": lambda: tiff(COLOUR8, photometric="rgb", subfiletype=1),
    "largest-icon": lambda: pillow(PICTURE, "ICO", sizes=[(16, 11), (48, 32), PICTURE.size]),
    "first-of-mpo": lambda: pillow(
        PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(90)], quality=95, subsampling=0
    ),
}


@pytest.mark.parametrize("make", AS_DRAWN.values(), ids=AS_DRAWN)
def test_pictures_look_as_they_were_drawn_where_libvips_reads_other_values_or_none(
    make: Make, request: pytest.FixtureRequest
) -> None:
    is_grey = request.node.callspec.id.startswith("grey")
    assert_alike(decoded(make()), GREY8[..., None].repeat(3, axis=2) if is_grey else COLOUR8)


@pytest.mark.parametrize(
    "profile",
    [pyvips.Image.profile_load("srgb"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()],
)
def test_a_profile_of_srgb_changes_no_pixel(profile: bytes) -> None:
    np.testing.assert_array_equal(decoded(pillow(PICTURE, "PNG", icc_profile=profile)), COLOUR8)


def test_a_picture_that_follows_its_thumbnail_is_limited_and_turned() -> None:
    data = tiff(
        COLOUR8[::4, ::4],
        COLOUR8,
        first={"subfiletype": 1},
        photometric="rgb",
        extratags=[(274, 3, 1, 6, True)],
    )
    assert decode_image(data, max_pixels=WIDTH * HEIGHT, max_bytes=10**6).size == (HEIGHT, WIDTH)
    with pytest.raises(UserError, match="more than 24575 pixels"):
        decode_image(data, max_pixels=WIDTH * HEIGHT - 1, max_bytes=10**6)


def jpeg_of_12_bits() -> bytes:
    data = pillow(PICTURE, "JPEG")
    place = data.index(b"\xff\xc0") + 4
    return data[:place] + b"\x0c" + data[place + 1 :]


RARE = "a TIFF that is damaged or of a rare kind"
REFUSED: dict[str, tuple[Make, str]] = {
    "colour-12-in-16": (lambda: tiff(COLOUR16 >> 4, photometric="rgb"), "save them with 8 bits$"),
    "colour-12-in-16-on-white": (
        lambda: vips(np.dstack([COLOUR16 >> 4, ALPHA16]), "rgb16").pngsave_buffer(),
        "save them with 8 bits$",
    ),
    "cmyk-12-in-16": (
        lambda: tiff(CMYK.astype(np.uint16) * 16, photometric="separated"),
        "save them with 8 bits$",
    ),
    "colour-float": (lambda: tiff(COLOUR.astype(np.float32), photometric="rgb"), RARE),
    "grey-float-64": (lambda: tiff(GREY), RARE),
    "grey-float-16": (lambda: tiff(GREY.astype(np.float16)), RARE),
    "colour-lab-planes": (lambda: tiff(planes(COLOUR8), photometric="cielab"), "in a plane of its own"),
    "tiff-of-webp": (lambda: vips(COLOUR8, "srgb").tiffsave_buffer(compression="webp"), RARE),
    "tiff-cut-off": (lambda: tiff(COLOUR8, photometric="rgb")[:-999], RARE),
    "colour-16-jpeg2000": (lambda: cv2.imencode(".jp2", COLOUR16)[1].tobytes(), "JPEG 2000 with colours"),
    "jpeg-12": (jpeg_of_12_bits, "a JPEG of more than 8 bits: save it with 8"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_would_come_out_wrong_is_refused_with_what_to_do(make: Make, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        decoded(make())


def test_a_black_silhouette_of_16_bits_is_a_picture() -> None:
    silhouette = np.dstack([np.zeros_like(COLOUR16), ALPHA16])
    assert decoded(vips(silhouette, "rgb16").pngsave_buffer()).min() < 255
