"""Speed from images to features, beside the fastest that this machine's cores allow and beside plain loops.

    python benchmarks/encoding.py                                        # lite, both kinds of images, one view
    python benchmarks/encoding.py --kinds photo --views weak,strong weak,strong,strong2 --num-images 300
    python benchmarks/encoding.py --encoder ViT-B-32 --kinds photo       # random weights, unless --pretrained FILE
    python benchmarks/encoding.py --growth --kinds small                 # 1, 4 and 16 times the images
    python benchmarks/encoding.py --precision-check --images photos/ --classes cat,dog

Images are generated: `small`, 32x32 PNGs in a Parquet file, and `photo`, 500x375 JPEGs in a folder. Arms of a setting
take turns, --repeats times, so that they share whatever else the machine does; a ratio is the median of the ratios
within a turn. An image counts once, however many views it has.

- bare: the forward pass alone, on batches that lie ready, on all cores.
- loop, N workers: torch's DataLoader with this project's decoding, views and encoder. The fastest is the best loop.
- open_clip loop: open_clip's own transform and float32 weights, under bfloat16 autocast where the CPU multiplies in it.
  It runs the model as CLIP_benchmark does: no_grad, and weights that require gradients, without which autocast is far
  slower. benchmarks/peers.py measures CLIP_benchmark itself.
- pipeline: lpclip.features.find_or_encode.

"images/s" leaves the start out. A loop's clock begins after its first batch, the pipeline's with the encoder's first;
what the pipeline has decoded ahead by then is charged to it, as if all cores had done it. "from start" has all but
Python's imports in it: loading the encoder, and for the pipeline Ray, its workers and the encoder's actor.

"decode", "encode" and "commit" are CPU milliseconds an image by the clocks of the processes that did it, "other" is
what the tree of processes used besides: imports, the start, the loop itself, transport. "peak MB" is the tree's largest
proportional set size, seen once a second. Bare and loops are given what makes them faster than users have them: the
pipeline's malloc settings, and OpenMP threads that sleep where they would wait for each other in a loop and take the
decoding processes' cores. The open_clip loop runs as it is.

The bound: with decoding (d CPU seconds an image) and the bare forward pass (f) sharing C cores without loss,
C / (d + f) images a second is the most that can be. On a busy machine not all C cores are ours: "paired" is the same
bound from the turn's own bare rate, bare x f / (d + f).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lpclip.config import ClassConfig, EncoderConfig, SourceConfig
from lpclip.encoders.encoder import Encoder
from lpclip.encoders.engine import computes_bfloat16
from lpclip.encoders.load import load_encoder
from lpclip.encoders.prompts import templates
from lpclip.encoders.zero_shot import zero_shot_weights
from lpclip.features import find_or_encode as pipeline
from lpclip.features.describe import describe_encoder
from lpclip.features.encode_stage import TORCH_ENV
from lpclip.images.classes import resolve_classes
from lpclip.images.open import open_source
from lpclip.images.pixels import decode_image
from lpclip.images.render import render
from lpclip.images.views import WEAK, parse_views
from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.process import start_ray
from lpclip.jobs.runtime import versions
from lpclip.report.tables import format_table

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BARE_IMAGES = 512
DECODED_IMAGES = 256
SIZES = (1, 4, 16)
LIMITS = SourceConfig()
LOOP_ENVIRONMENT = {**TORCH_ENV, "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure encoding beside the bare forward pass and plain loops."""

    encoder: str = "lite"
    """lite or an open_clip model."""
    pretrained: str | None = None
    """Checkpoint file or tag of an open_clip model; by default random weights, which are as fast."""
    precision: str = "auto"
    """Weights' dtype, as in the jobs."""
    kinds: tuple[str, ...] = ("small", "photo")
    """Images to generate: small (32x32 PNGs in Parquet), photo (500x375 JPEGs in a folder)."""
    views: tuple[str, ...] = ("weak",)
    """Settings of views, each a comma list."""
    num_images: int = 768
    """Images of a setting; with --growth the smallest number."""
    batch_size: int = 64
    """Images in one forward pass."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Worker processes that the plain loop is tried with."""
    repeats: int = 3
    """Turns of all arms."""
    growth: bool = False
    """Measure the pipeline alone, with 1, 4 and 16 times the images."""
    precision_check: bool = False
    """Compare features and predictions of --precision with float32 instead of measuring time."""
    images: str | None = None
    """Images of the precision check: whatever the jobs take as --data; generated ones by default."""
    classes: str | None = None
    """Class names of the precision check, as in the jobs; ImageNet's by default."""
    folder: str = "runs/encoding-benchmark"
    """Folder for generated images and random weights, which are kept."""
    json: str | None = None
    """File to write the numbers to."""


