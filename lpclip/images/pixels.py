"""From encoded bytes to pixels: decoding within limits, upright and in RGB, and an encoder's preprocessing."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """The first frame of an encoded image as upright RGB. Transparency is laid on white, 16 bits become 8.

    If `size`, the side of the encoder's input, is given, a large JPEG is decoded at a fraction of its size, with both
    sides still at least REDUCING_GAP times as long. Sizes are checked in the header, before anything is decoded.
    Raises UserError with a short reason when the image cannot be decoded.
    """
    if not data:
        raise UserError("empty")
    if len(data) > max_bytes:
        raise UserError(f"{len(data)} bytes, more than {max_bytes}")
    try:
        with _pillow_limits(max_pixels), Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(f"{width}x{height}, more than {max_pixels} pixels")
            if size is not None:
                image.draft(None, (REDUCING_GAP * size, REDUCING_GAP * size))
            image.load()
            return _to_rgb(_upright(image))
    except Image.UnidentifiedImageError as error:
        raise UserError("not an image that can be decoded") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"more than {max_pixels} pixels") from error
    except Exception as error:
        # Decoders raise errors of many kinds on broken bytes (SyntaxError, struct.error, MemoryError, ...).
        raise UserError(str(error) or type(error).__name__) from error


def encode_png(pixels: Pixels) -> bytes:
    """Pixels (H, W) or (H, W, 3) uint8 as a PNG, compressed lightly because that is fast."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _to_8_bit(grey: NDArray[np.generic]) -> Pixels:
    """Grey values (H, W) of more than 8 bits as uint8: integers from 16 bits, floats from [0, 1] if all lie there."""
    if grey.dtype.kind == "f":
        values = np.nan_to_num(grey.astype(np.float32))
        return np.round(np.clip(values * (255 if values.max() <= 1 else 1), 0, 255)).astype(np.uint8)
    return ((np.clip(grey.astype(np.int64), 0, 65535) + 128) // 257).astype(np.uint8)


def preprocess_identity(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessing as it reads back from JSON, with lists in place of tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(preprocess).items()
    }
