"""Files on any file system that pyarrow reaches: local paths, s3://, gs://, hdfs://."""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.parse
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from lpclip.config import UserError

# Whoever may read logs, summaries and MLflow's pages must not find keys there.
_SECRETS = re.compile(
    r"(?:^|=)\w+://([^/?#]*:(?!\d+/)[^?#]*@|.*[?&]\w*(secret|password|token|key)\w*=)", re.IGNORECASE
)


def cache_folder() -> Path:
    """The folder for files that lpclip can download or make again: LPCLIP_CACHE, or ~/.cache/lpclip."""
    return Path(os.environ.get("LPCLIP_CACHE") or "~/.cache/lpclip").expanduser()


def refuse_secrets(path: str, *, what: str = "a URI") -> None:
    """UserError, which does not repeat it, when a URI holds a password or a secret key."""
    if _SECRETS.search(path):
        raise UserError(
            f"{what} holds a password or a secret key, which logs and summaries would keep: leave it out of the URI "
            "and give it in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://)"
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
    # Object names may hold what a URI may not: only the authority and the options are parsed as one.
    authority, _, path = rest.partition("/")
    filesystem, start = _filesystem(f"{scheme}://{authority}{options}")
    return filesystem, f"{start.rstrip('/')}/{path}".rstrip("/")


@contextlib.contextmanager
def _explained(action: str, path: str) -> Iterator[None]:
    """Turn a file system's refusal into a UserError. A file that is not there stays a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot {action} {path}: {error}") from error


@lru_cache(maxsize=64)
def _filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(uri)


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
    filesystem, inner = resolve(path)
    with _explained("look for", path):
        return filesystem.get_file_info(inner).type != fs.FileType.NotFound


def list_names(folder: str) -> list[str]:
    """Sorted names of the files in a folder, empty when the folder is not there."""
    filesystem, inner = resolve(folder)
    with _explained("list", folder):
        infos = filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.File)


def list_folders(folder: str) -> list[str]:
    """Sorted names of the folders in a folder, empty when the folder is not there."""
    filesystem, inner = resolve(folder)
    with _explained("list", folder):
        infos = filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def make_folder(folder: str) -> None:
    """Create a folder and its parents; UserError when it cannot be written."""
    filesystem, inner = resolve(folder)
    try:
        filesystem.create_dir(inner, recursive=True)
        probe = join(inner, f".write-test-{uuid.uuid4().hex}")
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"")
        filesystem.delete_file(probe)
    except OSError as error:
        raise UserError(f"cannot write to the output folder {folder}: {error}") from error


def write_bytes(path: str, data: bytes | memoryview) -> None:
    """Write a file so that it is there whole or not at all. Raises UserError with its path when the disk is full."""
    filesystem, inner = resolve(path)
    temporary = f"{inner}.{uuid.uuid4().hex}.tmp"
    try:
        with filesystem.open_output_stream(temporary) as stream:
            stream.write(data)
    except OSError as error:
        # The part that was written would keep a full disk full.
        with contextlib.suppress(OSError):
            filesystem.delete_file(temporary)
        raise UserError(f"cannot write {path}: {error}; what was finished before is kept") from error
    if isinstance(filesystem, fs.LocalFileSystem):
        os.replace(temporary, inner)
    else:
        filesystem.move(temporary, inner)


def write_parquet(
    path: str, table: pa.Table, *, compression: str = "snappy", dictionary: bool | list[str] = True
) -> None:
    """Write a table as Parquet, atomically, with a checksum of each page. `dictionary` names columns that repeat."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, use_dictionary=dictionary, write_page_checksum=True)
    write_bytes(path, sink.getvalue())


@contextlib.contextmanager
def open_parquet(path: str, *, remedy: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file that lpclip wrote, to be read in the block; the checksums of the pages that are read are verified.

    Raises UserError, which ends with the remedy, when it is damaged, and FileNotFoundError when it is not there.
    """
    filesystem, inner = resolve(path)
    try:
        with filesystem.open_input_file(inner) as stream:
            yield pq.ParquetFile(stream, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def read_bytes(path: str) -> bytes:
    """A whole file; FileNotFoundError when it is not there."""
    filesystem, inner = resolve(path)
    with _explained("read", path), filesystem.open_input_file(inner) as stream:
        return stream.read()


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
    filesystem, inner = resolve(path)
    with _explained("delete", path):
        filesystem.delete_file(inner)


def delete_folder(folder: str) -> None:
    """Delete a folder and all in it."""
    filesystem, inner = resolve(folder)
    with _explained("delete", folder):
        filesystem.delete_dir(inner)
