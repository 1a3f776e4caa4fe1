"""Listing the files that `--data` names: by a path, by a pattern, or by several of these."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from lpclip.config import UserError
from lpclip.files import locate, split_options
from lpclip.files import split as split_uri
from lpclip.images.fetch import reason, scheme
from lpclip.images.names import escaped
from lpclip.images.source import File, Listing
from lpclip.patience import patiently

SYSTEM_FOLDERS = (
    *("@eaDir", "#recycle", "lost+found", "__MACOSX"),
    *("$RECYCLE.BIN", "System Volume Information"),
    *("mlruns", "mlartifacts"),
)
"""Folders of systems and of MLflow, with thumbnails, deleted files and charts: to people, they are hidden."""


def merge(listings: Sequence[Listing]) -> Listing:
    """Several listings as one, below the deepest folder that holds them all; a file that several have is there once.

    Their order does not matter. Raises UserError when they lie on different file systems.
    """
    if len(listings) == 1:
        return listings[0]
    bases, options = zip(*(split_options(listing.root) for listing in listings), strict=True)
    roots = [(base if "://" in base else os.path.normpath(base)).rstrip("/").split("/") for base in bases]
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*roots, strict=False))
    common = [level[0] for level in levels]
    # The first three parts of a URI are its scheme and its host or bucket.
    if len(set(options)) > 1 or len(common) < 1 + 2 * ("://" in bases[0]):
        raise UserError(
            f"{min(bases)} and {max(bases)} lie on different file systems: name those of one of them"
        )
    found: dict[str, File] = {}
    # The outermost folder comes first: it says what the labels are in a folder below it that is named as well.
    for root, listing in sorted(zip(roots, listings, strict=True), key=lambda pair: len(pair[0])):
        above = "".join(f"{escaped(part)}/" for part in root[len(common) :])
        for file in listing.files:
            path = above + file.path
            found.setdefault(path, file._replace(path=path, labels_at=len(above)))
    return Listing(
        f"{min(listing.name for listing in listings)}-and-{len(listings) - 1}-more",
        ("/".join(common) or "/") + options[0],
        sorted(found.values()),
        tuple(sorted({name for listing in listings for name in listing.folders})),
    )


def list_path(data: str) -> tuple[Listing, bool]:
    """The files below a path or URI, sorted, without hidden ones, and True when it is a single file."""
    is_remote = scheme(data) != "file"
    local = locate(data)[1] if "://" in data and not is_remote else data
    uri = data.rstrip("/") if is_remote else str(Path(local).expanduser().absolute())
    try:
        filesystem, path = locate(uri)
        info = patiently(uri, lambda: filesystem.get_file_info(path if is_remote else os.fsencode(path)))
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{data}: no such path")
        if info.type == fs.FileType.Unknown:
            raise UserError(
                f"{data} is a FIFO, a socket or a device: save what it gives as a file, and name that"
            )
        is_file, folders = info.is_file, []
        if is_file:
            files = [File(escaped(path.rpartition("/")[2]), info.size, info.mtime_ns)]
        elif not is_remote:
            files = list(_walk(path, above=()))
            folders = [escaped(name) for name in os.listdir(path) if os.path.isdir(os.path.join(path, name))]
        else:
            selector = fs.FileSelector(path, recursive=True)
            found = patiently(uri, lambda: filesystem.get_file_info(selector))
            places = {i.path[len(path.rstrip("/")) :].lstrip("/"): i for i in found}
            is_folder = {place: i.type == fs.FileType.Directory for place, i in places.items()}
            files = [File(place, i.size, i.mtime_ns) for place, i in places.items() if not is_folder[place]]
            folders = [place for place in places if is_folder[place] and "/" not in place]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{data}: cannot be listed ({reason(error)})") from error
    outputs = _outputs(file.path for file in files)
    files = sorted(
        file
        for file in files
        if not any(map(_is_hidden, file.path.split("/"))) and not file.path.startswith(outputs)
    )
    folder, name = split_uri(uri)
    if is_file:
        # Many files are called train.parquet or test.parquet: the folder's name says which data set it is.
        name = f"{split_uri(folder)[1]}-{name.partition('.')[0]}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "images"
    seen = tuple(sorted(name for name in folders if name and not _is_hidden(name) and name[:2] != "__"))
    return Listing(name, folder if is_file else uri, files, seen), is_file


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _outputs(paths: Iterable[str]) -> tuple[str, ...]:
    """The folders below that jobs of lpclip wrote, each with a / at its end: their pictures are no photographs."""
    names = {"job.json", "summary.json"}
    found = Counter(folder for folder, _, name in (path.rpartition("/") for path in paths) if name in names)
    return tuple(f"{folder}/" for folder, count in found.items() if folder and count == len(names))


def is_pattern(data: str) -> bool:
    """True when `data` names several files by a pattern, and is not itself a path."""
    return "*" in split_options(data)[0] and not ("://" not in data and Path(data).expanduser().exists())


def list_pattern(data: str) -> Listing:
    """The files that fit a pattern, or lie in folders that do, below the last folder before its first wildcard."""
    base, options = split_options(data)
    parts = base.split("/")
    first = next(place for place, part in enumerate(parts) if "*" in part)
    listing, _ = list_path(("/".join(parts[:first]) or ("/" if first else ".")) + options)
    # File names often hold brackets, which fnmatch would take for a wildcard.
    wanted = [escaped(part).replace("[", "[[]") for part in parts[first:]]

    def fits(path: str) -> bool:
        found = path.split("/")
        return len(found) >= len(wanted) and all(map(fnmatch.fnmatchcase, found, wanted))

    files = [file for file in listing.files if fits(file.path)]
    if not files:
        raise UserError(
            f"{data}: no file fits this pattern; there are {len(listing.files)} in {listing.root}"
        )
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{listing.name}-{'-'.join(wanted).partition('.')[0]}").strip("-")
    return Listing(name or "images", listing.root, files)


def _walk(folder: str, *, above: tuple[tuple[int, int], ...]) -> Iterator[File]:
    """The files below a local folder, their paths relative to it; hidden folders are left out.

    Links are followed, except those to one of the folders `above`, which would have no end. A link to nothing is a
    file without size and time: whoever reads it has the reason. pyarrow would go in circles and pass over it.
    Raises OSError when a folder cannot be read.
    """
    status = os.stat(folder)
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            name = escaped(entry.name)
            try:
                status = entry.stat()
            except OSError:
                yield File(name, None, None)
                continue
            if not stat.S_ISDIR(status.st_mode):
                yield File(name, status.st_size, status.st_mtime_ns)
            elif not _is_hidden(entry.name) and (status.st_dev, status.st_ino) not in above:
                for file in _walk(entry.path, above=above):
                    yield file._replace(path=f"{name}/{file.path}")
