"""Reading single files, wherever they lie: local paths, http(s), and whatever pyarrow.fs reaches."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPMessage
from typing import IO, TypeVar

import pyarrow as pa

from lpclip import files

RETRY_SECONDS = (0.2, 0.8)
HTTP_TIMEOUT_SECONDS = 30

T = TypeVar("T")


def join(root: str, path: str) -> str:
    """A path under root, which may be a URI with options; absolute paths and URIs stay as they are."""
    return path if "://" in path or path.startswith("/") else files.join(root, path)


def scheme(uri: str) -> str:
    """The scheme of a URI, `file` of a local path."""
    return uri.partition("://")[0].lower() if "://" in uri else "file"


def followed(schemes: str, *, root: str) -> tuple[str, ...]:
    """The schemes that are named by comma, and root's own. Raises ValueError when one is no scheme's name."""
    return tuple(sorted({*scheme_names(schemes), scheme(root)}))


def scheme_names(schemes: str) -> list[str]:
    """Names by comma, in lower case and sorted. Raises ValueError when one is no scheme's name."""
    names = [name.strip().lower() for name in schemes.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*", name):
            raise ValueError(f"--schemes {schemes}: {name!r} is no scheme; it takes names, as in https,s3")
    return sorted(set(names))


def refuse_scheme(uri: str, schemes: Sequence[str]) -> None:
    """ValueError when a URI's scheme is not among those that are followed."""
    if scheme(uri) not in schemes:
        raise ValueError(f"{scheme(uri)}:// is not followed (--schemes)")


def fetch_all(
    uris: Sequence[str], *, root: str, max_bytes: int, schemes: Sequence[str]
) -> list[bytes | Exception]:
    """The bytes of files under root or at URIs, in order; an exception in place of what cannot be read.

    Only URIs of these schemes are followed, also when an http server redirects to others.
    """

    def fetch(uri: str) -> bytes | Exception:
        try:
            place = join(root, uri)
            refuse_scheme(place, schemes)
            return retry(lambda: _fetch(place, max_bytes, schemes))
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
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise
            time.sleep(seconds)
    return read()


def reason(error: Exception) -> str:
    """An error's text on one line, cut to a length that fits into a table."""
    return " ".join(f"{error or type(error).__name__}".split())[:300]


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, schemes: Sequence[str]) -> None:
        self.schemes = schemes

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        refuse_scheme(newurl, self.schemes)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(uri: str, max_bytes: int, schemes: Sequence[str]) -> bytes:
    if uri.startswith(("http://", "https://")):
        opener = urllib.request.build_opener(_Redirects(schemes))
        with opener.open(uri, timeout=HTTP_TIMEOUT_SECONDS) as response:
            data = response.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"more than {max_bytes} bytes")
        return data
    filesystem, path = files.locate(uri)
    with filesystem.open_input_file(path) as file:
        if file.size() > max_bytes:
            raise ValueError(f"{file.size()} bytes, more than {max_bytes}")
        return file.read()
