"""Columns of tables: the ones that hold images, ids, labels or texts, and their values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from lpclip.config import UserError, counted
from lpclip.credentials import redact
from lpclip.files import refuse_objects
from lpclip.images.names import escaped_bytes

IMAGE_COLUMNS = ("image", "img", "jpg", "bytes", "uri", "url", "path", "filepath", "file_name")
ID_COLUMNS = ("id",)
LABEL_COLUMNS = ("label", "labels", "cls")
TEXT_COLUMNS = ("text", "texts", "caption", "captions", "txt", "title")
MAX_LABEL = 2**31 - 1
"""Labels are int32."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Asks a source for the texts of each image."""

    column: str | None = None
    """A table's column of texts or lists of texts; by default the first of TEXT_COLUMNS that it has."""


def pick_column(
    wanted: str | None, defaults: Sequence[str], names: Sequence[str], *, what: str
) -> str | None:
    """The wanted column, or the first default among `names`, in any case. None when there is none, or "" is wanted.

    Raises UserError when the wanted column is missing, or there are several of the name.
    """
    if wanted is None:
        fits = ([name for name in {*names} if plain_name(name) == default] for default in defaults)
        found = sorted(next(filter(None, fits), ()))
        exact = [name for name in found if name in defaults]
        if len(found) > 1 and not exact:
            raise UserError(f"{what}: the columns {' and '.join(found)} have one name: rename all but one")
        wanted = next(iter(exact or found), None)
    elif wanted and wanted not in names:
        raise UserError(f"{what}: no column {wanted!r}; there are {', '.join(names)}")
    if wanted and list(names).count(wanted) > 1:
        raise UserError(f"{what}: several columns are called {wanted!r}: rename all but one")
    return wanted or None


def plain_name(name: str) -> str:
    """A column's name as the defaults are written: ` Label` is label."""
    return name.strip().lower()


def as_strings(column: pa.ChunkedArray, *, name: str, what: str) -> pa.ChunkedArray:
    """A column as strings. Raises UserError when its values are lists or structs."""
    try:
        return utf_8(column)
    except pa.ArrowException as error:
        raise UserError(
            f"{what}: column {name!r} holds {column.type}, and not single texts or numbers"
        ) from error


