"""Runs in MLflow: this file and the two beside it alone import it, and only the driver of a job does so.

Everything goes through a client and a run id. MLflow's module-level functions keep a current run and a
current server in the process, where two users of one process meet.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import logging
import math
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import filelock
from pyarrow import fs

import lpclip
from lpclip import files
from lpclip.config import TrackingConfig, UserError, digest
from lpclip.credentials import redact
from lpclip.jobs.mlflow_entries import DataInput, log_inputs, log_model, register_model
from lpclip.patience import patiently

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import Model

DEFAULT_URI = "sqlite:///mlflow.db"
KEY_TAG = "lpclip.resume_key"
PARENT_TAG = "mlflow.parentRunId"

# The criterion that a sweep chooses by, under the same name in all sweeps: the trials' charts are sorted by it.
SWEEP_CRITERION = "tune/criterion"

# Packages that bring modules of other names.
DRIVERS = {"psycopg2": "psycopg2-binary", "psycopg": "'psycopg[binary]'", "MySQLdb": "mysqlclient"}

# Without this tag MLflow's pages open an experiment as traces of language models.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class Run:
    """One MLflow run. Made by `track`.

    `run_id` is MLflow's id, `uri` the server or database, secrets included.
    A server that goes away costs the record, never the job: the first failure is a warning on stderr, and the
    run logs nothing more.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        *,
        uri: str,
        experiment_id: str,
        resumed: bool,
        ended_at: int | None = None,
    ) -> None:
        """`ended_at`, in milliseconds since 1970, is when a resumed run had ended; it stays if no number is new."""
        self.run_id = run_id
        self.uri = uri
        self.resumed = resumed
        self.has_nested = False
        self.outcome = "FINISHED"
        """How `track` marks the run at the end of its block, where that raises nothing."""
        self._experiment_id = experiment_id
        self._client = client
        self._model_id: str | None = None
        self._lost = False
        self._ended_at = ended_at
        self._steps: dict[str, set[int]] = {}

    @property
    def charts(self) -> str | None:
        """The address of the server's charts of all runs, or of this one's nested runs; None for a database."""
        if not self.uri.startswith(("http://", "https://")):
            return None
        return charts(self.uri, self._experiment_id, parent=self.run_id if self.has_nested else None)

    @property
    def database(self) -> Path | None:
        """The absolute path of the run's SQLite file, None when a server has the run."""
        return database_of(self.uri)

    def log(self, metrics: Mapping[str, float | None], step: int = 0, *, at: float | None = None) -> None:
        """Log numbers at a step, once for each name and step, also when a resumed job comes by again.

        `at` is their time in seconds since 1970, by default now.
        MLflow's pages draw what is at step 0 as bars, one for each run, and what is at later steps as lines, so a
        number that a run has once belongs at 0. What stands before the last slash of a name is its chart's section.
        None is left out. NaN and infinities are left out with a warning: MLflow's databases change them.
        Characters that MLflow refuses in names become underscores.
        """
        self.log_steps([(step, time.time() if at is None else at, metrics)])

    def log_steps(self, steps: Sequence[tuple[int, float, Mapping[str, float | None]]]) -> None:
        """Log the numbers of several steps, each with its time, with one request, as `log` does those of one."""
        self._attempt("metrics", lambda: self._log_new(steps))

    def set_tags(self, tags: dict[str, Any]) -> None:
        """Set tags; a tag that is there is replaced."""
        self._attempt("tags", lambda: self._log_tags(tags))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Store a file, or a folder with all in it, under the run's artifacts or a folder of them.

        `path` may lie on any file system that pyarrow reaches. A refused upload is a warning.
        """
        filesystem, inner = files.resolve(str(path))
        if isinstance(filesystem, fs.LocalFileSystem):
            assert Path(inner).exists(), inner
            self._attempt(f"artifact {inner}", lambda: self._client.log_artifact(self.run_id, inner, folder))
            return
        with tempfile.TemporaryDirectory() as folder_here:
            copy = Path(folder_here, Path(inner).name)
            if not patiently(str(path), lambda: filesystem.get_file_info(inner)).is_file:
                copy.mkdir()  # an object store has no folders that pyarrow would make here
            patiently(str(path), lambda: fs.copy_files(inner, str(copy), source_filesystem=filesystem))
            self.artifact(copy, folder)

    def log_params(self, params: dict[str, Any]) -> None:
        """Log parameters. MLflow keeps a parameter's first value for good, so those of a resumed run stay."""
        self._attempt("parameters", lambda: self._log_params(params))

    def model(self, name: str, write: Callable[[Path, Model], None]) -> None:
        """Log a model, once, which `write` writes into a folder that is not there yet, as MLflow's own entry for it.

        The measures of tests that are logged later are the model's as well. A refused upload is a warning.
        """
        self._attempt(f"artifact of model {name}", lambda: self._log_model(name, write))

    def inputs(self, datasets: Sequence[DataInput]) -> None:
        """Log the data that the run works on, by which MLflow's pages compare runs."""
        self._attempt("names of the data", lambda: log_inputs(self._client, datasets, run_id=self.run_id))

    def register(self, name: str, *, alias: str) -> str | None:
        """Enter the run's model into the model registry; `alias` then stands for this version.

        Returns the version. A registry that refuses, or a model that was not logged, is a warning, and None.
        """
        found: list[str] = []
        self._attempt(f"artifact as model {name}", lambda: found.append(self._register(name, alias)))
        return found[0] if found else None

    def end(self, status: str) -> None:
        """Mark the run FINISHED, FAILED or KILLED."""
        at = self._ended_at
        self._attempt("status", lambda: self._client.set_terminated(self.run_id, status, at))

    def _log_model(self, name: str, write: Callable[[Path, Model], None]) -> None:
        self._model_id = log_model(
            self._client, name, run_id=self.run_id, experiment_id=self._experiment_id, write=write
        )

    def _register(self, name: str, alias: str) -> str:
        from mlflow.exceptions import MlflowException

        if self._model_id is None:
            raise MlflowException("the run has no model")
        return register_model(self._client, name, alias=alias, run_id=self.run_id, model_id=self._model_id)

    def _log_new(self, steps: Sequence[tuple[int, float, Mapping[str, float | None]]]) -> None:
        from mlflow.entities import Metric

        new: dict[tuple[str, int], Metric] = {}
        for step, at, metrics in steps:
            numbers = {metric_name(key): float(value) for key, value in metrics.items() if value is not None}
            for key, value in numbers.items():
                if not math.isfinite(value):
                    warn(f"{key} at step {step} is {value}, which MLflow cannot keep")
                elif step not in self._logged_steps(key):
                    model_id = self._model_id if key.startswith("test/") else None
                    new.setdefault((key, step), Metric(key, value, int(1000 * at), step, model_id=model_id))
        batch = list(new.values())
        for start in range(0, len(batch), 1000):
            self._client.log_batch(self.run_id, metrics=batch[start : start + 1000], synchronous=True)
        for key, step in new:
            self._steps[key].add(step)
            self._ended_at = None

    def _logged_steps(self, key: str) -> set[int]:
        if key not in self._steps:
            history = self._client.get_metric_history(self.run_id, key) if self.resumed else []
            self._steps[key] = {metric.step for metric in history}
        return self._steps[key]

    def _log_tags(self, tags: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        pairs = [RunTag(metric_name(key), redact(str(value))) for key, value in tags.items()]
        for start in range(0, len(pairs), 100):
            self._client.log_batch(self.run_id, tags=pairs[start : start + 100], synchronous=True)

    def _log_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        there = self._client.get_run(self.run_id).data.params if self.resumed else {}
        texts = {metric_name(key): redact(str(value)) for key, value in params.items()}
        new = [Param(key, text) for key, text in texts.items() if key not in there]
        for start in range(0, len(new), 100):
            self._client.log_batch(self.run_id, params=new[start : start + 100], synchronous=True)

    def _attempt(self, what: str, call: Callable[[], Any]) -> None:
        from mlflow.exceptions import MlflowException

        if self._lost:
            return
        try:
            call()
        except (MlflowException, OSError) as error:
            # A server without an artifact store still takes numbers.
            self._lost = not what.startswith("artifact")
            rest = "; the rest of this run is not logged" if self._lost else ""
            warn(f"MLflow did not take the {what} ({redact(_line(error))}){rest}")


@contextlib.contextmanager
def track(
    config: TrackingConfig,
    *,
    name: str,
    params: dict[str, Any],
    out: str | None = None,
    resume_key: str | None = None,
    parent: Run | None = None,
) -> Iterator[Run]:
    """One MLflow run around a job: `outcome` at the end, FAILED on an error, KILLED on Ctrl-C or an exit.

    `name` is the run's name unless the configuration has one; a run with a parent is nested in it and keeps
    `name`. `out` is the job's output folder. With a `resume_key`, an unfinished run of the same key in the experiment
    goes on instead of a second one beginning: two jobs that may run at once need different keys. Raises
    UserError, with a sentence for the user, when the server or the database cannot be used.
    """
    uri = parent.uri if parent else tracking_uri(out)
    key_tag = {KEY_TAG: digest(resume_key)} if resume_key else {}
    parent_tag = {}
    if parent:
        parent_tag = {PARENT_TAG: parent.run_id}
        parent.has_nested = True
    with explained(uri):
        client = connect(uri)
        experiment_id = _experiment(client, config.experiment, uri)
        run = _resume(client, experiment_id, resume_key, uri, parent=parent) if resume_key else None
        if run is None:
            # A resumed job finds the run by this tag. Setting it later would leave an orphan if a kill came between.
            info = client.create_run(
                experiment_id,
                run_name=(not parent and config.run_name) or name,
                tags={**_origin(), **key_tag, **parent_tag},
            ).info
            run = Run(client, info.run_id, uri=uri, experiment_id=experiment_id, resumed=False)
    run.log_params(params)
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        run.end("KILLED")
        raise
    except BaseException as error:
        run.set_tags({"lpclip.error": f"{type(error).__name__}: {_line(error)}"})
        run.end("FAILED")
        raise
    run.end(run.outcome)


def tracking_uri(out: str | None = None) -> str:
    """Where runs go: MLFLOW_TRACKING_URI, or mlflow.db in the working directory; SQLite paths made absolute.

    A submitted job works in a temporary copy, so its mlflow.db lies beside its output folder `out`, where the next
    job finds it again. Raises UserError for a folder of files, which MLflow has given up, and where the runs of a
    submitted job would be lost, and for a database whose driver is not installed.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if out is not None and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        if not uri and "://" in out:
            raise UserError(
                "MLflow keeps no runs in an object store: give the submitted job a server, with --runtime-env-json "
                """'{"env_vars": {"MLFLOW_TRACKING_URI": "http://host:5000"}}' before its --"""
            )
        if uri and uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            raise UserError(
                f"MLFLOW_TRACKING_URI is {uri}, relative to the job's temporary copy of the working directory: "
                "set it to sqlite:////folder/mlflow.db or http://host:port"
            )
        uri = uri or f"sqlite:///{Path(out).with_name('mlflow.db')}"
    uri = uri or DEFAULT_URI
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise UserError(
            f"MLFLOW_TRACKING_URI is {uri}, a folder, and MLflow keeps runs in databases or on servers: "
            "set it to sqlite:////folder/mlflow.db or http://host:port, or unset it for ./mlflow.db"
        )
    _refuse_missing_driver(uri)
    database = database_of(uri)
    return f"sqlite:///{database}" if database else uri


def _refuse_missing_driver(uri: str) -> None:
    if not uri.startswith(("postgresql", "mysql", "mssql")):
        return
    from sqlalchemy import exc, make_url

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        package = DRIVERS.get(error.name or "", error.name)
        raise UserError(
            f"MLFLOW_TRACKING_URI is {redact(uri)}, and the driver of this database is not installed: run pip install "
            f"{package}, or unset MLFLOW_TRACKING_URI to keep the runs in ./mlflow.db"
        ) from error
    except exc.ArgumentError as error:
        raise UserError(
            f"MLFLOW_TRACKING_URI is {redact(uri)}, which is no database's address ({redact(_line(error))})"
        ) from error


def charts(server: str, experiment_id: str, *, parent: str | None = None) -> str:
    """The address at which a server's pages show the charts of an experiment's runs.

    With the id of a `parent`, those of the runs that are nested in it, the best of a sweep first. The address has no
    user name or password.
    """
    # Without the first, MLflow greets a new browser with its pages about language models.
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART"}
    if parent:
        query["searchFilter"] = f"tags.`{PARENT_TAG}` = '{parent}'"
        query["orderByKey"] = f"metrics.`{SWEEP_CRITERION}`"
        query["orderByAsc"] = "false"
    return (
        f"{redact(server).rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote)}"
    )


def metric_name(name: str) -> str:
    """The nearest name that MLflow takes for a metric, parameter or tag on every platform."""
    parts = [part for part in re.sub(r"[^\w/. -]+", "_", name).split("/") if part.strip(".")]
    return "/".join(parts)[:250] or "_"


def database_of(uri: str) -> Path | None:
    """The absolute path of a SQLite URI's file; None for every other URI."""
    path = uri.removeprefix("sqlite:///")
    return Path(path).absolute() if uri.startswith("sqlite:///") and path != ":memory:" else None


def connect(uri: str) -> MlflowClient:
    """A client that has reached its server, or made its SQLite file's tables.

    Raises UserError when no server answers, or when the file is no database.
    """
    # MLflow reports usage to its makers unless this is set before its first import.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    database = database_of(uri)
    if database is None:
        _reach(uri)
        return _client(uri)
    artifacts = database.parent / "mlruns"
    artifacts.mkdir(parents=True, exist_ok=True)
    # Two processes that make the tables of one new file at once break each other.
    with filelock.FileLock(artifacts / ".lock"):
        with database.open("a+b") as file:
            file.seek(0)
            if file.read(16) not in (b"", b"SQLite format 3\0"):
                raise UserError(
                    f"{database} is not an SQLite database: move it away or set MLFLOW_TRACKING_URI"
                )
        return _patiently(lambda: _client(uri))


def _client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return MlflowClient(uri, registry_uri=uri)


def _patiently(open_database: Callable[[], MlflowClient], attempts: int = 10) -> MlflowClient:
    """Try again while a process that does not know our lock, such as `mlflow ui`, makes the tables."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DatabaseError

    for _ in range(attempts - 1):
        try:
            return open_database()
        except (MlflowException, DatabaseError) as error:
            if not re.search("already exists|locked|out-of-date|UNIQUE", str(error)):
                raise
            time.sleep(1)
    return open_database()


def _reach(uri: str) -> None:
    """One quick request: MLflow's own client tries for minutes before it says that nobody answers."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(redact(uri), timeout=20).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # MLflow has its own settings for certificates
            return
        raise UserError(
            f"no MLflow server answers at {redact(uri)} ({reason}): start it, or unset MLFLOW_TRACKING_URI "
            "to keep the runs in ./mlflow.db"
        ) from error


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    """The id of the experiment, created if need be; SQLite files keep their artifacts beside them."""
    from mlflow.exceptions import MlflowException

    database = database_of(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = (database.parent / "mlruns" / metric_name(name)).as_uri() if database else None
        try:
            return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another driver was faster
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {name!r} is deleted: restore it or choose another --experiment"
        )
    return experiment.experiment_id


def _resume(
    client: MlflowClient, experiment_id: str, resume_key: str, uri: str, *, parent: Run | None
) -> Run | None:
    """The latest unfinished run of the key, or the parent's own of that key, RUNNING again."""
    which = f"tags.`{PARENT_TAG}` = '{parent.run_id}'" if parent else "attributes.status != 'FINISHED'"
    found = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{KEY_TAG}` = '{digest(resume_key)}' and {which}",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    if not found:
        return None
    run_id = found[0].info.run_id
    client.update_run(run_id, status="RUNNING")
    # A trial that a resumed sweep finds ended did not end again.
    ended_at = found[0].info.end_time if parent else None
    return Run(client, run_id, uri=uri, experiment_id=experiment_id, resumed=True, ended_at=ended_at)


@functools.cache
def _origin() -> dict[str, str]:
    """Who runs the job, what was started, and the code's commit where it lies in a checkout of its own."""
    found = {"mlflow.source.name": Path(sys.argv[0]).name}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        found["mlflow.user"] = getpass.getuser()
    root = Path(lpclip.__file__).parents[1]
    # An installed package may lie in a checkout of something else, so only its own folder is asked.
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            found["mlflow.source.git.commit"] = commit
    return found


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what MLflow raises while a run is opened into a sentence for the user."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise UserError(f"MLflow at {redact(uri)}: {redact(_line(error))}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def warn(message: str) -> None:
    """Tell of what MLflow did not take, on stderr."""
    print(f"warning: {message}", file=sys.stderr)
