"""What Pillow leaves open about TIFFs: which page is the picture, and how its numbers are meant."""

from __future__ import annotations

import contextlib
from typing import Any

from PIL import TiffImagePlugin

from lpclip.config import UserError
from lpclip.images.colours import Numbers

SUBFILE_TYPE, OLD_SUBFILE_TYPE, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 254, 255, 262, 284, 339
"""Tags of TIFF 6.0."""

NO_DATA = 42113
"""GDAL's tag for the value of pixels that nothing was measured at."""

WHITE_IS_ZERO, SEPARATE_PLANES, UNSIGNED, SIGNED = 0, 2, 1, 2


def open_picture(image: TiffImagePlugin.TiffImageFile) -> Numbers:
    """Go to the page that is the picture, before its pixels are loaded. Raises UserError if Pillow would spoil it."""
    _seek_picture(image)
    tags = image.tag_v2
    if tags.get(PLANES) == SEPARATE_PLANES and image.mode in ("LA", "La", "LAB"):
        raise UserError("a TIFF with each channel in a plane of its own: save it with 8 bits in RGB")
    # libtiff gives numbers in the byte order of the machine. Pillow knows it of unsigned ones of 16 bits alone.
    (tile,) = image.tile
    assert isinstance(tile.args, tuple)
    rawmode = tile.args[0].replace(";32B", ";32").replace(";16BS", ";16S")
    image.tile = [tile._replace(args=(rawmode, *tile.args[1:]))]
    sample_format = max(tags.get(SAMPLE_FORMAT, (UNSIGNED,)))
    # Pillow takes unsigned numbers of 32 bits for signed ones, and signed numbers of 8 bits for unsigned ones.
    dtype = {("I", UNSIGNED): "uint32", ("L", SIGNED): "int8"}.get((image.mode, sample_format))
    return Numbers(
        dtype=dtype,
        no_data=_as_float(tags.get(NO_DATA)),
        # Pillow turns such images round, but not the deep ones.
        white_is_zero=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO,
    )


def _seek_picture(image: TiffImagePlugin.TiffImageFile) -> None:
    """Pass by the small copies of the picture with which some files begin."""
    page = 0
    try:
        while image.tag_v2.get(SUBFILE_TYPE, 0) not in (0, 2) or image.tag_v2.get(OLD_SUBFILE_TYPE) == 2:
            page += 1
            image.seek(page)
    except EOFError:  # There is no other page.
        image.seek(0)


def _as_float(value: Any) -> float:
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    return float("nan")
