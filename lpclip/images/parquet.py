"""Opening Parquet: files with a column of image bytes, of URIs, or of Hugging Face's bytes/path structs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lpclip.config import SourceConfig, UserError
from lpclip.files import holds_objects, open_input
from lpclip.images.columns import (
    ID_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    Texts,
    as_strings,
    is_text,
    label_words,
    note_on_numbers_among,
    pick_column,
    plain_name,
    refuse_duplicates,
    text_column,
    without_secrets,
    without_views,
)
from lpclip.images.fetch import followed, reason, under
from lpclip.images.parquet_paths import files_behind
from lpclip.images.parquet_reader import ParquetReader, label_indices, row_id
from lpclip.images.source import (
    UNIT_ROWS,
    File,
    Listing,
    Source,
    beyond_limit,
    choose,
    different,
    make_identity,
)

T = TypeVar("T")


def open_parquet(listing: Listing, *, config: SourceConfig, limit: int | None, texts: Texts | None) -> Source:
    """Parquet files. Footers are read, and the columns of ids and of labels that are words, but no image."""
    paths = [file.path for file in listing.files]
    footers = _each(paths, lambda path: _footer(listing.root, path))
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    image_column, id_column, label_column, text_column = _columns(paths, schemas, config, texts)
    counts = [
        [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] for footer in footers
    ]
    ids = _ids(listing, id_column, [sum(groups) for groups in counts], needed=limit is not None)
    chosen = None if limit is None else np.array(choose(ids, limit))
    label_names = _label_names(listing, schemas, label_column) if label_column else None
    schemes = followed(config.schemes, root=listing.root)
    ids_from = "" if config.id_column == "" else id_column
    behind, notes = files_behind(listing, image_column, chosen=chosen, schemes=schemes)
    identity = make_identity(
        "parquet",
        [*listing.files, *behind],
        config=config,
        limit=limit,
        columns=(image_column, ids_from, label_column, *filter(None, (text_column,))),
    )
    total = sum(map(sum, counts))
    return Source(
        name=listing.name,
        kind="parquet",
        root=listing.root,
        reader=ParquetReader(
            root=listing.root,
            max_bytes=config.max_bytes,
            schemes=schemes,
            timeout=config.read_timeout,
            image_column=image_column,
            id_column=id_column,
            label_column=label_column,
            label_names=label_names,
            text_column=text_column,
            has_texts=texts is not None,
        ),
        units=tuple(_units(_spans(paths, counts, chosen))),
        num_rows=total if chosen is None else len(chosen),
        labels_from=f"the column {label_column}" if label_column is not None else None,
        label_names=label_names,
        identity=identity,
        config=config,
        left_out={} if chosen is None else beyond_limit(total, len(chosen)),
        labels_there=_labels_there(listing, label_column, label_names, chosen) if label_column else (),
        notes=(
            *notes,
            *note_on_numbers_among(label_names or (), what=f"the column {label_column!r} of {listing.name}"),
        ),
    )


def _ids(listing: Listing, column: str | None, num_rows: Sequence[int], *, needed: bool) -> list[str]:
    """The ids of all rows, without duplicates; empty when they are not needed."""
    if column:
        ids = without_secrets(as_strings(_read_column(listing, column), name=column, what=listing.name))
        refuse_duplicates(ids, what=listing.name)
        return ids.to_pylist() if needed else []
    if not needed:
        return []
    pairs = zip(listing.files, num_rows, strict=True)
    return [row_id(file.path, row) for file, count in pairs for row in range(count)]


def _units(spans: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Spans packed into units, so that a few rows from each of many row groups do not become many units."""
    unit: list[dict[str, Any]] = []
    num_rows = 0
    for span in spans:
        count = len(span["rows"]) if "rows" in span else span["stop"] - span["start"]
        if num_rows + count > UNIT_ROWS:
            yield json.dumps(unit)
            unit, num_rows = [], 0
        unit.append(span)
        num_rows += count
    if unit:
        yield json.dumps(unit)


def _spans(
    paths: Sequence[str], counts: Sequence[Sequence[int]], chosen: np.ndarray | None
) -> Iterator[dict[str, Any]]:
    """Spans in order. `chosen` holds the places of the rows to keep, counted over all files, ascending."""
    place = 0
    for path, groups in zip(paths, counts, strict=True):
        first = 0
        for group, num_rows in enumerate(groups):
            for start in range(0, num_rows, UNIT_ROWS):
                stop = min(start + UNIT_ROWS, num_rows)
                span = {"file": path, "group": group, "first": first, "start": start, "stop": stop}
                if chosen is None:
                    yield span
                    continue
                low, high = np.searchsorted(chosen, [place + start, place + stop])
                if low < high:
                    yield {**span, "rows": (chosen[low:high] - place).tolist()}
            first += num_rows
            place += num_rows


