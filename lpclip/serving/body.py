"""The body of a request: read within limits, before all of it is in memory, and taken apart into images.

This module imports neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lpclip.config import UserError, counted

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

JSON_TYPE = "application/json"
RETRY_AFTER = 2
"""Seconds after which a client that was refused for now may ask again."""
MOST_TOP_K = 999_999_999
"""More than any probe has classes. Without a limit a number might be too large for a tensor's size."""


class Refused(Exception):  # noqa: N818 - it is an answer
    """A request that has no labels for an answer: an HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Gone(Exception):  # noqa: N818
    """The client went away before its request was complete: nobody waits for an answer."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request that was read: its images, and how many labels it asks for.

    In place of an image that is not base64, there is the reason.
    """

    images: list[bytes | UserError]
    top_k: int | None
    is_list: bool
    """Whether the answer is a list, as the question was."""


class Body:
    """The messages of a request's body, and whether all of them are there."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self.is_complete = receive, False

    async def __call__(self) -> bytes:
        """The next bytes. Raises Gone when the client leaves."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Gone
        self.is_complete = not message.get("more_body", False)
        found: bytes = message.get("body", b"")
        return found


class Held:
    """Bytes of all bodies that are in memory at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.now = most, 0

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """A body for the length of the block. The function adds bytes to it, or raises Refused."""
        mine = 0

        def add(count: int) -> None:
            nonlocal mine
            if self.now + count > self.most:
                raise Refused(503, "the server is busy with other requests: ask again later")
            self.now += count
            mine += count

        try:
            yield add
        finally:
            self.now -= mine


def kind_of(headers: dict[str, str]) -> str:
    """The type of a body, raises Refused when it is neither an image nor JSON."""
    kind = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind in (JSON_TYPE, "application/octet-stream") or kind.startswith("image/"):
        return kind
    raise Refused(
        415,
        f"the body is of type {kind}: send the bytes of an image with Content-Type image/jpeg, image/png or "
        f"application/octet-stream, or several images as {JSON_TYPE}",
    )


async def read_body(
    body: Body, headers: dict[str, str], *, max_bytes: int, seconds: float, add: Callable[[int], None]
) -> bytes:
    """The bytes of a body. `add` is told of them before they are kept.

    Raises Refused when it is too large, comes too slowly or is empty, and Gone when the client leaves.
    """
    too_large = Refused(413, f"the body has more than {max_bytes:,} bytes, the most that this server takes")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large
    chunks, size, ends = [], 0, time.monotonic() + seconds
    while not body.is_complete:
        try:
            chunk = await asyncio.wait_for(body(), ends - time.monotonic())
        except TimeoutError:
            raise Refused(408, f"the body was not complete after {seconds:g} seconds") from None
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        add(len(chunk))
        chunks.append(chunk)
    if not size:
        raise Refused(400, "the body is empty: send the bytes of an image")
    return b"".join(chunks)


def images_of_json(body: bytes, *, max_images: int) -> Request:
    """The images of `{"images": [BASE64, ...], "top_k": K}`. Raises Refused when it is no such thing."""
    told = _json(body)
    if not isinstance(told, dict) or not isinstance(told.get("images"), list):
        raise Refused(400, 'the JSON must be {"images": [BASE64, ...]}, with "top_k" if you like')
    if others := told.keys() - {"images", "top_k"}:
        # A name that is ignored would be taken for one that works.
        raise Refused(400, f"the JSON has {sorted(others)[0][:40]!r}, and only images and top_k are known")
    if not 0 < len(told["images"]) <= max_images:
        found = counted(len(told["images"]), "image")
        raise Refused(400, f"the JSON has {found}: send at least one and at most {max_images}")
    return Request(
        images=[_image(text) for text in told["images"]], top_k=_top_k(told.get("top_k")), is_list=True
    )


def top_k_of_query(query: str, *, kind: str) -> int | None:
    """How many labels `?top_k=K` asks for. Raises Refused for another query, and for any with a body of JSON."""
    if not query:
        return None
    if kind == JSON_TYPE:
        raise Refused(400, 'a body of JSON has "top_k" in the JSON: send it without a query')
    name, _, value = query.partition("=")
    if name != "top_k" or "&" in value:
        raise Refused(400, "the only query that is known is ?top_k= with a number")
    is_number = value.isascii() and value.isdecimal() and len(value) <= len(str(MOST_TOP_K))
    return _top_k(int(value) if is_number else value)


def _top_k(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_TOP_K):
        return value
    raise Refused(400, f"top_k must be a whole number from 1 to {MOST_TOP_K:,}")


def _json(body: bytes) -> Any:
    """What a body of JSON says. Raises Refused in words of our own: Python's are for its programmers."""
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        why = f"the body is not JSON: see line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        why = f"the body is not JSON: its text is not {error.encoding.upper()} at byte {error.start + 1}"
    except ValueError:
        why = "the JSON has a number with too many digits"
    except RecursionError:
        why = "the JSON is nested too deeply"
    raise Refused(400, why)


def _image(text: Any) -> bytes | UserError:
    if not isinstance(text, str):
        return UserError("not a text: images are sent as base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        # A path or a URI is refused here: following it would let any client read what this server can read.
        return UserError("not base64: send the bytes of the image; paths and URIs are not followed")
