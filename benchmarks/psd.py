"""The cost of noisy captions: InfoNCE, InfoNCE with smoothed labels, and progressive self-distillation (PSD).

    python benchmarks/psd.py                           # cifar10, fetched once; under an hour on two cores
    python benchmarks/psd.py --quick                   # one seed, two shares of noise, under 5 minutes
    python benchmarks/psd.py --train cifar/train.parquet --test cifar/test.parquet --json runs/psd.json

A small network at 32 px (tiny-32, which is not CLIP) is trained from scratch on labelled images whose captions name
their class, one of eight templates for each image. Then a share of the captions is shuffled among the images that have
them. What is trained is what jobs/pretrain.py trains, without its pair store.

The test images are measured once, at the end: zero-shot accuracy (the eight templates), a linear probe on the true
labels of the training images, and retrieval among the test images' own captions, where equal captions are one text. PSD
is a reconstruction: no code of it is public. Each number is the mean over the seeds, with the standard deviation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

from lpclip.config import ModelConfig, PretrainConfig, SourceConfig
from lpclip.encoders.encoder import to_input
from lpclip.encoders.open_clip import Trainable, load_trainable
from lpclip.evaluation.ranking import retrieval_metrics
from lpclip.images.open import open_source
from lpclip.images.pixels import decode_image
from lpclip.images.render import weak_view
from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.runtime import versions
from lpclip.method.contrastive_step import (
    Share,
    Towers,
    crop,
    draw_batch,
    learning_rate,
    make_optimizer,
    num_steps,
    train_step,
)
from lpclip.method.probe import zero_shot_probe
from lpclip.method.supervised import supervised_probe
from lpclip.progress import TrialProgress
from lpclip.report.style import grid, new_figure, save
from lpclip.report.tables import format_table

TEMPLATES = (
    *("a photo of a {}.", "a picture of the {}.", "one {}.", "a small {} in a photo."),
    *("this is a {}.", "an image of a {}.", "a blurry photo of a {}.", "my {}."),
)
METHODS: dict[str, dict[str, Any]] = {
    "infonce": {"method": "infonce"},
    "smoothed": {"method": "infonce", "label_smoothing": 0.1},
    "psd": {"method": "psd"},
    # The targets and the schedule as published.
    "psd-swapped": {"method": "psd", "targets": "swapped", "share_start": 0.2, "share_end": 0.8},
}
NAMES = {
    "infonce": "InfoNCE",
    "smoothed": "InfoNCE, smoothed labels",
    "psd": "PSD, similar images (default)",
    "psd-swapped": "PSD, swapped (reconstruction)",
}
COLOURS = {"infonce": "#8a9099", "smoothed": "#e59f3c", "psd": "#1f6fb4", "psd-swapped": "#9b3fe0"}
BATCH, STEPS = 500, 40


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train on captions of which a share is wrong, and measure what is left."""

    train: str = "cifar10:train"
    """Labelled images to train on."""
    test: str = "cifar10:test"
    """Labelled images to measure on."""
    num_train: int = 2000
    """Images to train on, chosen by a hash of their ids."""
    num_test: int = 5000
    """Images to measure on."""
    noise: str = "0,20,40,60"
    """Shares of shuffled captions in percent, by comma."""
    methods: str = ",".join(METHODS)
    """Methods, by comma."""
    seeds: int = 3
    """Seeds of the captions, the shuffling, the weights and the training."""
    quick: bool = False
    """One seed, no and 40% noise, a quarter of the epochs: whether it runs."""
    training: PretrainConfig = field(
        default_factory=lambda: PretrainConfig(batch_size=64, epochs=30, mirror=True)
    )
    json: str | None = None
    """File to write the rows to."""
    figure: str | None = None
    """PNG file to draw zero-shot accuracy to, against the share of shuffled captions."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images in memory."""

    pixels: torch.Tensor
    """(N, S, S, 3) uint8."""
    labels: np.ndarray
    """(N,) int64."""
    names: tuple[str, ...]


def load(data: str, *, split: str, limit: int, trainable: Trainable) -> Images:
    """Images at the model's size."""
    source = open_source(data, config=SourceConfig(), split=split, limit=limit)
    rows = [row for unit in source.units for row in source.reader.rows(unit)]
    assert source.label_names is not None, "captions are made of labels"
    pixels = []
    for row in rows:
        assert row.image is not None, row.error
        image = decode_image(row.image, max_pixels=10**8, max_bytes=10**8)
        pixels.append(weak_view(image, trainable.preprocess))
    labels = np.array([row.label for row in rows], np.int64)
    return Images(pixels=torch.from_numpy(np.stack(pixels)), labels=labels, names=source.label_names)


