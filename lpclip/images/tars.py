"""WebDataset tars: read from start to end, never extracted, with their damage reported as rows."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from lpclip.config import SourceConfig, UserError, counted
from lpclip.files import open_input
from lpclip.images.columns import MAX_LABEL, Texts, whole_number
from lpclip.images.fetch import reason, under
from lpclip.images.names import escaped
from lpclip.images.source import IMAGE_SUFFIXES, Listing, Reader, Row, Source, make_identity, make_pair

TAR_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)
MAX_MEMBERS = 32
"""Most members of one sample that are in memory at once."""
ROWS_VERSION = 3
"""Version of the rows that a tar has: features of other rows are never taken for these."""
BUFFER_BYTES = 4 << 20
ARCHIVES = ("tar", "tgz", "zip", "gz")
"""Suffixes of archives, which are not looked into where they lie in a tar."""
MAX_LABEL_BYTES = 1 << 10
BEGINNING_BYTES = 32 << 20
"""A label is looked for in so much of the first tar, to say in the plan where labels come from."""
MAX_HEADER_BYTES = 1 << 20
"""Most bytes of a member's name and other properties: tarfile reads them whole, and they could fill the memory."""


@dataclass(frozen=True, kw_only=True)
class TarReader(Reader):
    """Reads WebDataset tars from start to end, without extracting them.

    A unit holds a `file` below root and, if not all of its images are to be read, their number as `limit`.
    """

    root: str
    max_bytes: int
    image_extension: str | None = None
    has_labels: bool = True
    """False where the labels that there may be are not to be read."""

    def rows(self, unit: str) -> Iterator[Row]:
        """The images in the tar's order; a damaged tar ends in a row that says so.

        What is there again has an id of its own, such as `x.tar/1//2`, which is no path in a tar.
        """
        counts: Counter[str] = Counter()
        for row in self._rows(unit):
            counts[row.id] += 1
            yield row if counts[row.id] == 1 else row._replace(id=f"{row.id}//{counts[row.id]}")

    def _rows(self, unit: str) -> Iterator[Row]:
        work = json.loads(unit)
        file, limit = work["file"], work.get("limit")
        empty, num_images = True, 0
        try:
            with open_tar(self.root, file) as tar:
                for is_image_row, row in self._walk(file, samples(tar, read=partial(self._read, tar))):
                    if limit and num_images == limit:
                        return
                    empty, num_images = False, num_images + is_image_row
                    yield row
            if empty:
                # Without a row, the unit would leave no part in a store, as if it had never been read.
                yield Row(f"{file}/(empty)", None, error="tar: holds no samples")
        except TAR_ERRORS as error:
            yield Row(f"{file}/(rest)", None, error=f"tar: {reason(error)}")

    def count_images(self, file: str, *, most: int) -> int:
        """The number of images in a tar, up to `most` and to where it is damaged: the rows report that later."""
        found = 0
        with contextlib.suppress(*TAR_ERRORS), open_tar(self.root, file) as tar:
            for is_image_row, _ in self._walk(file, samples(tar, read=lambda *_: b"")):
                found += is_image_row
                if found == most:
                    break
        return found

    def _read(self, tar: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> bytes | Exception:
        if is_image(extension, self.image_extension) or extension.rpartition(".")[2] in self._beside():
            return read_member(tar, info, max_bytes=self.max_bytes)
        return b""

    def _beside(self) -> set[str]:
        """Suffixes of the files that are read beside an image."""
        return {*["cls"] * self.has_labels, *["txt"] * self.has_texts}

    def _walk(self, file: str, found: Iterable[Sample]) -> Iterator[tuple[bool, Row]]:
        """The rows of samples, each with True when it stands for an image that the tar should have."""
        seen: set[str] = set()
        for sample in found:
            images = [member for member in sample.members if is_image(member.extension, self.image_extension)]
            apart = {member.suffix for member in sample.members} & self._beside()
            if not images and apart and f"{file}/{sample.key}" in seen:
                reason = f"its .{min(apart)} lies apart from its image: the files of a sample must lie side by side"
                yield False, Row(f"{file}/{sample.key}", None, error=reason)
            elif not images and f"{file}/{sample.key}" not in seen:
                there = ", ".join(member.extension for member in sample.members)
                reason = f"no image in {there}"
                if all(member.suffix in ARCHIVES for member in sample.members):
                    reason = f"an archive in a tar ({there}): unpack {file}, and name the folder with what is in it"
                yield False, Row(f"{file}/{sample.key}", None, error=reason)
            # `1.jpg` is the picture of sample 1, and `1.seg.png` beside it is not another picture.
            whole = next((member for member in images if "." not in member.extension), None)
            first = None if sample.is_cut else whole
            for image in images:
                name = f"{file}/{sample.key if self.image_extension else image.stem}"
                if first is not None and image.extension != first.extension:
                    yield False, Row(f"{name}.{image.suffix}", None, error=_further(image, first))
                elif name in seen:
                    yield False, Row(name, None, error="duplicate id")
                else:
                    seen.add(name)
                    try:
                        label = class_label(sample.beside(image, "cls")) if self.has_labels else None
                    except UserError as error:
                        yield True, Row(name, None, error=str(error))
                        continue
                    text = sample.beside(image, "txt") if self.has_texts else None
                    yield True, make_pair(name, image.data, label, [] if text is None else [text])


class Member(NamedTuple):
    """A file in a tar. The extension is the part of its name after the first dot, in lower case.

    The stem is its path up to the last dot.
    """

    stem: str
    extension: str
    data: bytes | Exception

    @property
    def suffix(self) -> str:
        """The part of the name after the last dot."""
        return self.extension.rpartition(".")[2]


class Sample(NamedTuple):
    """Neighbouring members whose paths are equal up to the first dot of their names, the key.

    `is_cut` says that these are only some of very many.
    """

    key: str
    members: list[Member]
    is_cut: bool

    def beside(self, image: Member, suffix: str) -> bytes | Exception | None:
        """The file that says something of an image: for `1.2.jpg`, `1.2.cls` goes before `1.cls`."""
        found = {member.extension: member.data for member in reversed(self.members)}
        parts = image.extension.split(".")
        names = (".".join((*parts[:stop], suffix)) for stop in range(len(parts) - 1, -1, -1))
        return next((found[name] for name in names if name in found), None)


def _further(image: Member, first: Member) -> str:
    return (
        f"a further image of one sample, which has a .{first.extension}: --image-column {first.extension} leaves it "
        f"out, --image-column {image.extension} reads it instead"
    )


def samples(
    tar: tarfile.TarFile, *, read: Callable[[tarfile.TarInfo, str], bytes | Exception]
) -> Iterator[Sample]:
    """WebDataset's samples. Hidden members are left out; a link has a reason in place of its bytes.

    `read` takes a member and its extension. A sample of more than MAX_MEMBERS members is cut, between two stems if
    possible: names with dots make one sample of a whole tar.
    """
    key, is_cut = "", False
    members: list[Member] = []
    try:
        for info in tar:
            path = PurePosixPath(escaped(info.name))
            if (
                info.isdir()
                or not path.name
                or path.name.startswith(".")
                or re.fullmatch("__.*__", path.name)
            ):
                continue
            start, _, extension = path.name.partition(".")
            name, extension = str(path.with_name(start)), extension.lower()
            if members and name != key:
                yield Sample(key, members, is_cut)
                members, is_cut = [], False
            elif len(members) == MAX_MEMBERS:
                is_cut = True
                num_last = sum(member.stem == members[-1].stem for member in members) % MAX_MEMBERS
                yield Sample(key, members[: MAX_MEMBERS - num_last], is_cut)
                members = members[MAX_MEMBERS - num_last :]
            key = name
            data = read(info, extension) if info.isfile() else ValueError("a link, which is not followed")
            members.append(Member(str(path.with_suffix("")), extension, data))
    except TAR_ERRORS:
        if members:
            yield Sample(key, members, is_cut)
        raise
    if members:
        yield Sample(key, members, is_cut)


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo, *, max_bytes: int) -> bytes | ValueError:
    """A member's bytes, or the reason not to read them."""
    if info.issparse():
        return ValueError("a sparse file, of which parts are left out")
    if info.size > max_bytes:
        return ValueError(f"{info.size} bytes, more than {max_bytes}")
    file = tar.extractfile(info)
    assert file is not None
    return file.read()


