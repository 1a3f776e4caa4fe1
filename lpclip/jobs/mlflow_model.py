"""The model and the data of a run, in the form in which MLflow keeps them."""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import lpclip
from lpclip import files
from lpclip.config import SelftrainJob, TuneJob
from lpclip.encoders.again import own_files
from lpclip.encoders.hub import PROBE_FILES
from lpclip.images.pixels import encode_png
from lpclip.jobs.inputs import EncodedInputs, Inputs
from lpclip.jobs.mlflow_entries import DataInput
from lpclip.jobs.tracking import Run
from lpclip.method.probe import Probe
from lpclip.serving.pyfunc import CONFIG, TOP_K

if TYPE_CHECKING:
    from mlflow.models import Model

LOADER = "lpclip.serving.pyfunc"

PACKAGES = (
    "torch",
    "open_clip_torch",
    "timm",
    "transformers",
    "openvino",
    "pillow",
    "numpy",
    "pyarrow",
    "mlflow",
)
"""Packages that decide a model's answers. The others that it needs come with lpclip."""


def log_probe(run: Run, probe: Probe, *, saved: str) -> None:
    """Log the probe that lies in the folder `saved` as the model `probe` of a run."""
    run.model("probe", lambda folder, model: write_model(folder, model=model, probe=probe, saved=saved))


def log_data(run: Run, job: SelftrainJob | TuneJob, inputs: Inputs, known: EncodedInputs) -> None:
    """Log which images a run learnt from and, where there are others, which it was evaluated on."""
    used = [(inputs.data, known.encoded, job.data, "training")]
    if inputs.test is not None and known.tested is not None:
        used.append((inputs.test, known.tested, job.eval_data or job.data, "evaluation"))
    run.inputs(
        [
            DataInput(
                name=data.name,
                digest=encoded.store.manifest.content_digest,
                source=" ".join(values),
                num_rows=encoded.store.manifest.num_rows,
                context=context,
            )
            for data, encoded, values, context in used
        ]
    )


def write_model(folder: Path, *, model: Model, probe: Probe, saved: str) -> None:
    """Write the model that MLflow knows as `model` into a folder that is not there yet; `saved` has the probe's files.

    A checkpoint of the encoder that is a file is linked to, for the upload to follow.
    """
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType, Array

    data = folder.with_name("lpclip")
    (data / "probe").mkdir(parents=True)
    for name in PROBE_FILES:
        (data / "probe" / name).write_bytes(files.read_bytes(files.join(saved, name)))
    columns: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.string, "label", required=False),
        ColSpec(DataType.double, "probability", required=False),
        ColSpec(Array(DataType.string), "labels"),
        ColSpec(Array(DataType.double), "probabilities"),
        ColSpec(DataType.string, "error", required=False),
    ]
    pyfunc.save_model(
        folder,
        loader_module=LOADER,
        data_path=data,
        mlflow_model=model,
        # Bytes, or a text: MLflow has no name for either of two.
        signature=ModelSignature(
            inputs=Schema([ColSpec(AnyType(), "image")]),
            outputs=Schema(columns),
            params=ParamSchema([ParamSpec("top_k", DataType.long, TOP_K)]),
        ),
        input_example=pd.DataFrame({"image": [_example()]}),
        pip_requirements=requirements(),
        model_config=CONFIG,
        metadata={"encoder": encoder_told(probe), "classes": len(probe.class_names)},
    )
    shutil.rmtree(data)
    for name, content in own_files(probe.encoder).items():
        place = folder / "data" / "lpclip" / "encoder" / name
        place.parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            place.symlink_to(content)
        else:
            place.write_text(content)


def encoder_told(probe: Probe) -> str:
    """Which encoder a model needs, and whether it comes along."""
    made = probe.encoder["config"]
    name, weights = made["encoder"], made["pretrained"]
    if name == "lite":
        return "lite, embedded in packages that the requirements name; it is not CLIP"
    if own_files(probe.encoder):
        return f"{Path(name).stem if name.endswith('.json') else name}, with its weights"
    return f"{name}{f' {weights}' if weights else ''}, downloaded by this name when the model is loaded"


def requirements() -> list[str]:
    """lpclip and the packages that decide a model's answers, each in the version that is installed here."""
    found = [f"lpclip=={lpclip.__version__}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
    return found


def _example() -> str:
    """A small picture in base64, as a server takes it."""
    y, x = np.mgrid[:64, :64]
    return base64.b64encode(
        encode_png(np.stack([4 * x, 4 * y, 128 + 0 * x], axis=2).astype(np.uint8))
    ).decode()
