"""JPEGs that a GPU may decode: the ordinary ones. Pillow decodes all others."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import ExifTags, Image

from lpclip.images.colours import is_in_srgb
from lpclip.images.pixels import JPEG_END, JPEG_SCAN, JPEG_START, MAX_SCANS
from lpclip.images.render import MAX_ASPECT

MAX_AREA = 1 << 24
"""Pixels of the largest JPEG for a GPU. There it is decoded at its full size, and resized as float32."""

AS_RGB = (82, 71, 66)
"""Names of the components R, G and B: such a JPEG holds colours as they are, not brightness and differences."""


@dataclass(frozen=True)
class JpegHeader:
    """Facts about a JPEG, read from its header."""

    area: int
    """Width times height, in pixels."""
    orientation: int
    """EXIF's number of the way to turn it upright, 1 to 8."""


def ordinary_jpeg(data: bytes, *, max_pixels: int, max_bytes: int) -> JpegHeader | None:
    """The header of a complete grey or colour JPEG within the limits; None for all else, which Pillow decides about."""
    if not data.startswith(JPEG_START) or not data.endswith(JPEG_END) or len(data) > max_bytes:
        return None
    if data.count(JPEG_SCAN) > MAX_SCANS:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            width, height = image.size
            # Pillow has found other pictures, or a depth map, behind the first one.
            is_single = image.format == "JPEG"
            is_plain = (
                image.mode in ("L", "RGB") and image.info.get("adobe_transform", 1) == 1 and is_in_srgb(image)
            )
            names = tuple(layer[0] for layer in image.layer)  # type: ignore[attr-defined]
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Headers break in as many ways as images do.
        return None
    fits = width * height <= min(max_pixels, MAX_AREA) and max(width, height) <= MAX_ASPECT * min(
        width, height
    )
    if not (fits and is_single and is_plain and names != AS_RGB and orientation in range(1, 9)):
        return None
    return JpegHeader(area=width * height, orientation=orientation)
