"""Opening image sources: from the path, URI or data set that the user names to a plan of the work to read it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lpclip.config import SourceConfig, UserError, counted
from lpclip.images.columns import Texts
from lpclip.images.folders import is_text_file, open_folder
from lpclip.images.listings import is_pattern, list_path, list_pattern, merge
from lpclip.images.manifests import open_manifest
from lpclip.images.named import CLASSES, named_parquet
from lpclip.images.parquet import has_image_bytes, open_parquet
from lpclip.images.source import IMAGE_SUFFIXES, File, Listing, Source
from lpclip.images.tars import open_webdataset

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
WORDS = {"folder": "image", "parquet": "Parquet file", "webdataset": "tar", "manifest": "manifest"}
SUFFIXES = {
    "folder": IMAGE_SUFFIXES,
    "parquet": (".parquet", ".pq"),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "manifest": (".csv", ".tsv", ".jsonl", ".ndjson"),
}
REMEDIES = {
    (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"): "unpack it first",
    SUFFIXES["manifest"]: "name the list itself",
    (".json", ".txt", ".xml", ".xlsx"): "a list of images is a CSV, TSV or JSONL file with a column of paths",
    (
        ".heic",
        ".heif",
        ".jxl",
        ".dcm",
        ".dng",
        ".cr2",
        ".nef",
        ".arw",
        ".svg",
        ".pdf",
    ): "save as JPEG or PNG first",
    (
        ".npy",
        ".npz",
        ".h5",
        ".hdf5",
        ".mat",
        ".pkl",
        ".lmdb",
        ".tfrecord",
    ): "write the images as files, or to Parquet",
}
"""Advice by suffix, for files that hold or list images in a form that is not read."""


class _Value(NamedTuple):
    """One of the values of --data, with the files that it names."""

    text: str
    listing: Listing
    is_file: bool = False
    is_pattern: bool = False


def open_source(
    data: str | Sequence[str],
    *,
    config: SourceConfig,
    split: str = "train",
    limit: int | None = None,
    texts: Texts | None = None,
) -> Source:
    """The images in a folder, Parquet, WebDataset tars, a manifest or a named data set; none is read yet.

    `data` may be a pattern, with `*` for any part of a name: what lies in a folder that fits is read as well. A path
    that exists goes before a data set of that name. Several values of one kind are read as one, with ids as if the
    deepest folder that holds them all were named. `split` is the part of a data set that is named without one. A
    limit chooses rows by a hash of their ids. With `texts`, images have texts. Raises UserError when there is nothing
    to read, or when names tell of several splits and no pattern asks for them.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit must be at least 1, not {limit}")
    named = [data] if isinstance(data, str) else list(dict.fromkeys(data))
    values = [_list_value(text, split=split) for text in named]
    told = named[0] + (f" and {len(values) - 1} more" if len(values) > 1 else "")
    listing = merge([value.listing for value in values])
    kind = _kind_of(values, listing, config, told=told)
    beside = kind == "folder" and texts is not None

    def is_read(file: File) -> bool:
        return _kind(file.path) == kind or (beside and is_text_file(file.path))

    for value in values:
        own = [file.path for file in value.listing.files if is_read(file)]
        if not own:
            raise UserError(
                f"{value.text}: holds no {WORDS[kind]}s, as what is named beside it does: leave it out"
            )
        if not value.is_pattern:
            _refuse_splits(value.text, kind, own)
    files = [file for file in listing.files if is_read(file)]
    source = OPENERS[kind](listing._replace(files=files), config=config, limit=limit, texts=texts)
    if source.num_rows == 0:
        raise UserError(f"{told}: no rows")
    kept = set(files)
    skipped = [file.path for file in listing.files if file not in kept]
    if not skipped:
        return source
    note = f"left out of {told}: {counted(len(skipped), 'file')} other than {WORDS[kind]}s ({_suffixes(skipped)})"
    lists = [path for path in skipped if _kind(path) == "manifest"]
    if lists:
        note += f"; a list such as {lists[0]} is read where --data names it"
    left_out = source.left_out
    if left_out is not None:
        left_out = {**_count_suffixes(skipped), **left_out}
    return replace(source, left_out=left_out, notes=(*source.notes, note))


def _suffixes(paths: Sequence[str]) -> str:
    """The most frequent suffixes, each with its count."""
    return ", ".join(f"{count} {suffix}" for suffix, count in _count_suffixes(paths).most_common(3))


