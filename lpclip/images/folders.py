"""Folders of images, and the reader of image files: a unit of it is a list of paths or URIs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lpclip.config import SourceConfig, UserError, counted
from lpclip.images.columns import Texts
from lpclip.images.fetch import embedded, fetch_all, scheme, under
from lpclip.images.names import unescaped
from lpclip.images.source import (
    TABLE_BYTES,
    UNIT_ROWS,
    File,
    Listing,
    Reader,
    Row,
    Source,
    beyond_limit,
    choose,
    different,
    make_identity,
    make_pair,
    make_row,
)


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
        rows = zip(ids, self._fetch(paths), labels, strict=True)
        if "text_paths" in work:
            beside = work["text_paths"]
            read = self._fetch([path for path in beside if path])
            for row, path in zip(rows, beside, strict=True):
                yield make_pair(*row, [next(read)] if path else [])
        else:
            for row, own in zip(rows, texts, strict=True):
                yield make_row(*row, own)

    def listed(self, unit: str) -> list[tuple[str, int | None]]:
        """Id and label of each file."""
        work = json.loads(unit)
        ids = work.get("ids") or work["paths"]
        return list(zip(ids, work.get("labels") or [None] * len(ids), strict=True))

    def paths(self, unit: str) -> list[str | None]:
        """The path of each file of this machine, None for what is at a URI or is no file."""
        there = [None if embedded(path) else under(self.root, path) for path in json.loads(unit)["paths"]]
        return [path if path and "://" not in path and os.path.isfile(path) else None for path in there]

    def _fetch(self, paths: list[str]) -> Iterator[bytes | Exception]:
        return fetch_all(
            paths, root=self.root, max_bytes=self.max_bytes, schemes=self.schemes, timeout=self.timeout
        )


def open_folder(listing: Listing, *, config: SourceConfig, limit: int | None, texts: Texts | None) -> Source:
    """Folders of images. The subfolders directly below each are the labels; a flat folder has none.

    A note tells of folders without an image: they are no labels. The texts of `a/b.jpg`, if asked for, are in
    `a/b.txt`. Raises UserError when there is no such file.
    """
    images = [file for file in listing.files if not is_text_file(file.path)]
    folders = [_folder(file) for file in images]
    # An empty name says that there is no label, as it does of a column.
    names = sorted({folder for folder in folders if folder}) if config.label_column != "" else []
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
    identity = make_identity("folder", listing.files, config=config, limit=limit)
    tops = sorted({file.path[: file.labels_at] for file in images})
    if tops != [""]:
        identity["tops"] = tops
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
        units=file_units(work, [images[row].size or 0 for row in chosen]),
        num_rows=len(chosen),
        labels_from="the folders' names" if names else None,
        label_names=tuple(names) or None,
        identity=identity,
        config=config,
        labels_there=different(work["labels"] or ()),
        left_out=beyond_limit(len(images), len(chosen)),
        notes=(
            *_without_images(listing, names),
            *_unlabelled(images, names),
            *_named_alone(listing.root, tops, names),
            *_flattened(images),
        ),
    )


def _folder(file: File) -> str | None:
    """The name of the folder that may be a file's label."""
    folder, separator, _ = file.path[file.labels_at :].partition("/")
    return folder if separator else None


def _without_images(listing: Listing, names: Sequence[str]) -> tuple[str, ...]:
    """A note on folders beside those that are labels."""
    empty = sorted({*listing.folders} - {*names})
    if not empty or not names:
        return ()
    listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
    return (
        f"labels: {counted(len(empty), 'folder')} without an image in {listing.name} ({listed}): no class, unless "
        "--classes names it",
    )


def _unlabelled(images: Sequence[File], names: Sequence[str]) -> tuple[str, ...]:
    """A note on images beside the folders that are labels, such as those of a folder that is named by itself."""
    alone = [file.path for file in images if not _folder(file)]
    if not alone or not names:
        return ()
    return (
        f"labels: none for {len(alone):,} of {len(images):,} images, which lie right in a folder that is named, as "
        f"{alone[0]} does",
    )


def _named_alone(root: str, tops: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """A note on several folders that are named one by one, as a shell does for `photos/*`, and are no labels so."""
    folders = [top.rstrip("/") for top in tops if top]
    if names or len(folders) < 2:
        return ()
    listed = ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")
    return (
        f"labels: none, as a folder that is named is no label itself; if these ({listed}) are the labels, name the "
        f"folder above them, {root}",
    )


def _flattened(images: Sequence[File]) -> tuple[str, ...]:
    """A note on names that hold the folders of an archive: unpacking what Windows packed may leave them so."""
    names = [file.path for file in images if "\\" in unescaped(file.path)]
    if not names:
        return ()
    return (
        f"labels: a \\ in the name of a file makes no folder, and so no label; there is one in {names[0]}"
        + (f" and in {len(names) - 1:,} more" if len(names) > 1 else ""),
    )


def without_labels(source: Source, *, note: str) -> Source:
    """The folder with subfolders that mean nothing."""
    units = (
        {key: value for key, value in json.loads(unit).items() if key != "labels"} for unit in source.units
    )
    return replace(
        source,
        units=tuple(map(json.dumps, units)),
        labels_from=None,
        label_names=None,
        labels_there=(),
        notes=(*source.notes, note),
    )


def is_text_file(path: str) -> bool:
    """True when a file in a folder holds texts of an image."""
    return path.lower().endswith(".txt")


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def file_units(work: dict[str, list[Any] | None], sizes: Sequence[int]) -> tuple[str, ...]:
    """The columns of `work` cut into units, which end at UNIT_ROWS files or when they reach TABLE_BYTES bytes."""
    units, start, num_bytes = [], 0, 0
    for stop in range(1, len(sizes) + 1):
        num_bytes += sizes[stop - 1]
        if stop - start == UNIT_ROWS or num_bytes >= TABLE_BYTES or stop == len(sizes):
            part = {key: column[start:stop] for key, column in work.items() if column is not None}
            units.append(json.dumps(part))
            start, num_bytes = stop, 0
    return tuple(units)
