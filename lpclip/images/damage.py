"""Noise, blur and splashes for strong views: cheap, because every image gets a strong view.

The noise and the blur are ImageNet-C's extra corruptions "speckle noise" and "Gaussian blur" (Hendrycks and Dietterich
2019) with its strengths; the splashes are a plain relative of "spatter".
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

DAMAGES = ("speckle", "blur", "splashes")

# Each has a row for each severity, 1 to 5: standard deviations of the noise, and of the blur in pixels.
_NOISE = (0.15, 0.2, 0.35, 0.45, 0.6)
_SIGMA = (1, 2, 3, 4, 6)
# A splash is where smooth noise exceeds so many standard deviations; its size in pixels, its colour, its opacity.
_SPLASHES = (
    (1.9, 12, (175, 238, 238), 0.6),
    (1.1, 9, (175, 238, 238), 0.6),
    (0.7, 6, (175, 238, 238), 0.5),
    (1.1, 4, (63, 42, 20), 1.0),
    (0.8, 4, (63, 42, 20), 1.0),
)


def damage(view: Image.Image, *, name: str, severity: int, rng: np.random.Generator) -> Image.Image:
    """An RGB image with one of DAMAGES at a severity of 1 to 5."""
    place = severity - 1
    if name == "speckle":
        return _speckle(view, _NOISE[place], rng)
    if name == "blur":
        return view.filter(ImageFilter.GaussianBlur(_SIGMA[place]))
    return _splashes(view, *_SPLASHES[place], rng)


def _speckle(view: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Noise in proportion to the light: x (1 + n), n from a normal distribution."""
    pixels = np.asarray(view, np.float32)
    noisy = rng.standard_normal(pixels.shape, dtype=np.float32)
    noisy *= strength
    noisy += 1
    noisy *= pixels
    return Image.fromarray(np.clip(noisy, 0, 255, out=noisy).astype(np.uint8))


def _splashes(
    view: Image.Image,
    threshold: float,
    size: int,
    colour: tuple[int, int, int],
    opacity: float,
    rng: np.random.Generator,
) -> Image.Image:
    """Drops of a colour wherever smooth noise is high, with soft edges."""
    grid = (view.width // size + 2, view.height // size + 2)
    noise = Image.fromarray(rng.standard_normal(grid[::-1], dtype=np.float32))
    field = np.asarray(noise.resize(view.size, Image.Resampling.BICUBIC))
    mask = np.clip((field - threshold) * (4 * 255 * opacity), 0, 255 * opacity).astype(np.uint8)
    return Image.composite(Image.new("RGB", view.size, colour), view, Image.fromarray(mask))
