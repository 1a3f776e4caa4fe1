"""Published corrupted data sets, read as they are: ImageNet-C's folders, CIFAR-10-C's and CIFAR-100-C's arrays.

ImageNet-C is ROOT/<corruption>/<severity>/<class>/<images>, with or without folders of corruptions between
(ROOT/blur/defocus_blur/...). CIFAR-10-C is ROOT/<corruption>.npy, uint8 (5n, H, W, 3) with the n images of
severity 1 first, then those of severity 2, and so on, and ROOT/labels.npy with the n labels five times.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from pyarrow import fs

from lpclip.config import SourceConfig
from lpclip.errors import UserError
from lpclip.files import locate, split
from lpclip.images.fetch import reason, retry, under
from lpclip.images.open import open_source
from lpclip.images.pixels import encode_png
from lpclip.images.source import TABLE_BYTES, UNIT_ROWS, File, Reader, Row, Source, choose, make_identity
from lpclip.images.views import CORRUPTIONS, SEVERITIES

LABELS = "labels.npy"
HEADER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Published:
    """One corruption at one severity of a published set: known to be there, listed and read when opened."""

    name: str
    """The whole set's name, safe in file names."""
    root: str
    """The whole set's folder, as an absolute path or URI."""
    place: str
    """Under root: the severity's folder, or the corruption's .npy file."""
    corruption: str
    """One of `lpclip.images.views.CORRUPTIONS`."""
    severity: int
    """1 to 5."""

    def open(self, *, config: SourceConfig, limit: int | None = None) -> Source:
        """Its images with labels; a limit takes the same images at every corruption and severity.

        Raises UserError when there are no images or labels, or the files are not what the layout says.
        """
        if self.place.endswith(".npy"):
            source = _open_array(self, config=config, limit=limit)
        else:
            source = open_source(under(self.root, self.place), config=config, limit=limit)
            if not source.has_labels:
                raise UserError(f"{source.root}: the images lie in no class folders, so they have no labels")
        # Corrupted files may be alike in names, sizes and times: the identity must tell them apart.
        identity = {**source.identity, "corruption": self.corruption, "severity": self.severity}
        return replace(source, name=f"{self.name}-{_prefix(self)}", identity=identity)


@dataclass(frozen=True, kw_only=True)
class ArrayReader(Reader):
    """One severity of a .npy file. A unit holds the `rows` to read, ascending and numbered within the severity,
    and their `labels`."""

    uri: str
    offset: int
    """Of the severity's first row in the file, in bytes."""
    height: int
    width: int
    prefix: str
    """Of the ids: gaussian_noise-3 makes gaussian_noise-3-00042."""

    def rows(self, unit: str) -> Iterator[Row]:
        """The unit's rows as PNG, in order; where the file cannot be read, each of them with the reason."""
        work = json.loads(unit)
        ids = [f"{self.prefix}-{row:05d}" for row in work["rows"]]
        try:
            images = retry(partial(self._read, work["rows"]))
        except (OSError, pa.ArrowException) as error:
            for name, label in zip(ids, work["labels"], strict=True):
                yield Row(name, None, label, f"npy: {reason(error)}")
            return
        for name, image, label in zip(ids, images, work["labels"], strict=True):
            yield Row(name, encode_png(image), label)

    def _read(self, rows: Sequence[int]) -> np.ndarray:
        """Pixels (len(rows), H, W, 3): a read for each run of neighbouring rows, and no byte of the others."""
        shape = (self.height, self.width, 3)
        size = math.prod(shape)
        parts = []
        filesystem, path = locate(self.uri)
        with filesystem.open_input_file(path) as file:
            for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
                data = file.read_at(len(run) * size, self.offset + int(run[0]) * size)
                if len(data) < len(run) * size:
                    raise OSError("the file is shorter than it was at the start")
                parts.append(np.frombuffer(data, np.uint8).reshape(-1, *shape))
        return np.concatenate(parts)


