"""The model that every run leaves in MLflow: loaded, called and served by MLflow's own code."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import open_clip
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, ROOT, Training, draw, run
from mlflow import MlflowClient
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from safetensors.torch import save_file

import lpclip
from lpclip.config import TrackingConfig, UserError
from lpclip.jobs.mlflow_model import log_probe, requirements
from lpclip.jobs.tracking import track
from lpclip.method.probe import Probe, zero_shot_probe
from lpclip.serving.classifier import Classifier
from lpclip.serving.pyfunc import ProbeModel, _load_pyfunc

pytestmark = pytest.mark.usefixtures("lite_map", "one_thread")
PICTURES = [draw(place, seed) for place in range(3) for seed in range(200, 203)]


@pytest.fixture(scope="module")
def folder(trained: Training) -> Path:
    """The files of the model that a run of selftrain logged."""
    (output,) = MlflowClient().get_run(trained.summary["mlflow_run"]).outputs.model_outputs
    return Path(mlflow.artifacts.download_artifacts(f"models:/{output.model_id}"))


@pytest.fixture(scope="module")
def model(folder: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(folder))


def images(*values: Any) -> pd.DataFrame:
    return pd.DataFrame({"image": list(values)})


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def zero_shot(**encoder: Any) -> Probe:
    """Zero-shot as a probe, made without Ray."""
    head = lpclip.zero_shot_head(CLASSES, precision="float32", **encoder)
    origin = {**head.encoder, "views": "weak,mirror"}
    return zero_shot_probe(
        torch.tensor(head.weight), temperature=head.temperature, class_names=head.class_names, encoder=origin
    )


def test_mlflows_model_and_predict_say_the_same(
    model: mlflow.pyfunc.PyFuncModel,
    trained: Training,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(
        f"predict.py --probe {trained.out}/probe --data {photos} --out {tmp_path}/labels.parquet", monkeypatch
    )
    labels = pq.read_table(tmp_path / "labels.parquet").to_pylist()
    found = model.predict(images(*((photos / row["id"]).read_bytes() for row in labels)))
    assert len(found) == 30
    assert list(found["label"]) == [row["label"] for row in labels]
    assert list(found["labels"]) == [row["top_labels"] for row in labels]
    assert np.allclose(found["probability"].astype(float), [row["probability"] for row in labels], atol=1e-6)
    assert found["error"].isna().all()


def test_an_image_comes_as_bytes_or_base64_and_what_is_none_costs_its_row(
    model: mlflow.pyfunc.PyFuncModel,
) -> None:
    picture = PICTURES[0]
    found = model.predict(
        images(
            picture,
            text(picture),
            f"data:image/png;base64,{text(picture)}",
            bytearray(picture),
            picture[:100],
            b"",
            None,
            "",
            text(b"no image, but long enough"),
        )
    )
    assert len(set(found["probability"][:4])) == 1
    assert list(found["error"].isna()) == [True] * 4 + [False] * 5
    assert found["label"][4:].isna().all()
    assert list(found["labels"][4:]) == [[]] * 5
    assert "truncated" in found["error"][4]
    assert found["error"][5] == "empty"
    assert "no image in this row" in found["error"][6]


def test_paths_and_uris_are_followed_only_if_asked(
    folder: Path, model: mlflow.pyfunc.PyFuncModel, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(photos.rglob("*.png"))
    wanted = model.predict(images(path.read_bytes()))["probability"][0]
    for refused in (str(path), path.as_uri(), "https://127.0.0.1:9/a.png"):
        (error,) = model.predict(images(refused))["error"]
        assert "is not followed: load the model with model_config" in error
    asked = mlflow.pyfunc.load_model(str(folder), model_config={"schemes": "file"})
    found = asked.predict(images(str(path), path.as_uri(), str(path) + "x", "s3://bucket/a.png"))
    assert list(found["probability"][:2]) == [wanted] * 2
    assert "s3:// is not followed" in found["error"][3]
    assert found["error"][2]
    monkeypatch.setenv("LPCLIP_SCHEMES", "file")
    assert mlflow.pyfunc.load_model(str(folder)).predict(images(str(path)))["probability"][0] == wanted


def test_the_number_of_labels_is_a_parameter(model: mlflow.pyfunc.PyFuncModel) -> None:
    (labels,) = model.predict(images(PICTURES[0]), params={"top_k": 2})["labels"]
    assert len(labels) == 2
    assert set(model.predict(images(PICTURES[0]))["labels"][0]) == set(CLASSES)
    assert list(model.predict(images(PICTURES[0]), params={"top_k": 0})["error"]) == [
        "top_k must be at least 1, not 0"
    ]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"device": "tpu"}, "device is 'tpu', and must be one of auto, cpu, gpu"),
        ({"num_threads": -1}, "num_threads is -1, and must be a number"),
        ({"num_threads": "x"}, "num_threads is 'x', and must be a number"),
        ({"schemes": ["file"]}, "schemes is \\['file'\\], and must be a text such as 'file,https'"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    config: dict[str, Any], reason: str, folder: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        mlflow.pyfunc.load_model(str(folder), model_config=config)


@pytest.mark.parametrize(
    "body", [{"inputs": {"image": [0, 1]}}, {"inputs": [0, 1]}, {"instances": [0, 1]}], ids=str
)
def test_each_form_of_a_request_to_mlflows_server_gives_a_row_for_each_image(
    body: dict[str, Any], model: mlflow.pyfunc.PyFuncModel
) -> None:
    texts = [text(PICTURES[0]), text(PICTURES[3])]
    asked = json.loads(json.dumps(body).replace("[0, 1]", json.dumps(texts)))
    data = infer_and_parse_data(asked, model.metadata.get_input_schema())
    assert list(model.predict(data)["label"]) == list(model.predict(images(*texts))["label"])


def test_a_table_in_batches_has_the_answers_of_the_whole(model: mlflow.pyfunc.PyFuncModel) -> None:
    table = images(*PICTURES)
    parts = [model.predict(table[start : start + 4].reset_index(drop=True)) for start in (0, 4, 8)]
    whole = model.predict(table)
    assert pd.concat(parts, ignore_index=True)["label"].tolist() == whole["label"].tolist()
    assert np.allclose(
        pd.concat(parts)["probability"].astype(float), whole["probability"].astype(float), atol=1e-6
    )


def test_nothing_in_the_model_is_pickled_and_its_requirements_are_what_runs_here(folder: Path) -> None:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "MLmodel",
        "requirements.txt",
        "data/lpclip/probe/probe.json",
        "data/lpclip/probe/probe.safetensors",
    } <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".py", ".pt"))]
    assert (folder / "requirements.txt").read_text().split() == requirements()
    assert requirements()[0] == f"lpclip=={lpclip.__version__}"
    told = mlflow.models.Model.load(str(folder))
    assert told.signature is not None
    assert told.signature.inputs.input_names() == ["image"]
    assert told.metadata == {
        "encoder": "lite, embedded in packages that the requirements name; it is not CLIP",
        "classes": 3,
    }
    example = told.load_input_example(str(folder))
    assert (
        ProbeModel(Classifier.load(str(folder / "data" / "lpclip" / "probe")))
        .predict(example)["error"]
        .isna()
        .all()
    )


def test_runs_name_their_data_by_content(trained: Training, lake: Path) -> None:
    kept = MlflowClient().get_run(trained.summary["mlflow_run"])
    found = {item.tags[0].value: item.dataset for item in kept.inputs.dataset_inputs}
    assert {context: item.name for context, item in found.items()} == {
        "training": f"{lake.name}-labelled",
        "evaluation": "photos",
    }
    manifest = json.loads(Path(trained.summary["features"]["train"], "manifest.json").read_text())
    assert found["training"].digest == manifest["content_digest"]
    assert json.loads(found["training"].source) == {"uri": f"{lake}/labelled.parquet"}
    assert json.loads(found["training"].profile) == {"num_rows": 60}


def test_a_models_measures_are_those_of_its_run(trained: Training) -> None:
    client = MlflowClient()
    kept = client.get_run(trained.summary["mlflow_run"])
    logged = client.get_logged_model(kept.outputs.model_outputs[0].model_id)
    found = {metric.key: metric.value for metric in logged.metrics}
    assert found["test/accuracy"] == kept.data.metrics["test/accuracy"]
    assert logged.source_run_id == kept.info.run_id


def test_a_resumed_run_has_one_model(tmp_path: Path) -> None:
    probe = zero_shot()
    probe.save(str(tmp_path / "probe"))
    config = TrackingConfig(experiment="resumed model")
    with contextlib.suppress(KeyboardInterrupt), track(config, name="r", params={}, resume_key="m") as first:
        log_probe(first, probe, saved=str(tmp_path / "probe"))
        raise KeyboardInterrupt
    with track(config, name="r", params={}, resume_key="m") as again:
        log_probe(again, probe, saved=str(tmp_path / "probe"))
    assert again.run_id == first.run_id
    assert len(MlflowClient().get_run(again.run_id).outputs.model_outputs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("own_config", [False, True])
@pytest.mark.filterwarnings("ignore:.* does not say")
def test_a_local_checkpoint_comes_along(tmp_path: Path, *, own_config: bool) -> None:
    torch.manual_seed(0)
    # The path names a tag, from which the preprocessing follows.
    weights = tmp_path / "openai" / "clip.safetensors"
    weights.parent.mkdir()
    name = "ViT-S-32-alt"
    save_file(open_clip.create_model(name).state_dict(), weights)
    if own_config:
        name = str(tmp_path / "mine.json")
        Path(name).write_text(json.dumps(open_clip.get_model_config("ViT-S-32-alt")))
    probe = zero_shot(encoder=name, pretrained=str(weights))
    probe.save(str(tmp_path / "probe"))
    wanted = Classifier.load(str(tmp_path / "probe"))(PICTURES)
    with track(TrackingConfig(experiment="checkpoints"), name="r", params={}) as tracked:
        log_probe(tracked, probe, saved=str(tmp_path / "probe"))
    (output,) = MlflowClient().get_run(tracked.run_id).outputs.model_outputs
    shutil.rmtree(weights.parent)
    (tmp_path / "mine.json").unlink(missing_ok=True)
    loaded = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    found = loaded.predict(images(*PICTURES))
    assert list(found["label"]) == [answer.labels[0] for answer in wanted]
    assert np.allclose(
        found["probability"].astype(float), [answer.probabilities[0] for answer in wanted], atol=1e-6
    )
    assert loaded.metadata.metadata["encoder"].endswith(", with its weights")


def test_a_model_of_another_encoder_is_refused(tmp_path: Path) -> None:
    probe = zero_shot()
    probe.encoder["identity"]["weights"] = "another"
    probe.save(str(tmp_path / "probe"))
    with pytest.raises(UserError, match=r"another encoder than lite as it is now: they differ in weights"):
        _load_pyfunc(str(tmp_path))


def test_the_python_of_the_docs_labels_images(
    trained: Training, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient()
    run_id = trained.summary["mlflow_run"]
    (output,) = client.get_run(run_id).outputs.model_outputs
    client.create_registered_model("of-the-docs")
    client.create_model_version("of-the-docs", f"models:/{output.model_id}", run_id)
    client.set_registered_model_alias("of-the-docs", "champion", "1")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mlflow.md").read_text(), re.DOTALL)
    path = next(photos.rglob("*.png"))
    monkeypatch.chdir(path.parent)
    names: dict[str, Any] = {}
    # Sweeps of other tests register a lpclip-photos of their own.
    exec(code.replace("cat.jpg", path.name).replace("lpclip-photos", "of-the-docs"), names)
    (wanted,) = Classifier.load(str(trained.out / "probe"))([path.read_bytes()], top_k=3)
    assert list(names["answers"]["labels"]) == [list(wanted.labels)]
    assert "error" in capsys.readouterr().out


@pytest.mark.slow
def test_mlflow_serves_the_champion(trained: Training, tmp_path: Path) -> None:
    client = MlflowClient()
    run_id = trained.summary["mlflow_run"]
    (output,) = client.get_run(run_id).outputs.model_outputs
    client.create_registered_model("served")
    client.create_model_version("served", f"models:/{output.model_id}", run_id, model_id=output.model_id)
    client.set_registered_model_alias("served", "champion", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "mlflow", "models", "serve", "-m", "models:/served@champion", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=log,
            start_new_session=True,
            # MLflow starts uvicorn by its name.
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            },
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            time.sleep(0.2)
        body = {"dataframe_records": [{"image": text(PICTURES[0])}, {"image": "/etc/hostname"}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=json.dumps({**body, "params": {"top_k": 2}}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            first, second = json.load(response)["predictions"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (wanted,) = Classifier.load(str(trained.out / "probe"))(PICTURES[:1], top_k=2)
    assert (first["label"], first["labels"]) == (wanted.labels[0], list(wanted.labels))
    assert first["probability"] == pytest.approx(wanted.probabilities[0], abs=1e-6)
    assert second["label"] is None
    assert "file:// is not followed" in second["error"]
