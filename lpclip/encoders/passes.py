"""Forward passes over uint8 images on a CPU, and the feature of an image that is seen in several views.

Without torch: a process that encodes on a CPU does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from lpclip.encoders.engine import Tower
from lpclip.images.views import View


class Passes(Protocol):
    """A way to run an encoder over many images."""

    def __call__(self, pixels: Mapping[View, np.ndarray], views: Sequence[View]) -> np.ndarray:
        """Features (len(views) x N, d) float16, one view after the other.

        `pixels` has uint8 (N, S, S, 3) for each view's `pixels`, which are flipped first where the view is mirrored.
        """
        ...


class CpuPasses:
    """Small passes of one thread each, as many at a time as the tower takes."""

    def __init__(self, tower: Tower, *, dim: int) -> None:
        self.tower, self.dim = tower, dim

    def __call__(self, pixels: Mapping[View, np.ndarray], views: Sequence[View]) -> np.ndarray:
        """As `Passes`. Batches run on from view to view."""
        total, size = len(views) * len(pixels[views[0].pixels]), self.tower.pass_size
        out = np.empty((total, self.dim), np.float16)
        batches = _batches(pixels, views, total, size)
        for start, found in zip(range(0, total, size), self.tower(batches), strict=True):
            out[start : start + size] = found[: total - start]
        return out


def _batches(
    pixels: Mapping[View, np.ndarray], views: Sequence[View], total: int, size: int
) -> Iterator[np.ndarray]:
    """All images of all views in batches of one shape; the last is filled up with black images."""
    count, *shape = pixels[views[0].pixels].shape
    for start in range(0, total, size):
        batch = np.zeros((size, *shape), np.uint8)
        place, stop = start, min(start + size, total)
        while place < stop:
            number, row = divmod(place, count)
            view = views[number]
            run = pixels[view.pixels][row : row + stop - place]
            batch[place - start :][: len(run)] = run[:, :, ::-1] if view.mirrored else run
            place += len(run)
        yield batch


def mean_view(views: Sequence[np.ndarray]) -> np.ndarray:
    """Unit-norm float16 mean of unit-norm views, each (N, d) float16."""
    if len(views) == 1:
        return views[0]
    mean = np.sum([v.astype(np.float32) for v in views], axis=0)
    return (mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-6)).astype(np.float16)
