"""The server of the review page: this machine's browser alone reaches it, and only the page itself may write."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from lpclip.config import UserError
from lpclip.report.review_page import review_page

ADDRESS = "127.0.0.1"
MOST_BYTES = 16_384
"""The longest body of a request."""
# A connection that says nothing for so long is closed.
SILENT_SECONDS = 30


class Question(NamedTuple):
    """An image to ask about, with its likely labels and their probabilities."""

    id: str
    guesses: list[tuple[str, float]]
    why: str


@dataclass(frozen=True)
class Review:
    """The contents of the page, and the function that takes an answer."""

    questions: list[Question]
    classes: tuple[str, ...]
    none: str
    """The label for an image of no class."""
    file: str
    command: str
    answers: Callable[[], dict[str, str]]
    """The labels that are there, by id."""
    take: Callable[[str, str], None]
    """Called with an id and its label."""
    image: Callable[[str], bytes | None]
    """The JPEG of an id, if there is one."""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def state(self) -> dict[str, Any]:
        """All that the page shows, as JSON has it."""
        answers = self.answers()
        return {
            "questions": [
                question._asdict() | {"answer": answers.get(question.id)} for question in self.questions
            ],
            "classes": self.classes,
            "none": self.none,
            "file": self.file,
            "command": self.command,
        }


class _RefusedError(Exception):
    """A request that is not answered, with the status and the reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ReviewServer(ThreadingHTTPServer):
    """Answers requests for one review. Raises UserError when the port is taken."""

    daemon_threads = True

    def __init__(self, review: Review, *, port: int) -> None:
        self.review = review
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise UserError(
                f"port {port} cannot be listened at ({error.strerror}): choose another one with --port, or 0 for any "
                "that is free"
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this server. A request under another name comes from a page of another site."""
        return tuple(f"{name}:{self.server_port}" for name in (ADDRESS, "localhost"))


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    timeout = SILENT_SECONDS
    server_version, sys_version = "lpclip", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, work: Callable[[], tuple[str, bytes]]) -> None:
        self._nonce = secrets.token_urlsafe(16)
        try:
            if self.headers.get("Host") not in self.server.names:
                raise _RefusedError(HTTPStatus.FORBIDDEN, "this page is for the browser of its own machine")
            self._send(HTTPStatus.OK, *work())
        except _RefusedError as refused:
            self._send(refused.status, "text/plain; charset=utf-8", f"{refused}".encode())
        except UserError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", f"{error}".encode())

    def _get(self) -> tuple[str, bytes]:
        review = self.server.review
        if self.path == "/":
            page = review_page(token=review.token, nonce=self._nonce)
            return "text/html; charset=utf-8", page.encode()
        if self.path == "/state":
            self._refuse_strangers()
            return "application/json", json.dumps(review.state()).encode()
        # An image is named by its place in the list, and by nothing else.
        images = {f"/image/{place}": question.id for place, question in enumerate(review.questions)}
        data = review.image(images[self.path]) if self.path in images else None
        if data is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
        return "image/jpeg", data

    def _post(self) -> tuple[str, bytes]:
        review = self.server.review
        if self.path != "/answer":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
        self._refuse_strangers()
        if self.headers.get("Origin") not in [f"http://{name}" for name in self.server.names]:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "only the page itself may send answers")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal() or len(length) > 9 or int(length) > MOST_BYTES:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an answer has at most {MOST_BYTES} bytes"
            )
        try:
            answer = json.loads(self.rfile.read(int(length)))
            place, label = answer["place"], answer["label"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _RefusedError(
                HTTPStatus.BAD_REQUEST, "an answer is JSON with a place and a label"
            ) from error
        if type(place) is not int or not 0 <= place < len(review.questions):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "no image has this place")
        if label not in (*review.classes, review.none):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "no class has this name")
        review.take(review.questions[place].id, label)
        return "application/json", b"{}"

    def _refuse_strangers(self) -> None:
        """Raise _RefusedError for a request that does not come from the page that this server sent."""
        token = self.headers.get("X-Token", "")
        if not secrets.compare_digest(token.encode(errors="replace"), self.server.review.token.encode()):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "this page is of an earlier lpclip review: reload it")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        own = f"'nonce-{self._nonce}'"
        rules = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src {own}; style-src {own}; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": rules,
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: the terminal is for what the user should read."""
