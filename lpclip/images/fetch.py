"""Reading single files from local paths, http(s) and every file system that pyarrow.fs reaches."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import socket
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.client import HTTPMessage
from typing import IO, Any, TypeVar

import pyarrow as pa

from lpclip import files
from lpclip.config import StoreAwayError, UserError
from lpclip.credentials import redact
from lpclip.images.names import unescaped

RETRY_SECONDS = (0.2, 0.8)
# Files that one process fetches at a time, and holds until they are taken.
FETCHERS = 8
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
    match = re.match(r"data:image/[^,]*;base64,|(?=/9j/|iVBORw0KGgo|UklGR|R0lGOD)", text)
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
) -> Iterator[bytes | Exception]:
    """The bytes of files below root or at URIs, in order; an exception stands for each file that cannot be read.

    In place of a path, an image may be there itself, in base64. At most FETCHERS files are in memory ahead.

    Only URIs of these schemes are followed, even when an http server redirects to another. `timeout` is in seconds and
    limits one attempt over http(s). Raises StoreAwayError when another file system is busy or away for minutes. An http
    server that is away is a reason like any other: lists name thousands, and some are gone.
    """

    def fetch(uri: str) -> bytes | Exception:
        data = embedded(uri)
        if data is not None:
            return data
        if not uri.strip():
            return ValueError("no path in this row")
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

    return files.ahead(fetch, uris, threads=FETCHERS)


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
    """An error's text on one line, without secrets, cut to a length that fits into a table."""
    return redact(" ".join(f"{error or type(error).__name__}".split()))[:300]


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
    if "@" in parts.netloc:
        raise UserError("a URI with a user name or password, which is sent to no server")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return urllib.parse.quote(parts._replace(netloc=host).geturl(), safe=string.punctuation)


class _Deadline:
    """Ends the connections of one request after some seconds: a server that sends a little now and then never would."""

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)

    def _end(self) -> None:
        self.is_over = True
        for item in self._sockets:
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def connection(self, kind: type[http.client.HTTPConnection], *args: Any, **kwargs: Any) -> Any:
        """A connection of this kind, as http.client makes it, that the deadline ends."""
        made = kind(*args, **kwargs)
        connect = made.connect

        def watched() -> None:
            connect()
            self._sockets.append(made.sock)
            if self.is_over:
                self._end()

        made.connect = watched  # type: ignore[method-assign]
        return made


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._connection = partial(deadline.connection, http.client.HTTPConnection)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._connection = partial(deadline.connection, http.client.HTTPSConnection)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


def _get_once(uri: str, *, max_bytes: int, schemes: Sequence[str], timeout: float) -> bytes:
    request = urllib.request.Request(_quoted(uri), headers=HEADERS)
    data = bytearray()
    with _Deadline(timeout) as deadline:
        opener = urllib.request.build_opener(_Redirects(schemes), _Http(deadline), _Https(deadline))
        try:
            with opener.open(request, timeout=timeout) as response:
                size = response.length
                while len(data) != size and len(data) <= max_bytes and (part := response.read1(1 << 16)):
                    data += part
        except (OSError, http.client.HTTPException) as error:
            if not deadline.is_over:
                raise
            raise TimeoutError(f"timed out after {len(data)} bytes") from error
        if deadline.is_over:
            raise TimeoutError(f"timed out after {len(data)} bytes")
    if len(data) > max_bytes:
        raise UserError(f"more than {max_bytes} bytes")
    if size is not None and len(data) < size:
        raise ConnectionError(f"the connection ended after {len(data)} of {size} bytes")
    return bytes(data)
