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
from PIL import Image, ImageOps, TiffImagePlugin

from lpclip.config import UserError
from lpclip.images.colours import Numbers, shows_nothing, to_rgb
from lpclip.images.tiffs import open_picture

Pixels = NDArray[np.uint8]


# Formats that Pillow decodes by itself. For others, such as EPS, it would start another program on the user's bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "JPEG2000", "AVIF", "PPM", "ICO", "DIB")


# JPEGs are decoded at a half, a quarter or an eighth of their size if both sides stay at least this many times as long
# as the encoder's input, because decoding large photographs costs more than encoding them. A smaller factor than three
# changes the features noticeably.
REDUCING_GAP = 3


DECODING_VERSION = 5
"""Version of `decode_image`: features of pixels that were decoded in another way are never taken for these."""

PNG_START, JPEG_START, JPEG_SCAN, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
MAX_SCANS = 100
"""Each scan of a progressive JPEG goes over all of its pixels, and may be a few bytes long. Encoders write ten."""

JPEG2000_SIZES, JPEG2000_BITS = b"\xff\x4f\xff\x51", 42
"""How the pixels of a JPEG 2000 begin, and where each three bytes for a channel begin, with its bits less one."""

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
    (rb"\xff\xd8.*?\xff[\xc0-\xcf]\0[\x0b\x11\x14][\x09-\x10]", "a JPEG of more than 8 bits: save it with 8"),
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
    if data.startswith(JPEG_START) and data.count(JPEG_SCAN) > MAX_SCANS:
        raise UserError(f"a JPEG of more than {MAX_SCANS} scans")
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
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"not an image that can be decoded{_kind(data)}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"more than {max_pixels} pixels") from error
    except Exception as error:
        # Decoders raise errors of many kinds on broken bytes (SyntaxError, struct.error, MemoryError, ...).
        raise UserError(f"{str(error) or type(error).__name__}{_kind(data)}") from error


def _kind(data: bytes) -> str:
    kind = next((kind for start, kind in OTHER_KINDS if re.match(start, data, re.DOTALL)), None)
    return f" ({kind})" if kind else ""


def _decode(data: bytes, *, max_pixels: int, size: int | None) -> Image.Image:
    with _pillow_settings(max_pixels), Image.open(io.BytesIO(data), formats=_formats()) as image:
        numbers = open_picture(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else Numbers()
        width, height = image.size
        if width * height > max_pixels:
            raise UserError(f"{width}x{height}, more than {max_pixels} pixels")
        if size is not None:
            image.draft(None, (REDUCING_GAP * size, REDUCING_GAP * size))
        # Pillow keeps the upper 8 of a colour's 16 bits.
        # In a JPEG 2000, this makes black of white.
        if image.format == "JPEG2000" and _is_deep_jpeg2000(data, len(image.getbands())):
            raise UserError("JPEG 2000 with colours of more than 8 bits: save it with 8")
        is_cut = ";16" in str(image.tile) and len(image.getbands()) > 1
        image.load()
        if is_cut and shows_nothing(image):
            raise UserError("16-bit colours of which less than 12 bits are used: save them with 8 bits")
        return to_rgb(_upright(image), numbers)


def _is_deep_jpeg2000(data: bytes, channels: int) -> bool:
    """Whether there are several channels, of more than 8 bits."""
    place = data.find(JPEG2000_SIZES) + JPEG2000_BITS
    bits = data[place : place + 3 * channels : 3]
    return channels > 1 and any(number & 0x7F > 7 for number in bits)


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
def _pillow_settings(max_pixels: int) -> Iterator[None]:
    # Pillow has its own pixel limit: it warns above the limit and raises above twice the limit.
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    # Of uncompressed TIFFs, Pillow's own reader takes planes of 16 bits for planes of 8. libtiff reads them all.
    tiffs_before = TiffImagePlugin.READ_LIBTIFF
    TiffImagePlugin.READ_LIBTIFF = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
        TiffImagePlugin.READ_LIBTIFF = tiffs_before


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # A broken EXIF block does not matter: the pixels are decoded already.
        return image


def preprocess_identity(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessing as it reads back from JSON, with lists in place of tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(preprocess).items()
    }