def published_sets(path: str) -> tuple[list[Published], list[str]]:
    """The corrupted sets in a folder or URI, by corruption and severity, and notes on what was left out.

    Folders of images are only listed when they are opened, but arrays are checked now: their headers and labels.
    Raises UserError when there is no such folder, no corruption in it, one of them twice, or a damaged array.
    """
    root = path if "://" in path else str(Path(path).expanduser().absolute())
    folders, files = _list(root)
    arrays = [file for file in files if file.endswith(".npy") and file != LABELS]
    found = [file for file in arrays if _stem(file) in CORRUPTIONS]
    left_out = [file for file in arrays if file not in found]
    sets = [(_stem(file), severity, file) for file in found for severity in SEVERITIES]
    corruptions = [folder for folder in folders if folder in CORRUPTIONS]
    for folder in folders:
        if folder not in CORRUPTIONS:
            known, unknown = _subfolders(root, folder, CORRUPTIONS)
            corruptions += known
            left_out += unknown
    for folder in corruptions:
        known, unknown = _subfolders(root, folder, SEVERITIES)
        sets += [(_stem(folder), _stem(place), place) for place in known]
        left_out += unknown
    if not sets:
        raise UserError(
            f"{path}: no published corrupted data set; there should be folders CORRUPTION/SEVERITY/CLASS of images, or "
            f"files CORRUPTION.npy and {LABELS}, where CORRUPTION is one of {', '.join(CORRUPTIONS)}"
        )
    for before, after in pairwise(sorted(sets)):
        if before[:2] == after[:2]:
            raise UserError(
                f"{path}: {after[0]} of severity {after[1]} is there twice, as {before[2]} and {after[2]}"
            )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", _stem(locate(root)[1].rstrip("/"))).strip("-.") or "images"
    published = [
        Published(name=name, root=root, place=place, corruption=corruption, severity=int(severity))
        for corruption, severity, place in sorted(sets)
    ]
    for item in published:
        if item.place in found and item.severity == 1:
            item.open(
                config=SourceConfig()
            )  # A damaged file is better told now than after hours of encoding.
    if not left_out:
        return published, []
    examples = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
    return published, [
        f"{len(left_out)} folders and .npy files in {path} are no known corruption or severity and were left out "
        f"({examples})"
    ]


