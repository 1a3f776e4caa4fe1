"""Self-training under Ray Train: all rounds in one fit, a checkpoint a round, the same code with no worker.

OUT/rounds/identity.json            what is trained, so that other work's rounds are never continued
OUT/rounds/round-001.safetensors    weight, bias, factors
OUT/rounds/round-001.json           metrics; written after the tensors: the round exists when it does
OUT/rounds/search.json              how far the search for neighbours is
OUT/rounds/labels-0.parquet         the last round's pseudo-labels of worker 0
OUT/rounds/finished.json            written last
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from safetensors.torch import save as save_tensors
from torch import Tensor

from lpclip import files
from lpclip.config import SelfTrainingConfig, UserError, config_identity, digest
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
from lpclip.method.state import Pass, State
from lpclip.progress import watched
from lpclip.training.exchange import exchange
from lpclip.training.process_group import ProcessGroup
from lpclip.training.tensors import read_tensors

# The format of the rounds' files. Rounds of another format are never continued.
FORMAT = 4
LABELS = pa.schema(
    [("id", pa.string()), ("label", pa.int32()), ("confidence", pa.float32()), ("kept", pa.bool_())]
)


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
    labels: Mapping[str, int]
    """Labels that people gave, by id: the head's class indices, or NONE_OF_THESE."""


def make_work(
    *,
    store_path: str,
    fingerprint: str,
    head: Head,
    prior: Prior,
    config: SelfTrainingConfig,
    folder: str,
    labels: Mapping[str, int] | None = None,
) -> Work:
    """The work of training on a feature store."""
    shares = prior.shares.tolist() if prior.shares is not None else None
    identity = {
        "format": FORMAT,
        "features": fingerprint,
        "head": head.identity,
        "prior": [shares, prior.strength],
        "training": config_identity(config),
    }
    if labels:
        identity["labels"] = digest(dict(labels))
    return Work(
        store_path=store_path,
        head=head,
        prior=prior,
        config=config,
        folder=folder,
        identity=identity,
        labels=labels or {},
    )


def run_rounds(work: Work, *, storage: str, tell: Callable[[str], None] = lambda line: None) -> list[State]:
    """Train, going on after the last round that is there. Returns all rounds, oldest first.

    `tell` is called with a line about each round when the round is there.

    Raises UserError when the folder holds another work's rounds.
    """
    files.make_folder(work.folder)
    mark = files.join(work.folder, "identity.json")
    if files.exists(mark):
        if files.read_json(mark) != work.identity:
            raise UserError(f"{work.folder} holds the rounds of another training; choose another --out")
    else:
        files.write_json(mark, work.identity)
    if files.exists(files.join(work.folder, "finished.json")):
        return read_rounds(work.folder)
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
    with _told_rounds(work, tell):
        trainer.fit()
    return read_rounds(work.folder)


def read_rounds(folder: str) -> list[State]:
    """The rounds that are there, oldest first. Raises UserError when one is damaged."""
    states = []
    for name in _round_names(folder):
        text = files.read_json(files.join(folder, name))
        path = files.join(folder, name.replace(".json", ".safetensors"))
        tensors = read_tensors(path, remedy=f"remove the folder {folder}, its rounds run again")
        weight, bias, factors = tensors["weight"], tensors["bias"], tensors["factors"]
        states.append(State(weight=weight, bias=bias, factors=factors, **text))
    return states


def read_pseudo_labels(folder: str) -> pa.Table:
    """The last round's pseudo-labels in row order: id, label, confidence, kept, round."""
    finished = files.read_json(files.join(folder, "finished.json"))
    tables = []
    for worker in range(finished["num_workers"]):
        path = files.join(folder, f"labels-{worker}.parquet")
        with files.open_parquet(path, remedy=f"remove the folder {folder}, its rounds run again") as found:
            tables.append(files.read_columns(found))
    table = pa.concat_tables(tables)
    return table.append_column("round", pa.array(np.full(len(table), finished["round"], np.int32)))


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

    shard, ids = load_shard(work, part=rank, num_parts=size)
    # The last round is done again: its pass over the rows, with the labels, was not kept. With neighbours all
    # are: they depend on the targets of the round before, and take seconds where there are few enough rows.
    count = RECIPE.neighbour_count(work.config, num_rows=shard.num_rows, num_classes=len(work.head.weight))
    rounds = read_rounds(work.folder)[:-1] if count == 0 else []
    whitenings = fit_whitenings(shard, all_reduce=all_reduce)
    if count:
        # Every worker takes part, whether it has rows or not.
        found = nearest(
            shard,
            count=count,
            whitening=whitenings.base,
            dtype=comparison_dtype(),
            all_reduce=all_reduce,
            show=_Search(work.folder, shard.num_rows).note if rank == 0 else lambda done: None,
        )
        shard = replace(shard, neighbours=found)
    training = Rounds(
        shard,
        head=torch.tensor(work.head.weight) / work.head.temperature,
        prior=work.prior,
        config=work.config,
        all_reduce=all_reduce,
        whitenings=whitenings,
        labels=_few_labels(work, shard, ids, all_reduce=all_reduce) if work.labels else None,
    )
    for state, labelled in training.run(rounds[-1] if rounds else None):
        last = labelled
        if rank == 0:
            _write_round(work.folder, state)
        if distributed:
            ray.train.report(state.metrics)
    _write_labels(work.folder, rank, ids=ids, found=last)
    if distributed:
        dist.barrier()
    if rank == 0:
        # A run that was interrupted may have gone further: rounding decides whether hardly a label changed.
        for name in _round_names(work.folder)[state.round :]:
            files.delete(files.join(work.folder, name))
        files.write_json(
            files.join(work.folder, "finished.json"), {"round": state.round, "num_workers": size}
        )


