"""Rows, readers and sources: the parts that all kinds of image sources share.

A reader is small and frozen, so that it travels to the workers with every task. A unit is a JSON string made when the
source is opened. The unit says which images to read, and the reader knows where they are and how to read them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lpclip.config import SourceConfig
from lpclip.images.fetch import reason, scheme_names

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".ico"),
)
UNIT_ROWS = 256
TABLE_BYTES = 128 << 20
ROWS = pa.schema([("id", pa.string()), ("image", pa.binary()), ("label", pa.int32()), ("error", pa.string())])

PAIRS = ROWS.append(pa.field("texts", pa.list_(pa.string())))


class Row(NamedTuple):
    """One image. `image` is None when `error` says why, and `label` is None when there is none.

    `texts` are filled when the source was opened with them.
    """

    id: str
    image: bytes | None
    label: int | None = None
    error: str | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reader(ABC):
    """Base of all readers: each has `rows` of its own, and the tables follow from them."""

    has_texts: bool = False
    """The texts of each image are read as well."""

    @abstractmethod
    def rows(self, unit: str) -> Iterator[Row]:
        """The unit's images, one by one. An image that cannot be read is a row with an error."""

    def listed(self, unit: str) -> list[tuple[str, int | None]]:
        """Id and label of each of the unit's images; none where only reading the images would tell."""
        return []

    def paths(self, unit: str) -> list[str | None]:
        """Where each of the unit's images lies on this machine as a file of its own, None for one that does not.

        An empty list where none does.
        """
        return []

    def tables(self, unit: str) -> Iterator[pa.Table]:
        """The unit as tables, each of at most UNIT_ROWS rows and about TABLE_BYTES bytes.

        Their schema is ROWS, or PAIRS with texts; then an image without any is a row with an error.
        """
        schema = PAIRS if self.has_texts else ROWS
        rows: list[Row] = []
        num_bytes = 0
        for row in self.rows(unit):
            if self.has_texts and not row.texts and row.error is None:
                row = row._replace(image=None, error="no text")
            rows.append(row)
            num_bytes += len(row.image or b"")
            if len(rows) == UNIT_ROWS or num_bytes >= TABLE_BYTES:
                table = _table(rows, schema)
                # The table has copies: without the originals, half as much is in memory while it is decoded.
                rows, num_bytes = [], 0
                del row
                yield table
        if rows:
            yield _table(rows, schema)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A plan of the images to read, made on the driver without reading an image."""

    name: str
    """Short, and safe in file names."""
    kind: str
    """folder, parquet, webdataset, manifest or npy."""
    root: str
    """The folder, as an absolute path or URI."""
    reader: Reader
    units: tuple[str, ...]
    """Units of work for the reader, of at most UNIT_ROWS images each (a tar is one unit)."""
    num_rows: int | None
    """None when it is not known before reading (webdataset)."""
    labels_from: str | None
    """The place of the labels in words, such as "the column label"; None without labels."""
    label_names: tuple[str, ...] | None
    """The names that labels index, None when there are no labels or they are bare numbers."""
    identity: dict[str, Any]
    """Everything that changes the rows, but not the place they are read from; JSON-able."""
    config: SourceConfig
    labels_there: tuple[int, ...] | None = None
    """The different labels of the rows, None where they are not known before reading (webdataset)."""
    left_out: dict[str, int] | None = field(default_factory=dict)
    """The number of rows and files that are not read, by reason; None where nobody counts them (a cut tar)."""
    notes: tuple[str, ...] = ()
    """Sentences that the user should read, for example about files that were skipped."""

    @property
    def has_labels(self) -> bool:
        """True when there are labels to read."""
        return self.labels_from is not None

    def examples(self, count: int) -> dict[str, str | None]:
        """Ids of images from the first to the last, at most `count`, and the labels as the data tells them.

        None where only reading the images would tell.
        """
        found: dict[str, str | None] = {}
        for place in range(count):
            share = place / max(1, count - 1)
            rows = self.reader.listed(self.units[round(share * (len(self.units) - 1))])
            if rows:
                name, label = rows[round(share * (len(rows) - 1))]
                names = self.label_names
                found[name] = None if label is None else names[label] if names else str(label)
        return found

    @property
    def has_texts(self) -> bool:
        """True when the texts of the images are read with them."""
        return self.reader.has_texts


class File(NamedTuple):
    """A file in a listing. Its path is relative to the listing's root; size and mtime may be unknown."""

    path: str
    size: int | None
    mtime_ns: int | None
    labels_at: int = 0
    """Place in the path where the name of the folder begins that is the label, if there is one."""


