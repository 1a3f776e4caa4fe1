"""One probe, five ways to ask it: all give the same labels, and the same probabilities but for rounding."""

from __future__ import annotations

import base64
import http.client
import io
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, draw, run, start
from mlflow import MlflowClient, pyfunc
from PIL import Image
from safetensors.torch import save_file
from test_serve import free_port

import lpclip
from lpclip.config import TrackingConfig
from lpclip.features.store import Store
from lpclip.images.pixels import decode_image
from lpclip.images.render import weak_view
from lpclip.jobs.mlflow_model import log_probe
from lpclip.jobs.tracking import track
from lpclip.method.probe import Probe, zero_shot_probe
from lpclip.serving.classifier import Classifier

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster", "lite_map", "one_thread")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of three classes: PNGs, JPEGs of several sizes and shapes, and greyscale."""
    folder = tmp_path_factory.mktemp("one") / "photos"
    folder.mkdir()
    for number in range(60):
        image = Image.open(io.BytesIO(draw(number % 3, 500 + number)))
        if number % 4 == 1:
            image = image.resize((300 + number, 200))
        if number % 4 == 2:
            image = image.resize((700, 900 + number)).convert("L")
        image.save(folder / f"{number:02d}.{'png' if number % 4 == 0 else 'jpg'}")
    return folder


def zero_shot(folder: Path, encoder: str) -> Probe:
    """A probe in float32, of lite or of a local checkpoint with random weights, with weights that learnt nothing."""
    pretrained = None
    if encoder != "lite":
        torch.manual_seed(0)
        pretrained = str(folder / "clip.safetensors")
        save_file(open_clip.create_model(encoder).state_dict(), pretrained)
    head = lpclip.zero_shot_head(CLASSES, encoder=encoder, pretrained=pretrained, precision="float32")
    probe = zero_shot_probe(
        torch.tensor(head.weight),
        temperature=head.temperature,
        class_names=head.class_names,
        encoder={**head.encoder, "views": "weak,mirror"},
    )
    probe.save(str(folder / "probe"))
    return probe


@contextmanager
def served(probe: str) -> Iterator[int]:
    """The port of a server that answers."""
    port = free_port()
    process = start(f"serve.py --probe {probe} --port {port}")
    assert process.stdout is not None
    assert process.stderr is not None
    if not any(line.startswith("ready") for line in process.stdout):
        pytest.fail(process.stderr.read())
    try:
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def table(labels: list[list[str]], probabilities: list[list[float]]) -> np.ndarray:
    """Probabilities (N, K) in the order of the classes, from labels in the order of their probabilities."""
    rows = [
        dict(zip(names, values, strict=True)) for names, values in zip(labels, probabilities, strict=True)
    ]
    return np.array([[row[name] for name in CLASSES] for row in rows])


@pytest.mark.filterwarnings("ignore:.* does not say", "ignore::UserWarning:torch.onnx")
@pytest.mark.parametrize("encoder", ["lite", "ViT-S-32-alt"])
def test_every_way_to_ask_a_probe_gives_the_same_answer(
    encoder: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = zero_shot(tmp_path, encoder)
    saved = str(tmp_path / "probe")
    names = [path.name for path in sorted(photos.iterdir())]
    data = [(photos / name).read_bytes() for name in names]
    found: dict[str, np.ndarray] = {}

    run(
        f"predict.py --probe {saved} --data {photos} --features {tmp_path}/features --out {tmp_path}/labels.parquet",
        monkeypatch,
    )
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "labels.parquet").to_pylist()}
    kept = [rows[name] for name in names]
    found["predict"] = table([r["top_labels"] for r in kept], [r["top_probabilities"] for r in kept])

    (folder,) = (path.parent for path in (tmp_path / "features").rglob("manifest.json"))
    features = Store.open(str(folder)).features(views=())
    order = [list(features.ids).index(name) for name in names]
    found["predict_proba"] = probe.predict_proba(features.base[order])

    with track(TrackingConfig(experiment="one answer"), name=encoder, params={}) as tracked:
        log_probe(tracked, probe, saved=saved)
    (output,) = MlflowClient().get_run(tracked.run_id).outputs.model_outputs
    answers = pyfunc.load_model(f"models:/{output.model_id}").predict(pd.DataFrame({"image": data}))
    found["pyfunc"] = table(list(answers["labels"]), list(answers["probabilities"]))

    run(f"export.py --probe {saved} --out {tmp_path}/model.onnx", monkeypatch)
    preprocess = Classifier.load(saved).info.preprocess
    pixels = [
        weak_view(decode_image(image, max_pixels=10**8, max_bytes=10**8, size=preprocess.size), preprocess)
        for image in data
    ]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found["ONNX"], _ = session.run(None, {session.get_inputs()[0].name: np.stack(pixels)})

    with served(saved) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        told = []
        for start_ in range(0, len(data), 10):
            images = [base64.b64encode(image).decode() for image in data[start_ : start_ + 10]]
            body = json.dumps({"images": images, "top_k": 3})
            connection.request("POST", "/classify", body=body, headers={"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            told += json.load(answer)
        connection.close()
    found["serve"] = table([one["labels"] for one in told], [one["probabilities"] for one in told])

    wanted = found.pop("predict")
    assert len(set(wanted.argmax(axis=1))) > 1
    for way, probabilities in found.items():
        assert np.array_equal(probabilities.argmax(axis=1), wanted.argmax(axis=1)), way
        assert np.abs(probabilities - wanted).max() < 1e-4, (way, np.abs(probabilities - wanted).max())
