"""From images to features: a Ray Data pipeline that reads, decodes, encodes and commits, unit by unit.

    unit ──► read + decode (CPU tasks) ──► encode (one actor a GPU) ──► commit a part (CPU task) ──► progress

A decode task hands on uint8 pixels at the encoder's input size; encoded bytes never leave it. The driver sees
counts only. Requested CPUs differ from stage to stage so that Ray keeps the stages apart.
"""

from __future__ import annotations

import gc
import platform
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as NodeAffinity

from lpclip import files, store
from lpclip.commit import commit
from lpclip.config import EncodeConfig, EncoderConfig
from lpclip.decode import PIXEL_BYTES, decode_unit, rows_at_once
from lpclip.describe import EncoderInfo, has_gpus
from lpclip.encoders import load_encoder, preprocess_identity
from lpclip.images import Source
from lpclip.progress import Progress
from lpclip.runtime import ENCODER_ENV
from lpclip.views import (
    BASE_VIEWS,
    REDUCING_GAP,
    STRONG_VERSION,
    parse_views,
    pixel_views,
    split_mirror,
)
from lpclip.zero_shot import Head


def store_identity(
    source: Source | None, info: EncoderInfo, views: tuple[str, ...], *, seed: int
) -> dict[str, Any]:
    """Whatever changes a feature; without a source, whatever features of any source must have in common.

    The seed counts only where a view draws random numbers.
    """
    identity: dict[str, Any] = {
        "encoder": info.identity,
        "preprocessing": preprocess_identity(info.preprocess),
        "reducing_gap": REDUCING_GAP,
        "views": list(views),
        "seed": seed if any(view not in BASE_VIEWS for view in views) else None,
    }
    if any(view.startswith("strong") for view in views):
        identity["strong_version"] = STRONG_VERSION
    if source is not None:
        identity["source"] = {**source.identity, "label_names": list(source.label_names or ()) or None}
    return identity


class _Encode:
    """The actor that holds the encoder: pixel columns to feature columns."""

    def __init__(
        self,
        config: EncoderConfig,
        identity: dict[str, Any],
        views: tuple[str, ...],
        batch_size: int,
        num_threads: int,
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(num_threads)
        # `auto` may mean another precision on this node.
        config = replace(config, precision=identity["precision"])
        self.encoder = load_encoder(config, device=self.device)
        self.is_other = {**self.encoder.identity, "dim": self.encoder.dim} != identity
        self.views, self.batch_size = views, batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        if self.is_other:
            # Not where it is loaded: Ray would start a failing actor again.
            raise ValueError(
                f"another encoder was found on {platform.node()} than where the job began: its weights, its "
                "precision or its preprocessing differ; all nodes must have the same checkpoint"
            )
        begin = time.perf_counter()
        good = table.filter(table["error"].is_null())
        kept = table.drop_columns([name for name in table.column_names if name.startswith("pixels:")])
        is_good = table["error"].is_null().to_numpy()
        features = self._features(good)
        for place, view in enumerate(self.views):
            found = np.zeros((len(table), self.encoder.dim), np.float16)
            found[is_good] = features[place * len(good) : (place + 1) * len(good)]
            flat = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), self.encoder.dim)
            kept = kept.append_column(view, flat)
        seconds = np.full(len(table), (time.perf_counter() - begin) / len(table))
        return kept.append_column("seconds", pa.array(seconds))

    def _features(self, good: pa.Table) -> np.ndarray:
        """Features (views x rows, d) float16, one view after the other; batches run on from view to view."""
        size = self.encoder.preprocess.size
        names = [split_mirror(view) for view in self.views]
        pixels = [_pixel_array(good[f"pixels:{name}"], size) for name, _ in names]
        total = len(names) * len(good)
        out = np.empty((total, self.encoder.dim), np.float16)
        for start in range(0, total, self.batch_size):
            # Every batch has one shape: kernels, and so roundings, may differ with the batch size.
            batch = np.zeros((self.batch_size, size, size, 3), np.uint8)
            stop = min(start + self.batch_size, total)
            place = start
            while place < stop:
                view, row = divmod(place, len(good))
                run = pixels[view][row : row + stop - place]
                batch[place - start :][: len(run)] = run[:, :, ::-1] if names[view][1] else run
                place += len(run)
            found = self.encoder.encode_image(torch.from_numpy(batch).to(self.device, non_blocking=True))
            out[start:stop] = found[: stop - start].to(torch.float16).cpu().numpy()
        return out


