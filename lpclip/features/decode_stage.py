"""Units of a source to tables of uint8 pixels at the encoder's input size, or of JPEGs that a GPU will decode.

Without torch: the processes that decode stay small and start fast.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lpclip.config import SourceConfig
from lpclip.features.store import THUMBNAIL
from lpclip.features.thumbnails import Sample, thumbnail, thumbnail_of_jpeg
from lpclip.images.jpegs import JpegHeader, ordinary_jpeg
from lpclip.images.pixels import Preprocess, decode_image
from lpclip.images.render import render
from lpclip.images.source import UNIT_ROWS, Reader
from lpclip.images.views import WEAK, View

# Largest size of the tables of pixels that travel from the decoding tasks to the encoder: many views make few rows.
# It is Ray Data's own size of a block, so that a unit in two views of 224 pixels travels in one.
PIXEL_BYTES = 128 << 20
# What a JPEG that is left to the encoder's device has in place of pixels.
JPEG_COLUMNS = ("jpeg", "area", "orientation")


def decode_unit(
    units: pa.Table,
    *,
    reader: Reader,
    limits: SourceConfig,
    views: tuple[View, ...],
    preprocess: Preprocess,
    seed: int,
    leave_jpegs: bool = False,
    sample: Sample | None = None,
) -> Iterator[pa.Table]:
    """Decode units to tables with a row an image: id, label, error, place in the unit, digest, a pixel column a view.

    `units` has a row for each: the unit's number and what the reader needs to know of it. A reader of texts adds a
    column of them. With `leave_jpegs`, for the weak view alone, ordinary JPEGs stay as they are, in the columns jpeg,
    orientation and area, and have no pixels. With a `sample`, its images have thumbnails in a column of that name.
    """
    assert not leave_jpegs or views == (WEAK,), views
    decode = partial(
        _decode_rows,
        limits=limits,
        views=views,
        preprocess=preprocess,
        seed=seed,
        leave_jpegs=leave_jpegs,
        sample=sample,
    )
    step, num_bytes = rows_at_once(views, preprocess), PIXEL_BYTES if leave_jpegs else None
    for unit, spec in zip(units["unit"].to_pylist(), units["spec"].to_pylist(), strict=True):
        yield from _marked_last(
            decode(rows, unit=unit, start=start)
            for start, rows in _pieces(reader.tables(spec), step, num_bytes=num_bytes)
        )


def _marked_last(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The tables of a unit, the last row of them marked as the last."""
    held: pa.Table | None = None
    for table in tables:
        if held is not None:
            yield held
        held = table
    if held is None:
        return
    last = pa.array([False] * (len(held) - 1) + [True])
    yield held.set_column(held.schema.get_field_index("last"), "last", last)


