"""The jobs at ImageNet's size, without ImageNet: a made-up feature store, and the memory of all processes together.

    python benchmarks/large.py                              # 1,281,167 images, 512 dimensions, 1,000 classes, two views
    python benchmarks/large.py --workers 0,2 --images 200000 --folder /tmp/large

It makes a tiny CLIP model with random weights and 512 dimensions, whose text tower gives the head of made-up class
names, and writes features of two views around planted classes, which the head knows only roughly. `lpclip selftrain`
then trains on the store, in the driver or with Ray Train workers. `lpclip predict` labels it, and `lpclip evaluate`
measures the probe on 50,000 more images. Accuracies are those of planted classes: they say that the work was done.

Memory is that of a job's processes at its largest, looked at once a second: what they share counts once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import torch
import tyro
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file

from lpclip.config import EncoderConfig
from lpclip.encoders.head import EncoderInfo
from lpclip.encoders.prompts import templates
from lpclip.encoders.zero_shot import describe
from lpclip.features.encode_stage import store_identity
from lpclip.features.store import Store
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.images.views import parse_views
from lpclip.progress import Progress
from lpclip.report.tables import format_table

DIM = 512
MODEL = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
VIEWS = parse_views("weak,strong")
PART_ROWS = 256
EVALUATED = 50_000
"""Images that the probe is measured on: as many as ImageNet's validation set has."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Size of the data, and the trainings to measure."""

    images: int = 1_281_167
    classes: int = 1000
    workers: str = "0,1,2,4"
    """Comma-separated numbers of Ray Train workers; 0 runs the rounds in the driver."""
    neighbours: str = "auto"
    """As for lpclip selftrain: a number, or auto for its own choice."""
    folder: str = "runs/large"
    """Stores and results. A store that is there is used again."""
    json: str = ""
    """Also write the table here."""


def make_encoder(folder: Path) -> EncoderConfig:
    """A tiny CLIP model with random weights, whose texts differ as much as those of real ones."""
    config, weights = folder / "tiny-512.json", folder / "tiny-512.safetensors"
    if not weights.exists():
        config.write_text(json.dumps(MODEL))
        torch.manual_seed(0)
        model = open_clip.CLIP(**MODEL)
        with torch.no_grad():
            model.token_embedding.weight *= 50
            model.logit_scale.fill_(math.log(100))
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    return EncoderConfig(encoder=str(config), pretrained=str(weights), precision="float32")


def words(count: int) -> list[str]:
    """Words of one token each: the tiny text tower tells them apart."""
    ends = [text.removesuffix("</w>") for text in SimpleTokenizer().encoder if text.endswith("</w>")]
    known = [text for text in ends if text.isalpha() and len(text) > 4]
    return known[:: len(known) // count][:count]


def planted(labels: np.ndarray, *, centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, d) float16 of unit norm: a direction that all share, a class's centre, and noise."""
    common = np.full(DIM, DIM**-0.5, np.float32)
    noise = rng.standard_normal((len(labels), DIM), dtype=np.float32) * DIM**-0.5
    rows = 0.5 * common + 0.5 * centres[labels] + 0.75 * noise
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_store(path: Path, *, info: EncoderInfo, names: list[str], num_images: int, seed: int) -> Store:
    """A complete store of planted features, in parts as the encoders write them."""
    found = Store.find(str(path))
    if found is not None:
        return found
    assert info.head is not None
    rng = np.random.default_rng(0)
    # The texts know most of where a class lies.
    own = rng.standard_normal((len(names), DIM), dtype=np.float32) * DIM**-0.5
    texts = info.head - info.head.mean(axis=0)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    centres = 2 * texts + own
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    made = {"name": path.name, "rows": num_images, "seed": seed, "label_names": names}
    identity = {**store_identity(None, info, VIEWS, seed=0), "source": made}
    writer = StoreWriter(str(path), identity)
    writer.begin()
    num_units = -(-num_images // PART_ROWS)
    progress = Progress(f"writing {path.name}", total=num_images)
    known = {}
    for unit in range(num_units):
        size = min(PART_ROWS, num_images - unit * PART_ROWS)
        labels = rng.integers(len(names), size=size)
        columns: dict[str, pa.Array] = {
            "id": pa.array([f"{path.name}/{unit:05d}/{row:03d}.JPEG" for row in range(size)]),
            "label": pa.array(labels, pa.int32()),
        }
        for view in VIEWS:
            rows = planted(labels, centres=centres, rng=rng)
            columns[str(view)] = pa.FixedSizeListArray.from_arrays(rows.reshape(-1), DIM)
        part = Part(unit=unit, start=0, stop=size, last=True)
        known[part.name] = writer.write_part(part, rows=pa.table(columns), quarantine=[], content_digest=unit)
        progress.advance(size)
    progress.close()
    return writer.finish(num_units=num_units, rate=None, known=known)


class Memory(threading.Thread):
    """Looks once a second at how much memory a process and all below it take together."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.most, self.largest = pid, 0, 0
        """The process; bytes of all together at the largest, and of the largest process."""
        self.start()

    def run(self) -> None:
        """Look until the process is gone."""
        while Path(f"/proc/{self.pid}").exists():
            found = [proportional_bytes(pid) for pid in family(self.pid)]
            self.most, self.largest = max(self.most, sum(found)), max(self.largest, *found, 0)
            time.sleep(1)


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield from family(int(child))


def proportional_bytes(pid: int) -> int:
    """Memory of a process; of what it shares with others, its part."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(map(int, re.findall(r"^Pss: +(\d+)", text, re.MULTILINE)))


def run(name: str, command: list[str], *, log: Path, num_cpus: int = 1) -> dict[str, str]:
    """Run a job on as many CPUs as it needs, be they there or not. Returns a row of the table."""
    cpus = max(num_cpus, len(os.sched_getaffinity(0)))
    env = {**os.environ, "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": cpus})}
    print(f"{name}: {shlex.join(command)}", flush=True)
    begin = time.monotonic()
    with log.open("w") as output:
        job = subprocess.Popen(
            [sys.executable, "-u", *command], stdout=output, stderr=subprocess.STDOUT, env=env
        )
        memory = Memory(job.pid)
        code = job.wait()
    seconds = time.monotonic() - begin
    memory.join()
    if code:
        raise SystemExit(f"{name} ended with {code}, see {log}")
    row = {
        "job": name,
        "minutes": f"{seconds / 60:.1f}",
        "GB of all processes": f"{memory.most / 1e9:.1f}",
        "GB of the largest": f"{memory.largest / 1e9:.1f}",
    }
    print(row, flush=True)
    return row


