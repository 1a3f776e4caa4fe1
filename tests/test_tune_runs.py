"""The runs of trials in MLflow: there while a trial runs, with real times, and at its end with its outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from lpclip.config import TrackingConfig
from lpclip.jobs import tracking
from lpclip.jobs.tune_runs import OUTCOMES, TrialRuns
from lpclip.training.search_space import Parameters
from lpclip.training.trials import Status, TrialRecord


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    found = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found)
    return found


def record(name: str, status: Status, rounds: int) -> TrialRecord:
    error = "its process died" if status == "failed" else None
    metrics = [{"round": float(n), "coverage": 0.1 * n} for n in range(1, rounds + 1)]
    return TrialRecord(
        name=name, parameters={"threshold": 0.5}, status=status, rounds=metrics, seconds=2.5, error=error
    )


def eventually(look: Callable[[], bool]) -> bool:
    """Wait until it is so, for ten seconds at most."""
    end = time.monotonic() + 10
    while not look() and time.monotonic() < end:
        time.sleep(0.05)
    return look()


class Sweep:
    """A parent run and the runs of its trials."""

    def __init__(self, uri: str, parent: tracking.Run) -> None:
        self.client, self.parent = MlflowClient(uri), parent
        self.told: list[str] = []
        self.delay = 0.0

    def track(self, name: str, parameters: Parameters) -> AbstractContextManager[tracking.Run]:
        time.sleep(self.delay)
        return tracking.track(
            TrackingConfig(), name=name, params=dict(parameters), resume_key=name, parent=self.parent
        )

    def runs(self) -> TrialRuns:
        return TrialRuns(
            self.track,
            results=lambda record: {"test/accuracy": 0.75} if record.status == "finished" else {},
            tell=lambda record: self.told.append(record.name),
        )

    def found(self, runs: TrialRuns, name: str) -> MlflowRun:
        return self.client.get_run(runs.runs[name].run_id)


def test_a_run_is_there_while_its_trial_runs_and_ends_with_its_outcome(uri: str) -> None:
    with tracking.track(TrackingConfig(), name="sweep", params={}) as parent:
        sweep = Sweep(uri, parent)
        with sweep.runs() as runs:
            begin = time.time()
            runs.began("a", {"threshold": 0.5})
            runs.went_on("a", {"round": 1.0, "coverage": 0.1})
            assert eventually(lambda: "a" in runs.runs)
            assert eventually(lambda: "rounds/coverage" in sweep.found(runs, "a").data.metrics)
            assert sweep.found(runs, "a").info.status == "RUNNING"
            time.sleep(1.2)
            runs.went_on("a", {"round": 2.0, "coverage": 0.2})
            runs.began("a", {"threshold": 0.5})  # its process died, and another one begins
            runs.went_on("a", {"round": 1.0, "coverage": 0.1})
            runs.ended(record("a", "finished", 2))
            runs.ended(record("b", "stopped", 1))
            runs.ended(record("c", "failed", 0))
            runs.keep(record("d", "finished", 1))
        history = sweep.client.get_metric_history(runs.runs["a"].run_id, "rounds/coverage")
        assert [(entry.step, entry.value) for entry in history] == [(1, 0.1), (2, 0.2)]
        assert history[1].timestamp - history[0].timestamp > 1000
        assert abs(history[0].timestamp / 1000 - begin) < 5
        assert sweep.told == ["a", "b", "c"]
        for name, status in (("a", "finished"), ("b", "stopped"), ("c", "failed"), ("d", "finished")):
            found = sweep.found(runs, name)
            assert found.info.status == OUTCOMES[status]
            assert found.data.tags["status"] == status
            assert found.data.metrics["speed/seconds_total"] == 2.5
            assert found.data.params["threshold"] == "0.5"
            assert found.data.tags["mlflow.parentRunId"] == parent.run_id
        assert sweep.found(runs, "a").data.metrics["test/accuracy"] == 0.75
        assert "test/accuracy" not in sweep.found(runs, "b").data.metrics
        assert sweep.found(runs, "c").data.tags["error"] == "its process died"


def test_rounds_that_follow_each_other_fast_travel_together(uri: str) -> None:
    with tracking.track(TrackingConfig(), name="sweep", params={}) as parent:
        sweep = Sweep(uri, parent)
        with sweep.runs() as runs:
            runs.began("a", {"threshold": 0.5})
            assert eventually(lambda: "a" in runs.runs)
            sent = []
            client = runs.runs["a"]._client
            log_batch = client.log_batch
            runs.runs["a"]._client.log_batch = lambda run, **batch: (
                sent.append(batch),
                log_batch(run, **batch),
            )
            for number in (1, 2, 2, 3, 4, 5):
                runs.went_on("a", {"round": float(number), "coverage": number / 10})
            runs.ended(record("a", "finished", 6))
        history = sweep.client.get_metric_history(runs.runs["a"].run_id, "rounds/coverage")
        assert [entry.step for entry in history] == [1, 2, 3, 4, 5, 6]
        assert [len(batch["metrics"]) for batch in sent if "metrics" in batch][:2] == [1, 4]


def test_the_sweep_does_not_wait_for_a_slow_server(uri: str) -> None:
    with tracking.track(TrackingConfig(), name="sweep", params={}) as parent:
        sweep = Sweep(uri, parent)
        sweep.delay = 0.5
        with sweep.runs() as runs:
            begin = time.monotonic()
            for name in "abcd":
                runs.began(name, {})
                runs.went_on(name, {"round": 1.0, "coverage": 0.5})
                runs.ended(record(name, "finished", 1))
            assert time.monotonic() - begin < 0.4
        assert {sweep.found(runs, name).info.status for name in "abcd"} == {"FINISHED"}


def test_an_interrupted_sweep_ends_the_runs_that_are_open(uri: str) -> None:
    with tracking.track(TrackingConfig(), name="sweep", params={}) as parent:
        sweep = Sweep(uri, parent)
        with pytest.raises(KeyboardInterrupt), sweep.runs() as runs:
            runs.began("a", {})
            runs.ended(record("b", "finished", 1))
            assert eventually(
                lambda: sweep.found(runs, "b").info.status == "FINISHED" if "b" in runs.runs else False
            )
            raise KeyboardInterrupt
        assert sweep.found(runs, "a").info.status == "KILLED"
        with sweep.runs() as again:
            again.ended(record("a", "finished", 1))
        assert again.runs["a"].run_id == runs.runs["a"].run_id, "the run goes on"
        assert sweep.found(again, "a").info.status == "FINISHED"
        assert sweep.found(again, "a").info.end_time > sweep.found(runs, "b").info.end_time


def test_a_resumed_sweep_leaves_the_times_of_ended_trials_alone(uri: str) -> None:
    with tracking.track(TrackingConfig(), name="sweep", params={}) as parent:
        sweep = Sweep(uri, parent)
        records = [record("a", "finished", 2), record("b", "stopped", 1), record("c", "failed", 0)]
        found = []
        for _ in range(2):
            with sweep.runs() as runs:
                for one in records:
                    runs.ended(one)
            infos = [sweep.found(runs, name).info for name in "abc"]
            found.append([(info.status, info.start_time, info.end_time) for info in infos])
            time.sleep(0.01)
        assert found[0] == found[1]


def test_a_trial_of_which_mlflow_takes_no_run_costs_a_warning(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking.track(TrackingConfig(), name="sweep", params={}) as parent:
        sweep = Sweep(uri, parent)
        with sweep.runs() as runs:
            runs.ended(record("a", "finished", 1))
            assert eventually(lambda: "a" in runs.runs)
            parent.uri = "http://127.0.0.1:9"
            runs.ended(record("b", "finished", 1))
        assert list(runs.runs) == ["a"]
        assert sweep.told == ["a", "b"]
        assert "warning: MLflow has no run of trial b: no MLflow server answers" in capsys.readouterr().err
