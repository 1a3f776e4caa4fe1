"""What a run leaves in MLflow, with real SQLite files and a real server."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import CLASSES, ROOT, Training, run
from mlflow import MlflowClient

from lpclip.config import SelftrainJob, TrackingConfig, UserError
from lpclip.jobs.selftrain import selftrain_job
from lpclip.jobs.tracking import PARENT_TAG, Run, charts, metric_name, redact, track, tracking_uri

CONFIG = TrackingConfig(experiment="tests")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SQLite file with MLflow's tables, which take seconds to make."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    MlflowClient(uri)
    return uri


@pytest.fixture
def client(database: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    return MlflowClient(database)


def curve(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.run_id, key)]


def test_a_finished_run_holds_everything(client: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "probe.json").write_text("{}")
    (tmp_path / "summary.json").write_text("{}")
    params = {f"p{index}": index for index in range(150)} | {"classes": None, "long": "x" * 9000}
    with track(CONFIG, name="first", params=params) as run:
        run.set_tags({"data": "photos"})
        for step in range(3):
            run.log({"accuracy": step / 10, "ece": None}, step=step)
        run.artifact(tmp_path / "probe")
        run.artifact(tmp_path / "summary.json", "results")
        run.artifact((tmp_path / "summary.json").as_uri(), "more")
    kept = client.get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "first"
    assert kept.data.params["p149"] == "149"
    assert kept.data.tags["data"] == "photos"
    assert curve(client, run, "accuracy") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert "ece" not in kept.data.metrics
    assert [item.path for item in client.list_artifacts(run.run_id)] == ["more", "probe", "results"]
    assert client.list_artifacts(run.run_id, "probe")[0].path == "probe/probe.json"


def test_the_configuration_names_the_run(client: MlflowClient) -> None:
    with track(TrackingConfig(experiment="tests", run_name="mine"), name="other", params={}) as run:
        pass
    assert client.get_run(run.run_id).info.run_name == "mine"


def test_nested_runs_belong_to_their_parent_and_keep_their_names(client: MlflowClient) -> None:
    config = TrackingConfig(experiment="tests", run_name="mine")

    def nested() -> tuple[Run, list[Run]]:
        children = []
        with track(config, name="other", params={}, resume_key="nested") as parent:
            for name in ("a", "b"):
                options = {"resume_key": f"nested {name}", "parent": parent}
                with track(config, name=name, params={}, **options) as child:
                    child.set_tags({"probe": name})
                    child.log({"accuracy": 0.5}, step=3)
                children.append(child)
                if name == "b" and not parent.resumed:
                    raise RuntimeError("no luck")
        return parent, children

    with pytest.raises(RuntimeError):
        nested()
    parent, children = nested()
    assert parent.resumed
    kept = client.get_run(parent.run_id)
    assert (kept.info.run_name, kept.info.status) == ("mine", "FINISHED")
    assert "mlflow.parentRunId" not in kept.data.tags
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    runs = client.search_runs([kept.info.experiment_id], filter_string=query)
    assert len(runs) == 2, "a resumed parent finds its children, finished ones too"
    for name, child in zip("ab", children, strict=True):
        found = client.get_run(child.run_id)
        assert (found.info.run_name, found.info.status) == (name, "FINISHED")
        assert found.data.tags["mlflow.parentRunId"] == parent.run_id
        assert found.data.tags["probe"] == name
        assert curve(client, child, "accuracy") == [(3, 0.5)]


def test_a_run_names_its_user_and_the_commit_of_its_code(client: MlflowClient) -> None:
    with track(CONFIG, name="origin", params={}) as run:
        pass
    tags = client.get_run(run.run_id).data.tags
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    commit = done.stdout.strip() if (ROOT / ".git").exists() and not done.returncode else None
    assert (tags["mlflow.user"], tags.get("mlflow.source.git.commit")) == (getpass.getuser(), commit)


@pytest.mark.parametrize("checkout", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_code_without_git_names_no_commit(database: str, tmp_path: Path, checkout: bool) -> None:
    """In a checkout where no program `git` is found, and in an installed or copied package."""
    (tmp_path / "lpclip").symlink_to(ROOT / "lpclip")
    if checkout:
        (tmp_path / ".git").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "MLFLOW_TRACKING_URI": database, "PATH": ""}
    command = [sys.executable, "-c", DRIVER, "elsewhere"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    tags = MlflowClient(database).get_run(done.stdout.strip()).data.tags
    assert tags["mlflow.user"]
    assert "mlflow.source.git.commit" not in tags


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("no luck"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED")],
)
def test_a_broken_off_run_says_so(client: MlflowClient, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), track(CONFIG, name="broken", params={}) as run:
        raise error
    assert client.get_run(run.run_id).info.status == status


def test_a_resumed_run_has_each_step_once(client: MlflowClient) -> None:
    with pytest.raises(RuntimeError), track(CONFIG, name="a", params={"p": 1}, resume_key="k 'one'") as first:
        first.log({"flips": 0.5}, step=0)
        first.log({"flips": 0.5}, step=0)
        first.log({"flips": 0.4}, step=1)
        raise RuntimeError
    with track(CONFIG, name="a", params={"p": 2, "q": 3}, resume_key="k 'one'") as again:
        for step, value in enumerate([0.5, 0.4, 0.3]):
            again.log({"flips": value}, step=step)
    assert again.run_id == first.run_id
    assert curve(client, again, "flips") == [(0, 0.5), (1, 0.4), (2, 0.3)]
    kept = client.get_run(first.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"p": "1", "q": "3"}
    with track(CONFIG, name="a", params={}, resume_key="k 'one'") as third:
        pass
    assert third.run_id != first.run_id, "a finished run is history"


def test_numbers_that_no_database_keeps_are_left_out(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    with track(CONFIG, name="nan", params={}) as run:
        run.log({"bad": float("nan"), "worse": float("inf"), "good": 1.0}, step=0)
    assert client.get_run(run.run_id).data.metrics == {"good": 1.0}
    assert "bad at step 0 is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("accuracy@5", "accuracy_5"),
        ("risk=80%,all", "risk_80_all"),
        ("test/gaussian_noise:3", "test/gaussian_noise_3"),
        ("../up//./x/", "up/x"),
        ("", "_"),
    ],
)
def test_names_become_valid(name: str, valid: str, client: MlflowClient) -> None:
    assert metric_name(name) == valid
    with track(CONFIG, name="names", params={name: 1}) as run:
        run.log({name: 1.0}, step=0)
    assert client.get_run(run.run_id).data.metrics == {valid: 1.0}


def test_no_password_is_printed_or_kept(client: MlflowClient) -> None:
    assert redact("http://me:secret@host:5000/x") == "http://host:5000/x"
    assert redact("s3://bucket/dir@2024/x") == "s3://bucket/dir@2024/x"
    assert charts("http://me:secret@host:5000/", "7").startswith("http://host:5000/#/experiments/7/runs?")
    with (
        pytest.raises(ValueError),
        track(CONFIG, name="s3", params={"data": "s3://key:secret@bucket/a"}) as run,
    ):
        raise ValueError("cannot read s3://key:secret@bucket/a")
    assert "secret" not in str(client.get_run(run.run_id).to_dictionary())


def test_a_server_that_does_not_answer_is_a_quick_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"no MLflow server answers at http://127.0.0.1:{port}"):
            track(CONFIG, name="x", params={}).__enter__()
    assert time.monotonic() - start < 60, "MLflow alone would try again for minutes"


def test_submitted_jobs_keep_their_runs_beside_their_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri("/data/runs/photos") == f"sqlite:///{Path.cwd()}/mlflow.db"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert tracking_uri("/data/runs/photos") == "sqlite:////data/runs/mlflow.db"
    with pytest.raises(UserError, match="--runtime-env-json '.*MLFLOW_TRACKING_URI"):
        tracking_uri("s3://bucket/runs/photos")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(UserError, match="temporary copy"):
        tracking_uri("/data/runs/photos")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri("s3://bucket/runs/photos") == "http://server:5000"


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "/tmp/mlruns"])
def test_folders_of_runs_are_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match="sqlite:////folder/mlflow.db or http://host:port"):
        tracking_uri()


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        ("mssql", "the driver of this database is not installed: run pip install pyodbc"),
        ("postgresql+nothing", "is no database's address"),
    ],
)
def test_a_database_that_cannot_be_spoken_to_is_a_sentence_before_any_work(
    scheme: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://me:secret@127.0.0.1:5999/runs")
    with pytest.raises(UserError, match=sentence) as caught:
        selftrain_job(SelftrainJob(data=(str(tmp_path / "nowhere"),), out=str(tmp_path / "out")))
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_file_is_not_taken_for_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_text("these are my notes, not a database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(ValueError, match="is not an SQLite database"):
        track(CONFIG, name="x", params={}).__enter__()
    assert (tmp_path / "mlflow.db").read_text().startswith("these are my notes")


def test_a_deleted_experiment_is_a_sentence(client: MlflowClient) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(ValueError, match="'gone' is deleted"):
        track(TrackingConfig(experiment="gone"), name="x", params={}).__enter__()


DRIVER = """
import sys
from lpclip.config import TrackingConfig
from lpclip.jobs.tracking import track
with track(TrackingConfig(experiment="race"), name=sys.argv[1], params={"n": sys.argv[1]}) as run:
    for step in range(5):
        run.log({"x": step}, step=step)