# Images


def generate(kind: str, index: int) -> bytes:
    """The encoded image of a kind and number: smooth colours with some noise, the same every time."""
    rng = np.random.default_rng([index, len(kind)])
    size, coarse = {"small": ((32, 32), (6, 6, 3)), "photo": ((500, 375), (18, 24, 3))}[kind]
    blobs = Image.fromarray(rng.integers(0, 256, coarse, np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(blobs) + rng.normal(0, 6, (*size[::-1], 3)).astype(np.float32)
    buffer = io.BytesIO()
    options = {"format": "PNG"} if kind == "small" else {"format": "JPEG", "quality": 90}
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, **options)
    return buffer.getvalue()


def make_images(kind: str, count: int, *, folder: str) -> str:
    """Generate images under the folder, unless they are there. Returns the path of the data."""
    path = Path(folder).absolute() / f"{kind}-{count}"
    data = path / "images.parquet" if kind == "small" else path
    if path.exists():
        return str(data)
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if kind == "small":
        rows = {"id": [f"{i:06d}" for i in range(count)], "image": [generate(kind, i) for i in range(count)]}
        pq.write_table(pa.table(rows), part / data.name)
    else:
        for i in range(count):
            (part / f"{i:06d}.jpg").write_bytes(generate(kind, i))
    part.rename(path)
    return str(data)


def make_weights(name: str, *, folder: str) -> str:
    """A checkpoint of an open_clip model with random weights, made once. Returns its path."""
    import open_clip
    from safetensors.torch import save_file

    path = Path(folder).absolute() / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in open_clip.create_model(name).state_dict().items()}, path)
    return str(path)


@cache
def image_bytes(data: str) -> Sequence[Callable[[], bytes]]:
    """The part that reads each image of generated data: Parquet lies in memory, as CIFAR does in most loops."""
    if data.endswith(".parquet"):
        return [image.as_py for image in pq.read_table(data, columns=["image"])["image"]]
    return [path.read_bytes for path in sorted(Path(data).iterdir())]


# Arms


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The work that all arms of a table share."""

    data: str
    num_images: int
    encoder: EncoderConfig
    views: str
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One arm in one turn; times in seconds, memory in MB, CPU seconds an image."""

    rate: float
    """Images a second, the start left out."""
    from_start: float | None = None
    """Images a second with the start."""
    decode: float | None = None
    encode: float | None = None
    commit: float | None = None
    other: float | None = None
    peak_mb: float | None = None


class Loop(Dataset[tuple[Tensor, float]]):
    """Decoded views (V, S, S, 3) uint8 of each image, and the CPU seconds that they took."""

    def __init__(self, setting: Setting, encoder: Encoder) -> None:
        self.reads = image_bytes(setting.data)[: setting.num_images]
        self.views, self.preprocess = parse_views(setting.views), encoder.preprocess

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        begin = time.thread_time()
        bounds = {"max_pixels": LIMITS.max_pixels, "max_bytes": LIMITS.max_bytes}
        image = decode_image(self.reads[index](), **bounds, size=self.preprocess.size)
        options: dict[str, Any] = {"id": str(index), "preprocess": self.preprocess, "seed": 0}
        views = np.stack([render(image, view=view, **options) for view in self.views])
        return torch.from_numpy(views), time.thread_time() - begin