def _columns(
    paths: Sequence[str], schemas: Sequence[pa.Schema], config: SourceConfig, texts: Texts | None
) -> tuple[str, str | None, str | None, str | None]:
    """The columns of images, ids, labels and texts. Raises UserError when their types differ between files."""
    names = schemas[0].names
    image = pick_column(config.image_column, IMAGE_COLUMNS, names, what=paths[0])
    if image is None:
        raise UserError(f"{paths[0]}: no column of images; there are {', '.join(names)} (--image-column)")
    if not _holds_images(schemas[0].field(image).type):
        raise UserError(
            f"{paths[0]}: column {image!r} holds {schemas[0].field(image).type}, not image bytes, URIs or "
            "bytes/path structs (--image-column)"
        )
    identity = pick_column(config.id_column, ID_COLUMNS, names, what=paths[0])
    label = pick_column(config.label_column, LABEL_COLUMNS, names, what=paths[0])
    if label and pa.types.is_null(schemas[0].field(label).type):
        label = None
    text = text_column(texts, schemas[0], what=paths[0])
    for column in filter(None, (image, identity, label, text)):
        wanted = schemas[0].field(column).type
        if holds_objects(wanted):
            raise UserError(f"{paths[0]}: column {column!r} holds Python objects, which are never unpickled")
        for path, schema in zip(paths, schemas, strict=True):
            if column not in schema.names or schema.field(column).type != wanted:
                raise UserError(f"{path}: column {column!r} is not there as {wanted}, as it is in {paths[0]}")
    return image, identity, label, text


def is_bytes(dtype: pa.DataType) -> bool:
    """True when Arrow's type holds bytes, in any of its layouts."""
    return pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_binary_view(dtype)


def _holds_images(dtype: pa.DataType) -> bool:
    if pa.types.is_struct(dtype):
        fields = {field.name: field.type for field in dtype}
        return "bytes" in fields and ("path" in fields or is_bytes(fields["bytes"]))
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    return is_text(dtype) or is_bytes(dtype)


def has_image_bytes(root: str, file: File, *, config: SourceConfig) -> bool:
    """True when a Parquet file below root has a column of images, and not just of where they are."""
    schema = _footer(root, file.path).schema.to_arrow_schema()
    wanted = {config.image_column, *IMAGE_COLUMNS}
    columns = [field for field in schema if not wanted.isdisjoint({field.name, plain_name(field.name)})]
    return any(
        is_bytes(field.type) or (pa.types.is_struct(field.type) and _holds_images(field.type))
        for field in columns
    )


def _label_names(listing: Listing, schemas: Sequence[pa.Schema], column: str) -> tuple[str, ...] | None:
    dtype = schemas[0].field(column).type
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    if is_text(dtype) or pa.types.is_boolean(dtype):
        words = label_words(_read_column(listing, column)).unique().drop_null()
        return tuple(sorted(words.to_pylist()))
    names = {_names_in_metadata(schema, column) for schema in schemas}
    if len(names) > 1:
        raise UserError(f"{listing.name}: the files disagree on the names of the classes")
    return names.pop()


def _labels_there(
    listing: Listing, column: str, names: tuple[str, ...] | None, chosen: np.ndarray | None
) -> tuple[int, ...]:
    """The different labels of the chosen rows, as the reader tells them. Raises UserError when they are no labels."""
    try:
        labels = label_indices(_read_column(listing, column), names)
    except pa.ArrowException as error:
        raise UserError(
            f"{listing.name}: column {column!r} is no column of labels: {reason(error)}"
        ) from error
    there = different((labels if chosen is None else labels.take(pa.array(chosen))).unique().to_pylist())
    if names and there and there[-1] >= len(names):
        raise UserError(
            f"{listing.name}: column {column!r} has the label {there[-1]}, and names for the labels 0 to "
            f"{len(names) - 1} alone"
        )
    return there


def _names_in_metadata(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Class names from the metadata `classes` (a JSON list), or from Hugging Face's ClassLabel."""
    metadata = schema.metadata or {}
    try:
        if b"classes" in metadata:
            names = json.loads(metadata[b"classes"])
        else:
            features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
            names = features[column]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_utf_8(name) for name in names):
        return None
    return tuple(names) or None


def _is_utf_8(text: str) -> bool:
    return text == text.encode(errors="replace").decode()


def _footer(root: str, path: str) -> pq.FileMetaData:
    try:
        with open_input(under(root, path)) as file:
            return pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({reason(error)})") from error


def _read_column(listing: Listing, column: str) -> pa.ChunkedArray:
    def read(path: str) -> pa.ChunkedArray:
        with open_input(under(listing.root, path)) as file:
            return without_views(pq.ParquetFile(file).read(columns=[column]))[column]

    parts = _each([file.path for file in listing.files], read)
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)


def _each(paths: Sequence[str], function: Callable[[str], T]) -> list[T]:
    with ThreadPoolExecutor(max_workers=16) as threads:
        return list(threads.map(function, paths))