def _few_labels(work: Work, shard: Shard, ids: np.ndarray, *, all_reduce: AllReduce) -> FewLabels:
    """The given labels with their images' features, wherever these are."""
    places, features, classes = gathered(
        work.labels, ids=ids, features=shard.features, first_row=shard.first_row
    )
    return FewLabels(places=all_reduce(places).long(), features=all_reduce(features).float(), classes=classes)


@dataclass
class _Search:
    """How far the search for neighbours is: a worker notes it in a file, and the driver tells it."""

    folder: str
    num_rows: int
    noted: float = -math.inf

    def note(self, done: int) -> None:
        """Note the number of rows that are done, twice a minute."""
        if time.monotonic() >= self.noted + 30:
            self.noted = time.monotonic()
            files.write_json(_search_path(self.folder), {"done": done, "of": self.num_rows})


def _search_path(folder: str) -> str:
    return files.join(folder, "search.json")


def load_shard(work: Work, *, part: int, num_parts: int) -> tuple[Shard, np.ndarray]:
    """A worker's rows, a run of whole chunks of the row order, and their ids. Labels stay in the store."""
    store = Store.open(work.store_path)
    if num_parts == 1:
        found = store.features(with_labels=False)
    else:
        found = store.share(part, num_workers=num_parts).features(with_labels=False)
        found = exchange(found, chunk=CHUNK_ROWS)
    # A worker of Ray Train sees the GPU that it was given, and none if it was given none.
    shard = Shard(
        device=compute_device(),
        features=found.base,
        strong=tuple(found.strong.values()),
        first_row=found.first_row,
        num_rows=found.num_rows,
    )
    return shard, found.ids


def _write_round(folder: str, state: State) -> None:
    name = f"round-{state.round:03d}"
    tensors = {key: value.contiguous() for key, value in state.to_tensors().items()}
    files.write_bytes(files.join(folder, f"{name}.safetensors"), save_tensors(tensors))
    text = {
        "round": state.round,
        "zero_shot_share": state.zero_shot_share,
        "evidence": state.evidence,
        "metrics": state.metrics,
    }
    files.write_json(files.join(folder, f"{name}.json"), text)


def _told_rounds(work: Work, tell: Callable[[str], None]) -> AbstractContextManager[None]:
    """Report rounds as their files appear in the folder."""
    seen = len(_round_names(work.folder))
    searched = 0

    def metrics_of(name: str) -> dict[str, float]:
        found: dict[str, float] = files.read_json(files.join(work.folder, name))["metrics"]
        return found

    def look() -> None:
        nonlocal seen, searched
        path = _search_path(work.folder)
        search = files.read_json(path) if not seen and files.exists(path) else {"done": 0}
        if search["done"] > searched:
            searched = search["done"]
            tell(f"rounds: nearest neighbours of {searched:,} of {search['of']:,} images")
        names = _round_names(work.folder)
        for place, name in list(enumerate(names))[seen:]:
            before = metrics_of(names[place - 1]) if place else None
            is_last = is_last_student(place + 1, before=before, config=work.config)
            tell(round_line(place + 1, metrics_of(name), is_last=is_last))
        seen = max(seen, len(names))

    return watched(look, seconds=0.5)


def _round_names(folder: str) -> list[str]:
    names = files.list_names(folder)
    return [name for name in names if name.startswith("round-") and name.endswith(".json")]


def _write_labels(folder: str, rank: int, *, ids: np.ndarray, found: Pass) -> None:
    columns = [
        pa.array(ids, pa.string()),
        pa.array(found.labels),
        pa.array(found.confidence),
        pa.array(found.kept),
    ]
    files.write_parquet(files.join(folder, f"labels-{rank}.parquet"), pa.table(columns, schema=LABELS))
