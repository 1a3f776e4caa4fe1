"""The tools that people would take instead of lpclip's encode job: how each is installed, called and read."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lpclip.config import UserError
from lpclip.encoders.engine import computes_bfloat16
from lpclip.encoders.prompts import DEFAULT_TEMPLATES
from lpclip.features.encode_stage import TORCH_ENV

ROOT = Path(__file__).resolve().parents[1]
DTYPE = "bfloat16" if computes_bfloat16() else "float32"
TORCH = "torch==2.14.1 torchvision==0.29.1"
# What pip is asked for, step by step. CLIP_benchmark does not name requests, and with a newer numpy it fails after
# its last image. clip-retrieval imports what setuptools 70 took away, while torch asks for a newer one, which it
# does not use here.
PINS: dict[str, tuple[str, ...]] = {
    "CLIP_benchmark": (
        f"clip-benchmark==1.6.2 open_clip_torch==3.3.0 numpy==2.3.5 webdataset==1.0.2 requests {TORCH}",
    ),
    "clip-retrieval": (
        f"clip-retrieval==2.45.0 all-clip==1.3.0 open_clip_torch==2.32.0 numpy==1.26.4 {TORCH}",
        "--no-deps setuptools==69.5.1",
    ),
}
Command = tuple[list[str], dict[str, str]]
"""Words, and environment variables that are added."""
Labels = Mapping[str, int]
"""Class indices of photographs by file name."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The input of a run, and its working directory `out`, the only place that it writes to. Paths are absolute."""

    encoder: str
    checkpoint: str
    classes: str
    batch_size: int
    photos: Path
    cache: Path
    """lpclip keeps converted models there."""
    environments: Path
    out: Path
    labels: Labels
    """From the first lpclip run; empty before."""


# Commands, and what they predicted


def words(flags: Mapping[str, object]) -> list[str]:
    """Flags and their values as a command line has them."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def lpclip(work: Work, engine: str) -> Command:
    """The encode job with one view and zero-shot labels."""
    flags = {
        "data": work.photos,
        "encoder": work.encoder,
        "pretrained": work.checkpoint,
        "views": "weak",
        "classes": work.classes,
        "engine": engine,
        "out": work.out,
    }
    return [sys.executable, str(ROOT / "jobs" / "encode.py"), *words(flags)], {
        "LPCLIP_CACHE": str(work.cache)
    }


def lpclip_labels(work: Work) -> Labels:
    """Labels by file name."""
    (folder,) = work.out.glob("zero_shot-*")
    table = pq.read_table(folder)
    return dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))


def clip_benchmark(work: Work) -> Command:
    """CLIP_benchmark's evaluation of a tar whose labels are lpclip's."""
    data = work.out / "data"
    write_tar(work, data / "test" / "0.tar")
    (data / "test" / "nshards.txt").write_text("1")
    (data / "classnames.txt").write_text("\n".join(work.classes.split(",")))
    templates = [template.replace("{}", "{c}") for template in DEFAULT_TEMPLATES]
    (data / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    program = work.environments / "CLIP_benchmark" / "bin" / "clip_benchmark"
    flags = {
        "dataset": "wds/photos",
        "dataset_root": data,
        "split": "test",
        "task": "zeroshot_classification",
        "model": work.encoder,
        "pretrained": work.checkpoint,
        "batch_size": work.batch_size,
        "num_workers": 0,
        "output": "result.json",
    }
    amp = [] if DTYPE == "bfloat16" else ["--no_amp"]
    return [str(program), "eval", *words(flags), *amp], {}


def clip_benchmark_equal(work: Work) -> float:
    """CLIP_benchmark's accuracy."""
    return float(json.loads((work.out / "result.json").read_text())["metrics"]["acc1"])


def write_tar(work: Work, path: Path) -> None:
    """The photographs and their labels as WebDataset has them."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for photo in sorted(work.photos.iterdir()):
            tar.add(photo, photo.name)
            label = str(work.labels.get(photo.name, 0)).encode()
            entry = tarfile.TarInfo(f"{photo.stem}.cls")
            entry.size = len(label)
            tar.addfile(entry, io.BytesIO(label))


def clip_retrieval(work: Work) -> Command:
    """clip-retrieval's inference on a folder of files."""
    program = work.environments / "clip-retrieval" / "bin" / "clip-retrieval"
    flags = {
        "input_dataset": work.photos,
        "output_folder": work.out / "embeddings",
        "input_format": "files",
        "enable_text": False,
        "batch_size": work.batch_size,
        "num_prepro_workers": 0,
        "clip_model": f"open_clip:{work.encoder}/{work.checkpoint}",
    }
    return [str(program), "inference", *words(flags)], {}


def plain_loop(work: Work) -> Command:
    """The loop of benchmarks/plain_loop.py."""
    templates = work.out / "templates.txt"
    templates.write_text("\n".join(DEFAULT_TEMPLATES))
    flags = {
        "images": work.photos,
        "encoder": work.encoder,
        "pretrained": work.checkpoint,
        "classes": work.classes,
        "templates": templates,
        "dtype": DTYPE,
        "batch-size": work.batch_size,
        "out": work.out / "result.npz",
    }
    return [sys.executable, str(ROOT / "benchmarks" / "plain_loop.py"), *words(flags)], dict(TORCH_ENV)


def plain_loop_labels(work: Work) -> Labels:
    """Labels by file name."""
    found = np.load(work.out / "result.npz")
    return dict(zip(found["names"].tolist(), found["labels"].tolist(), strict=True))


ARMS: dict[str, tuple[Callable[[Work], Command], Callable[[Work], Labels | float | None]]] = {
    "lpclip auto": (partial(lpclip, engine="auto"), lpclip_labels),
    "lpclip torch": (partial(lpclip, engine="torch"), lpclip_labels),
    "CLIP_benchmark": (clip_benchmark, clip_benchmark_equal),
    "clip-retrieval": (clip_retrieval, lambda work: None),
    "plain loop": (plain_loop, plain_loop_labels),
}
"""An arm's command, and afterwards its labels or the share of them that are equal to those of its work."""


# Set-up


def install(name: str, environments: Path) -> None:
    """Install a peer into its environment, unless it is there with these pins. Raises UserError when pip fails."""
    folder, pins = environments / name, "\n".join(PINS[name])
    stamp, log = folder / "pins.txt", folder / "install.log"
    if stamp.exists() and stamp.read_text() == pins:
        return
    print(f"installing {name} into {folder}: a few minutes and about 6 GB", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off"]
    folder.mkdir(parents=True)
    with log.open("w") as output:
        for command in [
            [sys.executable, "-m", "venv", str(folder)],
            *([*pip, *step.split()] for step in PINS[name]),
        ]:
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                raise UserError(
                    f"{name} could not be installed ({last_line(log, start='ERROR')}); pip's output is in {log}. "
                    f"Mend what it names, or leave {name} out of --arms"
                )
    stamp.write_text(pins)


def last_line(log: Path, start: str = "") -> str:
    """The last line of a log that begins so, or else simply the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith(start)), (lines or ["no output"])[-1])
