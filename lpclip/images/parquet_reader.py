"""Reading Parquet: the rows of a unit, with images, labels and texts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lpclip.files import open_input, split
from lpclip.images.columns import as_texts, is_text, label_words, utf_8, without_secrets, without_views
from lpclip.images.fetch import fetch_all, reason, under
from lpclip.images.source import UNIT_ROWS, Reader, Row, make_row

PIECE_BYTES = 32 << 20
"""Bytes of images that are taken from a file at a time, about: it is not all of a unit where images are large."""


@dataclass(frozen=True, kw_only=True)
class ParquetReader(Reader):
    """Reads Parquet files.

    A unit is a list of spans. A span means the rows from `start` to before `stop` of row group `group` in `file`, and
    of these only `rows`, if given. `first` is the number of the group's first row in the file.
    """

    root: str
    max_bytes: int
    schemes: tuple[str, ...]
    timeout: float
    image_column: str
    id_column: str | None = None
    label_column: str | None = None
    label_names: tuple[str, ...] | None = None
    text_column: str | None = None

    def rows(self, unit: str) -> Iterator[Row]:
        """The unit's rows in order. If the file cannot be read, each row holds the reason."""
        for span in json.loads(unit):
            yield from self._span_rows(**span)

    def listed(self, unit: str) -> list[tuple[str, int | None]]:
        """Id and label of each row, from these columns alone."""
        found: list[tuple[str, int | None]] = []
        for span in json.loads(unit):
            kept = span.get("rows") or range(span["start"], span["stop"])
            ids: list[str] = [row_id(span["file"], span["first"] + row) for row in kept]
            columns = [name for name in (self.id_column, self.label_column) if name]
            labels: list[int | None] = [None] * len(ids)
            if columns:
                with open_input(under(self.root, span["file"])) as file:
                    table = pq.ParquetFile(file).read_row_group(span["group"], columns=columns)
                table = without_views(table).take(list(kept))
                ids = self._ids(table) if self.id_column else ids
                labels = self._labels(table)
            found += zip(ids, labels, strict=True)
        return found

    def _span_rows(
        self, *, file: str, group: int, first: int, start: int, stop: int, rows: list[int] | None = None
    ) -> Iterator[Row]:
        folder, _ = split(under(self.root, file))
        kept = rows or list(range(start, stop))
        pieces = self._pieces(file, group, start, stop)
        while kept:
            ids = [row_id(file, first + row) for row in kept]
            try:
                begin, table = next(pieces)
                here = [row - begin for row in kept if row < begin + len(table)]
                table = table.take(here)
                if self.id_column:
                    ids[: len(here)] = self._ids(table)
                labels = self._labels(table)
                texts = self._texts(table)
            except (OSError, pa.ArrowException) as error:
                yield from (Row(name, None, error=f"Parquet: {reason(error)}") for name in ids)
                return
            images = self._images(table[self.image_column], folder)
            yield from map(make_row, ids[: len(here)], images, labels, texts)
            kept = kept[len(here) :]

    def _pieces(self, file: str, group: int, start: int, stop: int) -> Iterator[tuple[int, pa.Table]]:
        """Some rows at a time, with the number of the first of them in the group."""
        wanted = (self.id_column, self.image_column, self.label_column, self.text_column)
        columns = [name for name in wanted if name]
        cursor = getattr(_open, "cursor", None)
        key = (self.root, file, group, columns)
        if cursor is None or cursor.key != key or cursor.position > start:
            cursor = _Cursor(key)
        _open.cursor = None  # A cursor that fails is not used again.
        yield from cursor.read(start, stop)
        _open.cursor = cursor

    def _images(self, column: pa.ChunkedArray, folder: str) -> Iterator[bytes | Exception]:
        dtype = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        values = (utf_8(column) if is_text(dtype) else column).to_pylist()
        # Hugging Face's struct holds the bytes, or the path of a file that does.
        values = [(v["bytes"] or v.get("path")) if isinstance(v, dict) else v for v in values]
        uris = [value for value in values if isinstance(value, str)]
        limits: dict[str, Any] = {
            "max_bytes": self.max_bytes,
            "schemes": self.schemes,
            "timeout": self.timeout,
        }
        fetched = fetch_all(uris, root=folder, **limits)
        missing = ValueError("no image in this row")
        for value in values:
            yield next(fetched) if isinstance(value, str) else missing if value is None else value

    def _ids(self, table: pa.Table) -> list[str]:
        found: list[str] = without_secrets(utf_8(table[self.id_column])).to_pylist()
        return found

    def _labels(self, table: pa.Table) -> list[int | None]:
        if not self.label_column:
            return [None] * len(table)
        return label_indices(table[self.label_column], self.label_names).to_pylist()

    def _texts(self, table: pa.Table) -> list[list[str]]:
        if not self.text_column:
            return [[]] * len(table)
        return as_texts(table[self.text_column])


def row_id(file: str, row: int) -> str:
    """The id of a Parquet row that has none of its own."""
    return f"{file}:{row}"


def label_indices(labels: pa.ChunkedArray, names: tuple[str, ...] | None) -> pa.ChunkedArray:
    """Labels as int32: words become their place in `names`, and negative numbers and NaN (unlabelled) become null."""
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    if is_text(labels.type) or pa.types.is_boolean(labels.type):
        assert names is not None
        return pc.index_in(label_words(labels), value_set=pa.array(names, pa.string()))
    if pa.types.is_floating(labels.type):
        labels = pc.if_else(pc.is_nan(labels), pa.scalar(None, labels.type), labels)
    numbers = labels.cast(pa.int32())
    return pc.if_else(pc.less(numbers, 0), pa.scalar(None, pa.int32()), numbers)


class _Cursor:
    """A row group that is read from its start on.

    Each worker keeps one open from unit to unit. So it streams a file of one large row group once, and does not read
    all of it for every unit. Large images are read a few at a time.
    """

    def __init__(self, key: tuple[str, str, int, list[str]]) -> None:
        root, file, group, columns = key
        parquet = pq.ParquetFile(open_input(under(root, file)), buffer_size=1 << 20, pre_buffer=False)
        self.key = key
        self.position = 0
        self._batches = parquet.iter_batches(
            _rows_at_once(parquet.metadata.row_group(group)),
            row_groups=[group],
            columns=columns,
            use_threads=False,
        )

    def read(self, start: int, stop: int) -> Iterator[tuple[int, pa.Table]]:
        """Rows from start to before stop of the group, as tables, each with the number of its first row.

        They must come after those read before.
        """
        columns = self.key[-1]
        while self.position < stop:
            batch = next(self._batches, None)
            if batch is None:
                raise OSError("the file has fewer rows than it had at the start")
            begin = self.position
            self.position += len(batch)
            if begin >= start:
                yield begin, without_views(pa.Table.from_batches([batch]).select(columns))
        assert self.position == stop, "units and batches have the same bounds"


def _rows_at_once(group: pq.RowGroupMetaData) -> int:
    """A divisor of UNIT_ROWS: so many rows of this size make about PIECE_BYTES."""
    rows = UNIT_ROWS
    while rows > 1 and rows * group.total_byte_size > PIECE_BYTES * group.num_rows:
        rows //= 2
    return rows


_open = threading.local()