class OpenClipLoop(Dataset[tuple[Tensor, float]]):
    """Images (3, S, S) float32 by open_clip's own transform, and the CPU seconds that they took."""

    def __init__(self, setting: Setting, transform: Callable[[Image.Image], Tensor]) -> None:
        self.reads, self.transform = image_bytes(setting.data)[: setting.num_images], transform

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        begin = time.thread_time()
        with Image.open(io.BytesIO(self.reads[index]())) as image:
            pixels = self.transform(image)
        return pixels, time.thread_time() - begin


@cache
def loaded(config: EncoderConfig) -> tuple[Encoder, float]:
    """An encoder on all cores, and the seconds that it took to load."""
    begin = time.perf_counter()
    torch.set_num_threads(CORES)
    return load_encoder(config), time.perf_counter() - begin


@cache
def loaded_open_clip(config: EncoderConfig) -> tuple[Any, Callable[[Image.Image], Tensor], float]:
    """An open_clip model in float32 and its transform, as open_clip gives them, and the seconds that it took."""
    import open_clip

    begin = time.perf_counter()
    torch.set_num_threads(CORES)
    model, _, transform = open_clip.create_model_and_transforms(config.encoder, pretrained=config.pretrained)
    return model.eval(), transform, time.perf_counter() - begin