def caption(images: Images, *, noise: float, seed: int) -> list[str]:
    """A caption for each image; a share of them is shuffled among their images."""
    random = np.random.default_rng((seed, 2))
    picked = random.integers(len(TEMPLATES), size=len(images.labels))
    texts = [TEMPLATES[t].format(images.names[y]) for t, y in zip(picked, images.labels, strict=True)]
    wrong = np.flatnonzero(random.random(len(texts)) < noise)
    moved = dict(zip(wrong.tolist(), random.permutation(wrong).tolist(), strict=True))
    return [texts[moved.get(i, i)] for i in range(len(texts))]


def train(images: Images, texts: list[str], config: PretrainConfig) -> tuple[Trainable, float]:
    """A model from scratch, and the seconds that a step took."""
    trainable, begin = load_trainable(ModelConfig(), seed=config.seed), time.perf_counter()
    total = sum(1 for _ in steps(trainable, images, texts, config))
    return trainable, (time.perf_counter() - begin) / total


def steps(trainable: Trainable, images: Images, texts: list[str], config: PretrainConfig) -> Iterator[int]:
    """Train, and tell after each step its number."""
    towers = Towers(trainable.model).train()
    optimizer = make_optimizer(towers, config)
    tokens = trainable.tokenizer(texts)
    total = num_steps(config, num_pairs=len(texts))
    for step in range(total):
        drawn = draw_batch(step, num_pairs=len(texts), config=config)
        pixels = to_input(
            images.pixels[drawn.rows], trainable.preprocess, dtype=torch.float32, device=torch.device("cpu")
        )
        train_step(
            towers,
            optimizer,
            Share(crop(pixels, drawn.crops, mirror=config.mirror), tokens[drawn.rows], drawn.distilled),
            rate=learning_rate(step, total=total, config=config),
            config=config,
            dtype=torch.float32,
        )
        yield step


def step_cost(images: Images, config: PretrainConfig) -> float:
    """A step of psd in steps of infonce: the medians of STEPS of each, in turn, after a few to warm up."""
    texts = caption(images, noise=0.0, seed=0)
    runs = [
        steps(load_trainable(ModelConfig(), seed=0), images, texts, replace(config, **METHODS[method]))
        for method in ("infonce", "psd")
    ]
    seconds = np.empty((STEPS, 2))
    for number in range(-5, STEPS):
        # The first of two is not always the same.
        for which in (0, 1) if number % 2 else (1, 0):
            begin = time.perf_counter()
            next(runs[which])
            seconds[number, which] = time.perf_counter() - begin
    infonce, psd = np.median(seconds, axis=0)
    return float(psd / infonce)


@torch.inference_mode()
def image_features(trainable: Trainable, pixels: torch.Tensor) -> np.ndarray:
    """Unit-norm features (N, d) float16, as feature stores have them."""
    cpu = torch.device("cpu")
    batches = [
        to_input(p, trainable.preprocess, dtype=torch.float32, device=cpu) for p in pixels.split(BATCH)
    ]
    found = torch.cat([F.normalize(trainable.model.encode_image(batch), dim=1) for batch in batches])
    return found.to(torch.float16).numpy()


@torch.inference_mode()
def text_features(trainable: Trainable, texts: Sequence[str]) -> torch.Tensor:
    """Unit-norm features (M, d) float32."""
    return F.normalize(trainable.model.encode_text(trainable.tokenizer(list(texts))), dim=1)


