"""Contrastive training of a dual encoder on pairs, step by step: what a step draws, computes and changes.

Everything random about a step is drawn for the whole batch from the seed and the step's number. So a step is the same
whatever was before it and however many workers share it, and a run goes on from nothing but its weights, its optimiser
and its number of steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lpclip.config import PretrainConfig, UserError, counted
from lpclip.method.contrastive_loss import Loss, choose_distilled, contrastive_loss, distilled_share, gather

MAX_SCALE = 100.0
"""Largest scale of the cosines, as in CLIP: more makes the training unstable."""
BETAS, EPSILON = (0.9, 0.98), 1e-6
"""AdamW's constants, as published for CLIP's vision transformers."""
MIN_SCALE = 0.8
"""Share of an image's side that a crop has at least."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Everything random about one step's batch of B pairs, all workers' shares together."""

    rows: np.ndarray
    """(B,) int64: which pairs."""
    texts: np.ndarray
    """(B,) float in [0, 1): which of a pair's texts."""
    crops: Tensor
    """(B, 4) float32 in [0, 1): size, two of place, and mirroring of the crop."""
    distilled: Tensor
    """(B,) bool: which pairs are trained toward the model's own alignments."""


def check_num_pairs(config: PretrainConfig, *, num_pairs: int) -> None:
    """Raise UserError for fewer pairs than one batch."""
    if num_pairs < config.batch_size:
        raise UserError(
            f"{counted(num_pairs, 'pair')}, fewer than one batch: choose a smaller --batch-size than "
            f"{config.batch_size}"
        )


