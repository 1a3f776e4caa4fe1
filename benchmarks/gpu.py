"""A GPU's own limits, and how near to them encoding, the rounds and pretraining come.

    python benchmarks/gpu.py --json runs/gpu.json         # about 9 minutes with one GPU and 16 cores
    python benchmarks/gpu.py --parts forward rounds       # some of the parts
    python benchmarks/gpu.py --head head.npy --images test.parquet      # agreement on these images

Without a GPU everything runs small on the CPU and says so: this shows that it works, not how fast it is. Each part is
a process of its own with a time limit, and its rows are written as soon as they are there.

- machine: the card, and what it reaches: a large product in bfloat16 and float32, copies on the card and to it.
- forward: images a second of the encoder's pass over uint8 images that lie on the card, eager and compiled.
- decode: images a second of JPEGs (500x375) to pixels on all cores, by lpclip's decode stage without Ray; and on the
  card by nvJPEG, whole batches of whole images, where torchvision has it.
- agreement: features on the card beside float32 on the CPU: the smallest and mean cosine, and, for the lite encoder,
  the share of equal zero-shot predictions. Weights of open_clip models are random. And features of JPEGs decoded on
  the card beside those of Pillow's pixels.
- rounds: seconds of a round of self-training at 1.28 million x 512 x 1,000, and the least that the card's own rates
  allow for its three products and eight sweeps over N x K numbers.
- psd: a pretraining step with progressive self-distillation over one with InfoNCE, ViT-B-32, batch 1,024.
- pipeline: images a second from JPEGs in a folder to a store, by Ray, in the middle half of the run; beside the rates
  of `forward` and `decode`; and the share of that time in which the card was busy, by nvidia-smi.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from encoding import CORES, generate, make_weights
from torch import Tensor

from lpclip.config import Decode, EncoderConfig, ModelConfig, PretrainConfig, SelfTrainingConfig, SourceConfig
from lpclip.encoders.encoder import Encoder, to_input
from lpclip.encoders.load import load_encoder
from lpclip.images.open import open_source
from lpclip.images.pixels import decode_image
from lpclip.images.render import weak_view
from lpclip.images.views import parse_views, pixel_views
from lpclip.report.tables import format_table

Part = Literal["prepare", "machine", "forward", "decode", "agreement", "rounds", "psd", "pipeline"]
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
PARTS: dict[Part, int] = {
    "prepare": 90,
    "machine": 40,
    "forward": 150,
    "decode": 90,
    "agreement": 60,
    "rounds": 60,
    "psd": 60,
    "pipeline": 240,
}
"""Parts, and the most seconds that each may take."""
MODELS = ("ViT-B-32", "ViT-L-14") if HAS_GPU else ("ViT-B-32",)
PHOTOS = 2048 if HAS_GPU else 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the parts on this machine's GPU."""

    parts: tuple[Part, ...] = tuple(PARTS)
    """Parts to run, in this order."""
    json: str | None = None
    """File to write the rows to, part by part."""
    folder: str = "runs/gpu-benchmark"
    """Folder for generated images and random weights, which are kept."""
    models: tuple[str, ...] = MODELS
    """open_clip models, the first of them for agreement too."""
    images: str | None = None
    """Images for the part agreement, in any form that the jobs take as --data. By default they are generated."""
    head: str | None = None
    """Class embeddings (K, 1280) as .npy for the lite encoder's predictions; by default a dozen class names'."""


Row = dict[str, Any]


def median_seconds(run: Callable[[], object], *, repeats: int, warmup: int = 2) -> float:
    """Median seconds of a call, the device's work included."""
    found = []
    for number in range(warmup + repeats):
        begin = time.perf_counter()
        run()
        if HAS_GPU:
            torch.cuda.synchronize()
        if number >= warmup:
            found.append(time.perf_counter() - begin)
    return statistics.median(found)


# Parts: each yields rows


