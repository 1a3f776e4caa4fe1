"""Files on any file system that pyarrow reaches: local paths, s3://, gs://, hdfs://; and hf://, which is read alone."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import json
import os
import re
import stat
import tempfile
import urllib.parse
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from lpclip.config import UserError
from lpclip.credentials import holds_secret
from lpclip.patience import patiently

# Requests that one process has in flight: a remote store answers a thousand as fast as one.
READERS = 64
# A remote Parquet file up to this size is read whole: one request costs less than one for each column.
WHOLE_BYTES = 1 << 20
# Bytes that are handed to a stream at a time, and of the rows of a row group that is written table by table, about.
WRITTEN_BYTES, GROUP_BYTES = 64 << 20, 32 << 20
# Key in the footer of Parquet that lpclip writes. Pages have checksums, and what says where they are needs one too.
FOOTER_DIGEST = "lpclip_footer"
# The footer's length and Parquet's mark, in bytes, and how much of a file's end is read to have all of the footer.
FOOTER_END, FOOTER_READ = 8, 1 << 16

S = TypeVar("S")
T = TypeVar("T")


def cache_folder() -> Path:
    """The folder for files that lpclip can download or make again: LPCLIP_CACHE, or ~/.cache/lpclip."""
    return Path(os.environ.get("LPCLIP_CACHE") or "~/.cache/lpclip").expanduser()


KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
    "abfss": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
    "hf": "HF_TOKEN",
}
"""The environment variables that give access, by the scheme of a URI."""


def refuse_secrets(path: str, *, what: str = "a URI") -> None:
    """UserError, which does not repeat it, when a URI holds a password, a key or a signature."""
    if holds_secret(path):
        names = KEYS.get(path.partition("://")[0].lower())
        raise UserError(
            f"{what} holds a password or a secret key, which logs and summaries would keep: leave it out of the URI"
            + (f" and give it in the environment ({names})" if names else "")
        )


def resolve(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path on it.

    Raises UserError when the URI's scheme is none that pyarrow knows, or the URI holds a secret.
    """
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    refuse_secrets(path)
    try:
        return locate(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot open {path!r}: {error}") from error


def locate(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and path of a local path or a URI that pyarrow knows (s3://bucket/key?region=...)."""
    base, options = split_options(uri)
    scheme, separator, rest = base.partition("://")
    if not separator:
        return fs.LocalFileSystem(), uri
    refuse_secrets(uri)
    if scheme == "file":
        return fs.LocalFileSystem(), urllib.parse.unquote(rest)
    if scheme == "hf":
        if not re.match(r"(datasets/)?(?!datasets/)\w[\w.-]*/\w[\w.-]*(?=[@/]|$)", rest):
            raise UserError(f"{uri}: a data set on the Hugging Face hub is hf://datasets/OWNER/NAME/PATH")
        return _hub(), rest.rstrip("/")
    # Object names may hold what a URI may not: only the authority and the options are parsed as one.
    authority, _, path = rest.partition("/")
    if scheme == "s3" and "allow_delayed_open" not in options:
        # A file of up to ten megabytes is then written with one request, not with three.
        options += f"{'&' if options else '?'}allow_delayed_open=true"
    filesystem, start = patiently(uri, lambda: _filesystem(f"{scheme}://{authority}{options}"))
    return filesystem, f"{start.rstrip('/')}/{path}".rstrip("/")


def _explained(action: str, path: str, work: Callable[[fs.FileSystem, str], T]) -> T:
    """Call `work` with the file system and the path on it, patiently, and turn a refusal into a UserError.

    A file that is not there stays a FileNotFoundError.
    """
    filesystem, inner = resolve(path)
    try:
        return patiently(path, lambda: work(filesystem, inner))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot {action} {path}: {error}") from error


@lru_cache(maxsize=64)
def _filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    # An S3 file system that is made now keeps as many connections.
    pa.set_io_thread_count(max(READERS, pa.io_thread_count()))
    return fs.FileSystem.from_uri(uri)


@lru_cache(maxsize=1)
def _hub() -> fs.FileSystem:
    from huggingface_hub import HfFileSystem

    return fs.PyFileSystem(_HubFiles(HfFileSystem()))


class _HubFiles(fs.FSSpecHandler):
    """Files of the Hugging Face hub, to be read."""

    @staticmethod
    def _create_file_info(path: str, info: dict[str, Any]) -> fs.FileInfo:
        found = fs.FSSpecHandler._create_file_info(path, info)
        # The hub tells no time of change. A number made of the content's digest is another one when a file changes.
        content = info.get("blob_id")
        return (
            fs.FileInfo(path, found.type, size=found.size, mtime=int(content[:8], 16)) if content else found
        )

    def create_dir(self, path: str, recursive: bool) -> None:
        self._refuse(path)

    def open_output_stream(self, path: str, metadata: Any) -> None:
        self._refuse(path)

    @staticmethod
    def _refuse(path: str) -> None:
        raise UserError(
            f"hf://{path}: nothing is written to the hub: give a local folder, and `hf upload` it"
        )


def each(function: Callable[[S], T], items: Iterable[S], *, folder: str) -> Iterator[T]:
    """Results in the order of the items, which are about files in `folder`: by many threads where it is remote."""
    if isinstance(resolve(folder)[0], fs.LocalFileSystem):
        return map(function, items)
    return ahead(function, items, threads=READERS)


def ahead(function: Callable[[S], T], items: Iterable[S], *, threads: int) -> Iterator[T]:
    """Results in the order of the items, made by so many threads; as many are made ahead."""
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def split_options(uri: str) -> tuple[str, str]:
    """A URI without its options, and these with their question mark; no options for a path."""
    match = re.search(r"\?\w+=[^/?]*$", uri) if "://" in uri else None
    return (uri[: match.start()], match.group()) if match else (uri, "")


def absolute(path: str) -> str:
    """A local path made absolute, with ~ spelled out: a worker may run in another folder. A URI stays as it is."""
    return path if "://" in path else os.path.abspath(Path(path).expanduser())


def join(path: str, *names: str) -> str:
    """A path below another, for local paths and URIs alike: a URI's options stay at its end."""
    base, options = split_options(path)
    return "/".join([base.rstrip("/"), *names]) + options


def split(path: str) -> tuple[str, str]:
    """A path's or URI's folder, and the name in it, without options."""
    base, options = split_options(path)
    folder, _, name = base.rstrip("/").rpartition("/")
    return f"{folder}{options}", name


def add_suffix(path: str, suffix: str) -> str:
    """A path or URI with something behind its name."""
    base, options = split_options(path)
    return f"{base.rstrip('/')}{suffix}{options}"


def exists(path: str) -> bool:
    """True when the file or folder is there."""
    info = _explained("look for", path, lambda filesystem, inner: filesystem.get_file_info(_named(inner)))
    return info.type != fs.FileType.NotFound


def size_and_time(path: str) -> tuple[int | None, int | None]:
    """Bytes of a file and when it was changed, in nanoseconds; None for what is not there.

    Raises what the file system raises, StoreAwayError when it does not answer.
    """
    filesystem, inner = locate(path)
    info = patiently(path, lambda: filesystem.get_file_info(_named(inner)))
    return info.size, info.mtime_ns


def _named(path: str) -> bytes:
    """A path as the system has it, whose names may be no UTF-8: pyarrow's own way there knows UTF-8 alone."""
    return os.fsencode(path)


def list_names(folder: str) -> list[str]:
    """Sorted names of the files in a folder, empty when the folder is not there."""
    return sorted(list_sizes(folder))


def list_sizes(folder: str) -> dict[str, int]:
    """The files in a folder, each with its bytes, empty when the folder is not there."""
    return {info.base_name: info.size for info in _list(folder) if info.type == fs.FileType.File}


def list_folders(folder: str) -> list[str]:
    """Sorted names of the folders in a folder, empty when the folder is not there."""
    return sorted(info.base_name for info in _list(folder) if info.type == fs.FileType.Directory)


def _list(folder: str) -> list[fs.FileInfo]:
    return _explained(
        "list", folder, lambda f, inner: f.get_file_info(fs.FileSelector(inner, allow_not_found=True))
    )


def make_folder(folder: str) -> None:
    """Create a folder and its parents. Raises UserError, with the reason, when it cannot be written."""
    try:
        folder.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"cannot write to {os.fsencode(folder)!r}: the name is not UTF-8") from error

    def make(filesystem: fs.FileSystem, inner: str) -> None:
        filesystem.create_dir(inner, recursive=True)
        probe = join(inner, f".write-test-{uuid.uuid4().hex}")
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"")
        filesystem.delete_file(probe)

    filesystem, inner = resolve(folder)
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    try:
        patiently(folder, lambda: make(filesystem, inner))
    except OSError as error:
        above = next(
            (place for place in (Path(inner), *Path(inner).parents) if place.exists() and not place.is_dir()),
            None,
        )
        reason = f"{error}"
        if is_local:
            reason = f"{above} is a file" if above else os.strerror(error.errno or 0)
        raise UserError(f"cannot write to the output folder {folder}: {reason}") from error


def write_bytes(path: str, data: bytes | memoryview) -> None:
    """Write a file so that it is there whole or not at all. Raises UserError with its path when the disk is full."""
    filesystem, inner = resolve(path)
    # An object of these stores is there when all of it has come.
    is_whole = filesystem.type_name in ("s3", "gcs")
    target = inner if is_whole else f"{inner}.{uuid.uuid4().hex}.tmp"

    def write() -> None:
        with filesystem.open_output_stream(target) as stream:
            for start in range(0, len(data), WRITTEN_BYTES):
                if start:
                    # A stream to a store copies what it has not yet sent.
                    stream.flush()
                stream.write(data[start : start + WRITTEN_BYTES])

    with _explained_writing(path):
        try:
            patiently(path, write)
            if isinstance(filesystem, fs.LocalFileSystem):
                os.replace(target, inner)
            elif not is_whole:
                patiently(path, lambda: filesystem.move(target, inner))
        except OSError:
            # The part that was written would keep a full disk full.
            with contextlib.suppress(OSError):
                if not is_whole:
                    filesystem.delete_file(target)
            raise


@contextlib.contextmanager
def _explained_writing(path: str) -> Iterator[None]:
    """Turn a refusal of the file system into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; what was finished before is kept") from error


@contextlib.contextmanager
def growing_file(path: str) -> Iterator[str]:
    """A local path to write a file at, which comes to `path` at the end of the block; nothing comes if that raises.

    It is beside `path`, or for a remote one in the folder of temporary files: no part of it has to be in memory.
    """
    filesystem, inner = resolve(path)
    if isinstance(filesystem, fs.LocalFileSystem):
        target = f"{inner}.{uuid.uuid4().hex}.tmp"
        try:
            yield target
            with _explained_writing(path):
                os.replace(target, inner)
        finally:
            Path(target).unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as here:
        yield f"{here}/file"
        with pa.memory_map(f"{here}/file") as whole:
            write_bytes(path, memoryview(whole.read_buffer()))


def write_parquet(
    path: str, table: pa.Table, *, compression: str = "snappy", dictionary: bool | list[str] = True
) -> None:
    """Write a table as Parquet, atomically, with a checksum of each page and a digest of the footer.

    `dictionary` names columns that repeat.
    """
    sink = io.BytesIO()
    options: dict[str, Any] = {"compression": compression, "use_dictionary": dictionary}
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FOOTER_DIGEST: "0" * 32})
    data = sink.getbuffer()
    start = len(data) - FOOTER_END - int.from_bytes(data[-FOOTER_END:-4], "little")
    place, digest = _digest_of_footer(bytes(data[start:]))
    data[start + place : start + place + 32] = digest
    write_bytes(path, data)


def _digest_of_footer(footer: bytes) -> tuple[int, bytes]:
    """The place of the digest in a footer, and what it should be; the place is -1 where earlier versions wrote none."""
    # In Thrift's compact protocol, a value of 32 bytes begins with these two.
    key = FOOTER_DIGEST.encode() + b"\x18\x20"
    place = footer.find(key) + len(key)
    if place < len(key):
        return -1, b""
    blank = footer[:place] + b"0" * 32 + footer[place + 32 :]
    return place, hashlib.blake2b(blank, digest_size=16).hexdigest().encode()


def _read_footer(source: Any) -> pq.FileMetaData:
    """The footer of a Parquet file. Raises OSError when it is not what was written."""
    size = source.size()
    source.seek(max(0, size - FOOTER_READ))
    footer = source.read()
    start = len(footer) - FOOTER_END - int.from_bytes(footer[-FOOTER_END:-4], "little")
    if start < 0:
        source.seek(max(0, size - len(footer) + start))
        footer, start = source.read(), 0
    footer = footer[start:]
    place, digest = _digest_of_footer(footer)
    if place >= 0 and footer[place : place + 32] != digest:
        raise OSError("its footer is not what was written")
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer))


@contextlib.contextmanager
def parquet_by_tables(path: str, *, group_rows: int = 1 << 16) -> Iterator[Callable[[pa.Table], None]]:
    """A function that adds tables of one schema, one at least, to a Parquet file with a checksum of each page.

    The file appears at the end of the block, whole or not at all. In memory are the rows of one row group, which has
    about `group_rows` or GROUP_BYTES.
    """
    writer: pq.ParquetWriter | None = None
    waiting: list[pa.Table] = []

    with growing_file(path) as place:

        def flush() -> None:
            nonlocal writer
            if waiting:
                with _explained_writing(path):
                    writer = writer or pq.ParquetWriter(
                        place, waiting[0].schema, filesystem=fs.LocalFileSystem(), write_page_checksum=True
                    )
                    writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        def add(table: pa.Table) -> None:
            waiting.append(table)
            if sum(map(len, waiting)) >= group_rows or sum(table.nbytes for table in waiting) >= GROUP_BYTES:
                flush()

        try:
            yield add
            flush()
        finally:
            if writer is not None:
                with _explained_writing(path):
                    writer.close()
        assert writer is not None, path


@contextlib.contextmanager
def open_parquet(path: str, *, remedy: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file that lpclip wrote, to be read in the block; the checksums of the pages that are read are verified.

    Raises UserError, which ends with the remedy, when it is damaged, and FileNotFoundError when it is not there.
    """
    try:
        with open_input(path) as stream:
            is_small = isinstance(stream, RemoteFile) and stream.size() <= WHOLE_BYTES
            source = pa.BufferReader(stream.read()) if is_small else stream
            file = pq.ParquetFile(source, metadata=_read_footer(source), page_checksum_verification=True)
            refuse_objects(file.schema_arrow)
            yield file
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def read_columns(file: pq.ParquetFile, columns: list[str] | None = None) -> pa.Table:
    """These columns of a Parquet file, by default all. Raises OSError when rows are missing."""
    table = file.read(columns=columns)
    # Pages of a kind that Arrow does not know, as a damaged one may seem to be, are passed over.
    if len(table) != file.metadata.num_rows:
        raise OSError(f"{len(table)} rows in place of {file.metadata.num_rows}")
    return table


def refuse_objects(schema: pa.Schema) -> None:
    """Raise ArrowInvalid for a column whose values Python code makes: that of Ray Data's objects unpickles them."""
    for field in schema:
        if holds_objects(field.type):
            raise pa.ArrowInvalid(f"column {field.name!r} holds Python objects, which are never unpickled")


def holds_objects(dtype: pa.DataType) -> bool:
    """True when Python code makes the values of an Arrow type, or of one within it."""
    if pa.types.is_dictionary(dtype):
        return holds_objects(dtype.value_type)
    inner = (dtype.field(place).type for place in range(dtype.num_fields))
    return isinstance(dtype, pa.ExtensionType) or any(map(holds_objects, inner))


class RemoteFile(io.RawIOBase):
    """A file of a remote store to be read at any place, patiently: a stream that a long read is never lost with."""

    def __init__(self, path: str, filesystem: fs.FileSystem, inner: str) -> None:
        super().__init__()
        self._path = path
        self._file = patiently(path, lambda: filesystem.open_input_file(inner))
        self._size = self._file.size()
        self._place = 0

    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def read_at(self, num_bytes: int, place: int) -> bytes:
        """Bytes from `place` on, fewer at the end of the file. Threads may call it at the same time."""
        return patiently(self._path, lambda: self._file.read_at(num_bytes, place))

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes, by default all that are left."""
        left = max(0, self._size - self._place)
        data = self.read_at(left if size is None or size < 0 else min(size, left), self._place)
        self._place += len(data)
        return data

    def readall(self) -> bytes:
        """All bytes that are left."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, for io.BufferedReader. Returns the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place, from the start, the next byte or the end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place


def open_input(path: str) -> pa.NativeFile | RemoteFile:
    """A file to be read at any place. Raises what the file system raises, StoreAwayError when it does not answer."""
    filesystem, inner = locate(absolute(path))
    if isinstance(filesystem, fs.LocalFileSystem):
        _refuse_special_file(inner)
        return filesystem.open_input_file(_named(inner))
    return RemoteFile(path, filesystem, inner)


def _refuse_special_file(path: str) -> None:
    """Raise OSError for a FIFO, a socket or a device. Reading one may never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path} is a FIFO, a socket or a device, and no file")


def read_bytes(path: str) -> bytes:
    """A whole file; FileNotFoundError when it is not there."""

    def read(filesystem: fs.FileSystem, inner: str) -> bytes:
        if isinstance(filesystem, fs.LocalFileSystem):
            if Path(inner).is_dir():
                raise UserError(f"{path} is a folder, and a file is wanted")
            _refuse_special_file(inner)
        with filesystem.open_input_file(inner) as stream:
            return stream.read()

    return _explained("read", path, read)


def decode_text(data: bytes, *, path: str) -> str:
    """The text of a file at `path`. Raises UserError when it is not UTF-8."""
    refuse_utf_16(data, path=path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf_8(path) from error


def refuse_utf_16(data: bytes, *, path: str) -> None:
    """Raise UserError when a file of text begins with UTF-16, as spreadsheets write it, or has bytes of 0."""
    # In UTF-16, every other byte is a 0 where letters are Latin.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * data.count(0) > len(data):
        raise not_utf_8(path)
    if 0 in data:
        line = data[: data.index(0)].count(b"\n") + 1
        raise UserError(f"{path} holds a byte of 0 in line {line}, which no text has: it may be damaged")


def not_utf_8(path: str) -> UserError:
    """The error for a text file in another encoding, with the remedy."""
    return UserError(f"{path} is not UTF-8 text: save it as UTF-8")


def write_json(path: str, value: Any) -> None:
    """Write JSON, atomically. NaN and infinities are refused: they are not JSON."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str) -> Any:
    """Read JSON; UserError with the path when it is not valid."""
    try:
        return json.loads(read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): it may be damaged") from error


def delete(path: str) -> None:
    """Delete a file."""
    _explained("delete", path, lambda filesystem, inner: filesystem.delete_file(inner))


def delete_folder(folder: str) -> None:
    """Delete a folder and all in it."""
    _explained("delete", folder, lambda filesystem, inner: filesystem.delete_dir(inner))
