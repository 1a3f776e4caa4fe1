"""Image files: a folder of them, or a manifest that lists their URIs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from pyarrow import fs

from lpclip.config import SourceConfig, UserError
from lpclip.files import open_input, split_options
from lpclip.images.columns import (
    ID_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    Texts,
    as_texts,
    pick_column,
    refuse_duplicates,
    text_column,
)
from lpclip.images.fetch import fetch_all, followed, reason, scheme, under
from lpclip.images.source import (
    TABLE_BYTES,
    UNIT_ROWS,
    File,
    Listing,
    Reader,
    Row,
    Source,
    choose,
    different,
    make_identity,
    make_pair,
    make_row,
)

FETCH_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class FilesReader(Reader):
    """Reads image files.

    A unit holds their `paths`, below root or URIs, and their `ids`, `labels` and `texts` if any. `text_paths` are the
    paths of files with an image's texts, null for an image without such a file.
    """

    root: str
    max_bytes: int
    schemes: tuple[str, ...]
    timeout: float

    def rows(self, unit: str) -> Iterator[Row]:
        """The files in order, fetched by several threads."""
        work = json.loads(unit)
        paths = work["paths"]
        ids, labels = work.get("ids") or paths, work.get("labels") or [None] * len(paths)
        texts = work.get("texts") or [[]] * len(paths)
        for start in range(0, len(paths), FETCH_ROWS):
            part = slice(start, start + FETCH_ROWS)
            rows = zip(ids[part], self._fetch(paths[part]), labels[part], strict=True)
            if "text_paths" in work:
                beside = work["text_paths"][part]
                read = iter(self._fetch([path for path in beside if path]))
                for row, path in zip(rows, beside, strict=True):
                    yield make_pair(*row, [next(read)] if path else [])
            else:
                for row, own in zip(rows, texts[part], strict=True):
                    yield make_row(*row, own)

    def _fetch(self, paths: list[str]) -> list[bytes | Exception]:
        return fetch_all(
            paths, root=self.root, max_bytes=self.max_bytes, schemes=self.schemes, timeout=self.timeout
        )


def open_folder(listing: Listing, *, config: SourceConfig, limit: int | None, texts: Texts | None) -> Source:
    """A folder of images. The subfolders directly below it are the labels; a flat folder has none.

    The texts of `a/b.jpg`, if asked for, are in `a/b.txt`. Raises UserError when there is no such file.
    """
    images = [file for file in listing.files if not is_text_file(file.path)]
    folders = [file.path.partition("/")[0] if "/" in file.path else None for file in images]
    names = sorted({folder for folder in folders if folder})
    places = {name: place for place, name in enumerate(names)}
    chosen = choose([file.path for file in images], limit)
    work: dict[str, list[Any] | None] = {
        "paths": [images[row].path for row in chosen],
        "labels": [places.get(folders[row] or "") for row in chosen] if names else None,
    }
    if texts is not None:
        beside = {_stem(file.path): file.path for file in listing.files if is_text_file(file.path)}
        if not beside:
            raise UserError(f"{listing.root}: no .txt file with the texts of an image")
        work["text_paths"] = [beside.get(_stem(images[row].path)) for row in chosen]
    return Source(
        name=listing.name,
        kind="folder",
        root=listing.root,
        reader=FilesReader(
            root=listing.root,
            max_bytes=config.max_bytes,
            schemes=(scheme(listing.root),),
            timeout=config.read_timeout,
            has_texts=texts is not None,
        ),
        units=_units(work, [images[row].size or 0 for row in chosen]),
        num_rows=len(chosen),
        has_labels=bool(names),
        label_names=tuple(names) or None,
        identity=make_identity("folder", listing.files, config=config, limit=limit),
        config=config,
        labels_there=different(work["labels"] or ()),
    )


def without_labels(source: Source, *, note: str) -> Source:
    """The folder with subfolders that mean nothing."""
    units = (
        {key: value for key, value in json.loads(unit).items() if key != "labels"} for unit in source.units
    )
    return replace(
        source,
        units=tuple(map(json.dumps, units)),
        has_labels=False,
        label_names=None,
        labels_there=(),
        notes=(*source.notes, note),
    )


def is_text_file(path: str) -> bool:
    """True when a file in a folder holds texts of an image."""
    return path.lower().endswith(".txt")


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def open_manifest(
    listing: Listing, *, config: SourceConfig, limit: int | None, texts: Texts | None
) -> Source:
    """A CSV, TSV or JSONL file with a column of URIs or of paths relative to it, and perhaps ids, labels and texts."""
    (file,) = listing.files
    table = _read_manifest(under(listing.root, file.path))
    names = table.column_names
    image_column = pick_column(config.image_column, IMAGE_COLUMNS, names, what=file.path)
    id_column = pick_column(config.id_column, ID_COLUMNS, names, what=file.path)
    label_column = pick_column(config.label_column, LABEL_COLUMNS, names, what=file.path)
    if image_column is None:
        raise UserError(
            f"{file.path}: no column of URIs or paths; there are {', '.join(names)} (--image-column)"
        )
    paths = table[image_column].cast(pa.string()).fill_null("").to_pylist()
    id_array = (table[id_column] if id_column else table[image_column]).cast(pa.string())
    if config.id_column != "":
        refuse_duplicates(id_array, what=file.path)
        ids = id_array.to_pylist()
    else:
        ids = [f"{file.path}:{row}" for row in range(len(paths))]
    texts_from = text_column(texts, table.schema, what=file.path)
    own_texts = as_texts(table[texts_from]) if texts_from else None
    labels, label_names = _labels(table, label_column)
    schemes = followed(config.schemes, root=listing.root)
    notes = _refused(paths, schemes, listing.root, file.path)
    chosen = choose(ids, limit)
    work: dict[str, list[Any] | None] = {
        "paths": [paths[row] for row in chosen],
        "ids": None if ids == paths else [ids[row] for row in chosen],
        "labels": [labels[row] for row in chosen] if labels else None,
        "texts": [own_texts[row] for row in chosen] if own_texts else None,
    }
    columns = (image_column, id_column, label_column, *filter(None, (texts_from,)))
    read = [file, *_local_files(paths, listing.root)]
    identity = make_identity("manifest", read, config=config, limit=limit, columns=columns)
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
        units=_units(work, [0] * len(chosen)),
        num_rows=len(chosen),
        has_labels=labels is not None,
        label_names=label_names,
        identity=identity,
        config=config,
        labels_there=different(work["labels"] or ()),
        notes=notes,
    )


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


def _units(work: dict[str, list[Any] | None], sizes: Sequence[int]) -> tuple[str, ...]:
    """The columns of `work` cut into units, which end at UNIT_ROWS files or when they reach TABLE_BYTES bytes."""
    units, start, num_bytes = [], 0, 0
    for stop in range(1, len(sizes) + 1):
        num_bytes += sizes[stop - 1]
        if stop - start == UNIT_ROWS or num_bytes >= TABLE_BYTES or stop == len(sizes):
            part = {key: column[start:stop] for key, column in work.items() if column is not None}
            units.append(json.dumps(part))
            start, num_bytes = stop, 0
    return tuple(units)


def _read_manifest(uri: str) -> pa.Table:
    path = split_options(uri)[0].lower()
    try:
        with open_input(uri) as file:
            if path.endswith((".jsonl", ".ndjson")):
                return pa.json.read_json(file)
            delimiter = "\t" if path.endswith(".tsv") else ","
            parse = pa.csv.ParseOptions(delimiter=delimiter)
            names = pa.csv.open_csv(file, parse_options=parse).schema.names
            file.seek(0)
            # All columns are read as text: as a number, the id 00012 would become 12.
            convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            return pa.csv.read_csv(file, parse_options=parse, convert_options=convert)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: the manifest cannot be read ({reason(error)})") from error


def _labels(table: pa.Table, column: str | None) -> tuple[list[int | None] | None, tuple[str, ...] | None]:
    if column is None:
        return None, None
    words = [word or None for word in table[column].cast(pa.string()).to_pylist()]
    if all(word is None or word.removeprefix("-").isdecimal() for word in words):
        numbers = [None if word is None or word.startswith("-") else int(word) for word in words]
        return numbers, None
    names = sorted({word for word in words if word is not None})
    places = {name: place for place, name in enumerate(names)}
    return [None if word is None else places[word] for word in words], tuple(names)


def _local_files(paths: Sequence[str], root: str) -> list[File]:
    """Sizes and times of the files on this machine, so that a change to one of them is seen. Remote files have none."""
    local = [path for path in paths if "://" not in under(root, path)]
    infos = fs.LocalFileSystem().get_file_info([under(root, path) for path in local])
    return [File(path, info.size, info.mtime_ns) for path, info in zip(local, infos, strict=True)]