def prepare(options: Options) -> Iterator[Row]:
    """Images and weights, once, on all cores."""
    begin = time.perf_counter()
    folder = Path(options.folder, "photos")
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        weights = [pool.submit(make_weights, name, folder=options.folder) for name in options.models]
        list(pool.map(partial(_write_photo, str(folder)), range(PHOTOS), chunksize=16))
        for future in weights:
            future.result()
    yield {"photos": PHOTOS, "seconds": time.perf_counter() - begin}


def _write_photo(folder: str, number: int) -> None:
    path = Path(folder, f"{number:05d}.jpg")
    if not path.exists():
        path.write_bytes(generate("photo", number))


def machine(options: Options) -> Iterator[Row]:
    """Name the machine, and measure its rates."""
    yield {
        "card": torch.cuda.get_device_name() if HAS_GPU else "no GPU",
        "driver": _smi("driver_version"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": CORES,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }
    rates = measure_rates()
    yield rates


def measure_rates() -> Row:
    """TFLOP/s of large products and GB/s of copies."""
    size = 8192 if HAS_GPU else 512
    row: Row = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        seconds = median_seconds(partial(torch.matmul, a, b), repeats=5)
        row[f"{str(dtype).removeprefix('torch.')}_tflops"] = 2 * size**3 / seconds / 1e12
    x = torch.empty((1 << 31) if HAS_GPU else (1 << 24), dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    row["copy_gb_s"] = 2 * len(x) / median_seconds(lambda: y.copy_(x), repeats=5) / 1e9
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=HAS_GPU)
    there = torch.empty_like(host, device=DEVICE, pin_memory=False)
    row["to_card_gb_s"] = len(host) / median_seconds(lambda: there.copy_(host), repeats=3) / 1e9
    return row


def forward(options: Options) -> Iterator[Row]:
    """Images a second of the encoder's pass over images that lie on the device."""
    for name in options.models:
        encoder = _open_clip(options, name)
        size = encoder.preprocess.size
        batches = (64, 256, 512) if HAS_GPU else (8,)

        def rate(encode: Callable[[Tensor], Tensor], batch: int, size: int = size) -> float:
            shape = (batch, size, size, 3)
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
            return batch / median_seconds(partial(encode, pixels), repeats=8 if HAS_GPU else 2)

        for batch in batches:
            yield {
                "model": name,
                "how": "eager",
                "batch": batch,
                "images_s": rate(encoder.encode_image, batch),
            }
        torch.backends.mha.set_fastpath_enabled(False)
        slow = {"model": name, "how": "eager, no fast path", "batch": batches[-1]}
        yield {**slow, "images_s": rate(encoder.encode_image, batches[-1])}
        torch.backends.mha.set_fastpath_enabled(True)
        batch = batches[len(batches) // 2]
        pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=DEVICE)
        with ThreadPoolExecutor(2) as workers:
            run = partial(_drain, workers.map, partial(_own_stream, encoder), [pixels] * 8)
            seconds = median_seconds(run, repeats=3, warmup=1)
        found = 8 * batch / seconds
        yield {"model": name, "how": "eager, two streams", "batch": batch, "images_s": found}
        torch._dynamo.reset()
        compiled = torch.compile(partial(_no_grad_forward, encoder), dynamic=False)
        begin = time.perf_counter()
        compiled(torch.zeros((batch, size, size, 3), dtype=torch.uint8, device=DEVICE))
        row = {"compile_seconds": time.perf_counter() - begin}
        yield {"model": name, "how": "compiled", "batch": batch, "images_s": rate(compiled, batch)} | row


def _own_stream(encoder: Encoder, pixels: Tensor) -> None:
    with torch.cuda.stream(torch.cuda.Stream()) if HAS_GPU else contextlib.nullcontext():
        encoder.encode_image(pixels).cpu()


@torch.no_grad()
def _no_grad_forward(encoder: Any, pixels: Tensor) -> Tensor:
    """The encoder's pass without inference mode, which the compiler refuses."""
    images = to_input(pixels, encoder.preprocess, dtype=encoder.dtype, device=encoder.device)
    return F.normalize(encoder._model.encode_image(images).float(), dim=1)


def decode(options: Options) -> Iterator[Row]:
    """Images a second from JPEG files to pixels: all cores, and the card."""
    folder = Path(options.folder, "photos").absolute()
    for views in ("weak", "weak,strong"):
        with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
            on_cpu = partial(_decode_unit, str(folder), views)
            list(pool.map(on_cpu, range(CORES)))  # imports
            units = (list(range(-(-PHOTOS // 256))) * (4 if HAS_GPU else 1))[: 4 * CORES]
            begin = time.perf_counter()
            done = sum(pool.map(on_cpu, units))
            yield {"how": f"{views}, {CORES} processes", "images_s": done / (time.perf_counter() - begin)}
    if HAS_GPU:
        paths = sorted(folder.iterdir())[:1024]
        data = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
        for how, size in (("", None), (" and resizing", 224)):
            for threads in (1, 2, 4):
                with ThreadPoolExecutor(threads) as workers:
                    on_card = partial(_decode_on_card, data, size)
                    run = partial(_drain, workers.map, on_card, range(0, len(data), 256))
                    seconds = median_seconds(run, repeats=3, warmup=1)
                yield {"how": f"nvJPEG{how}, {threads} threads", "images_s": len(data) / seconds}


def _decode_on_card(data: list[Tensor], size: int | None, start: int) -> None:
    from torchvision.io import decode_jpeg

    with torch.cuda.stream(torch.cuda.Stream()):
        for image in decode_jpeg(data[start : start + 256], device="cuda"):
            if size is not None:
                F.interpolate(image[None].float(), (size, size), mode="bicubic", antialias=True)
        torch.cuda.current_stream().synchronize()


def _drain(map_: Callable[..., Iterator[None]], *arguments: Any) -> None:
    for _ in map_(*arguments):
        pass


def _decode_unit(folder: str, views: str, number: int) -> int:
    import pyarrow as pa

    from lpclip.features.decode_stage import decode_unit
    from lpclip.images.pixels import Preprocess

    source = open_source(folder, config=SourceConfig())
    number %= len(source.units)
    tables = decode_unit(
        pa.table({"unit": [number], "spec": [source.units[number]]}),
        reader=source.reader,
        limits=source.config,
        views=pixel_views(parse_views(views)),
        preprocess=Preprocess(size=224, mean=(0.5,) * 3, std=(0.5,) * 3),
        seed=0,
    )
    return sum(len(table) for table in tables)


def agreement(options: Options) -> Iterator[Row]:
    """Features on the device beside float32 on the CPU."""
    for name in ("lite", options.models[0]):
        precisions = ("bfloat16", "float16", "float32") if HAS_GPU else ("float32",)
        reference = _encoder(options, name, precision="float32", device="cpu")
        pixels = _pixels(options, reference, count=(1024 if name == "lite" else 256) if HAS_GPU else 16)
        expected = _encode(reference, pixels)
        head = _head(options, reference) if name == "lite" else None
        for precision in precisions:
            encoder = _encoder(options, name, precision=precision, device=str(DEVICE))
            found = _encode(encoder, pixels)
            cosine = (found * expected).sum(dim=1)
            row = {"model": name, "precision": precision, "images": len(pixels)}
            row |= {"least_cosine": float(cosine.min()), "mean_cosine": float(cosine.mean())}
            if head is not None:
                same = (found @ head.T).argmax(dim=1) == (expected @ head.T).argmax(dim=1)
                row["equal_predictions"] = float(same.double().mean())
            yield row
        if HAS_GPU:
            yield {"model": name, **_decoding_agreement(options, encoder, head)}


def _decoding_agreement(options: Options, encoder: Encoder, head: Tensor | None) -> Row:
    """Features of JPEGs that the card decoded beside those that Pillow decoded, of one encoder on the card."""
    from lpclip.features.device_decoding import DeviceDecoder, Undecoded
    from lpclip.images.jpegs import ordinary_jpeg

    limits = SourceConfig()
    data = [row for row in _encoded(options, count=1024) if row.startswith(b"\xff\xd8")]
    headers = [ordinary_jpeg(row, max_pixels=10**8, max_bytes=10**8) for row in data]
    both = [(row, header) for row, header in zip(data, headers, strict=True) if header is not None]
    decoder = DeviceDecoder(encoder.preprocess, limits=limits, device=DEVICE)
    images = Undecoded(
        jpegs=[np.frombuffer(bytearray(row), np.uint8) for row, _ in both],
        areas=[header.area for _, header in both],
        orientations=[header.orientation for _, header in both],
        pixels=[None] * len(both),
    )
    found = decoder(images).cpu()
    expected = torch.from_numpy(np.stack([_weak(row, encoder) for row, _ in both]))
    difference = (found.int() - expected.int()).abs()
    a, b = _encode(encoder, found), _encode(encoder, expected)
    cosine = (a * b).sum(dim=1)
    row = {"precision": "decoded on the card", "images": len(both)}
    row |= {"least_cosine": float(cosine.min()), "mean_cosine": float(cosine.mean())}
    row |= {"left_to_pillow": len(data) - len(both), "errors": len(images.errors)}
    row |= {"mean_difference": float(difference.double().mean()), "largest": int(difference.max())}
    if head is not None:
        same = (a @ head.T).argmax(dim=1) == (b @ head.T).argmax(dim=1)
        row["equal_predictions"] = float(same.double().mean())
    return row


def _weak(data: bytes, encoder: Encoder) -> np.ndarray:
    return weak_view(decode_image(data, max_pixels=10**8, max_bytes=10**8), encoder.preprocess)


def _encoded(options: Options, *, count: int) -> list[bytes]:
    """Encoded images of the part agreement."""
    data = options.images or str(Path(options.folder, "photos").absolute())
    source = open_source(data, config=SourceConfig(), limit=count)
    return [row.image or b"" for unit in source.units for row in source.reader.rows(unit)]


def _pixels(options: Options, encoder: Encoder, *, count: int) -> Tensor:
    return torch.from_numpy(np.stack([_weak(data, encoder) for data in _encoded(options, count=count)]))


def _encode(encoder: Encoder, pixels: Tensor) -> Tensor:
    return torch.cat([encoder.encode_image(batch).cpu() for batch in pixels.split(64)])


def _head(options: Options, encoder: Encoder) -> Tensor:
    if options.head is not None:
        return torch.from_numpy(np.load(options.head)).float()
    names = ("dog", "cat", "horse", "ship", "truck", "car", "bird", "frog", "house", "tree", "cup", "chair")
    return encoder.encode_text([f"a photo of a {name}." for name in names]).cpu()


def rounds(options: Options) -> Iterator[Row]:
    """Seconds of a round, and the least that the card allows."""
    from rounds import random_features

    from lpclip.method.priors import Prior
    from lpclip.method.self_training import Rounds
    from lpclip.method.shard import Shard, fit_whitenings

    n, d, k = (1_280_000, 512, 1_000) if HAS_GPU else (20_000, 128, 100)
    rates = measure_rates()
    base = random_features(min(n, 80_000), d)
    features = np.concatenate([base] * (n // len(base)))
    head = F.normalize(torch.randn(k, d, generator=torch.Generator().manual_seed(0)), dim=1) / 0.03
    shard = Shard(features=features, num_rows=len(features), device=DEVICE)
    list(itertools.islice(shard.chunks(), 1))
    begin = time.perf_counter()
    whitenings = fit_whitenings(shard)
    yield {"what": "whitening", "seconds": time.perf_counter() - begin}
    training = Rounds(
        shard,
        head=head,
        prior=Prior(strength=0.3),
        config=SelfTrainingConfig(rounds=6, neighbours=0),
        whitenings=whitenings,
        recipe=replace(Rounds.recipe, stop_flip_rate=-1.0),
    )
    ends = [time.perf_counter()]
    ends += [time.perf_counter() for _ in training.run()]
    took = np.diff(ends).tolist()
    floor = 6 * n * d * k / rates["float32_tflops"] / 1e12 + 32 * n * k / rates["copy_gb_s"] / 1e9
    median = statistics.median(took[1:])
    row = {"what": f"a round, {n:,} x {d} x {k:,}", "seconds": median, "first_seconds": took[0]}
    yield row | {"least_seconds": floor, "times_least": median / floor}


def psd(options: Options) -> Iterator[Row]:
    """Seconds of a pretraining step by method, taking turns."""
    from lpclip.encoders.open_clip import load_trainable
    from lpclip.method.contrastive_step import Share, Towers, make_optimizer, train_step

    name, batch = ("ViT-B-32", 1024) if HAS_GPU else ("tiny-32", 64)
    trainable = load_trainable(ModelConfig(encoder=name), seed=0)
    towers = Towers(trainable.model.to(DEVICE)).train()
    size = trainable.preprocess.size
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    length = trainable.tokenizer(["a"]).shape[1]
    tokens = torch.randint(1, 40_000, (batch, length), device=DEVICE)
    tokens[:, -1] = 49_407
    configs = {m: PretrainConfig(method=m, batch_size=batch) for m in ("infonce", "psd")}
    optimizer = make_optimizer(towers, configs["psd"])
    seconds: dict[str, list[float]] = {method: [] for method in configs}
    for turn in range(12 if HAS_GPU else 3):
        for method, config in configs.items():
            distilled = torch.zeros(batch, dtype=torch.bool)
            distilled[:: 2 if method == "psd" else batch + 1] = method == "psd"
            share = Share(images, tokens, distilled)
            dtype = torch.bfloat16 if HAS_GPU else torch.float32
            step = partial(train_step, towers, optimizer, share, rate=1e-5, config=config, dtype=dtype)
            found = median_seconds(step, repeats=1, warmup=0)
            if turn >= (2 if HAS_GPU else 1):
                seconds[method].append(found)
    medians = {method: statistics.median(found) for method, found in seconds.items()}
    row = {"model": name, "batch": batch, **{f"{m}_seconds": s for m, s in medians.items()}}
    yield row | {"psd_over_infonce": medians["psd"] / medians["infonce"]}


def pipeline(options: Options) -> Iterator[Row]:
    """Images a second from JPEG files to a store, with Ray."""
    from lpclip.jobs.process import start_ray

    start_ray()
    cases: list[tuple[str, str, Decode, int]] = [("ViT-B-32", "weak,mirror", "cpu", 256)]
    if HAS_GPU:
        cases = [
            ("ViT-B-32", "weak,mirror", "gpu", 98_304),
            ("ViT-L-14", "weak,mirror", "gpu", 24_576),
            ("ViT-B-32", "weak,mirror", "cpu", 49_152),
            ("ViT-L-14", "weak,mirror", "cpu", 24_576),
            ("ViT-B-32", "weak,mirror,strong", "cpu", 12_288),
        ]
    for name, views, decode, count in cases:
        if name not in options.models:
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = _run_pipeline(options, name, views, decode, count, folder)
            yield {"model": name, "views": views, "decode": decode, **found}


def _run_pipeline(options: Options, name: str, views: str, decode: Decode, count: int, folder: str) -> Row:
    from lpclip.features.describe import describe_encoder
    from lpclip.features.find_or_encode import Encoding

    photos = sorted(Path(options.folder, "photos").absolute().iterdir())
    images = Path(folder, "images")
    images.mkdir()
    for number in range(count):
        os.link(photos[number % len(photos)], images / f"{number:06d}.jpg")
    begin, started = time.perf_counter(), time.time()
    source = open_source(str(images.absolute()), config=SourceConfig())
    config = EncoderConfig(encoder=name, pretrained=make_weights(name, folder=options.folder))
    info = describe_encoder(config)
    described = time.perf_counter() - begin
    encoding = Encoding(info=info, encoder=config, folder=folder, decode=decode)
    path = Path(folder, "store").absolute()
    with busy_samples() as samples:
        encoding.encode(source, views=parse_views(views), path=str(path))
    ended = time.time()
    ends = sorted(part.stat().st_mtime for part in path.glob("part-*.parquet"))
    first, last = ends[len(ends) // 4], ends[3 * len(ends) // 4]
    rate = (len(ends) // 2) * count / len(ends) / max(last - first, 1e-9)
    shares = [share for at, share in samples if first <= at <= last]
    return {
        "images": count,
        "images_s": rate,
        "passes_s": rate * len(parse_views(views)),
        "seconds_in_all": time.perf_counter() - begin,
        "seconds_describing": described,
        "seconds_to_first_part": ends[0] - started,
        "seconds_after_last_part": ended - ends[-1],
        "gpu_busy": statistics.mean(shares) / 100 if shares else None,
    }


@contextlib.contextmanager
def busy_samples() -> Iterator[list[tuple[float, float]]]:
    """Times and the card's utilisation in percent, five times a second while the block runs."""
    samples: list[tuple[float, float]] = []
    if not HAS_GPU or shutil.which("nvidia-smi") is None:
        yield samples
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout

        def read() -> None:
            for line in lines:
                with contextlib.suppress(ValueError):
                    samples.append((time.time(), float(line)))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield samples
        finally:
            process.terminate()
            reader.join()


def _smi(field: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def _open_clip(options: Options, name: str) -> Encoder:
    return _encoder(options, name, precision="auto", device=str(DEVICE))


def _encoder(options: Options, name: str, *, precision: Any, device: str) -> Encoder:
    pretrained = None if name == "lite" else make_weights(name, folder=options.folder)
    return load_encoder(
        EncoderConfig(encoder=name, pretrained=pretrained, precision=precision), device=device
    )


# The parts, one after the other


def run_part(part: Part, options: Options, rows: list[Row]) -> None:
    """Run a part in a process of its own, and add its rows as they come."""
    command = [sys.executable, __file__, "--parts", part, "--folder", options.folder]
    for flag, value in (("--images", options.images), ("--head", options.head)):
        command += [flag, value] if value else []
    command += ["--models", *options.models]
    begin = time.perf_counter()
    print(f"\n{part}", flush=True)
    environment = {**os.environ, "LPCLIP_GPU_PART": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        timer = threading.Timer(PARTS[part], process.kill)
        timer.start()
        try:
            for line in process.stdout:
                if not line.startswith("{"):
                    print(f"  {line.rstrip()}", flush=True)
                    continue
                row = {"part": part, **json.loads(line)}
                rows.append(row)
                print("  " + ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k != "part"), flush=True)
                if options.json is not None:
                    Path(options.json).write_text(json.dumps(rows, indent=1))
        finally:
            timer.cancel()
    took = time.perf_counter() - begin
    ended = "done" if process.returncode == 0 else f"ended with {process.returncode}"
    print(f"  {ended} after {took:.0f} s", flush=True)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the parts, or, in a part's process, print its rows."""
    options = tyro.cli(Options)
    if os.environ.get("LPCLIP_GPU_PART"):
        for row in globals()[options.parts[0]](options):
            print(json.dumps(row), flush=True)
        return
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    if not HAS_GPU:
        print("There is no GPU here: everything runs small, on the CPU. The figures say nothing about a GPU.")
    rows: list[Row] = []
    for part in options.parts:
        run_part(part, options, rows)
    print()
    for part in options.parts:
        mine = [{k: _short(v) for k, v in row.items() if k != "part"} for row in rows if row["part"] == part]
        if mine:
            names = list(dict.fromkeys(key for row in mine for key in row))
            print(format_table([{name: row.get(name, "") for name in names} for row in mine]), end="\n\n")


if __name__ == "__main__":
    main()
