"""JPEGs to the pixels of the weak view on the encoder's device: nvJPEG on a GPU, by torchvision, and on a CPU libjpeg.

What the device cannot decode, Pillow decodes, and its word is the last.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lpclip.config import SourceConfig, UserError
from lpclip.images.pixels import Preprocess, decode_image
from lpclip.images.render import middle, resized_size, weak_view

AT_ONCE = 1 << 25
"""Pixels that one call decodes, about: 100 MB."""


@dataclass(frozen=True, kw_only=True)
class Undecoded:
    """The weak view of N images, some of which are JPEGs still.

    `jpegs` has an image's bytes as uint8, or None; `pixels` uint8 (S, S, 3) for the others. `errors` gets the reason
    for each image, by its row, that turns out to be broken; its pixels are black.
    """

    jpegs: list[np.ndarray | None]
    areas: list[int]
    orientations: list[int]
    pixels: list[np.ndarray | None]
    errors: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table, *, size: int) -> Undecoded:
        """The rows of a table of `decode_unit` with JPEGs."""
        return cls(
            jpegs=_binary(table["jpeg"]),
            areas=table["area"].to_pylist(),
            orientations=table["orientation"].to_pylist(),
            pixels=[None if v is None else v.reshape(size, size, 3) for v in _binary(table["pixels:weak"])],
        )

    def __len__(self) -> int:
        return len(self.jpegs)


class DeviceDecoder:
    """Decodes on the device. Raises UserError when torchvision cannot do so there."""

    def __init__(self, preprocess: Preprocess, *, limits: SourceConfig, device: torch.device) -> None:
        self.preprocess, self.limits, self.device = preprocess, limits, device
        grey = io.BytesIO()
        Image.new("RGB", (16, 16), "grey").save(grey, "JPEG")
        try:
            self._decode_all([torch.frombuffer(bytearray(grey.getvalue()), dtype=torch.uint8)])
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"--decode gpu: torchvision cannot decode JPEGs on this machine's GPU ({str(error).splitlines()[0]}); "
                "leave --decode out"
            ) from error

    def __call__(self, images: Undecoded) -> Tensor:
        """The weak view, uint8 (N, S, S, 3) on the device. Reasons for broken images go to `images.errors`."""
        size = self.preprocess.size
        found = torch.zeros((len(images), size, size, 3), dtype=torch.uint8, device=self.device)
        done = {row: pixels for row, pixels in enumerate(images.pixels) if pixels is not None}
        if done:
            found[list(done)] = torch.from_numpy(np.stack(list(done.values()))).to(self.device)
        for rows in _runs(images):
            decoded = self._decode([torch.from_numpy(images.jpegs[row]) for row in rows])
            ours = {row: image for row, image in zip(rows, decoded, strict=True) if image is not None}
            for row in rows:
                if row not in ours:
                    found[row] = self._by_pillow(row, images)
            if ours:
                turned = (upright(image, images.orientations[row]) for row, image in ours.items())
                found[list(ours)] = _to_pixels([resized(image, self.preprocess) for image in turned])
        return found

    def _decode(self, data: Sequence[Tensor]) -> list[Tensor | None]:
        """RGB (3, H, W) uint8 of each; None where it fails."""
        try:
            return self._decode_all(data)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # One broken image fails them all.
            return [None] if len(data) == 1 else [self._decode([item])[0] for item in data]

    def _decode_all(self, data: Sequence[Tensor]) -> list[Tensor | None]:
        from torchvision.io import ImageReadMode, decode_jpeg

        return list(decode_jpeg(list(data), mode=ImageReadMode.RGB, device=self.device))

    def _by_pillow(self, row: int, images: Undecoded) -> Tensor:
        limits, size, data = self.limits, self.preprocess.size, images.jpegs[row]
        assert data is not None
        try:
            image = decode_image(
                data.tobytes(), max_pixels=limits.max_pixels, max_bytes=limits.max_bytes, size=size
            )
        except ValueError as error:
            images.errors[row] = str(error)
            return torch.zeros((size, size, 3), dtype=torch.uint8)
        return torch.from_numpy(weak_view(image, self.preprocess))


def _binary(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """The values of a large_binary column as uint8 arrays that may be written to, of one copy of them all."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.large_binary())
    _, offsets, data = array.buffers()
    if not len(array) or data is None:
        return [None] * len(array)
    ends = np.frombuffer(offsets, np.int64, count=len(array) + 1, offset=8 * array.offset)
    values = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].copy()
    there = array.is_valid().to_pylist()
    places = (ends - ends[0]).tolist()
    return [
        values[start:end] if valid else None
        for valid, (start, end) in zip(there, pairwise(places), strict=True)
    ]


def _runs(images: Undecoded) -> Iterator[list[int]]:
    """The rows of JPEGs, so many at a time as AT_ONCE allows."""
    rows: list[int] = []
    area = 0
    for row, data in enumerate(images.jpegs):
        if data is None:
            continue
        if rows and area + images.areas[row] > AT_ONCE:
            yield rows
            rows, area = [], 0
        rows.append(row)
        area += images.areas[row]
    if rows:
        yield rows


def upright(image: Tensor, orientation: int) -> Tensor:
    """An image (3, H, W) turned by EXIF's number of its orientation, 1 to 8."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    # After that, what is left is a mirror image, upside down, or both.
    mirrored, upside_down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return image.flip([1] * upside_down + [2] * mirrored)


def resized(image: Tensor, preprocess: Preprocess) -> Tensor:
    """The weak view (3, S, S) of an upright uint8 image (3, H, W), as float32 that is not rounded yet.

    It is what `weak_view` has but for rounding: Pillow also rounds between the two directions, in an order of its own.
    Beside sharp edges that can be seen.
    """
    size, mode = preprocess.size, preprocess.interpolation
    width, height = resized_size((image.shape[2], image.shape[1]), preprocess)
    view = F.interpolate(image[None].float(), (height, width), mode=mode, antialias=True, align_corners=False)
    (above, below, top), (before, after, left) = middle(height, size), middle(width, size)
    if above or below or before or after:
        view = F.pad(view, (before, after, above, below), value=float(preprocess.fill))
    return view[0, :, top : top + size, left : left + size]


def _to_pixels(views: Sequence[Tensor]) -> Tensor:
    """N float32 views (3, S, S) as uint8 (N, S, S, 3)."""
    return torch.stack(list(views)).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
