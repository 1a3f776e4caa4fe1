"""Self-training under Ray Train: all rounds in one fit, a checkpoint a round, the same code with no worker."""

from __future__ import annotations

import contextlib
import ctypes
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from torch import Tensor

from lpclip.config import SelfTrainingConfig, config_identity, counted, digest
from lpclip.encoders.head import Head
from lpclip.features.describe import has_gpus
from lpclip.features.store import Store
from lpclip.method.few_labels import FewLabels, gathered
from lpclip.method.fit import is_last_student, round_line
from lpclip.method.neighbours import comparison_dtype, nearest
from lpclip.method.priors import Prior
from lpclip.method.pseudo_labels import AllReduce
from lpclip.method.recipe import RECIPE
from lpclip.method.self_training import Rounds
from lpclip.method.shard import CHUNK_ROWS, Shard, compute_device, fit_whitenings
from lpclip.method.state import State
from lpclip.progress import watched
from lpclip.training.exchange import exchange
from lpclip.training.process_group import ProcessGroup
from lpclip.training.round_files import RoundFiles, Search

# The format of the rounds' files. Rounds of another format are never continued.
FORMAT = 4


@dataclass(frozen=True, kw_only=True)
class Work:
    """One training: everything a worker needs, small enough to send."""

    store_path: str
    head: Head
    prior: Prior
    config: SelfTrainingConfig
    folder: str
    """OUT/rounds."""
    identity: dict[str, Any]
    num_neighbours: int
    """Nearest neighbours of each image, 0 for none."""
    labels: Mapping[str, int]
    """Labels that people gave, by id: the head's class indices, or NONE_OF_THESE."""


def make_work(
    *,
    store: Store,
    head: Head,
    prior: Prior,
    config: SelfTrainingConfig,
    folder: str,
    labels: Mapping[str, int] | None = None,
) -> Work:
    """The work of training on a feature store."""
    manifest = store.manifest
    shares = prior.shares.tolist() if prior.shares is not None else None
    identity = {
        "format": FORMAT,
        "features": manifest.fingerprint,
        "head": head.identity,
        "prior": [shares, prior.strength],
        "training": config_identity(config),
    }
    if labels:
        identity["labels"] = digest(dict(labels))
    return Work(
        store_path=store.path,
        head=head,
        prior=prior,
        config=config,
        folder=folder,
        identity=identity,
        num_neighbours=RECIPE.neighbour_count(
            config, num_rows=manifest.num_rows, num_classes=len(head.class_names)
        ),
        labels=labels or {},
    )


def run_rounds(work: Work, *, storage: str, tell: Callable[[str], None] = lambda line: None) -> list[State]:
    """Train, going on after the last round that is there. Returns all rounds, oldest first.

    `tell` is called with a line about each round when the round is there.

    Raises UserError when the folder holds another work's rounds.
    """
    there = RoundFiles(work.folder)
    there.claim(work.identity)
    if there.is_finished():
        return there.states()
    _tell_start(work, there, tell)
    workers = work.config.num_workers
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"work": work},
        # What is added up are a few float64 sums a round, on the CPU: gloo, not NCCL.
        torch_config=ProcessGroup(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=workers > 0 and has_gpus()),
        # A run name that was used before would return its old result; resuming is the rounds' own affair.
        run_config=ray.train.RunConfig(
            name=f"rounds-{uuid.uuid4().hex[:12]}",
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=0 if workers == 0 else 2),
        ),
    )
    with _told_rounds(work, there, tell):
        trainer.fit()
    return there.states()


def _tell_start(work: Work, there: RoundFiles, tell: Callable[[str], None]) -> None:
    """Tell what an earlier run has left to go on from, and that neighbours come first."""
    num_rows = Store.open(work.store_path).manifest.num_rows
    if work.num_neighbours:
        count, known = counted(work.num_neighbours, "nearest neighbour"), there.num_neighbours()
        earlier = f"; {known:,} have them already" if known else ""
        tell(f"rounds: first, each of {num_rows:,} images gets its {count}{earlier}")
    if done := len(there.names()):
        start = there.last_to_go_on_from(num_rows=num_rows, with_neighbours=work.num_neighbours > 0)
        how = f"goes on after round {start}" if start else "begins again with round 1"
        tell(f"rounds: an interrupted run left {counted(done, 'round')}; this one {how}")