def run_bare(setting: Setting) -> Outcome:
    """The forward pass on batches that lie ready; an image has a row for each view."""
    encoder, _ = loaded(setting.encoder)
    num_views = len(parse_views(setting.views))
    ready = prepared(setting)
    encoder.encode_image(ready[0])
    begin, cpu = time.perf_counter(), time.process_time()
    count = 0
    for batch in itertools.islice(itertools.cycle(ready), -(-BARE_IMAGES // setting.batch_size)):
        encoder.encode_image(batch)
        count += len(batch)
    images = count / num_views
    rate = images / (time.perf_counter() - begin)
    return Outcome(rate=rate, encode=(time.process_time() - cpu) / images)


@cache
def prepared(setting: Setting) -> list[Tensor]:
    """Up to four whole batches (B, S, S, 3) uint8 of the setting's own images."""
    loop = Loop(setting, loaded(setting.encoder)[0])
    rows = itertools.cycle(pixels for i in range(len(loop)) for pixels in loop[i][0])
    return [torch.stack(list(itertools.islice(rows, setting.batch_size))) for _ in range(4)]


def run_decode(setting: Setting) -> Outcome:
    """Decoding alone, on one core."""
    loop = Loop(setting, loaded(setting.encoder)[0])
    seconds = [loop[i][1] for i in range(min(len(loop), DECODED_IMAGES))]
    return Outcome(rate=1 / statistics.fmean(seconds), decode=statistics.fmean(seconds))


def run_loop(setting: Setting, num_workers: int) -> Outcome:
    """The plain loop; features end as float16 in memory."""
    encoder, load = loaded(setting.encoder)

    def encode(pixels: Tensor) -> Tensor:
        found = encoder.encode_image(pixels.flatten(0, 1))
        return found.half().unflatten(0, pixels.shape[:2])

    return _loop(Loop(setting, encoder), encode, load=load, setting=setting, num_workers=num_workers)


def run_open_clip(setting: Setting) -> Outcome:
    """open_clip's model and transform, decoding in this process."""
    model, transform, load = loaded_open_clip(setting.encoder)

    # inference_mode, or frozen weights, would more than halve the rate under autocast.
    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16()):
            return F.normalize(model.encode_image(pixels), dim=-1).half()

    dataset = OpenClipLoop(setting, transform)
    return _loop(dataset, encode, load=load, setting=setting, num_workers=0)


def _loop(
    dataset: Dataset[tuple[Tensor, float]],
    encode: Callable[[Tensor], Tensor],
    *,
    load: float,
    setting: Setting,
    num_workers: int,
) -> Outcome:
    loader = DataLoader(dataset, batch_size=setting.batch_size, num_workers=num_workers)
    features: list[Tensor] = []
    decoding, encoding = 0.0, 0.0
    begin = first = time.perf_counter()
    for pixels, seconds in loader:
        cpu = time.process_time()
        features.append(encode(pixels))
        encoding += time.process_time() - cpu
        decoding += float(seconds.sum())
        if len(features) == 1:
            first = time.perf_counter()
    end = time.perf_counter()
    images = sum(map(len, features))
    return Outcome(
        rate=(images - len(features[0])) / (end - first),
        from_start=images / (load + end - begin),
        decode=decoding / images,
        encode=encoding / images,
    )


# The pipeline


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of a stage: its rows, when it was made on the machine's monotonic clock, CPU seconds."""

    rows: int
    start: float
    end: float
    cpu: float


def run_pipeline(setting: Setting) -> Outcome:
    """Ray's start, and then the pipeline into a store that is thrown away; Ray is stopped after it."""
    begin = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        start_ray()
        blocks = encode_once(setting)
    images, seconds = sum(block.rows for block in blocks["encode"]), time.perf_counter() - begin
    ray.shutdown()
    return Outcome(
        rate=steady_rate(blocks, cores=CORES),
        from_start=images / seconds,
        **{stage: sum(block.cpu for block in found) / images for stage, found in blocks.items()},
    )


def encode_once(setting: Setting) -> dict[str, list[Block]]:
    """Encode the setting's images under a Ray that runs. Returns the blocks of each stage, as Ray Data timed them."""
    limits = replace(LIMITS, id_column="id" if setting.data.endswith(".parquet") else None)
    source = open_source(setting.data, config=limits, limit=setting.num_images)
    info = describe_encoder(setting.encoder)
    options: dict[str, Any] = {"info": info, "encoder": setting.encoder, "batch_size": setting.batch_size}
    with tempfile.TemporaryDirectory() as store, _kept_datasets() as datasets:
        encoding = pipeline.Encoding(**options, folder=store)
        encoding.encode(source, views=parse_views(setting.views), path=store)
    (dataset,) = datasets
    return _blocks(dataset)


@contextlib.contextmanager
def _kept_datasets() -> Iterator[list[Any]]:
    """Keep hold of the datasets that lpclip.features.find_or_encode runs: their statistics are in no file."""
    fill, kept = pipeline.fill_store, []

    def keep(*args: Any, stages: Callable[..., Any], **options: Any) -> Any:
        def kept_stages(*units: Any) -> Any:
            kept.append(stages(*units))
            return kept[-1]

        return fill(*args, stages=kept_stages, **options)

    pipeline.fill_store = keep
    try:
        yield kept
    finally:
        pipeline.fill_store = fill


def _blocks(dataset: Any) -> dict[str, list[Block]]:
    stats, found = dataset._raw_stats(), []
    for stage in ("commit", "encode", "decode"):
        (metadata,) = stats.metadata.values()
        times = [(block.num_rows, block.exec_stats) for block in metadata]
        blocks = [
            Block(rows=n, start=t.start_time_s, end=t.end_time_s, cpu=t.cpu_time_s or 0.0) for n, t in times
        ]
        found.append((stage, blocks))
        (stats,) = stats.parents
    return dict(reversed(found))


def steady_rate(blocks: Mapping[str, Sequence[Block]], *, cores: int) -> float:
    """Images a second from the encoder's first batch to the last commit, decoding that was done before charged."""
    begin = min(block.start for block in blocks["encode"])
    ahead = sum(
        block.cpu * min(1.0, max(0.0, begin - block.start) / (block.end - block.start))
        for block in blocks["decode"]
    )
    seconds = max(block.end for block in blocks["commit"]) - begin
    return sum(block.rows for block in blocks["encode"]) / (seconds + ahead / cores)


# Processes


class Meter:
    """CPU seconds and the largest proportional set size (MB) of a process and all below it, while it is open."""

    def __init__(self, pid: int) -> None:
        self.peak_mb = 0.0
        self._root = psutil().Process(pid)
        self._cpu: dict[int, float] = {}
        self._before: dict[int, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def cpu(self) -> float:
        """CPU seconds since it was opened; of a process that has ended, what was seen of it."""
        return sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._cpu.items())

    def __enter__(self) -> Meter:
        self._look(memory=True)
        self._before = dict(self._cpu)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        for tick in itertools.count(1):
            ended = self._end.wait(0.25)
            self._look(memory=ended or tick % 4 == 0)
            if ended:
                return

    def _look(self, *, memory: bool) -> None:
        total, tree = 0.0, [self._root]
        with contextlib.suppress(psutil().Error):
            # The root may have ended already.
            tree += self._root.children(recursive=True)
        for process in tree:
            with contextlib.suppress(psutil().Error):
                times = process.cpu_times()
                self._cpu[process.pid] = times.user + times.system
                # Walking a process's memory map holds up its page faults: seldom.
                total += process.memory_full_info().pss / 2**20 if memory else 0.0
        self.peak_mb = max(self.peak_mb, total)


def psutil() -> Any:
    """Ray's own copy of psutil, which importing Ray makes known."""
    return importlib.import_module("psutil")


@contextlib.contextmanager
def worker(environment: Mapping[str, str]) -> Iterator[Callable[..., Outcome]]:
    """A fresh process with additional environment variables; yields what measures an arm in it."""
    before = dict(os.environ)
    os.environ.update(environment)
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    pid = pool.submit(os.getpid).result()
    os.environ.clear()
    os.environ.update(before)

    def measure(arm: Callable[..., Outcome], setting: Setting, *args: Any) -> Outcome:
        with Meter(pid) as meter:
            found = pool.submit(arm, setting, *args).result()
        used = sum(filter(None, (found.decode, found.encode, found.commit)))
        # Bare and decode run on a part of the images, or on some again: the tree's clocks say nothing of them.
        other = None if found.from_start is None else max(0.0, meter.cpu / setting.num_images - used)
        return replace(found, other=other, peak_mb=meter.peak_mb)

    try:
        yield measure
    finally:
        pool.shutdown()


def measure_pipeline(setting: Setting) -> Outcome:
    """The pipeline in a process of its own, since a second start of Ray in one process would be a warm one."""
    with worker({}) as measure:
        return measure(run_pipeline, setting)


# Tables


Turn = dict[str, Outcome]


def take_turns(setting: Setting, *, workers: Sequence[int], repeats: int) -> list[Turn]:
    """All arms of a setting, one after the other, `repeats` times."""
    turns: list[Turn] = []
    with worker(LOOP_ENVIRONMENT) as measure, worker({}) as measure_plain:
        for number in range(repeats):
            print(f"turn {number + 1} of {repeats}", file=sys.stderr, flush=True)
            turn = {"decode": measure(run_decode, setting), "bare": measure(run_bare, setting)}
            for count in workers:
                turn[loop_name(count)] = measure(run_loop, setting, count)
            if setting.encoder.encoder != "lite" and setting.views == "weak":
                turn["open_clip loop"] = measure_plain(run_open_clip, setting)
            turn["pipeline"] = measure_pipeline(setting)
            turns.append(turn)
    return turns


def loop_name(num_workers: int) -> str:
    """The name of a plain loop's arm."""
    return f"loop, {num_workers} worker{'s' * (num_workers != 1)}"


def median(turns: Sequence[Turn], arm: str, field: str = "rate") -> float | None:
    """The median of one number of an arm, None where it is not measured."""
    values = [getattr(turn[arm], field) for turn in turns]
    return None if None in values else statistics.median(values)


def ratio(turns: Sequence[Turn], arm: str, other: str) -> float:
    """The median of the turns' own ratios of two arms' rates."""
    return statistics.median(turn[arm].rate / turn[other].rate for turn in turns)


def best_loop(turns: Sequence[Turn]) -> str:
    """The plain loop with the largest median rate."""
    return max((arm for arm in turns[0] if arm.startswith("loop,")), key=lambda arm: median(turns, arm) or 0)


def bounds(turns: Sequence[Turn], *, cores: int) -> dict[str, float]:
    """The most images a second that decoding and forward pass allow, and the pipeline's share of it."""
    costs = [(turn["decode"].decode or 0.0, turn["bare"].encode or 0.0) for turn in turns]
    decode, forward = (statistics.median(values) for values in zip(*costs, strict=True))
    paired = [turn["bare"].rate * f / (d + f) for turn, (d, f) in zip(turns, costs, strict=True)]
    rates = [turn["pipeline"].rate for turn in turns]
    bound = cores / (decode + forward)
    return {
        "decode": decode,
        "forward": forward,
        "bound": bound,
        "share": statistics.median(rates) / bound,
        "paired_bound": statistics.median(paired),
        "paired_share": statistics.median(r / b for r, b in zip(rates, paired, strict=True)),
    }


def table_rows(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A row an arm, as the table shows it."""
    best = best_loop(turns)
    rows = []
    for arm in turns[0]:
        if arm == "decode":
            continue
        numbers = {field: median(turns, arm, field) for field in ("decode", "encode", "commit", "other")}
        start, peak = median(turns, arm, "from_start"), median(turns, arm, "peak_mb")
        rows.append(
            {
                "arm": arm,
                "images/s": f"{median(turns, arm):.1f}",
                "from start": None if start is None else f"{start:.1f}",
                "to bare": f"{ratio(turns, arm, 'bare'):.2f}",
                "to best loop": f"{ratio(turns, arm, best):.2f}",
                **{f"{k} ms": None if v is None else f"{1000 * v:.2f}" for k, v in numbers.items()},
                "peak MB": None if peak is None else round(peak),
            }
        )
    return rows


def growth_rows(outcomes: Mapping[int, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """A row a number of images: seconds from the start, beside a straight line through the first two, and memory."""
    counts = list(outcomes)
    seconds = [statistics.median(n / (o.from_start or np.nan) for o in outcomes[n]) for n in counts]
    peaks = [statistics.median(o.peak_mb or np.nan for o in outcomes[n]) for n in counts]
    slope = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
    return [
        {
            "images": n,
            "seconds": s,
            "images/s": statistics.median(o.rate for o in outcomes[n]),
            "from linear %": None if i < 2 else s / (seconds[0] + slope * (n - counts[0])) - 1,
            "peak MB": round(peak),
            "peak to first %": peak / peaks[0] - 1,
        }
        for i, (n, s, peak) in enumerate(zip(counts, seconds, peaks, strict=True))
    ]


# Precision


def compare_precision(
    encoder: Encoder, reference: Encoder, images: Sequence[bytes], *, head: Tensor, batch_size: int
) -> dict[str, float]:
    """Cosines (mean, min) of two encoders' features of the same images, and the share of equal predictions."""
    cosines, equal = [], []
    for start in range(0, len(images), batch_size):
        found = [
            decode_image(data, max_pixels=LIMITS.max_pixels, max_bytes=LIMITS.max_bytes)
            for data in images[start : start + batch_size]
        ]
        views = [render(i, id="", view=WEAK, preprocess=reference.preprocess, seed=0) for i in found]
        pixels = torch.from_numpy(np.stack(views))
        a, b = (one.encode_image(pixels) for one in (encoder, reference))
        cosines.append((a * b).sum(1))
        equal.append((a @ head.T).argmax(1) == (b @ head.T).argmax(1))
    cosine, same = torch.cat(cosines), torch.cat(equal)
    return {
        "images": len(cosine),
        "mean cosine": float(cosine.mean()),
        "min cosine": float(cosine.min()),
        "equal predictions %": float(same.float().mean()),
    }


def check_precision(config: EncoderConfig, options: Options) -> list[dict[str, Any]]:
    """One row for each kind of images, or for those given."""
    import open_clip

    torch.set_num_threads(CORES)
    encoder, reference = (load_encoder(c) for c in (config, replace(config, precision="float32")))
    names = (
        resolve_classes(ClassConfig(classes=options.classes), label_names=None).names
        if options.classes
        else tuple(open_clip.IMAGENET_CLASSNAMES)
    )
    head = zero_shot_weights(reference, names, templates=templates("default")[:2])
    rows = []
    for kind in [options.images] if options.images else options.kinds:
        data = kind if options.images else make_images(kind, options.num_images, folder=options.folder)
        source = open_source(data, config=LIMITS, limit=options.num_images)
        read = (row for unit in source.units for row in source.reader.rows(unit))
        images = [row.image for row in read if row.image is not None]
        found = compare_precision(encoder, reference, images, head=head, batch_size=options.batch_size)
        rows.append(
            {
                "images of": source.name,
                "dtype": encoder.identity["precision"],
                **{k: f"{v:.5f}" if "cosine" in k else v for k, v in found.items()},
            }
        )
    return rows


def main(options: Options) -> None:
    """Measure what the options ask for, print tables, write JSON."""
    if options.num_images <= options.batch_size:
        raise ValueError(f"--num-images must be more than the batch size of {options.batch_size}")
    random = options.encoder != "lite" and options.pretrained is None
    pretrained = make_weights(options.encoder, folder=options.folder) if random else options.pretrained
    config = EncoderConfig(encoder=options.encoder, pretrained=pretrained, precision=options.precision)  # type: ignore[arg-type]
    written: dict[str, Any] = {
        "cores": CORES,
        "options": asdict(options),
        "versions": versions(),
        "tables": [],
    }
    print(f"{options.encoder}{', random weights' * random}, {CORES} cores", flush=True)
    if options.precision_check:
        rows = check_precision(config, options)
        print(format_table(rows))
        written["tables"].append({"rows": rows})
    settings = [] if options.precision_check else list(itertools.product(options.kinds, options.views))
    for kind, views in settings:
        count = options.num_images * (SIZES[-1] if options.growth else 1)
        setting = Setting(
            data=make_images(kind, count, folder=options.folder),
            num_images=count,
            encoder=config,
            views=views,
            batch_size=options.batch_size,
        )
        print(f"\n{kind}, views {views}, {options.num_images:,} images, {options.repeats} turns", flush=True)
        if options.growth:
            sizes = [options.num_images * size for size in SIZES]
            outcomes: dict[int, list[Outcome]] = {size: [] for size in sizes}
            for size in sizes * options.repeats:
                outcomes[size].append(measure_pipeline(replace(setting, num_images=size)))
            rows = growth_rows(outcomes)
            print(format_table(rows), flush=True)
            written["tables"].append({"kind": kind, "views": views, "rows": rows})
        else:
            turns = take_turns(setting, workers=options.workers, repeats=options.repeats)
            rows, bound = table_rows(turns), bounds(turns, cores=CORES)
            print(format_table(rows))
            print(
                f"best loop: {best_loop(turns)}. Bound: {CORES} cores / ({1000 * bound['decode']:.2f} + "
                f"{1000 * bound['forward']:.2f} ms) = {bound['bound']:.0f} images/s, the pipeline reaches "
                f"{bound['share']:.0%}; paired {bound['paired_bound']:.0f} images/s, {bound['paired_share']:.0%}",
                flush=True,
            )
            found = [{arm: asdict(outcome) for arm, outcome in turn.items()} for turn in turns]
            written["tables"].append(
                {"kind": kind, "views": views, "rows": rows, "bound": bound, "turns": found}
            )
        if options.json:
            Path(options.json).write_text(json.dumps(written, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, config=OPTIONS))
