"""lpclip beside the tools that people would take instead, as whole processes from exec to exit.

    python benchmarks/peers.py --json runs/peers.json                  # 250, 1,000 and 4,000 photographs, three turns
    python benchmarks/peers.py --sizes 60 250 --repeats 1              # a first try
    python benchmarks/peers.py --images photos/ --pretrained ViT-B-32.pt

Every arm labels the same JPEGs with the same checkpoint, class names and prompts, in batches of --batch-size, and has
every core. Arms take turns. A first turn with 64 images is not counted. It brings files into the page cache, lets
lpclip convert the model and keep the class names' head, and shows at once which tool does not run.

- lpclip auto, lpclip torch: jobs/encode.py --views weak, with --engine auto and torch.
- CLIP_benchmark: its zero-shot classification, of the same files in a tar.
- clip-retrieval: its inference, which on CPUs is in float32 and ends with features.
- plain loop: benchmarks/plain_loop.py, with the malloc settings that lpclip gives to its own encoders.

CLIP_benchmark and clip-retrieval are installed into environments of their own, about 6 GB each. Where the CPU
multiplies in bfloat16, lpclip, the loop and CLIP_benchmark (under autocast, its default) do; elsewhere all compute in
float32, since autocast would be far slower. The peers decode in their main process, the fastest way on two cores.

"processor s" is the time of the process and of all below it, Ray's included: the larger of what their own clocks
showed, four times a second, and of what the kernel tells a parent that waits. "others s" is what the machine gave to
anyone else meanwhile: a turn in which it is large says little. "peak MB" is the largest proportional set size of all
these processes together, seen once a second. "to loop" and "to CLIP_benchmark" are medians of the turns' own ratios of
seconds. "equal" is the share of images that have the label of the first lpclip run of that size; CLIP_benchmark only
tells its accuracy, so it is given those labels as the truth. There is a dash where they all name one class, as with
random weights and generated images: real photographs (--images) compare better.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from encoding import CORES, Meter, make_images, make_weights, psutil
from peer_arms import ARMS, DTYPE, PINS, Command, Labels, Work, install, last_line

from lpclip.config import UserError
from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.runtime import versions
from lpclip.report.tables import format_table

WARM_UP = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare lpclip's encode job with its peers."""

    sizes: tuple[int, ...] = (250, 1000, 4000)
    """Numbers of images."""
    repeats: int = 3
    """Turns of all arms, for each number of images."""
    arms: tuple[str, ...] = (
        "lpclip auto",
        "lpclip torch",
        "CLIP_benchmark",
        "clip-retrieval",
        "plain loop",
    )
    """Arms to run, in this order."""
    images: str | None = None
    """Folder of JPEGs, taken again under other names if there are too few; by default 500x375 ones are generated."""
    encoder: str = "ViT-B-32"
    """Model of open_clip."""
    pretrained: str | None = None
    """Checkpoint file of the model; by default random weights, which are as fast."""
    classes: str = "dog,elephant,giraffe,guitar,horse,house,person"
    """Comma-separated class names."""
    batch_size: int = 64
    """Images in a forward pass of the peers; lpclip's passes on CPUs always have 8."""
    folder: str = "runs/peers"
    """Folder for images, random weights and lpclip's converted model, which are kept."""
    environments: str = "runs/peers/environments"
    """Folder for the peers' environments, which are kept."""
    json: str | None = None
    """File to write every run to, as soon as it has ended."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One arm in one turn: seconds and MB as the module says."""

    arm: str
    images: int
    turn: int
    """From 1; 0 is not counted."""
    seconds: float
    processor: float
    others: float
    peak_mb: float
    equal: float | None = None
    """Share of equal predictions, None where there are none to compare."""
    classes: int = 0
    """How many classes the labels name that it is compared with."""


