"""Manifests: CSV, TSV and JSONL files that list the URIs or paths of images."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from lpclip.config import SourceConfig, UserError, counted
from lpclip.credentials import redact
from lpclip.files import not_utf_8, open_input, refuse_utf_16, split, split_options
from lpclip.images.columns import (
    ID_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    MAX_LABEL,
    Texts,
    as_strings,
    as_texts,
    label_words,
    marked_columns,
    marked_labels,
    note_on_marks,
    note_on_numbers_among,
    pick_column,
    refuse_duplicates,
    text_column,
    whole_number,
)
from lpclip.images.fetch import embedded, followed, reason, scheme, under
from lpclip.images.folders import FilesReader, file_units
from lpclip.images.listed_files import files_at_uris, local_files, note_on_links
from lpclip.images.names import escaped
from lpclip.images.source import (
    IMAGE_SUFFIXES,
    File,
    Listing,
    Source,
    beyond_limit,
    choose,
    different,
    make_identity,
)

# The header of a table is within these.
HEAD_BYTES = 1 << 16
# The longest row of a table, about.
CELL_BYTES = 16 << 20
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
SEPARATOR_HINT = re.compile(rb'(\xef\xbb\xbf)?"?sep=.?"?', re.IGNORECASE)
"""A line that tells spreadsheets what separates the columns, before the header."""


def open_manifest(
    listing: Listing, *, config: SourceConfig, limit: int | None, texts: Texts | None
) -> Source:
    """A CSV, TSV or JSONL file with a column of URIs or of paths relative to it, and perhaps ids, labels and texts.

    Raises UserError when it cannot be read, is not UTF-8, lacks a column, or names no file that is there.
    """
    (file,) = listing.files
    table, notes = _read_manifest(under(listing.root, file.path))
    names = table.column_names
    image_column, image_array = _path_column(table, config.image_column, what=file.path)
    paths = image_array.fill_null("").to_pylist()
    id_column = pick_column(config.id_column, ID_COLUMNS, names, what=file.path)
    ids = _row_ids(table, id_column, paths=paths, are_numbers=config.id_column == "", what=file.path)
    marked = marked_columns(config.label_column, names)
    wanted = "" if marked else config.label_column
    label_column = pick_column(wanted, LABEL_COLUMNS, names, what=file.path)
    texts_from = text_column(texts, table.schema, what=file.path)
    own_texts = as_texts(table[texts_from]) if texts_from else None
    labels, label_names = _labels(table, label_column, what=file.path)
    if marked:
        label_column, labels, label_names = ", ".join(marked), marked_labels(table, marked), marked
        if all(label is None for label in labels):
            raise UserError(f"{file.path}: no row has a single 1, or true, in the columns {label_column}")
    elif labels is None and config.label_column is None:
        notes += note_on_marks(table.drop_columns([image_column]), what=file.path)
    schemes = followed(config.schemes, root=listing.root)
    notes += note_on_numbers_among(label_names or (), what=f"the column {label_column!r} of {file.path}")
    notes += _refused(paths, schemes, listing.root, file.path)
    chosen = choose(ids, limit)
    to_read = [paths[row] for row in chosen]
    work: dict[str, list[Any] | None] = {
        "paths": to_read,
        "ids": None if ids == paths else [ids[row] for row in chosen],
        "labels": [labels[row] for row in chosen] if labels else None,
        "texts": [own_texts[row] for row in chosen] if own_texts else None,
    }
    ids_from = "" if config.id_column == "" else id_column
    columns = (image_column, ids_from, label_column, *filter(None, (texts_from,)))
    local = local_files(paths, listing.root)
    remote = files_at_uris(to_read, listing.root, schemes=schemes)
    notes += note_on_links(to_read, listing.root, schemes=schemes, name=file.path)
    notes += _missing(local, column=image_column, root=listing.root, name=file.path, num_rows=len(paths))
    identity = make_identity("manifest", [file, *local, *remote], config=config, limit=limit, columns=columns)
    return Source(
        name=listing.name,
        kind="manifest",
        root=listing.root,
        reader=FilesReader(
            root=listing.root,
            max_bytes=config.max_bytes,
            schemes=schemes,
            timeout=config.read_timeout,
            has_texts=texts is not None,
        ),
        units=file_units(work, [0] * len(chosen)),
        num_rows=len(chosen),
        labels_from=f"the column{'s' * bool(marked)} {label_column}" if labels is not None else None,
        label_names=label_names,
        identity=identity,
        config=config,
        labels_there=different(work["labels"] or ()),
        left_out=beyond_limit(len(ids), len(chosen)),
        notes=notes,
    )


def _row_ids(
    table: pa.Table, column: str | None, *, paths: list[str], are_numbers: bool, what: str
) -> list[str]:
    """Each row's id: out of its column, the number of its line where ids `are_numbers`, or else its path."""
    numbers = [f"{what}:{row}" for row in range(len(paths))]
    if column:
        return _ids(as_strings(table[column], name=column, what=what), what=what)
    if are_numbers:
        return numbers
    # A row without a path has the number of its line.
    named = [path if path.strip() else number for path, number in zip(paths, numbers, strict=True)]
    return _ids(pa.chunked_array([named], pa.string()), what=what)


