"""The HTTP side of a served probe, in the processes of Ray Serve's proxy.

It reads bodies within their limits, so that a replica gets complete requests only, and never waits for a client. It
sends images of many requests to a replica in one call, and gives an answer where a replica died. It does not import
torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.middleware import Middleware

from lpclip.config import UserError
from lpclip.serving.batches import Batches, JsonAnswer
from lpclip.serving.body import (
    JSON_TYPE,
    RETRY_AFTER,
    Body,
    Gone,
    Held,
    Message,
    Receive,
    Refused,
    Request,
    images_of_json,
    kind_of,
    read_body,
    top_k_of_query,
)
from lpclip.serving.openapi import description

APPLICATION = DEPLOYMENT = "lpclip"

ANSWER_SECONDS = 60
"""How long a complete request waits for its answer, such as while a new replica loads the encoder."""
FACTS_SECONDS = 5
LINGER_SECONDS = 5
"""How long bytes of a refused body are still taken, and dropped: many clients read no answer before all is sent."""
HELD_BODIES = 16
"""Bodies of the largest size that are in memory at a time."""

OF_RAY = ("/-/healthz", "/-/routes")
"""Paths that Ray Serve answers itself: what runs a cluster asks there whether a proxy is well."""
METHODS = {
    "/classify": ("POST",),
    "/": ("GET", "HEAD"),
    "/health": ("GET", "HEAD"),
    "/openapi.json": ("GET", "HEAD"),
}

Send = Callable[[Message], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is served, and its limits."""

    encoder: str
    precision: str
    engine: str
    classes: tuple[str, ...]
    probe: str | None
    """Digest of the probe, as in its probe.json; probes of early versions have none."""
    notes: tuple[str, ...]
    top_k: int
    batch_size: int
    max_bytes: int
    max_pixels: int
    max_images: int
    max_waiting: int
    body_timeout: float
    replicas: int


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxy begins with: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this function."""
    return [Middleware(Door)]


class Door:
    """An ASGI application around Ray Serve's own, to which it leaves the paths `OF_RAY`."""

    def __init__(self, app: App) -> None:
        self._serve = app
        self._handle: DeploymentHandle | None = None
        self._facts: Facts | None = None
        self._parsing = asyncio.Lock()  # JSON takes several times its size

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "websocket":
            # Before it is accepted: the client gets status 403.
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http" or scope["path"] in OF_RAY:
            await self._serve(scope, receive, send)
            return
        body = Body(receive)
        try:
            status, told = 200, await self._answer(scope, body)
        except Gone:
            return
        except Refused as refused:
            status, told = refused.status, {"error": refused.sentence}
        except Exception:
            log.exception("a request failed")
            status, told = 500, {"error": "this is a fault of the server: its log says more"}
        allow = METHODS[scope["path"]] if status == 405 else ()
        await _tell(status, told, allow=allow, body=body, send=send)

    async def _answer(self, scope: dict[str, Any], body: Body) -> Any:
        """What is told in JSON. Raises Refused."""
        method, path = scope["method"], scope["path"]
        if path not in METHODS:
            raise Refused(404, f"there is nothing at this path: the paths are {', '.join(METHODS)}")
        if method not in METHODS[path]:
            raise Refused(405, f"{path} takes {' and '.join(METHODS[path])} alone")
        if path == "/classify":
            return await self._classify(scope, body)
        if path == "/openapi.json":
            return description()
        facts = await self._ask()
        return {"status": "ok"} if path == "/health" else asdict(facts)

    async def _classify(self, scope: dict[str, Any], body: Body) -> Any:
        facts = self._facts or await self._ask()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        kind = kind_of(headers)
        asked = top_k_of_query(scope["query_string"].decode("latin-1"), kind=kind)
        with self._held.body() as add:
            data = await read_body(
                body, headers, max_bytes=facts.max_bytes, seconds=facts.body_timeout, add=add
            )
            if kind == JSON_TYPE:
                async with self._parsing:
                    request = await asyncio.to_thread(images_of_json, data, max_images=facts.max_images)
            else:
                request = Request(images=[data], top_k=asked, is_list=False)
            del data
            return await self._answers(request, top_k=request.top_k or facts.top_k)

    async def _answers(self, request: Request, *, top_k: int) -> list[JsonAnswer] | JsonAnswer:
        found = await self._batches.answers(request.images, top_k=top_k, seconds=ANSWER_SECONDS)
        if request.is_list:
            return found
        (answer,) = found
        if "error" in answer:
            raise Refused(422, answer["error"])
        return answer

    async def _ask(self) -> Facts:
        """The facts, from a replica, which shows that there is one."""
        try:
            if self._handle is None:
                # In a thread: it asks Ray Serve's controller, and waits.
                self._handle = await asyncio.to_thread(serve.get_deployment_handle, DEPLOYMENT, APPLICATION)
            async with asyncio.timeout(FACTS_SECONDS):
                facts = Facts(**await self._handle.facts.remote())
        except TimeoutError:
            raise Refused(503, "no replica answers yet: ask again later") from None
        except Exception as error:
            raise _refusal(error) or error from error
        if facts != self._facts:
            self._facts, self._held = facts, Held(HELD_BODIES * facts.max_bytes)
            self._batches = Batches(
                self._call, size=facts.batch_size, replicas=facts.replicas, max_waiting=facts.max_waiting
            )
        return facts

    async def _call(self, images: list[bytes | UserError], top_k: list[int]) -> list[JsonAnswer]:
        assert self._handle is not None
        try:
            return await self._handle.classify.remote(images, top_k)
        except Exception as error:
            raise _refusal(error) or error from error


def _refusal(error: Exception) -> Refused | None:
    """What is told where a replica is not there, or not any more."""
    if isinstance(error, RayActorError):
        return Refused(503, "the replica that had this request ended: ask again")
    if isinstance(error, BackPressureError | DeploymentUnavailableError | RayServeException):
        return Refused(503, "no replica answers yet: ask again later")
    return None


async def _tell(status: int, told: Any, *, allow: tuple[str, ...], body: Body, send: Send) -> None:
    """Send an answer in JSON. When the body was refused before its end, the connection ends with it."""
    text = json.dumps(told, ensure_ascii=False).encode()
    headers = [(b"content-type", JSON_TYPE.encode()), (b"content-length", str(len(text)).encode())]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER).encode()))
    if allow:
        headers.append((b"allow", ", ".join(allow).encode()))
    is_cut = status != 200 and not body.is_complete
    if is_cut:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text, "more_body": is_cut})
    if is_cut:
        with contextlib.suppress(Gone, TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not body.is_complete:
                    await body()
        await send({"type": "http.response.body", "body": b""})
