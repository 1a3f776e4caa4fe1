"""From encoded bytes to pixels: decoding within limits, upright and in RGB, and an encoder's preprocessing."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lpclip.config import UserError

Pixels = NDArray[np.uint8]


# Formats that Pillow decodes by itself. For others, such as EPS, it would start another program on the user's bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "JPEG2000", "AVIF", "PPM", "ICO", "DIB")


# JPEGs are decoded at a half, a quarter or an eighth of their size if both sides stay at least this many times as long
# as the encoder's input, because decoding large photographs costs more than encoding them. A smaller factor than three
# changes the features noticeably.
REDUCING_GAP = 3


DECODING_VERSION = 3
"""Version of `decode_image`: features of pixels that were decoded in another way are never taken for these."""

WHITES = (1, 255, 1023, 4095, 16383, 65535)
"""Values that mean white: fractions, and integers of 8 to 16 bits. Files often hold fewer bits than their type."""

ALL_BUT_BLACK = 16
"""A picture of which no level reaches this one, of 256, shows nothing."""

PNG_START, JPEG_START, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
NO_DATA = 42113
"""GDAL's tag for the value of TIFF pixels that nothing was measured at."""

PNG_METADATA = (
    *(b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"sRGB", b"gAMA", b"cHRM"),
    *(b"pHYs", b"tIME", b"bKGD", b"sBIT", b"hIST", b"sPLT"),
)
"""Chunks of a PNG that change none of the pixels that Pillow gives."""

OTHER_KINDS = (
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "HEIC: save it as JPEG or PNG"),
    (rb".{4}ftyp(?!avi)", "a video"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL: save it as JPEG or PNG"),
    (rb"version https://git-lfs", "a pointer of Git LFS: git lfs pull fetches the image"),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page, an SVG or another text"),
    (rb".{128}DICM", "DICOM: save it as PNG or TIFF"),
    (rb"%PDF", "a PDF: save its pages as JPEG or PNG"),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF that is damaged or of a rare kind: save it with 8 bits in RGB"),
)
"""How files begin that people take for images, and what to say of them."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The form in which an encoder takes images. The fields have the names and meanings of open_clip's."""

    size: int
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash", "longest"] = "shortest"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fill: int = 0

    @property
    def resample(self) -> Image.Resampling:
        """Pillow's filter for `interpolation`."""
        return Image.Resampling[self.interpolation.upper()]


def decode_image(data: bytes, *, max_pixels: int, max_bytes: int, size: int | None = None) -> Image.Image:
    """The first frame of an encoded image as upright RGB. Transparency is laid on white, deep greyscale becomes 8 bits.

    If `size`, the side of the encoder's input, is given, a large JPEG is decoded at a fraction of its size, with both
    sides still at least REDUCING_GAP times as long. Sizes are checked in the header, before anything is decoded.
    Raises UserError with a short reason when the image cannot be decoded.
    """
    if not data:
        raise UserError("empty")
    if len(data) > max_bytes:
        raise UserError(f"{len(data)} bytes, more than {max_bytes}")
    decode = partial(_decode, max_pixels=max_pixels, size=size)
    try:
        try:
            return decode(data)
        except (UserError, Image.DecompressionBombError):
            raise
        except Exception:
            image = _mended(data, decode)
            if image is None:
                raise
            return image
    except Image.UnidentifiedImageError as error:
        kind = next((kind for start, kind in OTHER_KINDS if re.match(start, data, re.DOTALL)), None)
        raise UserError(f"not an image that can be decoded{f' ({kind})' if kind else ''}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"more than {max_pixels} pixels") from error
    except Exception as error:
        # Decoders raise errors of many kinds on broken bytes (SyntaxError, struct.error, MemoryError, ...).
        raise UserError(str(error) or type(error).__name__) from error


def _decode(data: bytes, *, max_pixels: int, size: int | None) -> Image.Image:
    with _pillow_limits(max_pixels), Image.open(io.BytesIO(data), formats=_formats()) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise UserError(f"{width}x{height}, more than {max_pixels} pixels")
        if size is not None:
            image.draft(None, (REDUCING_GAP * size, REDUCING_GAP * size))
        # Pillow keeps the upper 8 of a colour's 16 bits.
        is_deep = ";16" in str(image.tile)
        tags = getattr(image, "tag_v2", {})
        # Pillow turns such TIFFs round, but not the deep ones.
        is_negative = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
        image.load()
        rgb = _to_rgb(_upright(image), is_negative=is_negative, no_data=_as_float(tags.get(NO_DATA)))
    if is_deep and np.asarray(rgb).max() < ALL_BUT_BLACK:
        raise UserError("16-bit colours of which less than 12 bits are used: save them with 8 bits")
    return rgb


def _mended(data: bytes, decode: Callable[[bytes], Image.Image]) -> Image.Image | None:
    """An image of which no pixel is lost, though it does not decode as it is; None when that is not so."""
    with contextlib.suppress(Exception):
        if data.startswith(PNG_START):
            return decode(_without_metadata(data))
        if data.startswith(JPEG_START):
            # The decoder makes missing pixels out of the bytes that follow. So two fillings give two images if any is.
            start = data.removesuffix(b"\xff")
            image, other = (decode(start + filling + JPEG_END) for filling in (b"", b"\x55" * 64))
            return image if image.tobytes() == other.tobytes() else None
    return None


def _without_metadata(data: bytes) -> bytes:
    """A PNG without its metadata, which may be damaged, or unpack to more than Pillow takes."""
    kept, place = [PNG_START], len(PNG_START)
    while place < len(data):
        stop = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in PNG_METADATA:
            kept.append(data[place:stop])
        place = stop
    return b"".join(kept)


def encode_png(pixels: Pixels) -> bytes:
    """Pixels (H, W) or (H, W, 3) uint8 as a PNG, compressed lightly because that is fast."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _pillow_limits(max_pixels: int) -> Iterator[None]:
    # Pillow has its own pixel limit: it warns above the limit and raises above twice the limit.
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # A broken EXIF block does not matter: the pixels are decoded already.
        return image


def _as_float(value: Any) -> float:
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    return float("nan")


def _to_rgb(image: Image.Image, *, is_negative: bool, no_data: float) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey = _to_8_bit(np.asarray(image), no_data=no_data)
        image = Image.fromarray(255 - grey if is_negative else grey)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if not rgba.getchannel("A").getbbox():
            raise UserError(
                "wholly transparent in its first frame: save it without its alpha channel, if its colours are the "
                "picture"
            )
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _to_8_bit(grey: NDArray[np.generic], *, no_data: float) -> Pixels:
    """Grey values (H, W) of any numbers as uint8. What is white follows from the largest one, not from the type.

    White is the smallest of WHITES that holds all values, or the largest value where that would be all but black.
    Black is 0, or the smallest value where some are negative. Pixels of the value `no_data` are black.
    """
    values = grey.astype(np.float32)
    values[values == np.float32(no_data)] = np.nan
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    low = min(low, 0.0)
    white = next((white for white in WHITES if white >= high - low), high - low)
    if (high - low) * 256 < ALL_BUT_BLACK * white:
        white = high - low
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low
    return np.round(values * (255 / (white or 1))).astype(np.uint8)


def preprocess_identity(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessing as it reads back from JSON, with lists in place of tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(preprocess).items()
    }