print(run.run_id)
"""


def test_encodings_and_predictions_are_runs_too(
    cluster: None,
    trained: Training,
    photos: Path,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / CLASSES[0].replace(" ", "_") / "broken.png").write_bytes(b"none")
    data = f"--data {tmp_path}/photos --experiment tests"
    summary = run(f"encode.py {data} --views weak --out {tmp_path}/encoded", monkeypatch)
    encoded = client.get_run(summary["mlflow_run"])
    run(f"predict.py {data} --probe {trained.out}/probe --out {tmp_path}/labels.parquet", monkeypatch)
    found = client.search_runs([encoded.info.experiment_id], "attributes.run_name = 'labels.parquet'")
    for kept in (encoded, *found):
        assert kept.info.status == "FINISHED"
        assert (kept.data.tags["data"], kept.data.tags["encoder"]) == ("photos", "lite")
        numbers = kept.data.metrics
        assert (numbers["data/images"], numbers["data/quarantined"]) == (30, 1)
        assert numbers["speed/images_per_second"] > 0
        for stage in ("decoding", "encoding", "committing"):
            assert 0 < numbers[f"encoding/processes_{stage}"] < 2
        for name, value in (("quarantined", 1), ("images_per_second", numbers["encoding/images_per_second"])):
            history = client.get_metric_history(kept.info.run_id, f"encoding/{name}")
            assert [(m.step, m.value) for m in history] == [(31, value)]
    assert len(found) == 1


def test_an_encoding_waits_for_no_server(
    cluster: None,
    lite_map: None,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    summary = run(f"encode.py --data {photos} --views weak --out {tmp_path}/encoded", monkeypatch)
    assert (summary["images"], summary["mlflow_run"]) == (30, None)
    assert f"warning: this run is not in MLflow: no MLflow server answers at http://127.0.0.1:{port}" in (
        capsys.readouterr().err
    )


def start_driver(name: str, folder: Path) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", DRIVER, name]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_first_runs_at_once_share_one_new_database(tmp_path: Path) -> None:
    drivers = [start_driver(name, tmp_path) for name in ("a", "b")]
    ends = [(driver.communicate(timeout=120), driver.returncode) for driver in drivers]
    assert [code for _, code in ends] == [0, 0], ends
    assert all(not stderr for (_, stderr), _ in ends), ends
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("race")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {(run.info.run_name, run.info.status) for run in runs} == {("a", "FINISHED"), ("b", "FINISHED")}
    assert all(run.data.metrics == {"x": 4.0} for run in runs)
    assert all(run.info.artifact_uri.startswith((tmp_path / "mlruns").as_uri()) for run in runs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlruns"]


@contextlib.contextmanager
def server(database: str, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real MLflow server on a free port of the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", database, "--artifacts-destination", str(folder)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        deadline, answered = time.monotonic() + 180, False
        while not answered:
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                answered = True
        yield f"http://127.0.0.1:{port}", process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_server_takes_runs_and_its_death_does_not_stop_the_job(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with server(database, tmp_path) as (uri, process):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with track(TrackingConfig(experiment="remote"), name="remote", params={"p": 1}) as run:
            run.log({"accuracy": 0.5}, step=0)
            run.artifact(tmp_path / "summary.json")
        client = MlflowClient(uri)
        kept = client.get_run(run.run_id)
        assert (
            run.charts
            == f"{uri}/#/experiments/{kept.info.experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
        )
        with (
            track(CONFIG, name="sweep", params={}) as sweep,
            track(CONFIG, name="trial", params={}, parent=sweep) as trial,
        ):
            trial.log({"tune/criterion": 0.5})
        assert sweep.charts is not None
        page = urlsplit(urlsplit(sweep.charts).fragment)
        (query,) = parse_qs(page.query)["searchFilter"]
        (found,) = client.search_runs([page.path.split("/")[2]], query)
        assert (found.info.run_id, found.data.tags[PARENT_TAG]) == (trial.run_id, sweep.run_id)
        assert (kept.info.status, kept.data.metrics) == ("FINISHED", {"accuracy": 0.5})
        assert [item.path for item in client.list_artifacts(run.run_id)] == ["summary.json"]

        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        with track(TrackingConfig(experiment="remote"), name="orphan", params={}) as orphan:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            orphan.log({"accuracy": 0.5}, step=0)
            orphan.log({"accuracy": 0.6}, step=1)
    warnings = re.findall("^warning: .*$", capsys.readouterr().err, re.MULTILINE)
    assert len(warnings) == 1
    assert "the rest of this run is not logged" in warnings[0]
