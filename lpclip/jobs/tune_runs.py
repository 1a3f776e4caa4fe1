"""The trials' runs in MLflow, written by a thread beside the sweep: Ray Tune's loop waits for no server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from lpclip.config import UserError
from lpclip.jobs.beside import Beside
from lpclip.jobs.tracking import Run, warn
from lpclip.training.search_space import Parameters
from lpclip.training.trials import Listener, Status, TrialRecord

SECONDS_APART = 1.0
"""A trial's rounds are sent so far apart: a server spends more on each request than a short round takes."""
OUTCOMES: dict[Status, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class TrialRuns(Listener):
    """A nested run of each trial, which is there from the trial's start on, and has each round as it comes.

    It is what `run_trials` tells of trials. Nothing is waited for before the end of the `with` block. A trial that
    MLflow takes no run of costs a warning.
    """

    def __init__(
        self,
        track: Callable[[str, Parameters], AbstractContextManager[Run]],
        *,
        results: Callable[[TrialRecord], Mapping[str, float | None]],
        tell: Callable[[TrialRecord], None],
    ) -> None:
        """`track` makes a trial's run, `results` has what its outcome is worth, and `tell` is called at its end."""
        self.runs: dict[str, Run] = {}
        self._track, self._results, self._tell = track, results, tell
        self._open: dict[str, AbstractContextManager[Run]] = {}
        self._waiting: dict[str, list[tuple[float, Mapping[str, float]]]] = {}
        self._told_at: dict[str, float] = {}
        self._beside = Beside()

    def __enter__(self) -> TrialRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._beside.close(in_error=error is not None)
        finally:
            for run in self._open.values():
                run.__exit__(kind, error, trace)

    def began(self, name: str, parameters: Parameters) -> None:
        """A trial begins, or begins again."""
        self._beside.later(self._begin, name, parameters)

    def went_on(self, name: str, metrics: Mapping[str, float]) -> None:
        """A trial has finished a round. Rounds that follow each other fast travel together."""
        now = time.time()
        self._waiting.setdefault(name, []).append((now, dict(metrics)))
        if now - self._told_at.get(name, 0) >= SECONDS_APART:
            self._told_at[name] = now
            self._beside.later(self._log, name, self._waiting.pop(name))

    def ended(self, record: TrialRecord) -> None:
        """A trial is over, now or in an earlier run of the sweep."""
        self._tell(record)
        self.keep(record)

    def keep(self, record: TrialRecord) -> None:
        """See that the run of a trial is whole, without telling of it."""
        self._beside.later(self._log, record.name, self._waiting.pop(record.name, []))
        self._beside.later(self._end, record)

    def _begin(self, name: str, parameters: Parameters) -> None:
        if name in self._open:
            return
        context = self._track(name, parameters)
        try:
            self.runs[name] = context.__enter__()
        except UserError as error:
            warn(f"MLflow has no run of trial {name}: {error}")
        else:
            self._open[name] = context

    def _log(self, name: str, rounds: Sequence[tuple[float, Mapping[str, float]]]) -> None:
        if name not in self._open:
            return
        steps = []
        for at, metrics in rounds:
            named = {f"rounds/{key}": value for key, value in metrics.items() if key != "round"}
            steps.append((int(metrics["round"]), at, named))
        self.runs[name].log_steps(steps)

    def _end(self, record: TrialRecord) -> None:
        self._begin(record.name, record.parameters)
        if record.name not in self._open:
            return
        run = self.runs[record.name]
        run.set_tags({"status": record.status, **({"error": record.error} if record.error else {})})
        self._log(record.name, [(time.time(), metrics) for metrics in record.rounds])
        run.log({"speed/seconds_total": record.seconds, **self._results(record)})
        run.outcome = OUTCOMES[record.status]
        self._open.pop(record.name).__exit__(None, None, None)
