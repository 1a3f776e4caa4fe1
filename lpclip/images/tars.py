"""WebDataset tars: read from start to end, never extracted, with their damage reported as rows."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from lpclip.config import SourceConfig
from lpclip.files import open_input
from lpclip.images.columns import Texts
from lpclip.images.fetch import reason, under
from lpclip.images.source import IMAGE_SUFFIXES, Listing, Reader, Row, Source, make_identity, make_pair

TAR_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error)
MAX_MEMBERS = 32
"""Most members of one sample, because all of them are in memory at once."""
BUFFER_BYTES = 4 << 20
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

    def rows(self, unit: str) -> Iterator[Row]:
        """The samples in the tar's order; a damaged tar ends in a row that says so."""
        work = json.loads(unit)
        file, limit = work["file"], work.get("limit")
        seen: set[str] = set()
        empty = True
        try:
            with open_tar(self.root, file) as tar:
                for key, members in samples(tar, read=partial(self._read, tar)):
                    if len(seen) == limit:
                        return
                    empty = False
                    yield from self._sample(f"{file}/{key}", members, seen)
            if empty:
                # Without a row, the unit would leave no part in a store, as if it had never been read.
                yield Row(f"{file}/(empty)", None, error="tar: holds no samples")
        except TAR_ERRORS as error:
            yield Row(f"{file}/(rest)", None, error=f"tar: {reason(error)}")

    def _read(self, tar: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> bytes | Exception:
        wanted = ("cls", "txt") if self.has_texts else ("cls",)
        if is_image(extension, self.image_extension) or extension in wanted:
            return read_member(tar, info, max_bytes=self.max_bytes)
        return b""

    def _sample(self, name: str, members: list[Member], seen: set[str]) -> Iterator[Row]:
        if len(members) > MAX_MEMBERS:
            yield Row(name, None, error=f"more than {MAX_MEMBERS} files of one sample")
            return
        images = [member for member in members if is_image(member.extension, self.image_extension)]
        if not images:
            if name not in seen:
                yield Row(
                    name, None, error=f"no image in {', '.join(member.extension for member in members)}"
                )
            return
        if name in seen:
            yield Row(name, None, error="duplicate id")
            return
        seen.add(name)
        label = next((class_label(member.data) for member in members if member.extension == "cls"), None)
        texts = [member.data for member in members if member.extension == "txt"]
        yield make_pair(name, images[0].data, label, texts)
        if any(member.extension == images[0].extension for member in images[1:]):
            yield Row(name, None, error="duplicate id")


class Member(NamedTuple):
    """A file in a tar. The extension is the part of its name after the first dot."""

    extension: str
    data: bytes | Exception


def samples(
    tar: tarfile.TarFile, *, read: Callable[[tarfile.TarInfo, str], bytes | Exception]
) -> Iterator[tuple[str, list[Member]]]:
    """WebDataset's samples: neighbouring members whose paths are equal up to the first dot of their names.

    `read` takes a member and its extension. At most MAX_MEMBERS members of a sample are read; one more shows, unread,
    that there are too many.
    """
    key = ""
    members: list[Member] = []
    try:
        for info in tar:
            path = PurePosixPath(info.name)
            if not info.isfile() or path.name.startswith((".", "_")):
                continue
            stem, _, extension = path.name.partition(".")
            name = str(path.with_name(stem))
            if members and name != key:
                yield key, members
                members = []
            key = name
            extension = extension.lower()
            if len(members) < MAX_MEMBERS:
                members.append(Member(extension, read(info, extension)))
            elif len(members) == MAX_MEMBERS:
                members.append(Member(extension, b""))
    except TAR_ERRORS:
        if members:
            yield key, members
        raise
    if members:
        yield key, members


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo, *, max_bytes: int) -> bytes | ValueError:
    """A member's bytes, or the reason not to read them."""
    if info.size > max_bytes:
        return ValueError(f"{info.size} bytes, more than {max_bytes}")
    file = tar.extractfile(info)
    assert file is not None
    return file.read()


def is_image(extension: str, wanted: str | None = None) -> bool:
    """True when a tar member with this extension is an image, or has the `wanted` extension, if given."""
    return extension == wanted if wanted else f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES


def class_label(data: bytes | Exception) -> int | None:
    """The number in a .cls member, None when it holds none."""
    text = b"" if isinstance(data, Exception) else data.strip()
    return int(text) if text.isdigit() else None


def open_tar(root: str, file: str) -> tarfile.TarFile:
    """A tar below root, compressed or not, opened to be read from start to end."""
    # tarfile asks for ten kilobytes at a time: a store would be sent a request for each.
    stream = io.BufferedReader(open_input(under(root, file)), BUFFER_BYTES)
    return tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo)


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
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"the archive is cut or damaged ({error})") from error

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in HEADER_TYPES and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, more than {MAX_HEADER_BYTES}")
        return super()._proc_member(tar)  # type: ignore[misc]


def open_webdataset(
    listing: Listing, *, config: SourceConfig, limit: int | None, texts: Texts | None
) -> Source:
    """Tars, each a unit. A limit takes the first samples, because only reading shows what a tar holds."""
    units = [{"file": file.path} for file in listing.files]
    notes = []
    if limit is not None:
        units = list(_first_samples(listing, limit))
        notes.append(f"--limit takes the first {limit} samples of {listing.name}, in the order of the tars")
    return Source(
        name=listing.name,
        kind="webdataset",
        root=listing.root,
        reader=TarReader(
            root=listing.root,
            max_bytes=config.max_bytes,
            image_extension=config.image_column,
            has_texts=texts is not None,
        ),
        units=tuple(map(json.dumps, units)),
        num_rows=None,
        has_labels=_has_labels(listing),
        label_names=None,
        identity=make_identity(
            "webdataset",
            listing.files,
            config=config,
            limit=limit,
            columns=[config.image_column, *(["txt"] if texts is not None else [])],
        ),
        config=config,
        notes=tuple(notes),
    )


def _first_samples(listing: Listing, limit: int) -> Iterator[dict[str, Any]]:
    for file in listing.files:
        num_samples = sum(1 for _ in islice(_peek(listing.root, file.path), limit))
        yield {"file": file.path, "limit": num_samples}
        limit -= num_samples
        if not limit:
            return


def _has_labels(listing: Listing) -> bool:
    members = next(_peek(listing.root, listing.files[0].path), [])
    return any(member.extension == "cls" for member in members)


def _peek(root: str, file: str) -> Iterator[list[Member]]:
    """The samples without their bytes, up to where the tar is damaged: the reader reports the damage later."""
    try:
        with open_tar(root, file) as tar:
            for _, members in samples(tar, read=lambda *_: b""):
                yield members
    except TAR_ERRORS:
        return