def rows_at_once(views: tuple[View, ...], preprocess: Preprocess) -> int:
    """Number of images that fit, in all these views, into PIXEL_BYTES; one at least."""
    return max(1, PIXEL_BYTES // (len(views) * preprocess.size**2 * 3))


def table_bytes(views: tuple[View, ...], preprocess: Preprocess, *, units_at_once: int = 1) -> int:
    """Bytes of a whole table of pixels, as Ray Data puts those of a task's units together."""
    rows = min(units_at_once * UNIT_ROWS, min(units_at_once, 2) * rows_at_once(views, preprocess))
    return rows * len(views) * preprocess.size**2 * 3


def _pieces(
    tables: Iterator[pa.Table], step: int, *, num_bytes: int | None
) -> Iterator[tuple[int, pa.Table]]:
    """Slices of at most `step` rows, and of about `num_bytes` of encoded images, if that is given; and their places."""
    place = 0
    for table in tables:
        for start in range(0, len(table), step):
            piece = table.slice(start, step)
            if num_bytes is None:
                yield place + start, piece
                continue
            lengths = pc.fill_null(pc.binary_length(piece["image"]), 0).to_numpy()
            group = np.cumsum(lengths, dtype=np.int64) // num_bytes
            ends = [*np.flatnonzero(np.diff(group)) + 1, len(piece)]
            for first, end in pairwise([0, *ends]):
                yield place + start + first, piece.slice(first, end - first)
        place += len(table)


def _decode_rows(
    rows: pa.Table,
    *,
    unit: int,
    start: int,
    limits: SourceConfig,
    views: tuple[View, ...],
    preprocess: Preprocess,
    seed: int,
    leave_jpegs: bool,
    sample: Sample | None,
) -> pa.Table:
    ids, errors = rows["id"].to_pylist(), rows["error"].to_pylist()
    stages = [None if error is None else "read" for error in errors]
    texts = rows["texts"].to_pylist() if "texts" in rows.column_names else [()] * len(ids)
    size = preprocess.size
    pixels = {view: np.zeros((len(ids), size, size, 3), np.uint8) for view in views}
    digests = []
    left: dict[int, JpegHeader] = {}
    is_shown = sample.chosen(ids, start=start) if sample else np.zeros(len(ids), bool)
    thumbnails: list[bytes | None] = [None] * len(ids)
    for i, data in enumerate(rows["image"]):
        image = data.as_py()
        content = ids[i].encode() + b"\0" + (image or b"") + b"".join(b"\0" + t.encode() for t in texts[i])
        digests.append(hashlib.blake2b(content, digest_size=16).digest())
        if image is None:
            continue
        if leave_jpegs:
            header = ordinary_jpeg(image, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes)
            if header is not None:
                left[i] = header
                thumbnails[i] = thumbnail_of_jpeg(image, limits) if is_shown[i] else None
                continue
        try:
            decoded = decode_image(image, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes, size=size)
            for view in views:
                pixels[view][i] = render(decoded, id=ids[i], view=view, preprocess=preprocess, seed=seed)
            thumbnails[i] = thumbnail(decoded) if is_shown[i] else None
        except ValueError as error:
            errors[i], stages[i] = str(error), "decode"
    columns = {
        "id": rows["id"],
        **{name: rows[name] for name in ("label", "texts") if name in rows.column_names},
        "error": pa.array(errors, pa.string()),
        "stage": pa.array(stages, pa.string()),
        "digest": pa.array(digests, pa.binary(16)),
        "unit": pa.array(np.full(len(ids), unit, np.int32)),
        "row": pa.array(np.arange(start, start + len(ids), dtype=np.int32)),
        "last": pa.array([False] * len(ids)),
    }
    if sample:
        columns[THUMBNAIL] = pa.array(thumbnails, pa.binary())
    if leave_jpegs:
        done = [
            image if errors[i] is None and i not in left else None for i, image in enumerate(pixels[WEAK])
        ]
        return pa.table(columns | _jpeg_columns(rows["image"], left, done))
    return pa.table(columns | {f"pixels:{view}": _pixel_column(pixels[view]) for view in views})


def _pixel_column(pixels: np.ndarray) -> pa.Array:
    """Pixels (n, S, S, 3) uint8 as a column, without a copy."""
    dtype = pa.binary(math.prod(pixels.shape[1:]))
    buffer = pa.py_buffer(np.ascontiguousarray(pixels))
    return pa.FixedSizeBinaryArray.from_buffers(dtype, len(pixels), [None, buffer])


def _jpeg_columns(
    images: pa.ChunkedArray, left: dict[int, JpegHeader], done: list[np.ndarray | None]
) -> dict[str, pa.Array]:
    """JPEGs that are left and what is known of them, and the pixels of the others that are done."""
    headers = [left.get(row) for row in range(len(done))]
    return {
        "jpeg": pc.if_else(pa.array([h is not None for h in headers]), images.cast(pa.large_binary()), None),
        "area": pa.array([h and h.area for h in headers], pa.int32()),
        "orientation": pa.array([h and h.orientation for h in headers], pa.int8()),
        f"pixels:{WEAK}": pa.array(
            [None if pixels is None else pixels.tobytes() for pixels in done], pa.large_binary()
        ),
    }


def pixel_array(column: pa.ChunkedArray, *, size: int) -> np.ndarray:
    """A pixel column as uint8 (N, S, S, 3)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    width = size * size * 3
    if not len(array):
        return np.empty((0, size, size, 3), np.uint8)
    flat = np.frombuffer(array.buffers()[1], np.uint8, count=len(array) * width, offset=array.offset * width)
    return flat.reshape(-1, size, size, 3)