def _count_suffixes(paths: Sequence[str]) -> Counter[str]:
    return Counter(Path(path).suffix or "no suffix" for path in paths)


def _remedy(paths: Sequence[str]) -> str | None:
    found = (
        remedy for ends, remedy in REMEDIES.items() if any(path.lower().endswith(ends) for path in paths)
    )
    return next(found, None)


def _list_value(text: str, *, split: str) -> _Value:
    if is_pattern(text):
        return _Value(text, list_pattern(text), is_pattern=True)
    if "://" in text or Path(text).expanduser().exists():
        return _Value(text, *list_path(text))
    name, split = _parse_name(text, split=split)
    listing, is_file = list_path(str(named_parquet(name, split=split)))
    return _Value(text, listing._replace(name=f"{name}-{split}"), is_file)


def _parse_name(data: str, *, split: str) -> tuple[str, str]:
    name, separator, part = data.partition(":")
    if name not in CLASSES:
        raise UserError(f"{data}: no such path, nor one of the data sets {', '.join(CLASSES)}")
    if separator and part not in ("train", "test"):
        raise UserError(f"{data}: no such part of {name}; there are {name}:train and {name}:test")
    return name, part or split


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
    place = data.rstrip("/")
    one, all_ = f"'{place}/{first}*'", f"'{place}/*'"
    if kind == "folder":
        # By a pattern, the splits' names would be the labels.
        one, all_ = f"'{place}/{first}'", " ".join(f"'{place}/{name}'" for name in sorted({*names}))
    raise UserError(
        f"{data}: the names tell of several splits ({told} files): name one, as in {one}, or all of them, as in "
        f"{all_}"
    )


def _kind(path: str) -> str | None:
    lower = path.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if lower.endswith(suffixes)), None)


def _kind_of(values: Sequence[_Value], listing: Listing, config: SourceConfig, *, told: str) -> str:
    """The one kind of all values, whose files are in the listing."""
    kinds = [_kind_of_file(value) for value in values if value.is_file]
    if len(values) == len(kinds) == 1:
        return kinds[0]
    if "manifest" in kinds:
        raise UserError(f"{told}: a manifest is read alone: put the lines of all in one file")
    return _kind_of_folder(values, listing, config, told=told)


def _kind_of_file(value: _Value) -> str:
    kind = _kind(value.listing.files[0].path) if value.listing.files else None
    if kind is None:
        known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        remedy = _remedy([value.text]) or f"the known ones end in {known}"
        raise UserError(f"{value.text}: unknown kind of file; {remedy}")
    return kind


def _kind_of_folder(values: Sequence[_Value], listing: Listing, config: SourceConfig, *, told: str) -> str:
    kinds = sorted({kind for file in listing.files if (kind := _kind(file.path)) and kind != "manifest"})
    if not kinds:
        if not listing.files:
            raise UserError(f"{told}: the folder holds nothing")
        paths = [file.path for file in listing.files]
        remedy = _remedy(paths)
        raise UserError(
            f"{told}: the folder holds {counted(len(paths), 'file')}, and no image, Parquet file or tar "
            f"({_suffixes(paths)})" + (f": {remedy}" if remedy else "")
        )
    if len(kinds) > 1 and "parquet" in kinds:
        # Downloaders write what they know of the images beside them.
        files = [file for file in listing.files if _kind(file.path) == "parquet"]
        if not any(map(partial(has_image_bytes, listing.root, config=config), files)):
            kinds.remove("parquet")
    if len(kinds) > 1:
        there = {kind: [f.path for f in listing.files if _kind(f.path) == kind] for kind in kinds}
        listed = ", ".join(
            f"{counted(len(paths), WORDS[kind])} ({paths[0]})" for kind, paths in there.items()
        )
        advice = "name those of one kind"
        if len(values) == 1:
            suffix = Path(there[max(kinds, key=lambda kind: len(there[kind]))][0]).suffix
            pattern = f"{told.rstrip('/')}/*{suffix}"
            advice = f"move the others away, or name those of one kind by a pattern, as in '{pattern}'"
        where = "the folder holds" if len(values) == 1 else "these are"
        raise UserError(f"{told}: {where} files of different kinds: {listed}; {advice}")
    return kinds[0]
