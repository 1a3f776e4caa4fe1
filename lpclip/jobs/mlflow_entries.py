"""Entries of a run in MLflow: its data, its model, and the model's version in the registry."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lpclip.credentials import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import Model


@dataclass(frozen=True, kw_only=True)
class DataInput:
    """Data that a run works on."""

    name: str
    digest: str
    """Digest of the images, at most 36 characters. Equal images have the same one, wherever they lie."""
    source: str
    num_rows: int
    context: str
    """Use of the data in the run: training or evaluation."""


def log_inputs(client: MlflowClient, datasets: Sequence[DataInput], *, run_id: str) -> None:
    """Log the data that a run works on."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_inputs(
        run_id,
        [
            DatasetInput(
                Dataset(
                    name=item.name,
                    digest=item.digest,
                    source_type="lpclip",
                    source=json.dumps({"uri": redact(item.source)}),
                    profile=json.dumps({"num_rows": item.num_rows}),
                ),
                [InputTag("mlflow.data.context", item.context)],
            )
            for item in datasets
        ],
    )


def log_model(
    client: MlflowClient,
    name: str,
    *,
    run_id: str,
    experiment_id: str,
    write: Callable[[Path, Model], None],
) -> str:
    """Log a run's model of this name, unless it has one already: `write` writes it into a folder that is not there yet.

    Returns the model's id.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    there = client.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = '{run_id}' AND name = '{name}'"
    )
    for found in there:
        if found.status == LoggedModelStatus.READY:
            return str(found.model_id)
    entry = client.create_logged_model(experiment_id, name, source_run_id=run_id)
    model_id = str(entry.model_id)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "model")
        model = Model(
            artifact_path=entry.artifact_location, run_id=run_id, model_uuid=model_id, model_id=model_id
        )
        write(place, model)
        client.log_model_artifacts(model_id, str(place))
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    return model_id


def register_model(client: MlflowClient, name: str, *, alias: str, run_id: str, model_id: str) -> str:
    """Enter a run's model into the registry, once, and let the alias stand for this version. Returns the version."""
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):  # it is there already; if not, the next call tells why
        client.create_registered_model(name)
    there = [v for v in client.search_model_versions(f"run_id='{run_id}'") if v.name == name]
    version = (
        there[0]
        if there
        else client.create_model_version(
            name, f"models:/{model_id}", run_id, await_creation_for=0, model_id=model_id
        )
    )
    client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)
