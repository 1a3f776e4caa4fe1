"""A pipeline that stands still: a line says which stage waits, and for what."""

from __future__ import annotations

import re
import sys
import time
import weakref
from dataclasses import dataclass
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.no_progress_guard import NoProgressGuard
from ray.data.exceptions import ExecutionTimeoutError

WORDS = {"decode_unit": "decoding", "EncodeStage": "encoding", "commit": "committing"}


@dataclass(frozen=True, kw_only=True)
class StallLimits:
    """How long a pipeline may stand still. All in seconds."""

    tell: float = 60.0
    """Nothing was committed for so long: a line tells of it."""
    again: float = 240.0
    """The next line comes so much later."""
    lose: float = 600.0
    """No table moved from one stage to the next for so long: the pipeline counts as lost."""


LIMITS = StallLimits()
# A large encoder may compute on a CPU for an hour before its table of images goes on.
CPU_LIMITS = StallLimits(lose=7200)


class StallWatch:
    """Tells on stderr of a pipeline that commits nothing. While it does, this costs two looks at the clock."""

    def __init__(self, what: str, limits: StallLimits) -> None:
        self._what, self._limits = what, limits
        self._moved = time.monotonic()
        self._has_begun = False
        self._longest = 0.0
        self._told = -float("inf")

    def moved(self) -> None:
        """Something was committed."""
        now = time.monotonic()
        if (
            self._has_begun
        ):  # what comes before the first commit are processes that start and models that load
            self._longest = max(self._longest, now - self._moved)
        self._has_begun, self._moved = True, now

    def look(self) -> None:
        """Tell of a stall, if there is one. A slow pipeline has none: its commits came as slowly before."""
        now = time.monotonic()
        still = now - self._moved
        if still >= max(self._limits.tell, 3 * self._longest) and now - self._told >= self._limits.again:
            self._told = now
            print(f"{self._what}: nothing for {still:.0f} s; {_state()}", file=sys.stderr, flush=True)


_executor: Any = lambda: None  # noqa: E731


class SeeExecutor(ExecutionCallback):
    """Lets `StallWatch` see the stages of the pipeline that this process began last, and ends one that is lost."""

    def __init__(self, limits: StallLimits) -> None:
        self._limits = limits

    def before_execution_starts(self, executor: Any) -> None:
        """Called by Ray Data."""
        global _executor
        _executor = weakref.ref(executor)
        self._guard = NoProgressGuard(executor._topology, self._limits.lose)

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data. Raises RayActorError or ExecutionTimeoutError where the pipeline would wait forever.

        Ray Data learns of a dead actor by the task that it was running. One that died between two tasks is neither
        used nor replaced (ray-project/ray, issue 62746).
        """
        for op in executor._topology:
            for actor, state in getattr(getattr(op, "_actor_pool", None), "_running_actors", {}).items():
                if actor._get_local_state() == ActorTableData.DEAD and not state.num_tasks_in_flight:
                    ray.get(actor.__ray_ready__.remote())
        try:
            self._guard.check()
        except ExecutionTimeoutError:
            # Ray Data's own guard asks tasks to end. One that stands still would not hear that, and keep its CPU.
            for op in executor._topology:
                for task in op.get_active_tasks():
                    task._cancel(force=True)
            raise


def seconds_at_work() -> dict[str, float]:
    """Seconds that all processes of a stage have spent on its tables so far, by stage, in the pipeline seen last."""
    topology = getattr(_executor(), "_topology", {})
    return {_words(op): op.metrics.block_generation_time for op in list(topology)[1:]}


def _words(op: Any) -> str:
    functions = re.findall(r"\((\w+)\)", op.name) or [op.name]
    return " and ".join(WORDS.get(function, function) for function in functions)


def _state() -> str:
    """The stages that are not at their end, and the share of the cluster that is free."""
    # Ray Data has no public way to see a running pipeline. Without this one, the line still tells what is free.
    topology = getattr(_executor(), "_topology", {})
    stages = [_stage(op, state) for op, state in list(topology.items())[1:] if not op.has_completed()]
    there, free = ray.cluster_resources(), ray.available_resources()
    shares = [f"{free.get(name, 0):.3g} of {there.get(name, 0):g} {name}s" for name in ("GPU", "CPU")]
    return "; ".join([*stages, f"free are {' and '.join(shares)}"])


def _stage(op: Any, state: Any) -> str:
    text = (
        f"{_words(op)} has {op.num_active_tasks()} running and {state.total_enqueued_input_blocks()} waiting"
    )
    pending = op.get_actor_info().pending if hasattr(op, "get_actor_info") else 0
    if not pending:
        return text
    need = "a GPU" if op.min_scheduling_resources().gpu else "a CPU"
    whose = (
        "1 of its actors loads its model or waits"
        if pending == 1
        else f"{pending} of its actors load or wait"
    )
    return f"{text}, and {whose} for {need}"