def main(options: Options) -> None:
    """Make the stores, run the jobs and print the table."""
    folder = Path(options.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    encoder = make_encoder(folder)
    flags = ["--encoder", encoder.encoder, "--pretrained", str(encoder.pretrained), "--precision", "float32"]
    names = words(options.classes)
    classes = folder / "classes.txt"
    classes.write_text("\n".join(names))
    info = describe(encoder, tuple(names), templates("default"))
    many = folder / f"many-{options.images}"
    few = folder / "evaluated"
    write_store(many, info=info, names=names, num_images=options.images, seed=1)
    write_store(few, info=info, names=names, num_images=EVALUATED, seed=2)
    rows = []
    probe = ""
    for workers in options.workers.split(","):
        out = folder / f"selftrain-{workers}"
        shutil.rmtree(out, ignore_errors=True)
        command = [
            "jobs/selftrain.py",
            "--data",
            str(many),
            "--eval-data",
            str(few),
            "--classes",
            str(classes),
        ]
        command += [*flags, "--views", "weak,strong", "--num-workers", workers, "--out", str(out)]
        if options.neighbours != "auto":
            command += ["--neighbours", options.neighbours]
        name = "selftrain" if workers == "0" else f"selftrain, workers: {workers}"
        row = run(name, command, log=folder / f"selftrain-{workers}.log", num_cpus=int(workers))
        rows.append(row | figures(out))
        probe = probe or str(out / "probe")
    labels = folder / "labels.parquet"
    command = ["jobs/predict.py", "--probe", probe, "--data", str(many), "--out", str(labels)]
    rows.append(run("predict", command, log=folder / "predict.log"))
    shutil.rmtree(folder / "evaluate", ignore_errors=True)
    command = ["jobs/evaluate.py", "--probe", probe, "--data", str(few), "--out", str(folder / "evaluate")]
    rows.append(run("evaluate", command, log=folder / "evaluate.log"))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(format_table([{key: row.get(key, "") for key in columns} for row in rows]))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2))


def figures(out: Path) -> dict[str, str]:
    """What a training came to, out of its summary."""
    summary = json.loads((out / "summary.json").read_text())
    return {
        "minutes of the rounds": f"{summary['timings']['rounds'] / 60:.1f}",
        "rounds": str(len(summary["rounds"])),
        "zero-shot %": f"{100 * summary['zero_shot']['accuracy']:.1f}",
        "probe %": f"{100 * summary['probe']['accuracy']:.1f}",
    }


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