class Listing(NamedTuple):
    """The files of a source."""

    name: str
    root: str
    files: list[File]
    folders: tuple[str, ...] = ()
    """Names of the folders right below the root, without those of systems; none where a pattern chooses files."""


def make_identity(
    kind: str,
    files: Sequence[File],
    *,
    config: SourceConfig,
    limit: int | None,
    columns: Sequence[str | None] = (),
) -> dict[str, Any]:
    """The identity of a source that reads these files. `columns` name image, id, label and, if read, texts."""
    digest = blake2b()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\0{file.mtime_ns}\n".encode())
    names = scheme_names(config.schemes)
    follows = {"schemes": names} if names != scheme_names(SourceConfig.schemes) else {}
    return {
        **(follows if kind in ("parquet", "manifest") else {}),
        "kind": kind,
        "num_files": len(files),
        "files": digest.hexdigest(),
        "columns": list(columns),
        "limit": limit,
        "max_pixels": config.max_pixels,
        "max_bytes": config.max_bytes,
    }


def choose(ids: Sequence[str], limit: int | None) -> list[int]:
    """Places of the `limit` ids with the smallest hashes, ascending.

    That is a fair sample even of sorted data, and a larger sample contains a smaller one.
    """
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    keys = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return sorted(np.argsort(np.frombuffer(keys, ">u8"), kind="stable")[:limit].tolist())


def beyond_limit(count: int, chosen: int) -> dict[str, int]:
    """The entry of `Source.left_out` for a limit that keeps `chosen` of `count` rows."""
    return {"beyond --limit": count - chosen} if count > chosen else {}


def different(labels: Sequence[int | None]) -> tuple[int, ...]:
    """The different labels among these, sorted."""
    return tuple(sorted({label for label in labels if label is not None}))


def make_row(name: str, image: bytes | Exception, label: int | None, texts: Sequence[str] = ()) -> Row:
    """A row with an image, or with the reason why there is none. Blank texts are left out."""
    kept = tuple(stripped for text in texts if (stripped := text.strip()))
    if isinstance(image, Exception):
        return Row(name, None, label, reason(image), kept)
    return Row(name, image, label, None, kept)


def make_pair(
    name: str, image: bytes | Exception, label: int | None, text_files: Sequence[bytes | Exception]
) -> Row:
    """A row with an image and the lines of its UTF-8 text files as texts, or with the reason why there is none."""
    texts: list[str] = []
    for data in text_files:
        if isinstance(data, Exception):
            return Row(name, None, label, f"text: {reason(data)}")
        try:
            texts += data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            return Row(
                name, None, label, f"text is not UTF-8: byte {error.start} is {data[error.start]:#04x}"
            )
    return make_row(name, image, label, texts)


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    # Row's last field, the texts, has no column in ROWS.
    columns = zip(*rows, strict=True)
    arrays = [
        _binary(column) if field.name == "image" else pa.array(column, field.type)
        for column, field in zip(columns, schema, strict=False)
    ]
    return pa.table(arrays, schema)


def _binary(values: Sequence[bytes | None]) -> pa.Array:
    """A column of bytes. pa.array takes up to twice the memory while it builds one."""
    is_there = pa.array([value is not None for value in values])
    ends = pa.array(np.cumsum([0, *(len(value or b"") for value in values)]), pa.int32())
    data = pa.py_buffer(b"".join(value or b"" for value in values))
    buffers = [is_there.buffers()[1], ends.buffers()[1], data]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)
