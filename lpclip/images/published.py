"""Published corrupted data sets in their own layouts: ImageNet-C's folders, CIFAR-10-C's and CIFAR-100-C's arrays.

ImageNet-C is ROOT/<corruption>/<severity>/<class>/<images>, with or without folders of corruptions between
(ROOT/blur/defocus_blur/...). CIFAR-10-C is ROOT/<corruption>.npy, uint8 (5n, H, W, 3) with the n images of
severity 1 first, then those of severity 2, and so on, and ROOT/labels.npy with the n labels five times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import fs

from lpclip.config import SourceConfig, UserError, counted
from lpclip.files import locate, open_input
from lpclip.images.arrays import ArrayReader, inspect_array
from lpclip.images.fetch import reason, under
from lpclip.images.open import open_source
from lpclip.images.source import TABLE_BYTES, UNIT_ROWS, File, Source, beyond_limit, choose, make_identity
from lpclip.images.views import CORRUPTIONS, SEVERITIES
from lpclip.patience import patiently

LABELS = "labels.npy"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One corruption at one severity of a published set. It exists, and its images are listed when it is opened."""

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
        """The images with labels. A limit takes the same images at every corruption and severity.

        Raises UserError when there are no images or labels, or the files are not what the layout says.
        """
        if self.place.endswith(".npy"):
            source = _open_array(self, config=config, limit=limit)
        else:
            source = open_source(under(self.root, self.place), config=config, limit=limit)
            if not source.has_labels:
                raise UserError(f"{source.root}: the images lie in no class folders, so they have no labels")
        # Corrupted files may have equal names, sizes and times, so the identity names the corruption as well.
        identity = {**source.identity, "corruption": self.corruption, "severity": self.severity}
        return replace(source, name=f"{self.name}-{_prefix(self)}", identity=identity)


def published_sets(path: str) -> tuple[list[Published], list[str]]:
    """The corrupted sets in a folder or URI, sorted by corruption and severity, and notes on what was left out.

    Headers and labels of arrays are checked now. Folders of images are listed when they are opened.
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
            # A damaged array is reported now, not after hours of encoding.
            item.open(config=SourceConfig())
    if not left_out:
        return published, []
    examples = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
    return published, [
        f"left out of {path}: {counted(len(left_out), 'name')} of no known corruption or severity "
        f"({examples})"
    ]


def _list(root: str, folder: str = "") -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files directly in a folder below root, without hidden ones."""
    uri = under(root, folder) if folder else root
    try:
        filesystem, path = locate(uri)
        info = patiently(uri, lambda: filesystem.get_file_info(path))
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{uri}: no such path")
        if info.is_file:
            raise UserError(f"{uri}: a file, where a folder of corruptions should be")
        infos = patiently(uri, lambda: filesystem.get_file_info(fs.FileSelector(path)))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot be listed ({reason(error)})") from error
    infos = sorted((i for i in infos if not i.base_name.startswith(".")), key=lambda i: i.base_name)
    return [i.base_name for i in infos if not i.is_file], [i.base_name for i in infos if i.is_file]


def _subfolders(root: str, folder: str, names: Container[str]) -> tuple[list[str], list[str]]:
    """Paths of the subfolders with these names, and of all others; if none has such a name, the folder itself."""
    folders, _ = _list(root, folder)
    known = [f"{folder}/{name}" for name in folders if name in names]
    return known, [f"{folder}/{name}" for name in folders if name not in names] if known else [folder]


def _stem(path: str) -> str:
    """The last part of a path, without .npy."""
    return path.rpartition("/")[2].removesuffix(".npy")


def _prefix(item: Published) -> str:
    return f"{item.corruption}-{item.severity}"


def _open_array(item: Published, *, config: SourceConfig, limit: int | None) -> Source:
    """The source of one severity of a .npy file. Its header and the labels are read, but no image."""
    if limit is not None and limit < 1:
        raise UserError(f"the limit must be at least 1, not {limit}")
    uri = under(item.root, item.place)
    array = inspect_array(uri)
    if array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[3] != 3 or array.fortran:
        order = "Fortran" if array.fortran else "C"
        raise UserError(
            f"{uri}: {array.dtype} {array.shape} in {order} order, not uint8 (rows, height, width, 3) in C order"
        )
    num_rows, height, width, _ = array.shape
    if min(array.shape) < 1 or num_rows % len(SEVERITIES):
        raise UserError(
            f"{uri}: {counted(num_rows, 'row')} of {width}x{height} pixels are not five severities of images"
        )
    count, row_bytes = num_rows // len(SEVERITIES), height * width * 3
    labels_file, labels = _labels(under(item.root, LABELS), num_rows=num_rows)
    # Row numbers alone choose, without the corruption, so that a limit takes the same images from every set.
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
        left_out=beyond_limit(count, len(rows)),
        labels_from=labels_file.path,
        label_names=None,
        identity=make_identity("npy", [array.file, labels_file], config=config, limit=limit),
        config=config,
    )


def _labels(uri: str, *, num_rows: int) -> tuple[File, np.ndarray]:
    """The file of labels, and the labels (num_rows / 5,), which are the same at each severity."""
    array = inspect_array(uri)
    if array.dtype.kind not in "iu" or len(array.shape) != 1:
        raise UserError(f"{uri}: {array.dtype} {array.shape}, where a list of integers should be")
    if array.shape[0] != num_rows:
        raise UserError(f"{uri}: {counted(array.shape[0], 'label')}, but the images are {num_rows}")
    try:
        with open_input(uri) as file:
            data = file.read_at(num_rows * array.dtype.itemsize, array.offset)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot be read ({reason(error)})") from error
    labels = np.frombuffer(data, array.dtype).reshape(len(SEVERITIES), -1)
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise UserError(f"{uri}: labels from {labels.min()} to {labels.max()} are not numbers of classes")
    if (labels != labels[0]).any():
        raise UserError(f"{uri}: the labels are not the same for each of the five severities")
    return array.file, labels[0]
