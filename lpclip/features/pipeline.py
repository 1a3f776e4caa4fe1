"""The part that Ray Data pipelines over images share: decoding, and going on after losses until a store is whole.

    unit ──► read + decode (CPU tasks) ──► ... ──► commit a part ──► progress

The driver sees counts, and what the manifest says of a part.
"""

from __future__ import annotations

import contextlib
import json
import platform
import threading
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as NodeAffinity

from lpclip import files
from lpclip.config import UserError, counted
from lpclip.features.decode_stage import PIXEL_BYTES, decode_unit, table_bytes
from lpclip.features.losses import LOSSES, MAX_LOSSES, Losses
from lpclip.features.pulse import PULSE_SECONDS, Pulse, PulseTaker
from lpclip.features.stalls import LIMITS, SeeExecutor, StallLimits, StallWatch
from lpclip.features.store import Store
from lpclip.features.store_writer import Facts, StoreWriter, write_quarantine
from lpclip.features.thumbnails import Sample
from lpclip.images.pixels import Preprocess
from lpclip.images.source import Source
from lpclip.images.views import View
from lpclip.progress import Progress, watched

# What ends a pipeline is waited for so long, then it goes on beside the work.
END_SECONDS = 3.0
# So many tables of pixels may wait for each consumer, beside the one that each CPU is decoding.
TABLES_AHEAD = 4
# One thread of the driver plans all tasks, and a task costs it the same whatever its size. With a unit in a task for
# every two GPUs, many GPUs ask for few more tasks a second than two.
GPUS_A_UNIT = 2
# Four tables of pixels, in one view of 224 pixels; more would wait in shared memory for each GPU than they save.
MOST_AT_ONCE = 28
# Ray Data keeps half of its memory limit for each stage's own needs, and shares the rest. With this factor, all CPUs
# decode: with less, Ray would hold decoding back long before the tables fill the limit.
SHARING = 2.5
# A decoding process takes the memory of at most three tables of pixels and the interpreter, except for huge images.
DECODE_TABLES = 4


def fill_store(
    source: Source,
    *,
    writer: StoreWriter,
    what: str,
    stages: Callable[[list[int], str], ray.data.Dataset],
    limits: StallLimits = LIMITS,
    tell: Callable[[Pulse], object] | None = None,
) -> Store:
    """Run a pipeline until the store has all units of the source. Returns the complete store.

    `stages` makes the pipeline for the units that are still to do; its rows are the counts of committed parts, and the
    names of its actors begin with the given one. `what` is the word for the work: "encoding". `limits` say after how
    long a standstill a line tells of it, and after how long the pipeline is begun again. `tell` is called in another
    thread, every minute and at the end, with what the pipeline did since.
    Raises UserError when too many images are bad, or the folder is another store's.
    """
    done = writer.begin()
    todo = [unit for unit in range(len(source.units)) if unit not in done]
    what = f"{what} {source.name}"
    progress = Progress(what, total=source.num_rows, done=sum(done.values()))
    taker = PulseTaker(progress, tell) if tell else None
    if done and todo:
        print(f"going on after {counted(progress.done, 'image')}", flush=True)
    worked_now, losses = bool(todo), Losses()
    bad: Counter[int] = Counter()
    known: dict[str, Facts] = {}
    while todo:
        name, dead = f"lpclip-{uuid.uuid4().hex}", _dead_nodes()
        with warnings.catch_warnings():
            # Ray Data has no other way yet to say how often a task or an actor may be tried again.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
            pipeline = stages(todo, name)
        try:
            for counts in _follow(pipeline, what=what, limits=limits, taker=taker):
                bad[counts["unit"]] += counts["bad"]
                known[counts["part"]] = Facts(**json.loads(counts["facts"]))
                progress.advance(counts["images"], bad=counts["bad"])
                _check_bad(source, writer.path, bad=bad.total(), seen=source.num_rows)
        except LOSSES as error:
            # Ray would restart a dying actor forever, even where the parts that are there need none.
            _end_actors(name)
            _wait_for_nodes()
            before, done = len(done), writer.begin()
            if len(done) > before:
                losses.forget()
            print(losses.go_on_after(error, lost_node=bool(_dead_nodes() - dead)), flush=True)
        else:
            break
        finally:
            _end_actors(name)
        todo = [unit for unit in todo if unit not in done]
        # Units that are done again must not count twice.
        bad = Counter({unit: count for unit, count in bad.items() if unit in done})
        progress.done, progress.bad = sum(done.values()), bad.total()
    progress.close()
    rate = progress.rate if worked_now else None
    store = writer.finish(num_units=len(source.units), rate=rate, known=known)
    check_quarantine(source, store)
    return store


