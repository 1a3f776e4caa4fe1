"""Small pictures of some of a store's images, for people to look at, made while the images are decoded anyway.

Without torch: the processes that decode make them.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lpclip.config import SourceConfig
from lpclip.features.store import MOST_THUMBNAILS, row_keys
from lpclip.images.pixels import REDUCING_GAP, decode_image
from lpclip.images.source import Source

SIDE = 160
"""Most pixels of a thumbnail's longer side."""
MAX_BYTES = 20_000
QUALITIES = (80, 50, 25)
"""Qualities of JPEG that are tried, one after the other, until a thumbnail is small enough."""
LEAST_OF_A_UNIT = 100


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Which of a source's images get a thumbnail: a hash of the id chooses, so every run chooses the same ones.

    All of them are the first in the store's row order, which is that of the same hash. Where nobody knows the number of
    rows, each unit (a tar) gets more than its share of those, so that the first ones are there nevertheless.
    """

    num_rows: int | None
    num_units: int

    @classmethod
    def of(cls, source: Source) -> Sample:
        """The sample of a source."""
        return cls(num_rows=source.num_rows, num_units=len(source.units))

    def chosen(self, ids: list[str], *, start: int) -> np.ndarray:
        """Say of a unit's images from place `start` on whether they get one: (N,) bool."""
        if self.num_rows is None:
            of_a_unit = max(LEAST_OF_A_UNIT, MOST_THUMBNAILS / self.num_units)
            shares = of_a_unit / np.arange(start + 1, start + len(ids) + 1)
        else:
            shares = np.full(len(ids), MOST_THUMBNAILS / max(1, self.num_rows))
        return np.asarray(row_keys(np.array(ids, dtype=object)) / 2.0**64 < shares)


def thumbnail(image: Image.Image) -> bytes | None:
    """An RGB image as a JPEG, its longer side at most SIDE, never enlarged; None if that takes over MAX_BYTES."""
    factor = min(1.0, SIDE / max(image.size))
    if factor < 1:
        width, height = (max(1, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=1.0)
    for quality in QUALITIES:
        buffer = io.BytesIO()
        # Without this, Pillow would copy the comment of a JPEG.
        image.save(buffer, "JPEG", quality=quality, optimize=True, comment=b"")
        if buffer.tell() <= MAX_BYTES:
            return buffer.getvalue()
    return None


def thumbnail_of_jpeg(data: bytes, limits: SourceConfig) -> bytes | None:
    """The thumbnail of a JPEG that a GPU decodes for the encoder; None where it cannot be decoded here."""
    with contextlib.suppress(ValueError):
        size = -(-SIDE // REDUCING_GAP)
        return thumbnail(
            decode_image(data, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes, size=size)
        )
    return None
