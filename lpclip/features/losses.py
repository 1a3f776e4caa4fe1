"""Encoders, processes and machines that a pipeline loses: when it goes on, and when that would not help."""

from __future__ import annotations

import ray
from ray.data.exceptions import ExecutionTimeoutError

from lpclip.config import UserError

# The work ends after so many losses with no unit finished in between, and so often a process may die over one unit.
MAX_LOSSES = 3
LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ExecutionTimeoutError,
)


class Losses:
    """The losses in a row: those since the last unit was finished. A machine that goes with notice is none of them."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def forget(self) -> None:
        """Begin a new row: a unit was finished. Parts of a unit do not count, they are made again with it."""
        self._in_a_row = 0

    def go_on_after(self, error: BaseException, *, lost_node: bool) -> str:
        """Count one of the LOSSES. Returns a line that names it.

        `lost_node` says whether the cluster lost a node while the pipeline ran. Raises UserError when going on would
        not help: after the third loss in a row, and when images bring their own process down.
        """
        if isinstance(error, ray.exceptions.RayActorError) and error.preempted:
            return "the machine of an encoder was taken away with notice, going on"
        kept = f"the last time with: {str(error).splitlines()[0]}; what is encoded is kept, the same command goes on"
        if isinstance(error, ray.exceptions.WorkerCrashedError) and not lost_node:
            raise UserError(
                f"a process that reads and decodes images died {MAX_LOSSES} times over the same ones, {kept}; a file "
                "that brings its decoder down must be taken out, and memory that is short wants fewer CPUs"
            ) from error
        self._in_a_row += 1
        if self._in_a_row < MAX_LOSSES:
            return f"{_lost(error)}, going on ({self._in_a_row} of {MAX_LOSSES - 1} times in a row)"
        if isinstance(error, ExecutionTimeoutError):
            raise UserError(
                f"the work stood still {MAX_LOSSES} times in a row, {kept}; where web servers do not answer, give a "
                "smaller --read-timeout"
            ) from error
        raise UserError(
            f"{_what(error)} died {MAX_LOSSES} times in a row, {kept}; a smaller --batch-size needs less memory"
        ) from error


def _lost(error: BaseException) -> str:
    return "the work stood still" if isinstance(error, ExecutionTimeoutError) else f"{_what(error)} was lost"


def _what(error: BaseException) -> str:
    return "an encoder" if isinstance(error, ray.exceptions.RayActorError) else "a machine or its memory"