def _list(root: str, folder: str = "") -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files right in a folder under root, without hidden ones."""
    uri = under(root, folder) if folder else root
    try:
        filesystem, path = locate(uri)
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{uri}: no such path")
        if info.is_file:
            raise UserError(f"{uri}: a file, where a folder of corruptions should be")
        infos = filesystem.get_file_info(fs.FileSelector(path))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot be listed ({reason(error)})") from error
    infos = sorted((i for i in infos if not i.base_name.startswith(".")), key=lambda i: i.base_name)
    return [i.base_name for i in infos if not i.is_file], [i.base_name for i in infos if i.is_file]


def _subfolders(root: str, folder: str, names: Container[str]) -> tuple[list[str], list[str]]:
    """Paths of the subfolders of these names, and of the others; without the former, the folder is the other."""
    folders, _ = _list(root, folder)
    known = [f"{folder}/{name}" for name in folders if name in names]
    return known, [f"{folder}/{name}" for name in folders if name not in names] if known else [folder]


def _stem(path: str) -> str:
    """The last name of a path, without .npy."""
    return path.rpartition("/")[2].removesuffix(".npy")


def _prefix(item: Published) -> str:
    return f"{item.corruption}-{item.severity}"


def _open_array(item: Published, *, config: SourceConfig, limit: int | None) -> Source:
    """One severity of a .npy file: its header and the labels are read, but no image."""
    if limit is not None and limit < 1:
        raise UserError(f"the limit must be at least 1, not {limit}")
    uri = under(item.root, item.place)
    array = _inspect(uri)
    if array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[3] != 3 or array.fortran:
        order = "Fortran" if array.fortran else "C"
        raise UserError(
            f"{uri}: {array.dtype} {array.shape} in {order} order, not uint8 (rows, height, width, 3) in C order"
        )
    num_rows, height, width, _ = array.shape
    if min(array.shape) < 1 or num_rows % len(SEVERITIES):
        raise UserError(
            f"{uri}: {num_rows} rows of {width}x{height} pixels are not five severities of images"
        )
    count, row_bytes = num_rows // len(SEVERITIES), height * width * 3
    labels_file, labels = _labels(under(item.root, LABELS), num_rows=num_rows)
    # The ids' hashes choose, without the corruption: under a limit, all sets hold the same images.
    rows = choose([f"{row:05d}" for row in range(count)], limit)
    step = min(UNIT_ROWS, max(TABLE_BYTES // row_bytes, 1))
    units = [rows[start : start + step] for start in range(0, len(rows), step)]
    return Source(
        name=item.name,
        kind="npy",
        root=item.root,
        reader=ArrayReader(
            uri=uri,
            offset=array.offset + (item.severity - 1) * count * row_bytes,
            height=height,
            width=width,
            prefix=_prefix(item),
        ),
        units=tuple(json.dumps({"rows": unit, "labels": labels[unit].tolist()}) for unit in units),
        num_rows=len(rows),
        has_labels=True,
        label_names=None,
        identity=make_identity("npy", [array.file, labels_file], config=config, limit=limit),
        config=config,
    )


def _labels(uri: str, *, num_rows: int) -> tuple[File, np.ndarray]:
    """The labels' file, and the labels (num_rows / 5,) that are the same at each severity."""
    array = _inspect(uri)
    if array.dtype.kind not in "iu" or len(array.shape) != 1:
        raise UserError(f"{uri}: {array.dtype} {array.shape}, where a list of integers should be")
    if array.shape[0] != num_rows:
        raise UserError(f"{uri}: {array.shape[0]} labels, but the images are {num_rows}")
    try:
        filesystem, path = locate(uri)
        with filesystem.open_input_file(path) as file:
            data = retry(lambda: file.read_at(num_rows * array.dtype.itemsize, array.offset))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot be read ({reason(error)})") from error
    labels = np.frombuffer(data, array.dtype).reshape(len(SEVERITIES), -1)
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise UserError(f"{uri}: labels from {labels.min()} to {labels.max()} are not numbers of classes")
    if (labels != labels[0]).any():
        raise UserError(f"{uri}: the labels are not the same for each of the five severities")
    return array.file, labels[0]


class _Array(NamedTuple):
    """What is known of a .npy file before its data is read; they begin at the offset, in bytes."""

    file: File
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int


def _inspect(uri: str) -> _Array:
    """A .npy file by its header; UserError when it is missing, damaged, cut, or would have to be unpickled."""
    filesystem, path = locate(uri)
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{uri}: no such file")
        with filesystem.open_input_file(path) as file:
            head = io.BytesIO(retry(lambda: file.read_at(HEADER_BYTES, 0)))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot be read ({reason(error)})") from error
    try:
        shape, fortran, dtype = _parse(head)
    except Exception as error:  # Broken bytes lead NumPy's parser to whatever Python's own may raise.
        raise UserError(f"{uri}: not a .npy file that can be read ({reason(error)})") from error
    if dtype.hasobject:
        raise UserError(f"{uri}: holds Python objects, which are never unpickled")
    size = head.tell() + math.prod(shape) * dtype.itemsize
    if info.size != size:
        raise UserError(f"{uri}: cut or damaged, as it has {info.size} bytes and its header says {size}")
    return _Array(File(split(uri)[1], info.size, info.mtime_ns), dtype, shape, fortran, head.tell())


def _parse(head: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(head)
    if version == (1, 0):
        return npy.read_array_header_1_0(head)
    if version == (2, 0):
        return npy.read_array_header_2_0(head)
    raise UserError(f"format version {version[0]}.{version[1]}")