def decode_units(
    source: Source,
    todo: list[int],
    *,
    views: tuple[View, ...],
    preprocess: Preprocess,
    seed: int,
    num_consumers: int,
    leave_jpegs: bool = False,
    sample: Sample | None = None,
    at_once: int = 1,
) -> ray.data.Dataset:
    """The first stage: units of a source to tables of uint8 pixels, one column a view, or as `decode_unit` says.

    All CPUs that are free decode, until some tables wait for each of the next stage's `num_consumers`. A task decodes
    `at_once` units, one after the other.
    """
    decode = partial(
        decode_unit,
        reader=source.reader,
        limits=source.config,
        views=views,
        preprocess=preprocess,
        seed=seed,
        leave_jpegs=leave_jpegs,
        sample=sample,
    )
    groups = [todo[start : start + at_once] for start in range(0, len(todo), at_once)]
    units = ray.data.from_blocks(
        [pa.table({"unit": group, "spec": [source.units[i] for i in group]}) for group in groups]
    )
    limit = _memory_limit(num_consumers, table_bytes(views, preprocess, units_at_once=at_once))
    # A table of several units may be larger: it costs the scheduling thread as much as a task.
    table_limit = PIXEL_BYTES * min(at_once, 2)
    units.context.target_max_block_size = table_limit
    units.context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=limit
    )
    # Without a limit, Ray Data would forever try a unit again whose images bring the decoder down.
    return units.map_batches(
        decode,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        memory=DECODE_TABLES * table_limit,
        max_retries=MAX_LOSSES - 1,
    )


def units_at_once(num_units: int, *, num_gpus: int, num_cpus: float) -> int:
    """Units of a task, so that many encoders are planned for as cheaply as few, and all CPUs work."""
    fair_share = int(num_units / (4 * max(1, num_cpus)))
    return max(1, min(num_gpus // GPUS_A_UNIT, fair_share, MOST_AT_ONCE))


def _memory_limit(num_consumers: int, num_bytes: int) -> float | None:
    """Bytes of shared memory for tables of this size that wait or are being made.

    Without a limit, decoding would fill half of Ray's shared memory ahead of a slower encoder. That is right on a
    cluster, which may also grow, and too much on somebody's own machine.
    """
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if sum(count >= 1 for count in cpus) > 1:
        return None
    return SHARING * num_bytes * (sum(cpus) + TABLES_AHEAD * num_consumers)


def _follow(
    dataset: ray.data.Dataset, *, what: str, limits: StallLimits, taker: PulseTaker | None
) -> Iterator[dict[str, Any]]:
    """Run the pipeline. Yields the counts of each part when it is committed."""
    dataset.context.execution_no_progress_timeout_s = -1  # SeeExecutor looks after it
    see_executor: Any = partial(SeeExecutor, limits)
    dataset.context.custom_execution_callback_classes = [see_executor]
    watch = StallWatch(what, limits)
    with contextlib.ExitStack() as watches:
        watches.enter_context(watched(watch.look, seconds=limits.tell / 10))
        if taker is not None:
            watches.enter_context(watched(taker.look, seconds=PULSE_SECONDS))
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(batch, pa.Table)
            watch.moved()
            yield from batch.to_pylist()


def _end_actors(name: str) -> None:
    """End the actors of a failed pipeline: anything that refers to it keeps them, and their CPUs."""

    def end() -> None:
        # An actor may end by itself meanwhile, and Ray may have ended before.
        with contextlib.suppress(Exception):
            for actor in ray.util.list_named_actors():
                if actor.startswith(name):
                    with contextlib.suppress(ValueError):
                        ray.kill(ray.get_actor(actor))

    # A Ray that has ended is waited for a minute, then it ends this process.
    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(END_SECONDS)


def _dead_nodes() -> set[str]:
    """The nodes that the cluster has lost so far."""
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def _wait_for_nodes() -> None:
    """Wait until each node has answered or is known to be lost, for a minute at most.

    Ray notices late that a machine is gone. Until then it would place encoders there, to be lost once more.
    """
    ask = ray.remote(num_cpus=0, max_retries=0)(platform.node)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    answers = [ask.options(scheduling_strategy=NodeAffinity(node, soft=False)).remote() for node in nodes]
    ray.wait(answers, num_returns=len(answers), timeout=60)


def check_quarantine(source: Source, store: Store) -> None:
    """Raise UserError when the store of this source has too many quarantined images."""
    bad = store.manifest.num_quarantined
    _check_bad(source, store.path, bad=bad, seen=store.manifest.num_rows + bad)


def _check_bad(source: Source, path: str, *, bad: int, seen: int | None) -> None:
    limit = source.config.max_bad_fraction
    if seen and (bad > limit * seen or bad == seen):
        first = write_quarantine(path)[0]
        limit_text = f", more than --max-bad-fraction {limit:g} allows" if bad > limit * seen else ""
        raise UserError(
            f"{bad:,} of {seen:,} images of {source.name} cannot be used{limit_text}; the first is {first['id']} "
            f"({first['error']}), all are in {files.join(path, 'quarantine.parquet')}"
        )
