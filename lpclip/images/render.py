"""From an RGB image to the uint8 pixels of one of its views, at the size that an encoder takes.

Only Pillow and NumPy are imported here, so that the processes that decode stay small and start fast.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from lpclip.config import UserError
from lpclip.images.damage import DAMAGES, damage
from lpclip.images.pixels import Pixels, Preprocess
from lpclip.images.views import View

DAMAGED_SHARE = 0.75
"""Share of strong views that also get a damage. The others show what it would hide."""

MAX_ASPECT = 16
"""Longer images are cut to this aspect ratio before they are resized: 1 x 1,000,000 pixels would fill the memory."""


def weak_view(image: Image.Image, preprocess: Preprocess) -> Pixels:
    """The view of an RGB image that the encoder is evaluated on, uint8 (S, S, 3): open_clip's steps before ToTensor."""
    if preprocess.resize == "shortest":
        image = _trim(image)
    resized = image.resize(resized_size(image.size, preprocess), preprocess.resample)
    return np.array(resized) if preprocess.resize == "squash" else _center(np.asarray(resized), preprocess)


def resized_size(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Width and height that an image of this width and height is resized to, before its middle is taken."""
    if preprocess.resize == "squash":
        return preprocess.size, preprocess.size
    if preprocess.resize == "shortest":
        width, height = (int(preprocess.size * side / min(size)) for side in size)
    else:
        ratio = max(size) / preprocess.size
        width, height = (max(round(side / ratio), 1) for side in size)
    return width, height


def middle(side: int, size: int) -> tuple[int, int, int]:
    """Where the middle `size` pixels of a side are: the margins that it needs before and after it, then the first."""
    missing = max(size - side, 0)
    return missing // 2, (missing + 1) // 2, round((side + missing - size) / 2)


def strong_view(image: Image.Image, preprocess: Preprocess, *, seed: int) -> Pixels:
    """A seeded augmentation of an RGB image, uint8 (S, S, 3): crop, flip, colour jitter, grey, blur, damage."""
    rng = np.random.default_rng(seed)
    size = preprocess.size
    view = image.resize((size, size), preprocess.resample, box=_random_box(image.size, rng))
    flip, jitter, grey, blur = rng.random(4) < (0.5, 0.8, 0.2, 0.2)
    factors, radius = rng.uniform(0.6, 1.4, size=3), rng.uniform(0.1, 1.5) * size / 224
    if flip:
        view = ImageOps.mirror(view)
    if jitter:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, factor in zip(enhancers, factors, strict=True):
            view = enhancer(view).enhance(factor)
    if grey:
        view = view.convert("L").convert("RGB")
    if blur:
        view = view.filter(ImageFilter.GaussianBlur(radius))
    if rng.random() < DAMAGED_SHARE:
        name, severity = DAMAGES[rng.integers(len(DAMAGES))], int(rng.integers(1, 6))
        view = damage(view, name=name, severity=severity, rng=rng)
    return np.array(view)


def corrupt(pixels: Pixels, *, name: str, severity: int, seed: int) -> Pixels:
    """Pixels (S, S, 3) uint8 with ImageNet-C's corruption `name` at severity 1 to 5; seed is a uint32.

    Raises UserError for images smaller than 32x32 pixels.
    """
    if min(pixels.shape[:2]) < 32:
        raise UserError(
            f"corruptions need images of at least 32x32 pixels, not {pixels.shape[1]}x{pixels.shape[0]}"
        )
    import imagecorruptions

    # Two corruptions take a seed. All others draw from NumPy's global generator, so that one is seeded, then restored.
    seeded = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        return np.asarray(imagecorruptions.corrupt(pixels, severity=severity, corruption_name=name, **seeded))
    finally:
        np.random.set_state(state)  # noqa: NPY002


def view_seed(id: str, *, view: View, seed: int) -> int:  # noqa: A002
    """The uint32 seed of one view of one image: a hash, so that no order of work can change it."""
    return int.from_bytes(blake2b(f"{seed}\0{view}\0{id}".encode(), digest_size=4).digest(), "big")


def render(
    image: Image.Image,
    *,
    id: str,  # noqa: A002
    view: View,
    preprocess: Preprocess,
    seed: int,
) -> Pixels:
    """One of `pixel_views` of an RGB image, uint8 (S, S, 3): a pure function of its arguments."""
    assert not view.mirrored, view
    if view.is_base:
        return weak_view(image, preprocess)
    own_seed = view_seed(id, view=view, seed=seed)
    if view.is_strong:
        return strong_view(image, preprocess, seed=own_seed)
    return corrupt(weak_view(image, preprocess), name=view.name, severity=view.level, seed=own_seed)


def _trim(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _center(pixels: Pixels, preprocess: Preprocess) -> Pixels:
    """The middle (S, S, 3) of pixels (H, W, 3), with a margin of `fill` where a side is shorter."""
    size = preprocess.size
    (above, below, top), (before, after, left) = (middle(side, size) for side in pixels.shape[:2])
    if above or below or before or after:
        pixels = np.pad(pixels, ((above, below), (before, after), (0, 0)), constant_values=preprocess.fill)
    return pixels[top : top + size, left : left + size].copy()


def _random_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box of half to all of the area with an aspect ratio of 3:4 to 4:3, or the middle square if none fits."""
    width, height = size
    for area, log_ratio, x, y in rng.uniform(
        (0.5, np.log(3 / 4), 0, 0), (1, np.log(4 / 3), 1, 1), size=(10, 4)
    ):
        box_width = round((width * height * area * np.exp(log_ratio)) ** 0.5)
        box_height = round((width * height * area / np.exp(log_ratio)) ** 0.5)
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(x * (width - box_width + 1)), int(y * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