def _ids(names: pa.ChunkedArray, *, what: str) -> list[str]:
    """Ids from names, paths or URIs, without their secrets. Links that differ in these alone get a number.

    Raises UserError when two names are equal or one is missing.
    """
    refuse_duplicates(names, what=what)
    counts: Counter[str] = Counter()
    ids = []
    for name in map(redact, names.to_pylist()):
        counts[name] += 1
        ids.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return ids


def _path_column(table: pa.Table, wanted: str | None, *, what: str) -> tuple[str, pa.ChunkedArray]:
    """The name of the column of URIs or paths, and its values. Raises UserError when there is none."""
    names = table.column_names
    name = pick_column(wanted, IMAGE_COLUMNS, names, what=what)
    if name is None:
        is_headless = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        raise UserError(
            f"{what}: no column of URIs or paths; there are {', '.join(names)} (--image-column)"
            + ("; it has no first line with the names of the columns" if is_headless else "")
        )
    column = as_strings(table[name], name=name, what=what)
    if any(embedded(path or "") is not None for path in column[:1].to_pylist()):
        raise UserError(
            f"{what}: column {name!r} holds images in base64, and not their paths: write it as Parquet, where this is "
            "read"
        )
    return name, column


def _refused(paths: Sequence[str], schemes: Sequence[str], root: str, name: str) -> tuple[str, ...]:
    """A note on URIs whose schemes are not followed. Raises UserError when there are no other URIs."""
    counts = Counter(scheme(under(root, path)) for path in paths)
    refused = {kind: count for kind, count in counts.items() if kind not in schemes}
    if not refused:
        return ()
    found = ", ".join(f"{count:,} at {kind}://" for kind, count in sorted(refused.items()))
    flag = f"--schemes {','.join(sorted({*schemes, *refused} - {'file'}))}"
    if len(refused) == len(counts):
        raise UserError(f"{name}: URIs of these schemes are not followed unless you say so: {found} ({flag})")
    return (f"{name}: {found} will be quarantined, as their scheme is not followed ({flag} follows it)",)


def _missing(local: Sequence[File], *, column: str, root: str, name: str, num_rows: int) -> tuple[str, ...]:
    """A note on paths that are no files. Raises UserError when no path is one and there are no URIs."""
    missing = [file.path for file in local if file.size is None]
    if not missing:
        return ()
    example = f"such as {under(root, missing[0])[:300]}"
    if len(missing) == num_rows:
        raise UserError(
            f"{name}: no file is at any path in its column {column!r} ({counted(num_rows, 'row')}), {example}: a path "
            "is relative to the folder of this list, and has its suffix (.jpg)"
        )
    return (
        f"{name}: {len(missing):,} of its {num_rows:,} paths will be quarantined for lack of a file, {example}",
    )