def _pixel_array(column: pa.ChunkedArray, size: int) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    width = size * size * 3
    if not len(array):
        return np.empty((0, size, size, 3), np.uint8)
    flat = np.frombuffer(array.buffers()[1], np.uint8, count=len(array) * width, offset=array.offset * width)
    return flat.reshape(-1, size, size, 3)


# How often an encoder, a machine, or a process over one unit of work may die.
MAX_LOSSES = 3
LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)

# Tables of pixels that may wait for each encoder, or be on their way.
TABLES_AHEAD = 8
# What a decoding process takes at most but for huge images: three tables of pixels, and the interpreter.
DECODE_MEMORY = 4 * PIXEL_BYTES


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the pipeline lies on the machine."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    num_threads: int

    def __str__(self) -> str:
        place = "1 GPU each" if self.gpus_per_actor else f"{self.num_threads} CPU threads each"
        return f"{self.num_actors} encoder actor{'s' * (self.num_actors != 1)}, {place}"


def plan_actors(num_actors: int | None) -> Plan:
    """One actor for each GPU, else one for every eight CPUs of a node. Half of a node's CPUs stay for decoding.

    Actors that held all CPUs would starve the tasks that feed them, and the pipeline would wait for ever. So all
    of them fit into half of the smallest node, whatever others are lost, and hold nothing of a single CPU.
    """
    if num_actors is not None and num_actors < 1:
        raise ValueError(f"--num-actors must be at least 1, not {num_actors}")
    if has_gpus():
        count = num_actors or int(ray.cluster_resources()["GPU"])
        return Plan(num_actors=count, cpus_per_actor=0, gpus_per_actor=1, num_threads=1)
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    nodes = [cpus for cpus in nodes if cpus >= 1]
    count = num_actors or sum(max(1, int(cpus) // 8) for cpus in nodes)
    share = min(nodes) / max(1, -(-count // len(nodes)))
    cpus = 0.45 * min(nodes) / count if min(nodes) >= 2 else 0.0
    # Never a whole CPU: stages with the same request would be fused into one process.
    cpus = 0.9 if cpus == 1 else cpus
    return Plan(num_actors=count, cpus_per_actor=cpus, gpus_per_actor=0, num_threads=max(1, int(share)))


def encode(
    source: Source,
    *,
    info: EncoderInfo,
    encoder: EncoderConfig,
    config: EncodeConfig,
    seed: int,
    path: str,
    head: Head | None = None,
    scores_path: str = "",
) -> dict[str, Any]:
    """Encode a source into the feature store at `path`, going on from what is there. Returns its manifest.

    With a head, zero-shot pseudo-labels of the images that are encoded now go to `scores_path`, part by part.
    Raises ValueError when too many images are bad, or the folder is another store's.
    """
    views = parse_views(config.views)
    identity = store_identity(source, info, views, seed=seed)
    done = store.open_store(path, identity)
    todo = [unit for unit in range(len(source.units)) if unit not in done]
    if head is not None:
        files.make_folder(scores_path)
    progress = Progress(f"encoding {source.name}", total=source.num_rows, done=sum(done.values()))
    if done and todo:
        print(f"going on: {progress.done:,} images are encoded already", flush=True)
    encoded_now, num_losses = bool(todo), 0
    bad: Counter[int] = Counter()
    while todo:
        try:
            # Not kept in a variable: see below.
            for counts in _follow(
                _pipeline(
                    source,
                    todo,
                    info=info,
                    encoder=encoder,
                    config=config,
                    seed=seed,
                    path=path,
                    head=head,
                    scores_path=scores_path,
                )
            ):
                bad[counts["unit"]] += counts["bad"]
                progress.advance(counts["images"], bad=counts["bad"])
                _check_bad(source, path, bad=bad.total(), seen=source.num_rows)
        except Exception as error:
            _let_go(error)
            if not isinstance(error, LOSSES):
                raise
            # Ray would restart a dying encoder for ever; parts that are there need no encoder.
            num_losses += 1
            what = _go_on_after(error, num_losses)
            print(f"{what} was lost, going on ({num_losses} of {MAX_LOSSES - 1} times)", flush=True)
            _wait_for_nodes()
        else:
            break
        done = store.open_store(path, identity)
        todo = [unit for unit in todo if unit not in done]
        # Units that are encoded again must not count twice.
        bad = Counter({unit: count for unit, count in bad.items() if unit in done})
        progress.done, progress.bad = sum(done.values()), bad.total()
    progress.close()
    rate = progress.rate if encoded_now else None
    manifest = store.finish_store(path, identity, num_units=len(source.units), rate=rate)
    check_manifest(source, path, manifest)
    return manifest


def _let_go(error: BaseException) -> None:
    """Frames of errors hold the pipeline, and that its encoders: their CPUs would be missed by the next one."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()


def _follow(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Run the pipeline; the counts of each part, when it is committed."""
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        assert isinstance(batch, pa.Table)
        yield from batch.to_pylist()


def _go_on_after(error: BaseException, num_losses: int) -> str:
    """What was lost, in words; ValueError when it is no use to go on."""
    cause = str(error).splitlines()[0]
    kept = f"the last time with: {cause}; what is encoded is kept, the same command goes on"
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        raise ValueError(
            f"a process that reads and decodes images died {MAX_LOSSES} times over the same ones, {kept}; a file "
            "that brings its decoder down must be taken out, and memory that is short wants fewer CPUs"
        ) from error
    what = "an encoder" if isinstance(error, ray.exceptions.RayActorError) else "a machine or its memory"
    if num_losses == MAX_LOSSES:
        raise ValueError(
            f"{what} died {num_losses} times, {kept}; a smaller --batch-size needs less memory"
        ) from error
    return what


def _wait_for_nodes() -> None:
    """Until each node has answered or is known to be lost, a minute at most.

    Ray notices late that a machine is gone. Until then it would place encoders there, to be lost once more.
    """
    ask = ray.remote(num_cpus=0, max_retries=0)(platform.node)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    answers = [ask.options(scheduling_strategy=NodeAffinity(node, soft=False)).remote() for node in nodes]
    ray.wait(answers, num_returns=len(answers), timeout=60)


def check_manifest(source: Source, path: str, manifest: dict[str, Any]) -> None:
    """ValueError when a complete store of this source has too many quarantined images."""
    bad = manifest["num_quarantined"]
    _check_bad(source, path, bad=bad, seen=manifest["num_rows"] + bad)


def _check_bad(source: Source, path: str, *, bad: int, seen: int | None) -> None:
    limit = source.config.max_bad_fraction
    if seen and (bad > limit * seen or bad == seen):
        first = store.write_quarantine(path)[0]
        raise ValueError(
            f"{bad:,} of {seen:,} images of {source.name} cannot be read, more than --max-bad-fraction {limit:g} "
            f"allows; the first is {first['id']} ({first['error']}), all are in "
            f"{files.join(path, 'quarantine.parquet')}"
        )


def _pipeline(
    source: Source,
    todo: list[int],
    *,
    info: EncoderInfo,
    encoder: EncoderConfig,
    config: EncodeConfig,
    seed: int,
    path: str,
    head: Head | None,
    scores_path: str,
) -> ray.data.Dataset:
    views = parse_views(config.views)
    plan = plan_actors(config.num_actors)
    units = ray.put(pa.table({"unit": todo, "spec": [source.units[i] for i in todo]}))
    decode = partial(
        decode_unit,
        units=units,
        reader=source.reader,
        limits=source.config,
        views=pixel_views(views),
        preprocess=info.preprocess,
        seed=seed,
    )
    # Ray Data insists on a number of rows where GPUs are asked for; tables of small units are put together to it.
    rows = min(config.batch_size, rows_at_once(pixel_views(views), info.preprocess))
    # Retries and restarts have no parameter of their own: they go the way that Ray means to close.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    blocks = ray.data.range(len(todo), override_num_blocks=len(todo))
    # Decoded images wait for the encoders in shared memory: enough to keep them busy, however many are to come.
    blocks.context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=plan.num_actors * TABLES_AHEAD * PIXEL_BYTES
    )
    # Ray Data would try a unit for ever whose images bring the decoder down.
    decoded = blocks.map_batches(
        decode, batch_size=1, num_cpus=1, memory=DECODE_MEMORY, max_retries=MAX_LOSSES - 1
    )
    encoded = decoded.map_batches(
        _Encode,
        batch_size=rows if plan.gpus_per_actor else None,
        batch_format="pyarrow",
        fn_constructor_args=(encoder, info.identity, views, config.batch_size, plan.num_threads),
        compute=ray.data.ActorPoolStrategy(size=min(plan.num_actors, len(todo))),
        num_cpus=plan.cpus_per_actor,
        num_gpus=plan.gpus_per_actor,
        max_restarts=0,
        max_task_retries=0,
        runtime_env={"env_vars": ENCODER_ENV},
    )
    commit_parts = partial(commit, path=path, views=views, head=head, scores_path=scores_path)
    # Not a share of a CPU: decoding would take it again and again, and commits would wait.
    return encoded.map_batches(commit_parts, batch_size=None, batch_format="pyarrow", num_cpus=0)
