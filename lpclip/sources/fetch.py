"""Reading single files, wherever they lie: local paths, http(s), and whatever pyarrow.fs reaches."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

RETRY_SECONDS = (0.2, 0.8)
# Of the client errors, those that say "later": request timeout and too many requests.
HTTP_LATER = (408, 429)

T = TypeVar("T")


def join(root: str, path: str) -> str:
    """A path under root, which may be a URI with options; absolute paths and URIs stay as they are."""
    if "://" in path or path.startswith("/"):
        return path
    base, options = _split_options(root)
    return f"{base.rstrip('/')}/{path}{options}"


def split(uri: str) -> tuple[str, str]:
    """A path's or URI's folder, and the name in it."""
    base, options = _split_options(uri)
    folder, _, name = base.rstrip("/").rpartition("/")
    return f"{folder}{options}", name


def locate(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and path of a local path or a URI that pyarrow knows (s3://bucket/key?region=...)."""
    base, options = _split_options(uri)
    scheme, separator, rest = base.partition("://")
    if not separator:
        return fs.LocalFileSystem(), uri
    if scheme == "file":
        return fs.LocalFileSystem(), urllib.parse.unquote(rest)
    # Object names may hold what a URI may not: only the authority and the options are parsed as one.
    authority, _, path = rest.partition("/")
    filesystem, start = _filesystem(f"{scheme}://{authority}{options}")
    return filesystem, f"{start.rstrip('/')}/{path}".rstrip("/")


def fetch_all(uris: Sequence[str], *, root: str, max_bytes: int, timeout: float) -> list[bytes | Exception]:
    """The bytes of files under root or at URIs, in order; an exception in place of what cannot be read.

    `timeout` is in seconds, for one attempt over http(s); other file systems have limits of their own.
    """

    def fetch(uri: str) -> bytes | Exception:
        try:
            return retry(lambda: _fetch(join(root, uri), max_bytes, timeout))
        except (OSError, ValueError, pa.ArrowException) as error:
            return error

    with ThreadPoolExecutor(max_workers=8) as threads:
        return list(threads.map(fetch, uris))


def retry(read: Callable[[], T]) -> T:
    """What read returns; an OSError that may pass is tried again twice."""
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            if (
                isinstance(error, urllib.error.HTTPError)
                and error.code < 500
                and error.code not in HTTP_LATER
            ):
                raise
            time.sleep(seconds)
    return read()


def reason(error: Exception) -> str:
    """An error's text on one line, cut to a length that fits into a table."""
    return " ".join(f"{error or type(error).__name__}".split())[:300]


def _fetch(uri: str, max_bytes: int, timeout: float) -> bytes:
    if uri.startswith(("http://", "https://")):
        try:
            return _fetch_http(uri, max_bytes, timeout)
        except http.client.HTTPException as error:
            raise ConnectionError(f"no valid answer ({reason(error)})") from error
    filesystem, path = locate(uri)
    with filesystem.open_input_file(path) as file:
        if file.size() > max_bytes:
            raise ValueError(f"{file.size()} bytes, more than {max_bytes}")
        return file.read()


def _fetch_http(uri: str, max_bytes: int, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    with urllib.request.urlopen(uri, timeout=timeout) as response:
        size = response.length
        data = bytearray()
        # What has come so far, bit by bit: a read of all would wait for a server that trickles.
        while len(data) != size and len(data) <= max_bytes and (part := response.read1(1 << 16)):
            data += part
            if time.monotonic() > deadline:
                raise TimeoutError(f"timed out after {len(data)} bytes")
    if len(data) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes")
    if size is not None and len(data) < size:
        raise ConnectionError(f"the connection ended after {len(data)} of {size} bytes")
    return bytes(data)


@lru_cache(maxsize=64)
def _filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(uri)


def _split_options(uri: str) -> tuple[str, str]:
    match = re.search(r"\?\w+=[^/?]*$", uri) if "://" in uri else None
    return (uri[: match.start()], match.group()) if match else (uri, "")