def _read_manifest(uri: str) -> tuple[pa.Table, tuple[str, ...]]:
    """The table, and a note where its columns are not separated as its suffix says."""
    path = split_options(uri)[0].lower()
    try:
        with open_input(uri) as file:
            head = file.read(HEAD_BYTES)
            file.seek(0)
            refuse_utf_16(head, path=uri)
            if path.endswith((".jsonl", ".ndjson")):
                return _read_lines(file, uri=uri), ()
            lines = head.splitlines()
            num_hints = sum(map(bool, map(SEPARATOR_HINT.fullmatch, lines[:1])))
            separator, notes = _separator(split(split_options(uri)[0])[1], lines[num_hints:])
            parse = pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
            start = pa.csv.ReadOptions(skip_rows=num_hints, block_size=CELL_BYTES)
            names = pa.csv.open_csv(file, start, parse).schema.names
            file.seek(0)
            # All columns are read as text: as a number, the id 00012 would become 12.
            convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            table = pa.csv.read_csv(file, start, parse, convert)
            cells = zip(table.column_names, table.columns, strict=True)
            broken = [name for name, column in cells if pc.any(pc.match_substring(column, "\n")).as_py()]
            if not broken:
                return table, notes
            file.seek(0)
            if file.read().count(b'"') % 2:
                raise UserError(
                    f'{uri}: a cell of the column {broken[0]!r} begins with a quote (") that is not closed, and '
                    "swallows the lines below it: write a quote in a cell twice, and the cell in quotes"
                )
            return table, (
                *notes,
                f"{uri}: cells of the column {broken[0]!r} hold line breaks: a cell in quotes may",
            )
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
            raise not_utf_8(uri) from error
        raise UserError(f"{uri}: the manifest cannot be read ({reason(error)})") from error


def _read_lines(file: Any, *, uri: str) -> pa.Table:
    """A table of the JSON objects in the lines. Numbers stay the text that they are: no id is rounded.

    Raises UserError when a line is no object, or a column holds values of different kinds.
    """
    columns: dict[str, list[Any]] = {}
    num_rows = 0
    for number, line in enumerate(io.BufferedReader(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{uri}: line {number} cannot be read as JSON ({reason(error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{uri}: line {number} is no JSON object, which is written in braces")
        for name in row:
            columns.setdefault(name, [None] * num_rows)
        for name, values in columns.items():
            values.append(row.get(name))
        num_rows += 1
    return pa.table({_encodable(name): _column(values, name, uri=uri) for name, values in columns.items()})


def _column(values: list[Any], name: str, *, uri: str) -> pa.Array:
    try:
        return pa.array(values)
    except UnicodeEncodeError:
        return pa.array([_encodable(value) if isinstance(value, str) else value for value in values])
    except pa.ArrowException as error:
        raise UserError(f"{uri}: column {name!r} holds values of different kinds: {reason(error)}") from error


def _encodable(text: str) -> str:
    """A text of JSON as UTF-8 can have it: Python writes names that are not UTF-8 as halves of characters."""
    return escaped(text).encode(errors="backslashreplace").decode()


def _separator(name: str, lines: Sequence[bytes]) -> tuple[str, tuple[str, ...]]:
    """The separator of the columns, and a note if the suffix says another one.

    The suffix is wrong where it would make the header one column and another separator makes several.
    """
    own = "\t" if name.lower().endswith(".tsv") else ","
    header = next(iter(lines), b"").decode(errors="replace")
    counts = {mark: len(next(csv.reader([header], delimiter=mark), ())) for mark in (own, *SEPARATORS)}
    found = own if counts[own] > 1 else max(counts, key=lambda mark: counts[mark])
    if found == own:
        return own, ()
    return found, (f"{name}: its columns are separated by {SEPARATORS[found]}, and read like that",)


def _labels(
    table: pa.Table, column: str | None, *, what: str
) -> tuple[list[int | None] | None, tuple[str, ...] | None]:
    """Labels and their names, which are None where all labels are numbers; 1.0 is one as well."""
    if column is None:
        return None, None
    words = label_words(as_strings(table[column], name=column, what=what)).to_pylist()
    gaps = [word is None for word in words]
    numbers = [whole_number(word or "") for word in words]
    if all(gap or number is not None for number, gap in zip(numbers, gaps, strict=True)):
        labels = [None if number is None or number < 0 else number for number in numbers]
        if max(different(labels), default=0) > MAX_LABEL:
            raise UserError(
                f"{what}: column {column!r} is no column of labels: it has numbers above {MAX_LABEL}"
            )
        return labels, None
    names = sorted({word for word in words if word is not None})
    places = {name: place for place, name in enumerate(names)}
    return [None if word is None else places[word] for word in words], tuple(names)