def _train_worker(arguments: dict[str, Any]) -> None:
    work: Work = arguments["work"]
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    distributed = size > 1 and dist.is_initialized()

    def all_reduce(tensor: Tensor) -> Tensor:
        if not distributed:
            return tensor
        # gloo adds on the CPU.
        total = tensor.cpu()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def of_first_worker(number: int) -> int:
        # Workers on several machines may see files that were written a moment ago or not.
        return int(all_reduce(torch.tensor([number if rank == 0 else 0])))

    there = RoundFiles(work.folder)
    shard, ids = load_shard(work, part=rank, num_parts=size)
    whitenings = fit_whitenings(shard, all_reduce=all_reduce)
    if work.num_neighbours:
        search = Search(there, num_rows=shard.num_rows, stop_row=shard.stop_row)
        # Every worker takes part, whether it has rows or not.
        found = nearest(
            shard,
            count=work.num_neighbours,
            whitening=whitenings.base,
            dtype=comparison_dtype(),
            all_reduce=all_reduce,
            show=search.show if rank == 0 else lambda done: None,
            known=there.neighbours(of_first_worker(there.num_neighbours())),
            keep=search.keep,
        )
        shard = replace(shard, neighbours=found)
        _return_memory()
    training = Rounds(
        shard,
        head=torch.tensor(work.head.weight) / work.head.temperature,
        prior=work.prior,
        config=work.config,
        all_reduce=all_reduce,
        whitenings=whitenings,
        labels=_few_labels(work, shard, ids, all_reduce=all_reduce) if work.labels else None,
    )
    options: dict[str, Any] = {"num_rows": shard.num_rows, "with_neighbours": work.num_neighbours > 0}
    number = of_first_worker(there.last_to_go_on_from(**options))
    start = there.states()[number - 1] if number else None
    shared = None
    if number and work.num_neighbours:
        shared = there.targets(number - 1, num_rows=shard.num_rows).to(shard.device)
    for state, labelled in training.run(start, shared=shared):
        last = labelled
        if labelled.targets is not None:
            rows = slice(shard.first_row, shard.stop_row)
            there.write_targets(state.round, labelled.targets, rows=rows)
            if distributed:
                dist.barrier()
        if rank == 0:
            there.write_state(state)
        if distributed:
            ray.train.report(state.metrics)
    there.write_labels(rank, ids=ids, found=last)
    if distributed:
        dist.barrier()
    if rank == 0:
        there.finish(rounds=state.round, num_workers=size)


def _return_memory() -> None:
    """Give what is free in the heap back to the system: glibc keeps the pieces of a search's index."""
    with contextlib.suppress(AttributeError, OSError):  # other libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def _few_labels(work: Work, shard: Shard, ids: np.ndarray, *, all_reduce: AllReduce) -> FewLabels:
    """The given labels with their images' features, wherever these are."""
    places, features, classes = gathered(
        work.labels, ids=ids, features=shard.features, first_row=shard.first_row
    )
    return FewLabels(places=all_reduce(places).long(), features=all_reduce(features).float(), classes=classes)


def load_shard(work: Work, *, part: int, num_parts: int) -> tuple[Shard, np.ndarray]:
    """A worker's rows, a run of whole chunks of the row order, and their ids. Labels stay in the store."""
    store = Store.open(work.store_path)
    if num_parts == 1:
        found = store.features(with_labels=False)
    else:
        share = store.share(part, num_workers=num_parts)
        found = exchange(lambda: share.features(with_labels=False), chunk=CHUNK_ROWS)
    # A worker of Ray Train sees the GPU that it was given, and none if it was given none.
    shard = Shard(
        device=compute_device(),
        features=found.base,
        strong=tuple(found.strong.values()),
        first_row=found.first_row,
        num_rows=found.num_rows,
    )
    return shard, found.ids


def _told_rounds(work: Work, there: RoundFiles, tell: Callable[[str], None]) -> AbstractContextManager[None]:
    """Report rounds as their files appear in the folder."""
    seen, searched = len(there.names()), there.search()["done"]

    def look() -> None:
        nonlocal seen, searched
        search = there.search()
        if not seen and search["done"] > searched:
            searched = search["done"]
            tell(f"rounds: nearest neighbours of {searched:,} of {search['of']:,} images")
        names = there.names()
        for place, name in list(enumerate(names))[seen:]:
            before = there.metrics(names[place - 1]) if place else None
            is_last = is_last_student(place + 1, before=before, config=work.config)
            tell(round_line(place + 1, there.metrics(name), is_last=is_last))
        seen = max(seen, len(names))

    return watched(look, seconds=0.5)
