"""Work that a job must not wait for: MLflow's import, its database, a slow server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from lpclip.config import UserError
from lpclip.features.pulse import Pulse
from lpclip.features.stored_views import Encoded
from lpclip.jobs.tracking import Run, warn


class Beside:
    """One thread that works off calls in their order. Their errors are raised by `close`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._work: list[Future[None]] = []

    def later(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call the function when all calls before it are done."""
        self._work.append(self._thread.submit(function, *arguments))

    def close(self, *, in_error: bool) -> None:
        """Wait for all calls; after an error, for the one that runs now."""
        self._thread.shutdown(cancel_futures=in_error)
        if not in_error:
            for work in self._work:
                work.result()


def encoding_metrics(encoded: Encoded, timings: Mapping[str, float]) -> dict[str, float | None]:
    """The single numbers of an encoding, by which MLflow compares runs."""
    return {
        "data/images": encoded.store.manifest.num_rows,
        "data/quarantined": encoded.store.manifest.num_quarantined,
        "speed/images_per_second": encoded.rate,
        "speed/seconds_encode": timings["encode"],
        "speed/seconds_total": sum(timings.values()),
    }


class EncodingRun:
    """The MLflow run of a job that only encodes or labels, written beside it. A line tells where MLflow takes none."""

    def __init__(self, track: Callable[[], AbstractContextManager[Run]]) -> None:
        """`track` makes the run."""
        self._track = track
        self._context: AbstractContextManager[Run] | None = None
        self._run: Run | None = None
        self._beside = Beside()

    def __enter__(self) -> EncodingRun:
        self._beside.later(self._begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beside.close(in_error=error is not None)
        if self._context is not None:
            self._context.__exit__(kind, error, trace)

    def tell(self, pulse: Pulse) -> None:
        """Log what the pipeline does, by the number of images that are done."""
        numbers = {
            "encoding/images_per_second": pulse.images_per_second,
            "encoding/quarantined": float(pulse.quarantined),
            **{f"encoding/processes_{stage}": count for stage, count in pulse.at_work.items()},
        }
        self._beside.later(self._log, numbers, pulse.images, time.time())

    def end(self, metrics: dict[str, float | None]) -> Run | None:
        """Log the single numbers of the job. Returns the run, None where MLflow took none."""
        self._beside.later(self._log, metrics, 0, time.time())
        self._beside.close(in_error=False)
        return self._run

    def _begin(self) -> None:
        context = self._track()
        try:
            self._run = context.__enter__()
        except UserError as error:
            warn(f"this run is not in MLflow: {error}")
        else:
            self._context = context

    def _log(self, metrics: dict[str, float | None], step: int, at: float) -> None:
        if self._run is not None:
            self._run.log(metrics, step=step, at=at)