def num_steps(config: PretrainConfig, *, num_pairs: int) -> int:
    """Steps of the whole training: an epoch has whole batches alone, and leaves other pairs out each time."""
    return config.epochs * (num_pairs // config.batch_size)


def draw_batch(step: int, *, num_pairs: int, config: PretrainConfig) -> Draw:
    """Draw everything random about the step with this number, from 0."""
    epoch, place = divmod(step, num_pairs // config.batch_size)
    rows = _permutation(num_pairs, config.seed, epoch)[place * config.batch_size :][: config.batch_size]
    random = np.random.default_rng((config.seed, 1, step))
    texts = random.random(config.batch_size)
    crops = torch.from_numpy(random.random((config.batch_size, 4), dtype=np.float32))
    generator = torch.Generator().manual_seed(int(random.integers(1 << 62)))
    progress = step / max(1, num_steps(config, num_pairs=num_pairs) - 1)
    share = _share(progress, config)
    distilled = choose_distilled(config.batch_size, share=share, generator=generator)
    return Draw(rows=rows, texts=texts, crops=crops, distilled=distilled)


@lru_cache(2)
def _permutation(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_pairs)


def _share(progress: float, config: PretrainConfig) -> float:
    if config.method == "infonce":
        return 0.0
    return distilled_share(progress, start=config.share_start, end=config.share_end)


def learning_rate(step: int, *, total: int, config: PretrainConfig) -> float:
    """Linear from 0 in the warm-up's share of all steps, then half a cosine to 0."""
    warm = config.warmup * total
    if step < warm:
        return config.learning_rate * (step + 1) / math.ceil(warm)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2


def pick_texts(texts: Sequence[Sequence[str]], draws: np.ndarray) -> list[str]:
    """One of each pair's texts."""
    return [options[int(place * len(options))] for options, place in zip(texts, draws.tolist(), strict=True)]


def crop(images: Tensor, crops: Tensor, *, mirror: bool) -> Tensor:
    """Random crops (B, 3, S, S) of images of that shape, back at their size; `crops` (B, 4) as drawn."""
    area, across, down, side = crops.to(images.device).unbind(1)
    size = (MIN_SCALE**2 + (1 - MIN_SCALE**2) * area).sqrt()
    zero = torch.zeros_like(size)
    sign = torch.where(side < 0.5, -1.0, 1.0) if mirror else torch.ones_like(size)
    rows = [[sign * size, zero, (1 - size) * (2 * across - 1)], [zero, size, (1 - size) * (2 * down - 1)]]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    found = F.grid_sample(images, grid.to(images.dtype), padding_mode="reflection", align_corners=False)
    return found.contiguous(memory_format=torch.channels_last)


class Towers(nn.Module):
    """An open_clip model as both embeddings of unit norm and the cosines' scale, in one forward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # Convolutions take a fifth less time so, on CPUs and GPUs.
        self.model.visual.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, 3, S, S) and (b, L) to float32 (b, d), (b, d) and a scalar."""
        # Captions that are there several times, as class names are, need be encoded once.
        different, places = torch.unique(tokens, dim=0, return_inverse=True)
        image = F.normalize(self.model.encode_image(images).float(), dim=1)
        text = F.normalize(self.model.encode_text(different).float(), dim=1)
        return image, text[places], self.model.logit_scale.exp()


def make_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW over whatever is trained; biases, gains and the scale do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One pass over the weights: on CPUs a step of a small model takes a third less time so.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, eps=EPSILON, fused=True)


class Share(NamedTuple):
    """A worker's share of a step's batch of B pairs."""

    images: Tensor
    """(b, 3, S, S) float, cropped."""
    tokens: Tensor
    """(b, L) int64."""
    distilled: Tensor
    """(B,) bool, of the whole batch: which pairs are trained toward the model's own alignments."""


def train_step(
    towers: nn.Module,
    optimizer: torch.optim.Optimizer,
    share: Share,
    *,
    rate: float,
    config: PretrainConfig,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Take one step on this worker's share of the batch, at the learning rate `rate`.

    Returns the loss in nats, the mean entropy of distilled targets in nats, and the temperature.
    Raises UserError when the loss is no number.
    """
    images, tokens, distilled = share
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    parts = list(zip(images.chunk(config.accumulate), tokens.chunk(config.accumulate), strict=True))
    if len(parts) == 1:
        image, text, scale = _embed(towers, *parts[0], dtype=dtype)
        loss = _loss(image, text, scale, distilled, config)
        loss.total.backward()
    else:
        loss = _accumulate(towers, parts, distilled, config, dtype=dtype)
    if not torch.isfinite(loss.total):
        raise UserError(
            f"the loss is {loss.total.item()}: the training has come apart; try a smaller --learning-rate, or more "
            "--warmup"
        )
    for group in optimizer.param_groups:
        # The fused step takes memory as it lies.
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in group["params"])
    optimizer.step()
    logit_scale = _inner(towers).model.logit_scale
    with torch.no_grad():
        logit_scale.clamp_(0, math.log(MAX_SCALE))
    return {
        "loss": loss.total.item(),
        "target_entropy": loss.target_entropy.item(),
        "temperature": math.exp(-logit_scale.item()),
    }


def _embed(towers: nn.Module, images: Tensor, tokens: Tensor, *, dtype: torch.dtype) -> Any:
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return towers(images, tokens)


def _loss(image: Tensor, text: Tensor, scale: Tensor, distilled: Tensor, config: PretrainConfig) -> Loss:
    return contrastive_loss(
        gather(image),
        gather(text),
        scale=scale,
        distilled=distilled.to(image.device),
        teacher_scale=scale.detach() * config.teacher_sharpness,
        targets=config.targets,
        label_smoothing=config.label_smoothing,
    )


def _accumulate(
    towers: nn.Module,
    parts: list[tuple[Tensor, Tensor]],
    distilled: Tensor,
    config: PretrainConfig,
    *,
    dtype: torch.dtype,
) -> Loss:
    """The whole batch's gradients with the activations of one part at a time (Gao et al., 2021, GradCache).

    All parts are embedded without gradients, the loss tells the gradients of the embeddings, and these go back through
    the towers part by part. It costs a second forward pass.
    """
    with torch.no_grad():
        found = [_embed(_inner(towers), *part, dtype=dtype) for part in parts]
    image, text = (torch.cat([one[i] for one in found]).requires_grad_() for i in (0, 1))
    scale = _inner(towers).model.logit_scale.exp().detach().requires_grad_()
    loss = _loss(image, text, scale, distilled, config)
    loss.total.backward()
    assert image.grad is not None
    assert text.grad is not None
    assert scale.grad is not None
    count = len(parts[0][0])
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with _without_sync(towers, unless=last):
            mine = slice(number * count, (number + 1) * count)
            one_image, one_text, one_scale = _embed(towers, *part, dtype=dtype)
            surrogate = (one_image * image.grad[mine]).sum() + (one_text * text.grad[mine]).sum()
            # The scale is every part's: its gradient goes back once.
            (surrogate + one_scale * (scale.grad if last else 0)).backward()
    return loss


def _inner(towers: nn.Module) -> Any:
    return towers.module if isinstance(towers, DistributedDataParallel) else towers


def _without_sync(towers: nn.Module, *, unless: bool) -> Any:
    if isinstance(towers, DistributedDataParallel) and not unless:
        return towers.no_sync()
    return contextlib.nullcontext()
