"""Images of many requests go to a replica together.

A batch goes as soon as a replica has room for it, with all that wait: the more there is to do, the larger the batches.
This module imports neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lpclip.config import UserError
from lpclip.serving.body import Refused

JsonAnswer = dict[str, Any]
"""The answer for an image, as a JSON object."""

IN_WORK = 2
"""Batches that a replica has at a time: it decodes one while it encodes the other. More of them are smaller, and leave
processors of a large encoder idle."""
GATHER = 0.002
"""Seconds that a batch waits for more images while another one is in work."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Waiting:
    """An image that waits for its answer."""

    image: bytes | UserError
    top_k: int
    answer: asyncio.Future[JsonAnswer]


class Batches:
    """The images that wait, and the batches that are in work."""

    def __init__(
        self,
        send: Callable[[list[bytes | UserError], list[int]], Awaitable[list[JsonAnswer]]],
        *,
        size: int,
        replicas: int,
        max_waiting: int,
    ) -> None:
        self._send, self._size, self._most, self._max_waiting = send, size, IN_WORK * replicas, max_waiting
        self._waiting: deque[Waiting] = deque()
        self._in_work: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def answers(
        self, images: Sequence[bytes | UserError], *, top_k: int, seconds: float
    ) -> list[JsonAnswer]:
        """The answers for the images of a request, in their order. Raises Refused when it is not the time for them."""
        if len(self._waiting) + len(images) > self._max_waiting:
            raise Refused(503, f"{len(self._waiting)} images wait already: ask again later")
        loop = asyncio.get_running_loop()
        mine = [Waiting(image=image, top_k=top_k, answer=loop.create_future()) for image in images]
        self._waiting.extend(mine)
        self._begin(is_late=not self._in_work)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.gather(*(one.answer for one in mine))
        except TimeoutError:
            raise Refused(503, f"there was no answer for {seconds:g} seconds: ask again later") from None
        finally:
            # Nothing of a request that was answered waits on.
            if not all(one.answer.done() for one in mine):
                for one in mine:
                    one.answer.cancel()
                self._waiting = deque(one for one in self._waiting if not one.answer.done())

    def _begin(self, *, is_late: bool = False) -> None:
        """Send what waits where there is room; while another batch is in work, a small one a little later."""
        while self._waiting and len(self._in_work) < self._most:
            if not is_late and len(self._waiting) < self._size:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(GATHER, self._late)
                return
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            batch = [one for one in batch if not one.answer.done()]
            if batch:
                task = asyncio.create_task(self._run(batch))
                self._in_work.add(task)
                task.add_done_callback(self._ended)

    def _late(self) -> None:
        self._timer = None
        self._begin(is_late=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._in_work.discard(task)
        self._begin(is_late=not self._in_work)

    async def _run(self, batch: list[Waiting]) -> None:
        try:
            found = await self._send([one.image for one in batch], [one.top_k for one in batch])
        except Exception as error:
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        for one, answer in zip(batch, found, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)