def is_image(extension: str, wanted: str | None = None) -> bool:
    """True when a tar member with this extension is an image, or has the `wanted` extension, if given."""
    return extension == wanted if wanted else f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES


def class_label(data: bytes | Exception | None) -> int | None:
    """The number in a .cls member, None when there is no member or it says that there is no label.

    Raises UserError, with the reason, when it cannot be read or holds anything else.
    """
    if isinstance(data, Exception):
        raise UserError(f"its .cls is {data}")
    word = _word(data)
    if word.lower() in ("", "nan"):
        return None
    number = whole_number(word)
    if number is None:
        raise UserError(f"the label in its .cls is no whole number: {word[:40]!r}")
    if number > MAX_LABEL:
        raise UserError(f"the label {number} is above {MAX_LABEL}")
    return number if number >= 0 else None


def _word(data: bytes | Exception | None) -> str:
    return data.decode("utf-8-sig", errors="replace").strip() if isinstance(data, bytes) else ""


def open_tar(root: str, file: str) -> tarfile.TarFile:
    """A tar below root, compressed or not, opened to be read from start to end."""
    # tarfile asks for ten kilobytes at a time: a store would be sent a request for each.
    stream = io.BufferedReader(open_input(under(root, file)), BUFFER_BYTES)
    unpacked: Any = _Unpacked(stream)
    return tarfile.open(fileobj=unpacked, mode="r|", tarinfo=_StrictTarInfo)


UNPACKERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x5d\0\0": lzma.LZMAFile,
}
"""What unpacks a compressed tar, by how it begins."""
MAX_RATIO, FREE_BYTES = 100, 1 << 30
"""A tar may unpack to so many times its size. No tar of less than FREE_BYTES is a bomb."""


class _Unpacked:
    """A tar's own bytes, for tarfile. Raises ReadError where a compressed tar is a bomb."""

    def __init__(self, packed: io.BufferedReader) -> None:
        self._packed = packed
        start = packed.peek(8)
        found = (unpack for magic, unpack in UNPACKERS.items() if start.startswith(magic))
        self._stream = next(found, lambda stream: stream)(packed)
        self._num_bytes = 0

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = self._stream.read(size)
        self._num_bytes += len(data)
        if self._num_bytes > max(FREE_BYTES, MAX_RATIO * self._packed.tell()):
            raise tarfile.ReadError(f"unpacks to more than {MAX_RATIO} times its size")
        return data


HEADER_TYPES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class _StrictTarInfo(tarfile.TarInfo):
    """Refuses damaged archives, which tarfile takes for ended ones, and headers of more than MAX_HEADER_BYTES."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except UserError:
            raise
        # tarfile takes numbers in headers for numbers.
        except (tarfile.HeaderError, ArithmeticError, LookupError, RecursionError, ValueError) as error:
            raise tarfile.ReadError(f"the archive is cut or damaged ({error})") from error

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in HEADER_TYPES and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, more than {MAX_HEADER_BYTES}")
        return super()._proc_member(tar)  # type: ignore[misc]


def open_webdataset(
    listing: Listing, *, config: SourceConfig, limit: int | None, texts: Texts | None
) -> Source:
    """Tars, each a unit. A limit takes the first images, because only reading shows what a tar holds."""
    first, words = _beginning(listing)
    names = [word for word in words if whole_number(word) is None]
    wants_labels = config.label_column != ""
    reader = TarReader(
        root=listing.root,
        max_bytes=config.max_bytes,
        image_extension=config.image_column,
        has_labels=wants_labels and not names,
        has_texts=texts is not None,
    )
    units = [{"file": file.path} for file in listing.files]
    notes = []
    if limit is not None:
        units = list(_first_images(listing, reader, limit))
        notes.append(
            f"--limit takes the first {counted(limit, 'image')} of {listing.name}, in the order of the tars"
        )
    if first and all(member.suffix in ARCHIVES for member in first):
        notes.append(
            f"{listing.files[0].path} begins with an archive, {first[0].stem}.{first[0].suffix}: unpack it and name "
            "the folder with what is in it, if all are archives"
        )
    if names and wants_labels:
        notes.append(
            f"labels: the .cls files of {listing.name} hold words such as {names[0]!r}; only numbers are labels there"
        )
    identity = make_identity(
        "webdataset",
        listing.files,
        config=config,
        limit=limit,
        columns=[
            config.image_column,
            *(["txt"] if texts is not None else []),
            *([] if reader.has_labels else ["no labels"]),
        ],
    )
    return Source(
        name=listing.name,
        kind="webdataset",
        root=listing.root,
        reader=reader,
        units=tuple(map(json.dumps, units)),
        num_rows=None,
        labels_from="the .cls files" if words and reader.has_labels else None,
        label_names=None,
        identity={**identity, "rows": ROWS_VERSION},
        config=config,
        left_out={} if limit is None else None,
        notes=tuple(notes),
    )


def _first_images(listing: Listing, reader: TarReader, limit: int) -> Iterator[dict[str, Any]]:
    for file in listing.files:
        num_images = reader.count_images(file.path, most=limit)
        yield {"file": file.path, "limit": num_images}
        limit -= num_images
        if not limit:
            return


def _beginning(listing: Listing) -> tuple[list[Member], list[str]]:
    """The members of the first sample, and what the first .cls files with anything in them say, those of one sample.

    They are looked for in the first BEGINNING_BYTES; of all files, .cls ones alone are read.
    """
    first: list[Member] = []
    with contextlib.suppress(*TAR_ERRORS), open_tar(listing.root, listing.files[0].path) as tar:

        def read(info: tarfile.TarInfo, extension: str) -> bytes | Exception:
            is_label = extension.rpartition(".")[2] == "cls"
            return read_member(tar, info, max_bytes=MAX_LABEL_BYTES) if is_label else b""

        for sample in samples(tar, read=read):
            first = first or sample.members
            words = [
                word for member in sample.members if member.suffix == "cls" and (word := _word(member.data))
            ]
            if words or tar.offset > BEGINNING_BYTES:
                return first, words
    return first, []