def make_photos(options: Options, count: int) -> Path:
    """A folder of so many JPEGs. Raises UserError when --images has none."""
    if options.images is None:
        return Path(make_images("photo", count, folder=options.folder))
    given = sorted(
        path for path in Path(options.images).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
    )
    if not given:
        raise UserError(f"--images {options.images} has no .jpg or .jpeg files: name a folder of photographs")
    folder = Path(options.folder).absolute() / f"images-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(count):
        shutil.copyfile(given[number % len(given)], folder / f"{number:06d}.jpg")
    return folder


def measure(command: Command, folder: Path, *, arm: str) -> dict[str, float]:
    """Run a command in a folder to its end: seconds, processor, others, peak_mb. Raises UserError when it fails."""
    log = folder.with_suffix(".log")
    before, waited, begin = machine_seconds(), waited_seconds(), time.perf_counter()
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **command[1]}
    with log.open("w") as output:
        process = subprocess.Popen(
            command[0], cwd=folder, env=environ, stdout=output, stderr=subprocess.STDOUT
        )
        with Meter(process.pid) as meter:
            try:
                code = process.wait()
            finally:
                process.terminate()
            seconds = time.perf_counter() - begin
    if code:
        raise UserError(
            f"{arm} ended with exit code {code} ({last_line(log)}); all that it printed is in {log}. Mend what it "
            f"names, or leave {arm} out of --arms"
        )
    log.unlink()
    processor = max(meter.cpu, waited_seconds() - waited)
    others = max(0.0, machine_seconds() - before - processor)
    return {"seconds": seconds, "processor": processor, "others": others, "peak_mb": meter.peak_mb}


def waited_seconds() -> float:
    """Processor seconds of all processes that this one, or one below it, has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine_seconds() -> float:
    """Processor seconds of the whole machine that were not idle, those that its host took included."""
    times = psutil().cpu_times()._asdict()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(times.get(name, 0.0) for name in names)


def run_arm(arm: str, work: Work, *, turn: int) -> tuple[Run, Labels]:
    """One arm in one turn, and the labels that the next ones are compared with."""
    make_command, result = ARMS[arm]
    with tempfile.TemporaryDirectory(dir=work.out) as out:
        work = replace(work, out=Path(out))
        found = measure(make_command(work), Path(out), arm=arm)
        labels = result(work)
    share, classes = None, len({*work.labels.values()})
    if classes > 1:
        share = labels if not isinstance(labels, Mapping) else equal_share(labels, work.labels)
    elif arm.startswith("lpclip") and not classes:
        assert isinstance(labels, Mapping)
        work = replace(work, labels=labels)
    size = len(list(work.photos.iterdir()))
    return Run(arm=arm, images=size, turn=turn, equal=share, classes=classes, **found), work.labels


def equal_share(labels: Labels, others: Labels) -> float:
    """The share of the photographs that two arms give the same class."""
    return statistics.fmean(labels[name] == label for name, label in others.items())


# Tables


def median(runs: Sequence[Run], field: str) -> float:
    """The median of one number."""
    return statistics.median(getattr(run, field) for run in runs)


def ratio(runs: Sequence[Run], others: Sequence[Run]) -> float | None:
    """The median over the turns of two arms' ratio of seconds, None where an arm was not run."""
    pairs = [(a, b) for a in runs for b in others if a.turn == b.turn]
    return statistics.median(a.seconds / b.seconds for a, b in pairs) if pairs else None


