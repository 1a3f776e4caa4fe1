"""Contrastive training under Ray Train: batches from a pair store, checkpoints, metrics; the same code with no worker.

OUT/job.json                         what is trained: other work is never continued
OUT/training/state.safetensors       weights, optimiser, number of steps done: the last checkpoint
OUT/training/metrics.json            what was measured on the way, about a thousand steps of it
OUT/model/open_clip_model.safetensors, open_clip_config.json      the result, as open_clip reads it
OUT/training/finished.json           written last
"""

from __future__ import annotations

import json
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lpclip import files
from lpclip.config import ModelConfig, PretrainConfig, UserError
from lpclip.encoders.encoder import to_input
from lpclip.encoders.open_clip import Trainable, load_trainable
from lpclip.features.pairs import PairStore
from lpclip.method.contrastive_step import (
    Draw,
    Share,
    Towers,
    crop,
    draw_batch,
    learning_rate,
    make_optimizer,
    num_steps,
    pick_texts,
    train_step,
)
from lpclip.training.process_group import ProcessGroup

KEPT_METRICS = 1000
MAX_HEADER = 100 << 20  # of a safetensors file, by its own definition
TOKEN_CACHE = 1 << 17
STATE, METRICS, FINISHED = "state.safetensors", "metrics.json", "finished.json"
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """One training: everything a worker needs, small enough to send."""

    store_path: str
    model: ModelConfig
    config: PretrainConfig
    folder: str
    """OUT/training."""
    model_folder: str
    """OUT/model."""


def pretrain(work: Pretraining, *, storage: str, use_gpu: bool) -> None:
    """Train, going on after the last checkpoint that is there. The result is in `work.model_folder`.

    Raises UserError when the training comes apart, or a store or checkpoint is damaged.
    """
    files.make_folder(work.folder)
    files.make_folder(work.model_folder)
    if is_finished(work):
        return
    workers = work.config.num_workers
    trainer = TorchTrainer(
        _pretrain_worker,
        train_loop_config={"work": work},
        torch_config=ProcessGroup(backend="nccl" if use_gpu and workers else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu and workers > 0),
        # A run name that was used before would return its old result; resuming is the checkpoint's affair.
        run_config=ray.train.RunConfig(
            name=f"pretrain-{uuid.uuid4().hex[:12]}",
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=2 if workers else 0),
        ),
    )
    trainer.fit()


def is_finished(work: Pretraining) -> bool:
    """True when all is done. A model that was moved away is written again, from the last checkpoint."""
    done = files.join(work.folder, FINISHED)
    return all(
        files.exists(path)
        for path in (done, *(files.join(work.model_folder, name) for name in (WEIGHTS, CONFIG)))
    )


def read_metrics(folder: str) -> list[dict[str, float]]:
    """The metrics of a training in this folder so far, oldest first."""
    try:
        return files.read_json(files.join(folder, METRICS))
    except FileNotFoundError:
        return []


def resume_step(folder: str) -> int:
    """Steps of the last checkpoint, 0 without one; what was measured beyond it is dropped, to be measured again."""
    try:
        step = int(_read_metadata(files.join(folder, STATE))["step"])
    except FileNotFoundError:
        step = 0
    found = read_metrics(folder)
    if found and found[-1]["step"] > step:
        files.write_json(files.join(folder, METRICS), [entry for entry in found if entry["step"] <= step])
    return step


def _pretrain_worker(arguments: dict[str, Any]) -> None:
    work: Pretraining = arguments["work"]
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    distributed = size > 1 and dist.is_initialized()
    device = ray.train.torch.get_device() if work.config.num_workers else _own_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // (context.get_local_world_size() or 1)))
    _Training(work, rank=rank, size=size, distributed=distributed, device=device).run()
    if distributed:
        dist.barrier()