def measure(trainable: Trainable, train_images: Images, test: Images, *, seed: int) -> dict[str, float]:
    """All that is told of a model, in percent."""
    trainable.model.eval()
    x, y = image_features(trainable, test.pixels), test.labels
    heads = [text_features(trainable, [t.format(name) for name in test.names]) for t in TEMPLATES]
    zero_shot = zero_shot_probe(F.normalize(torch.stack(heads).mean(0), dim=1), temperature=1.0)
    probe = supervised_probe(
        image_features(trainable, train_images.pixels), train_images.labels, like=zero_shot
    )
    texts, owned = np.unique(caption(test, noise=0.0, seed=seed), return_inverse=True)
    found = retrieval_metrics(
        x,
        text_features(trainable, texts.tolist()).numpy(),
        image_index=np.arange(len(x)),
        text_index=owned.astype(np.int64),
    )
    return {
        "zero_shot": 100 * float((zero_shot.logits(x).argmax(1).numpy() == y).mean()),
        "linear_probe": 100 * float((probe.logits(x).argmax(1).numpy() == y).mean()),
        "image_to_text_r10": 100 * found.image_to_text.recall(10),
        "text_to_image_r10": 100 * found.text_to_image.recall(10),
    }


def main(options: Options) -> None:
    """Train and measure everything, print the table, write JSON."""
    if options.quick:
        fewer = replace(options.training, epochs=max(1, options.training.epochs // 4))
        options = replace(options, seeds=1, noise="0,40", training=fewer)
    methods = options.methods.split(",")
    if unknown := set(methods) - METHODS.keys():
        raise ValueError(f"--methods {','.join(unknown)}: there are {', '.join(METHODS)}")
    trainable = load_trainable(ModelConfig(), seed=0)
    images = load(options.train, split="train", limit=options.num_train, trainable=trainable)
    test = load(options.test, split="test", limit=options.num_test, trainable=trainable)
    shares = [float(share) for share in options.noise.split(",")]
    steps = num_steps(options.training, num_pairs=len(images.labels))
    runs = len(shares) * len(methods) * options.seeds
    print(
        f"{runs} trainings of {steps:,} steps on {len(images.labels):,} images, tested on {len(test.labels):,}"
    )
    progress, rows = TrialProgress(total=runs, done=0), list[dict[str, Any]]()
    for share in shares:
        # Methods in turn: whatever else the machine does meets all of them.
        for seed in range(options.seeds):
            for method in methods:
                config = replace(options.training, seed=seed, **METHODS[method])
                texts = caption(images, noise=share / 100, seed=seed)
                trained, seconds = train(images, texts, config)
                found = measure(trained, images, test, seed=seed)
                rows.append(
                    {"noise": share, "method": method, "seed": seed, **found, "step_ms": 1000 * seconds}
                )
                progress.advance(f"{share:g}% shuffled, {method}, seed {seed}: {found['zero_shot']:.1f}")
                if options.json:
                    written = {"options": asdict(options), "versions": versions(), "rows": rows}
                    Path(options.json).write_text(json.dumps(written, indent=1))
    cost = step_cost(images, options.training)
    print(format_table(summarise(rows)))
    if options.figure:
        save(noise_figure(rows), options.figure)
    print(f"a step of psd takes {cost:.3f} times one of infonce (medians of {STEPS} of each, in turn)")


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each share of noise and method: means over the seeds and standard deviations."""
    table = []
    for key in dict.fromkeys((row["noise"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["noise"], row["method"]) == key]
        shown: dict[str, Any] = {"shuffled %": f"{key[0]:g}", "method": key[1]}
        for name in ("zero_shot", "linear_probe", "image_to_text_r10", "text_to_image_r10"):
            values = [row[name] for row in mine]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            shown[name.replace("_", " ")] = f"{np.mean(values):.1f}{spread}"
        table.append(shown | {"ms a step": f"{np.mean([row['step_ms'] for row in mine]):.0f}"})
    return table


def noise_figure(rows: list[dict[str, Any]]) -> Figure:
    """Zero-shot accuracy against the share of shuffled captions: means over the seeds and standard deviations."""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shares = sorted({row["noise"] for row in rows})
    for place, method in enumerate(methods):
        values = [
            [row["zero_shot"] for row in rows if (row["method"], row["noise"]) == (method, share)]
            for share in shares
        ]
        # Beside one another, or bars of the same height would hide each other.
        across = [share + 1.2 * (place - (len(methods) - 1) / 2) for share in shares]
        axes.errorbar(
            across,
            [np.mean(one) for one in values],
            [np.std(one, ddof=1) if len(one) > 1 else 0.0 for one in values],
            label=NAMES[method],
            color=COLOURS[method],
            marker="o",
            linewidth=1.8,
            capsize=3,
        )
    axes.set(xticks=shares, xlabel="captions shuffled, %", ylabel="zero-shot accuracy, %")
    grid(axes)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options, config=OPTIONS))
