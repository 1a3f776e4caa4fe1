"""Opening image sources: from the path, URI or data set that the user names to a plan of the work to read it."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from lpclip.config import SourceConfig, UserError
from lpclip.files import locate, split_options
from lpclip.files import split as split_uri
from lpclip.images.columns import Texts
from lpclip.images.fetch import reason
from lpclip.images.folders import is_text_file, open_folder
from lpclip.images.manifests import open_manifest
from lpclip.images.named import CLASSES, named_parquet
from lpclip.images.parquet import has_image_bytes, open_parquet
from lpclip.images.source import IMAGE_SUFFIXES, File, Listing, Source
from lpclip.images.tars import open_webdataset
from lpclip.patience import patiently

OPENERS = {
    "folder": open_folder,
    "parquet": open_parquet,
    "webdataset": open_webdataset,
    "manifest": open_manifest,
}
SPLIT = re.compile(
    r"(?:^|[/_.-])(?P<word>train(?:ing)?|test(?:ing)?|val(?:id|idation)?|dev)(?=[/_.-]|\d|$)", re.IGNORECASE
)
"""A split's name in a path."""
SUFFIXES = {
    "folder": IMAGE_SUFFIXES,
    "parquet": (".parquet", ".pq"),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "manifest": (".csv", ".tsv", ".jsonl", ".ndjson"),
}


