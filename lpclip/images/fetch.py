"""Reading single files from local paths, http(s) and every file system that pyarrow.fs reaches."""

from __future__ import annotations

import base64
import http.client
import os
import re
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPMessage
from typing import IO, TypeVar

import pyarrow as pa

from lpclip import files
from lpclip.config import StoreAwayError, UserError
from lpclip.images.names import unescaped

RETRY_SECONDS = (0.2, 0.8)
# Servers such as Wikimedia's answer no program that hides behind its library's name.
HEADERS = {"User-Agent": "lpclip"}
# Client errors that mean "try later": request timeout and too many requests.
HTTP_LATER = (408, 429)

T = TypeVar("T")


def under(root: str, path: str) -> str:
    """A path below `root`, which may be a URI with options. Absolute paths and URIs stay as they are.

    Local names that are not UTF-8 come escaped. Lists from Windows have \\ between folders; here, it may be a part of a
    name.
    """
    place = _join(root, path)
    if "\\" not in place or "://" in place:
        return place
    named = _join(root, unescaped(path))
    if os.path.lexists(named):
        return named
    return place if os.path.lexists(place) else place.replace("\\", "/")


def _join(root: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else files.join(root, path)


def embedded(text: str) -> bytes | None:
    """The image that a text holds in base64, as data: URIs do; None when the text is a path or a URI."""
    match = re.match(r"data:image/[^,]*;base64,|(?=/9j/|iVBORw0KGgo)", text)
    if not match:
        return None
    try:
        return base64.b64decode(text[match.end() :].replace("\n", ""), validate=True)
    except ValueError:
        return None


def scheme(uri: str) -> str:
    """The scheme of a URI, `file` of a local path."""
    return uri.partition("://")[0].lower() if "://" in uri else "file"


def followed(schemes: str, *, root: str) -> tuple[str, ...]:
    """Comma-separated schemes, and root's own. Raises UserError when a name cannot be a scheme."""
    return tuple(sorted({*scheme_names(schemes), scheme(root)}))


def scheme_names(schemes: str) -> list[str]:
    """Comma-separated schemes, in lower case and sorted. Raises UserError when a name cannot be a scheme."""
    names = [name.strip().lower() for name in schemes.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*", name):
            raise UserError(
                f"--schemes {schemes}: {name!r} is no scheme; give comma-separated names, as in https,s3"
            )
    return sorted(set(names))


def refuse_scheme(uri: str, schemes: Sequence[str]) -> None:
    """Raise UserError when a URI's scheme is not among those that are followed."""
    if scheme(uri) not in schemes:
        raise UserError(f"{scheme(uri)}:// is not followed (--schemes)")


def fetch_all(
    uris: Sequence[str], *, root: str, max_bytes: int, schemes: Sequence[str], timeout: float
) -> list[bytes | Exception]:
    """The bytes of files below root or at URIs, in order; an exception stands for each file that cannot be read.

    In place of a path, an image may be there itself, in base64.

    Only URIs of these schemes are followed, even when an http server redirects to another. `timeout` is in seconds and
    limits one attempt over http(s). Raises StoreAwayError when another file system is busy or away for minutes. An http
    server that is away is a reason like any other: lists name thousands, and some are gone.
    """

    def fetch(uri: str) -> bytes | Exception:
        data = embedded(uri)
        if data is not None:
            return data
        try:
            place = under(root, uri)
            refuse_scheme(place, schemes)
            if place.startswith(("http://", "https://")):
                return _retry(lambda: _get(place, max_bytes=max_bytes, schemes=schemes, timeout=timeout))
            with files.open_input(place) as file:
                if file.size() > max_bytes:
                    raise UserError(f"{file.size()} bytes, more than {max_bytes}")
                return file.read()
        except StoreAwayError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            return error

    with ThreadPoolExecutor(max_workers=8) as threads:
        return list(threads.map(fetch, uris))


def _retry(read: Callable[[], T]) -> T:
    """Call `read` and return its result. An OSError that may be temporary leads to two more attempts."""
    for seconds in RETRY_SECONDS:
        try:
            return read()
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


def _get(uri: str, *, max_bytes: int, schemes: Sequence[str], timeout: float) -> bytes:
    try:
        return _get_once(uri, max_bytes=max_bytes, schemes=schemes, timeout=timeout)
    except http.client.HTTPException as error:
        raise ConnectionError(f"no valid answer ({reason(error)})") from error


def _quoted(uri: str) -> str:
    """A URI as servers take it: browsers show, and lists hold, blanks and letters of any language."""
    parts = urllib.parse.urlsplit(uri)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return urllib.parse.quote(parts._replace(netloc=host).geturl(), safe=string.punctuation)


def _get_once(uri: str, *, max_bytes: int, schemes: Sequence[str], timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    opener = urllib.request.build_opener(_Redirects(schemes))
    with opener.open(urllib.request.Request(_quoted(uri), headers=HEADERS), timeout=timeout) as response:
        size = response.length
        data = bytearray()
        # The answer is read piece by piece: one read of everything would wait forever for a slow server.
        while len(data) != size and len(data) <= max_bytes and (part := response.read1(1 << 16)):
            data += part
            if time.monotonic() > deadline:
                raise TimeoutError(f"timed out after {len(data)} bytes")
    if len(data) > max_bytes:
        raise UserError(f"more than {max_bytes} bytes")
    if size is not None and len(data) < size:
        raise ConnectionError(f"the connection ended after {len(data)} of {size} bytes")
    return bytes(data)