def utf_8(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as strings; of texts and bytes that are not UTF-8, the wrong bytes are escaped.

    Raises ArrowException when its values are lists or structs.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        texts = column.cast(pa.string())
        texts.validate(full=True)  # Parquet's reader takes any bytes for text
        return texts
    except pa.ArrowInvalid:
        values = column.cast(pa.binary()).to_pylist()
        return pa.chunked_array(
            [pa.array([None if value is None else escaped_bytes(value) for value in values], pa.string())]
        )


def without_secrets(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids that may be URIs, without the secrets in these."""
    if not pc.any(pc.match_substring(ids, "://")).as_py():
        return ids
    return pa.chunked_array([[name and redact(name) for name in ids.to_pylist()]], pa.string())


def refuse_duplicates(ids: pa.Array | pa.ChunkedArray, *, what: str) -> None:
    """Raise UserError with examples when two ids are equal, or one is null or empty."""
    missing = ids.null_count + (pc.sum(pc.equal(ids, "")).as_py() or 0)
    if missing:
        raise UserError(
            f"{what}: no id in {counted(missing, 'row')}; --id-column '' numbers the rows instead"
        )
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    counts = counts.filter(pc.greater(counts.field("counts"), 1))
    examples = ", ".join(map(redact, counts.field("values")[:3].to_pylist()))
    raise UserError(
        f"{what}: duplicates of {counted(len(counts), 'id')}, such as {examples}; --id-column names another "
        "column, and --id-column '' numbers the rows instead"
    )


def text_column(texts: Texts | None, schema: pa.Schema, *, what: str) -> str | None:
    """The column of texts, None when no texts are asked for. Raises UserError when there is no such column."""
    if texts is None:
        return None
    column = pick_column(texts.column, TEXT_COLUMNS, schema.names, what=what)
    if not column:
        raise UserError(f"{what}: no column of texts; there are {', '.join(schema.names)} (--text-column)")
    dtype = schema.field(column).type
    if not is_text(dtype.value_type if _is_list(dtype) else dtype):
        raise UserError(
            f"{what}: column {column!r} holds {dtype}, neither texts nor lists of texts (--text-column)"
        )
    return column


def as_texts(column: pa.ChunkedArray) -> list[list[str]]:
    """The texts of each row of a column of texts or of lists of texts, without nulls."""
    lists = column.to_pylist() if _is_list(column.type) else [[cell] for cell in utf_8(column).to_pylist()]
    return [[text for text in texts or () if text is not None] for texts in lists]


def whole_number(text: str) -> int | None:
    """The whole number that a text is, None when it is none. Tables write a column with gaps as 0.0, 1.0."""
    return int(text.partition(".")[0]) if re.fullmatch(r"-?\d{1,18}(\.0*)?", text) else None


def label_words(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Labels that are words, without blanks around them; null for what programs write where there is none."""
    words = pc.utf8_trim_whitespace(utf_8(column))
    is_gap = pc.is_in(pc.utf8_lower(words), value_set=pa.array(["", "nan"]))
    return pc.if_else(is_gap, pa.scalar(None, pa.string()), words)


def note_on_numbers_among(names: Sequence[str], *, what: str) -> tuple[str, ...]:
    """A note on numbers that are read as names of classes, as there are words or fractions beside them."""
    numbers = [name for name in names if re.fullmatch(r"-?\d+(\.\d*)?", name)]
    if not numbers or all(whole_number(name) is not None for name in names):
        return ()
    return (
        f"labels: {numbers[0]} in {what} is read as the name of a class, as not all labels there are whole numbers",
    )


def marked_columns(wanted: str | None, names: Sequence[str]) -> tuple[str, ...]:
    """The columns, one for each class, that `--label-column cat,dog` names; none where it names a single column."""
    found = tuple(part.strip() for part in (wanted or "").split(","))
    return found if len(found) > 1 and wanted not in names and {*found} <= {*_single(names)} else ()


def _single(names: Sequence[str]) -> list[str]:
    """The names that one column has, and not several."""
    return [name for name, count in Counter(names).items() if count == 1]


def marked_labels(table: pa.Table, columns: Sequence[str]) -> list[int | None]:
    """The place of the one of these columns that has a 1, for each row; None for rows with none or several."""
    cells = [_marks(table[name]) for name in columns]
    places = [[place for place, mark in enumerate(row) if mark == 1] for row in zip(*cells, strict=True)]
    return [found[0] if len(found) == 1 else None for found in places]


def note_on_marks(table: pa.Table, *, what: str) -> tuple[str, ...]:
    """A note on columns of 0 and 1 of which each row has a single 1, as published labels are written."""
    columns = [name for name in _single(table.column_names) if {*_marks(table[name][:100])} <= {0, 1}]
    columns = [name for name in columns if {*_marks(table[name].unique())} <= {0, 1}]
    if len(columns) < 2 or None in marked_labels(table, columns):
        return ()
    return (
        f"labels: none, but each row of {what} has a 1 in one of {counted(len(columns), 'column')}: --label-column "
        f"{','.join(columns)} takes these as the classes",
    )


def _marks(column: pa.ChunkedArray | pa.Array) -> list[int | None]:
    """The whole numbers of a column of numbers, or of numbers as text, true being 1; None for everything else."""
    dtype = column.type
    is_number = pa.types.is_boolean(dtype) or pa.types.is_integer(dtype) or pa.types.is_floating(dtype)
    if not (is_text(dtype) or is_number):
        return [None] * len(column)
    cells = ((cell or "").strip().lower() for cell in column.cast(pa.string()).to_pylist())
    return [{"true": 1, "false": 0}.get(cell, whole_number(cell)) for cell in cells]


def is_text(dtype: pa.DataType) -> bool:
    """True when Arrow's type holds strings, in any of its layouts."""
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)


def without_views(table: pa.Table) -> pa.Table:
    """The table with string and binary views, which Arrow cannot do much with, in their plain layouts.

    Raises ArrowInvalid when a column holds Python objects.
    """
    refuse_objects(table.schema)
    schema = pa.schema([field.with_type(_plain_type(field.type)) for field in table.schema])
    return table if schema.types == table.schema.types else table.cast(schema)


def _plain_type(dtype: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(dtype):
        return pa.large_string()
    if pa.types.is_binary_view(dtype):
        return pa.large_binary()
    if pa.types.is_struct(dtype):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in dtype])
    if pa.types.is_list(dtype):
        return pa.list_(_plain_type(dtype.value_type))
    return dtype


def _is_list(dtype: pa.DataType) -> bool:
    return pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype)