def open_source(
    data: str,
    *,
    config: SourceConfig,
    split: str = "train",
    limit: int | None = None,
    texts: Texts | None = None,
) -> Source:
    """The images in a folder, Parquet, WebDataset tars, a manifest or a named data set; none is read yet.

    `data` may be a pattern, with `*` for any part of a name: what lies in a folder that fits is read as well. A path
    that exists goes before a data set of that name. `split` is the part of a data set that is named without one. A
    limit chooses rows by a hash of their ids. With `texts`, images have texts. Raises UserError when there is nothing
    to read, or when names tell of several splits and no pattern asks for them.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit must be at least 1, not {limit}")
    is_pattern = _is_pattern(data)
    if is_pattern:
        listing, is_file = _list_pattern(data), False
    elif "://" in data or Path(data).expanduser().exists():
        listing, is_file = _list(data)
    else:
        name, split = _parse_name(data, split=split)
        listing, is_file = _list(str(named_parquet(name, split=split)))
        listing = listing._replace(name=f"{name}-{split}")
    kind = _kind_of_file(data, listing) if is_file else _kind_of_folder(data, listing, config)
    beside = kind == "folder" and texts is not None
    files = [f for f in listing.files if _kind(f.path) == kind or (beside and is_text_file(f.path))]
    if not is_pattern:
        _refuse_splits(data, kind, [file.path for file in files])
    source = OPENERS[kind](listing._replace(files=files), config=config, limit=limit, texts=texts)
    if source.num_rows == 0:
        raise UserError(f"{data}: no rows")
    kept = set(files)
    skipped = Counter(Path(file.path).suffix or "no suffix" for file in listing.files if file not in kept)
    if not skipped:
        return source
    suffixes = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(3))
    what = {"folder": "images", "parquet": "Parquet", "webdataset": "tars", "manifest": "manifests"}[kind]
    note = f"{skipped.total()} files in {data} are not {what} and were left out ({suffixes})"
    return replace(source, notes=(*source.notes, note))


def _parse_name(data: str, *, split: str) -> tuple[str, str]:
    name, separator, part = data.partition(":")
    if name not in CLASSES:
        raise UserError(f"{data}: no such path, nor one of the data sets {', '.join(CLASSES)}")
    if separator and part not in ("train", "test"):
        raise UserError(f"{data}: no such part of {name}; there are {name}:train and {name}:test")
    return name, part or split


def _list(data: str) -> tuple[Listing, bool]:
    """The files below a path or URI, sorted, without hidden ones, and True when it is a single file."""
    uri = data.rstrip("/") if "://" in data else str(Path(data).expanduser().absolute())
    try:
        filesystem, path = locate(uri)
        info = patiently(uri, lambda: filesystem.get_file_info(path))
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{data}: no such path")
        is_file, folders = info.is_file, []
        if is_file:
            files = [File(path.rpartition("/")[2], info.size, info.mtime_ns)]
        elif isinstance(filesystem, fs.LocalFileSystem):
            files = list(_walk(path, above=()))
            folders = [name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name))]
        else:
            selector = fs.FileSelector(path, recursive=True)
            found = patiently(uri, lambda: filesystem.get_file_info(selector))
            places = {i.path[len(path.rstrip("/")) :].lstrip("/"): i for i in found}
            is_folder = {place: i.type == fs.FileType.Directory for place, i in places.items()}
            files = [File(place, i.size, i.mtime_ns) for place, i in places.items() if not is_folder[place]]
            folders = [place for place in places if is_folder[place] and "/" not in place]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{data}: cannot be listed ({reason(error)})") from error
    files = sorted(file for file in files if not any(part.startswith(".") for part in file.path.split("/")))
    folder, name = split_uri(uri)
    if is_file:
        # Many files are called train.parquet or test.parquet: the folder's name says which data set it is.
        name = f"{split_uri(folder)[1]}-{name.partition('.')[0]}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "images"
    seen = tuple(sorted(name for name in folders if name and not name.startswith((".", "__"))))
    return Listing(name, folder if is_file else uri, files, seen), is_file


def _is_pattern(data: str) -> bool:
    """True when `data` names several files by a pattern, and is not itself a path."""
    return "*" in split_options(data)[0] and not ("://" not in data and Path(data).expanduser().exists())


def _list_pattern(data: str) -> Listing:
    """The files that fit a pattern, or lie in folders that do, below the last folder before its first wildcard."""
    base, options = split_options(data)
    parts = base.split("/")
    first = next(place for place, part in enumerate(parts) if "*" in part)
    listing, _ = _list(("/".join(parts[:first]) or ("/" if first else ".")) + options)
    # File names often hold brackets, which fnmatch would take for a wildcard.
    wanted = [part.replace("[", "[[]") for part in parts[first:]]

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


def _refuse_splits(data: str, kind: str, paths: Sequence[str]) -> None:
    """Raise UserError where the names say that the files are several splits: read as one, the test split is trained on.

    For images, the names are those of the folders right below `data`, and all of them must be names of splits.
    """
    names = list(paths)
    if kind == "folder":
        names = [path.partition("/")[0] for path in paths if "/" in path]
        if not all(map(SPLIT.fullmatch, set(names))):
            return
    found = [SPLIT.search(name) for name in names]
    counts = Counter(match["word"].lower() for match in found if match)
    if len({word[:2] for word in counts}) < 2:
        return
    first = next(name[: match.end("word")] for name, match in zip(names, found, strict=True) if match)
    told = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    raise UserError(
        f"{data}: the names tell of several splits ({told} files): name one, as in '{data.rstrip('/')}/{first}*', or "
        f"all of them, as in '{data.rstrip('/')}/*'"
    )


def _walk(folder: str, *, above: tuple[tuple[int, int], ...]) -> Iterator[File]:
    """The files below a local folder, their paths relative to it; hidden folders are left out.

    Links are followed, except those to one of the folders `above`, which would have no end. A link to nothing is a
    file without size and time: whoever reads it has the reason. pyarrow would go in circles and pass over it.
    Raises OSError when a folder cannot be read, UserError when a name is not UTF-8.
    """
    status = os.stat(folder)
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name != os.fsencode(entry.name).decode(errors="replace"):
                raise UserError(
                    f"{folder}: the file name {os.fsencode(entry.name)!r} is not UTF-8: rename the file"
                )
            try:
                status = entry.stat()
            except OSError:
                yield File(entry.name, None, None)
                continue
            if not stat.S_ISDIR(status.st_mode):
                yield File(entry.name, status.st_size, status.st_mtime_ns)
            elif not entry.name.startswith(".") and (status.st_dev, status.st_ino) not in above:
                for file in _walk(entry.path, above=above):
                    yield file._replace(path=f"{entry.name}/{file.path}")


def _kind(path: str) -> str | None:
    lower = path.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if lower.endswith(suffixes)), None)


def _kind_of_file(data: str, listing: Listing) -> str:
    kind = _kind(listing.files[0].path) if listing.files else None
    if kind is None:
        known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise UserError(f"{data}: unknown kind of file; the known ones end in {known}")
    return kind


def _kind_of_folder(data: str, listing: Listing, config: SourceConfig) -> str:
    kinds = sorted({kind for file in listing.files if (kind := _kind(file.path)) and kind != "manifest"})
    if not kinds:
        what = (
            f"{len(listing.files)} files, and no image, Parquet file or tar" if listing.files else "nothing"
        )
        raise UserError(f"{data}: the folder holds {what}")
    if len(kinds) > 1 and "parquet" in kinds:
        # Downloaders write what they know of the images beside them.
        files = [file for file in listing.files if _kind(file.path) == "parquet"]
        if not any(map(partial(has_image_bytes, listing.root, config=config), files)):
            kinds.remove("parquet")
    if len(kinds) > 1:
        first = next(file.path for file in listing.files if _kind(file.path) == kinds[-1])
        pattern = f"'{data.rstrip('/')}/*{Path(first).suffix}'"
        raise UserError(
            f"{data}: the folder holds files of different kinds ({', '.join(kinds)}); name one of them, or those of "
            f"one kind by a pattern, as in {pattern}"
        )
    return kinds[0]