def size_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row an arm, of the counted runs of one number of images."""
    by_arm = {run.arm: [other for other in runs if other.arm == run.arm] for run in runs}
    rows = []
    for arm, found in by_arm.items():
        seconds, shares = (
            [run.seconds for run in found],
            [run.equal for run in found if run.equal is not None],
        )
        rows.append(
            {
                "arm": arm,
                "seconds": f"{median(found, 'seconds'):.1f}",
                "least to most": f"{min(seconds):.1f} to {max(seconds):.1f}",
                "images/s": f"{found[0].images / median(found, 'seconds'):.1f}",
                "processor s": f"{median(found, 'processor'):.1f}",
                "others s": f"{median(found, 'others'):.1f}",
                "peak MB": round(median(found, "peak_mb")),
                "to loop": ratio(found, by_arm.get("plain loop", ())),
                "to CLIP_benchmark": ratio(found, by_arm.get("CLIP_benchmark", ())),
                "equal %": min(shares) if shares else None,
            }
        )
    return rows


def line_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row an arm: the straight line through its median seconds, and the one through its processor seconds."""
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        row: dict[str, Any] = {"arm": arm}
        for field, name in (("seconds", ""), ("processor", "processor ")):
            sizes = sorted({run.images for run in runs})
            medians = [median([r for r in runs if (r.arm, r.images) == (arm, n)], field) for n in sizes]
            slope, start = np.polyfit(sizes, medians, 1)
            row |= {f"{name}start s": f"{start:.1f}", f"{name}ms an image": f"{1000 * slope:.1f}"}
        rows.append(row)
    return rows


def start(options: Options) -> Work:
    """Install the peers, make weights and folders. Raises UserError when one of them cannot be had."""
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        raise UserError(f"--arms knows no {', '.join(unknown)}: the arms are {', '.join(ARMS)}")
    folder, environments = Path(options.folder).absolute(), Path(options.environments).absolute()
    for name in filter(PINS.get, options.arms):
        install(name, environments)
    checkpoint = Path(options.pretrained or make_weights(options.encoder, folder=options.folder))
    if not checkpoint.is_file():
        raise UserError(f"--pretrained {checkpoint} is no file: all arms read the same checkpoint, not a tag")
    shutil.rmtree(folder / "running", ignore_errors=True)
    (folder / "running").mkdir(parents=True)
    return Work(
        encoder=options.encoder,
        checkpoint=str(checkpoint.absolute()),
        classes=options.classes,
        batch_size=options.batch_size,
        photos=folder,
        cache=folder / "cache",
        environments=environments,
        out=folder / "running",
        labels={},
    )


def take_turns(options: Options, work: Work, *, turns: Sequence[int]) -> Iterator[Run]:
    """All arms on one number of images, one after the other."""
    for turn in turns:
        for arm in options.arms:
            run, labels = run_arm(arm, work, turn=turn)
            work = replace(work, labels=labels)
            print(
                f"  {run.images:,} images, turn {turn}, {arm}: {run.seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            yield run


def compare(options: Options) -> None:
    """Run all arms in turns, print tables, write JSON."""
    work = start(options)
    weights = "given" if options.pretrained else "random"
    print(f"{options.encoder}, {weights} weights, {DTYPE}, {CORES} cores", flush=True)
    written = {
        "options": asdict(options),
        "cores": CORES,
        "dtype": DTYPE,
        "versions": versions(),
        "pins": PINS,
    }
    runs: list[Run] = []
    for size, turns in [(WARM_UP, [0]), *((size, range(1, options.repeats + 1)) for size in options.sizes)]:
        work = replace(work, photos=make_photos(options, size))
        for run in take_turns(options, work, turns=turns):
            runs.append(run)
            if options.json:
                Path(options.json).write_text(
                    json.dumps({**written, "runs": list(map(asdict, runs))}, indent=1)
                )
        if found := [run for run in runs if run.images == size and run.turn]:
            classes = max(run.classes for run in found)
            print(f"\n{size:,} images, {options.repeats} turns, {classes} classes predicted")
            print(format_table(size_rows(found)), flush=True)
    if len(set(options.sizes)) > 1:
        print(f"\nstraight lines through the medians\n{format_table(line_rows([r for r in runs if r.turn]))}")


if __name__ == "__main__":
    try:
        compare(tyro.cli(Options, config=OPTIONS))
    except UserError as error:
        sys.exit(f"error: {error}")
