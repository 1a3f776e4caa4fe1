"""From encoded bytes to pixels: decoding within limits, upright and in RGB, and an encoder's preprocessing."""

from __future__ import annotations

import contextlib
import dataclasses
import io
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


DECODING_VERSION = 2
"""Version of `decode_image`: features of pixels that were decoded in another way are never taken for these."""

WHITES = (1, 255, 1023, 4095, 16383, 65535)
"""Values that mean white: fractions, and integers of 8 to 16 bits. Files often hold fewer bits than their type."""

ALL_BUT_BLACK = 16
"""A picture of which no level reaches this one, of 256, shows nothing."""

PNG_START, JPEG_START, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0


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
        raise UserError("not an image that can be decoded") from error
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
        # Pillow turns such TIFFs round, but not the deep ones.
        is_negative = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
        image.load()
        rgb = _to_rgb(_upright(image), is_negative=is_negative)
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
    """A PNG without its texts and its colour profile, which may be damaged, or unpack to more than Pillow takes."""
    kept, place = [PNG_START], len(PNG_START)
    while place < len(data):
        stop = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
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


def _to_rgb(image: Image.Image, *, is_negative: bool) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey = _to_8_bit(np.asarray(image))
        image = Image.fromarray(255 - grey if is_negative else grey)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _to_8_bit(grey: NDArray[np.generic]) -> Pixels:
    """Grey values (H, W) of any numbers as uint8. What is white follows from the largest one, not from the type.

    White is the smallest of WHITES that holds all values, or the largest value where that would be all but black.
    Black is 0, or the smallest value where some are negative.
    """
    values = grey.astype(np.float32)
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
