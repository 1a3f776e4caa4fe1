"""Images in .npy files: headers are checked before the data is read, and nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from pyarrow import fs

from lpclip.config import UserError
from lpclip.files import locate, open_input, split
from lpclip.images.fetch import reason
from lpclip.images.pixels import encode_png
from lpclip.images.source import File, Reader, Row
from lpclip.patience import patiently

HEADER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ArrayReader(Reader):
    """Reads one severity of a .npy file.

    A unit holds the `rows` to read, ascending and numbered within the severity, and their `labels`.
    """

    uri: str
    offset: int
    """Place of the severity's first row in the file, in bytes."""
    height: int
    width: int
    prefix: str
    """Start of the ids: gaussian_noise-3 gives gaussian_noise-3-00042."""

    def rows(self, unit: str) -> Iterator[Row]:
        """The unit's rows as PNG, in order. If the file cannot be read, each row holds the reason."""
        work = json.loads(unit)
        ids = self._ids(work["rows"])
        try:
            images = self._read(work["rows"])
        except (OSError, pa.ArrowException) as error:
            for name, label in zip(ids, work["labels"], strict=True):
                yield Row(name, None, label, f"npy: {reason(error)}")
            return
        for name, image, label in zip(ids, images, work["labels"], strict=True):
            yield Row(name, encode_png(image), label)

    def listed(self, unit: str) -> list[tuple[str, int | None]]:
        """Id and label of each row."""
        work = json.loads(unit)
        return list(zip(self._ids(work["rows"]), work["labels"], strict=True))

    def _ids(self, rows: Sequence[int]) -> list[str]:
        return [f"{self.prefix}-{row:05d}" for row in rows]

    def _read(self, rows: Sequence[int]) -> np.ndarray:
        """Pixels (len(rows), H, W, 3) uint8. Each run of neighbouring rows is one read, and no other bytes are read."""
        shape = (self.height, self.width, 3)
        size = math.prod(shape)
        parts = []
        with open_input(self.uri) as file:
            for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
                data = file.read_at(len(run) * size, self.offset + int(run[0]) * size)
                if len(data) < len(run) * size:
                    raise OSError("the file is shorter than it was at the start")
                parts.append(np.frombuffer(data, np.uint8).reshape(-1, *shape))
        return np.concatenate(parts)


class ArrayFile(NamedTuple):
    """The header of a .npy file, whose data begins at `offset`, in bytes."""

    file: File
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int


def inspect_array(uri: str) -> ArrayFile:
    """The header of a .npy file. Raises UserError when it is missing, damaged, cut, or would have to be unpickled."""
    filesystem, path = locate(uri)
    try:
        info = patiently(uri, lambda: filesystem.get_file_info(path))
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{uri}: no such file")
        with open_input(uri) as file:
            head = io.BytesIO(file.read_at(HEADER_BYTES, 0))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot be read ({reason(error)})") from error
    try:
        shape, fortran, dtype = _parse(head)
    except Exception as error:  # NumPy's parser raises errors of many kinds on broken bytes.
        raise UserError(f"{uri}: not a .npy file that can be read ({reason(error)})") from error
    if dtype.hasobject:
        raise UserError(f"{uri}: holds Python objects, which are never unpickled")
    size = head.tell() + math.prod(shape) * dtype.itemsize
    if info.size != size:
        raise UserError(f"{uri}: cut or damaged, as it has {info.size} bytes and its header says {size}")
    return ArrayFile(File(split(uri)[1], info.size, info.mtime_ns), dtype, shape, fortran, head.tell())


def _parse(head: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(head)
    if version == (1, 0):
        return npy.read_array_header_1_0(head)
    if version == (2, 0):
        return npy.read_array_header_2_0(head)
    raise UserError(f"format version {version[0]}.{version[1]}")