def _own_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Training:
    """One worker's side of a training."""

    def __init__(
        self, work: Pretraining, *, rank: int, size: int, distributed: bool, device: torch.device
    ) -> None:
        self.work, self.rank, self.size, self.device = work, rank, size, device
        self.config = work.config
        self.pairs = PairStore(work.store_path)
        self.total = num_steps(self.config, num_pairs=len(self.pairs))
        self.every = max(1, self.total // KEPT_METRICS)
        self.trainable = load_trainable(work.model, seed=self.config.seed)
        self.dtype = resolve_training_precision(self.config.precision, device)
        towers = Towers(self.trainable.model.to(device)).train()
        if self.trainable.locked is not None:
            self.trainable.locked.eval()
        self.inner = towers
        self.optimizer = make_optimizer(towers, self.config)
        self.metrics: list[dict[str, float]] = []
        self.step = self._restore()
        self.towers: nn.Module = DistributedDataParallel(towers) if distributed else towers
        self.tokens = lru_cache(TOKEN_CACHE)(lambda text: self.trainable.tokenizer([text])[0])

    def run(self) -> None:
        """All steps that are left, and the result."""
        begin = saved = told = time.monotonic()
        first = self.step
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._batch, self.step) if self.step < self.total else None
            while coming is not None:
                drawn, images, tokens = coming.result()
                step, self.step = self.step, self.step + 1
                coming = ahead.submit(self._batch, self.step) if self.step < self.total else None
                rate = learning_rate(step, total=self.total, config=self.config)
                found = train_step(
                    self.towers,
                    self.optimizer,
                    Share(self._images(images, drawn), tokens.to(self.device), drawn.distilled),
                    rate=rate,
                    config=self.config,
                    dtype=self.dtype,
                )
                if self.rank:
                    continue
                now = time.monotonic()
                if self.step % self.every == 0 or self.step == self.total:
                    share = drawn.distilled.float().mean().item()
                    pairs = (self.step - first) * self.config.batch_size / (now - begin)
                    found |= {"learning_rate": rate, "distilled_share": share, "pairs_per_second": pairs}
                    self.metrics.append({"step": self.step, **found})
                    if now - told > 1:
                        files.write_json(files.join(self.work.folder, METRICS), self.metrics)
                        told = now
                if now - saved > 60 * self.config.checkpoint_minutes:
                    self._save()
                    saved = time.monotonic()
        if self.rank == 0:
            self._save()
            save_model(self.work.model_folder, self.trainable)
            files.write_json(files.join(self.work.folder, FINISHED), {"steps": self.step})

    def _batch(self, step: int) -> tuple[Draw, Tensor, Tensor]:
        """The step's draw, and this worker's share of its images, uint8 (b, S, S, 3), and tokens (b, L)."""
        drawn = draw_batch(step, num_pairs=len(self.pairs), config=self.config)
        mine = self._mine()
        texts = pick_texts(self.pairs.texts(drawn.rows[mine]), drawn.texts[mine])
        tokens = torch.stack([self.tokens(text) for text in texts])
        return drawn, torch.from_numpy(self.pairs.pixels(drawn.rows[mine])), tokens

    def _mine(self) -> slice:
        share = self.config.batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def _images(self, pixels: Tensor, drawn: Draw) -> Tensor:
        images = to_input(pixels, self.trainable.preprocess, dtype=torch.float32, device=self.device)
        return crop(images, drawn.crops[self._mine()], mirror=self.config.mirror)

    def _save(self) -> None:
        """The checkpoint, metrics first: those beyond the checkpoint are dropped when it is gone on from."""
        files.write_json(files.join(self.work.folder, METRICS), self.metrics)
        tensors = {f"model.{k}": v for k, v in self.inner.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = save_tensors(tensors, metadata={"step": str(self.step)})
        files.write_bytes(files.join(self.work.folder, STATE), data)

    def _restore(self) -> int:
        """Steps that are done: 0, or those of the checkpoint."""
        path = files.join(self.work.folder, STATE)
        try:
            data = files.read_bytes(path)
        except FileNotFoundError:
            return 0
        try:
            tensors = load_tensors(data)
            model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            self.inner.model.load_state_dict(model)
            state = self.optimizer.state_dict()
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".")
                    state["state"].setdefault(int(index), {})[key] = tensor
            self.optimizer.load_state_dict(state)
            for weight, moments in self.optimizer.state.items():
                for key, moment in moments.items():
                    if moment.shape == weight.shape:
                        # The fused step takes memory as it lies: moments must lie as their weights do.
                        moments[key] = torch.empty_like(weight).copy_(moment)
        except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it to begin again") from error
        step = int(_read_metadata(path)["step"])
        self.metrics = [entry for entry in read_metrics(self.work.folder) if entry["step"] <= step]
        return step


def _read_metadata(path: str) -> dict[str, str]:
    """Read the metadata of a safetensors file. Raises UserError when it is damaged."""
    with files.open_input(path) as file:
        length = int.from_bytes(file.read_at(8, 0), "little")
        header = file.read_at(min(length, MAX_HEADER), 8)
    try:
        return json.loads(header)["__metadata__"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to begin again") from error


def resolve_training_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation; `auto` is bfloat16 on GPUs that have it."""
    if precision == "float32" or (precision == "auto" and device.type == "cpu"):
        return torch.float32
    if precision == "auto" and not torch.cuda.is_bf16_supported():
        return torch.float32
    return torch.bfloat16


def save_model(folder: str, trainable: Trainable) -> None:
    """The model as open_clip reads it: float32 weights, then the configuration that tells their architecture."""
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in trainable.model.state_dict().items()
    }
    files.write_bytes(files.join(folder, WEIGHTS), save_tensors(state))
    files.write_json(files.join(folder, CONFIG), trainable.open_clip_config)
