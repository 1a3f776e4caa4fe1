"""From the pixels that Pillow gives, of any kind, to RGB: depths, colour profiles, transparency."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from lpclip.config import UserError

WHITES = (1, 255, 1023, 4095, 16383, 65535)
"""Values that mean white: fractions, and integers of 8 to 16 bits. Files often hold fewer bits than their type."""

ALL_BUT_BLACK = 16
"""A picture of which no level reaches this one, of 256, shows nothing."""

NEARLY_SRGB = 8
"""A profile that changes no colour by more levels than this, of 256, is taken as sRGB: most profiles are."""

SPACES = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}
"""The mode that a profile is applied in, by the mode of the image. For all other modes, it is RGB."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How the numbers of a grey image are meant, where its file says so."""

    dtype: str | None = None
    """The type that they have in the file, where Pillow takes another one of the same size."""
    no_data: float = float("nan")
    """The value of pixels that nothing was measured at."""
    white_is_zero: bool = False


def to_rgb(image: Image.Image, numbers: Numbers) -> Image.Image:
    """Any image as RGB in sRGB: deep grey becomes 8 bits, transparency is laid on white.

    Raises UserError when the image is wholly transparent, or no pixel has a value.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F") or numbers.dtype:
        image = _to_8_bit(image, numbers)
    if image.mode == "La":  # grey that is multiplied by its transparency, which Pillow converts to LA alone
        image = image.convert("LA")
    if not image.has_transparency_data:
        return _to_srgb(image)
    alpha = image.convert("RGBA").getchannel("A")
    if not alpha.getbbox():
        raise UserError(
            "wholly transparent in its first frame: save it without its alpha channel, if its colours are the picture"
        )
    colours = _to_srgb(image)
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def shows_nothing(image: Image.Image) -> bool:
    """Whether an image of several channels is all but black. Pure black shows something if its transparency does."""
    highs = np.asarray(image).reshape(-1, len(image.getbands())).max(axis=0)
    colours = highs[:-1] if image.mode in ("RGBA", "LA", "La") else highs
    return bool(highs.max() < ALL_BUT_BLACK or 0 < colours.max() < ALL_BUT_BLACK)


def is_in_srgb(image: Image.Image) -> bool:
    """Whether an image, not yet decoded perhaps, has the colours that its pixels have without a profile."""
    return _way_to_srgb(image) is None


def _to_srgb(image: Image.Image) -> Image.Image:
    way = _way_to_srgb(image)
    if way is None:
        return image.convert("RGB")
    return _apply(way, image.convert(way.input_mode))


def _way_to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    # Pillow converts L*a*b* to sRGB whatever the profile says.
    return _transform(profile, SPACES.get(image.mode, "RGB")) if profile and image.mode != "LAB" else None


# Photographs have few different profiles, and preparing one takes as long as decoding a photograph.
@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the colours of a profile to sRGB; None where that changes next to nothing, or the profile does not fit."""
    try:
        way = ImageCms.buildTransform(
            io.BytesIO(profile),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:
        return None
    if mode == "CMYK":
        return way
    ramp = Image.linear_gradient("L")
    samples = Image.merge("RGB", (ramp, ramp.rotate(90), Image.radial_gradient("L"))).convert(mode)
    before, after = np.asarray(samples.convert("RGB"), np.int16), np.asarray(_apply(way, samples))
    return None if np.abs(before - after).max() <= NEARLY_SRGB else way


def _apply(way: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    found = ImageCms.applyTransform(image, way)
    assert found is not None  # as it is where the image itself is changed
    return found


def _to_8_bit(image: Image.Image, numbers: Numbers) -> Image.Image:
    """Deep grey as L or LA, with its profile. What is white follows from the largest value, not from the type.

    White is the smallest of WHITES that holds all values, or the largest value where that would be all but black.
    Black is 0, or the smallest value where some are negative. Pixels of the value `no_data` are black.
    """
    grey: NDArray[Any] = np.asarray(image)
    values = grey.view(numbers.dtype or grey.dtype).astype(np.float32)
    values[values == np.float32(numbers.no_data)] = np.nan
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise UserError("no pixel has a value: all are NaN, infinite or marked as without data")
    low, high = min(float(finite.min()), 0.0), float(finite.max())
    white = next((white for white in WHITES if white >= high - low), high - low)
    if (high - low) * 256 < ALL_BUT_BLACK * white:
        white = high - low
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low
    levels = np.round(values * (255 / (white or 1))).astype(np.uint8)
    found = Image.fromarray(255 - levels if numbers.white_is_zero else levels)
    if "transparency" in image.info:
        found.putalpha(Image.fromarray(grey != image.info["transparency"]))
    if "icc_profile" in image.info:
        found.info["icc_profile"] = image.info["icc_profile"]
    return found
