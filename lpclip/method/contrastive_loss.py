"""Losses of contrastive training on image-text pairs: InfoNCE, and progressive self-distillation beside it.

Progressive self-distillation (PSD; Andonian, Chen and Hamid, arXiv 2204.04588) is a reconstruction from the paper's
description; no code of it is public. A growing share of each batch is not trained toward its own text alone, but
toward everything in the batch that the model itself takes for alike. The student is its own teacher: its embeddings
serve both.

With unit vectors v_i of images and t_i of texts, s the student's scale and s' the teacher's, pairs i of N:

    p_i = softmax_j(s v_i . t_j)      q_i = softmax_j(s t_i . v_j)        the student, from images and from texts

    hard pairs       -log p_i[i] - log q_i[i]                             InfoNCE in both directions
    distilled pairs  -sum_j a_i[j] log p_i[j] - sum_j b_i[j] log q_i[j]   toward a and b, which have no gradients

    swapped          a_i = softmax_j(s' t_i . v_j)    b_i = softmax_j(s' v_i . t_j)      as published
    own              a_i = softmax_j(s' v_i . t_j)    b_i = softmax_j(s' t_i . v_j)
    images           a_i = b_i = softmax_{j != i}(s' v_i . v_j)

The loss is half the mean over all pairs. Swapped, a wrong text t_i tells its image where the images of such texts are:
it is believed. The last form is not the paper's: an image learns the texts of images like it, and no text is asked.
docs/pretraining.md has what each is worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather

Targets = Literal["images", "swapped", "own"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a batch."""

    total: Tensor
    """Scalar with gradients, the mean over all pairs and both directions, in nats."""
    target_entropy: Tensor
    """Scalar without: the mean entropy of the distilled pairs' targets in nats, 0 without any."""


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    *,
    scale: Tensor | float,
    distilled: Tensor | None = None,
    teacher_scale: Tensor | float | None = None,
    targets: Targets = "images",
    label_smoothing: float = 0.0,
) -> Loss:
    """The loss of N pairs, images and texts (N, d) of unit norm, row i of one being the pair of row i of the other.

    `distilled` (N,) bool marks the pairs that are trained toward `targets`, none by default: then this is InfoNCE, and
    `label_smoothing` is spread over the batch as in Szegedy et al. (2016). The teacher's scale is the student's by
    default.
    """
    assert images.shape == texts.shape, (images.shape, texts.shape)
    cosines = images @ texts.T
    own = torch.arange(len(images), device=images.device)
    directions = (cosines, cosines.T)
    if distilled is None or not distilled.any():
        losses = [F.cross_entropy(scale * c, own, label_smoothing=label_smoothing) for c in directions]
        return Loss(total=sum(losses, torch.zeros(())) / 2, target_entropy=torch.zeros(()))
    assert label_smoothing == 0, "soft targets are smooth already"
    total, entropy = images.new_zeros(()), images.new_zeros(())
    for student, alignments in zip(directions, _alignments(images, cosines, targets), strict=True):
        with torch.no_grad():
            teacher = scale if teacher_scale is None else teacher_scale
            soft_targets = torch.softmax(teacher * alignments[distilled], dim=1)
            entropy += torch.special.entr(soft_targets).sum() / (2 * len(soft_targets))
        logits = scale * student
        hard = F.cross_entropy(logits[~distilled], own[~distilled], reduction="sum")
        soft = F.cross_entropy(logits[distilled], soft_targets, reduction="sum")
        total = total + (hard + soft) / (2 * len(images))
    return Loss(total=total, target_entropy=entropy)


def _alignments(images: Tensor, cosines: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """The teacher's similarities, from images and from texts, (N, N) each."""
    if targets == "swapped":
        return cosines.T, cosines
    if targets == "own":
        return cosines, cosines.T
    with torch.no_grad():
        among = (images @ images.T).fill_diagonal_(-torch.inf)
    return among, among


def gather(embeddings: Tensor) -> Tensor:
    """All workers' embeddings (W b, d), in the order of their ranks, of this one's (b, d), with gradients.

    Each worker computes the loss of all pairs. The gradients that come back are summed over workers, and DDP's mean
    over them makes that the gradient of one loss.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return embeddings
    return torch.cat(all_gather(embeddings))


def choose_distilled(num_pairs: int, *, share: float, generator: torch.Generator) -> Tensor:
    """A random `share` of pairs, (N,) bool on the CPU: the same on all workers whose generators agree."""
    assert 0 <= share <= 1, share
    chosen = torch.zeros(num_pairs, dtype=torch.bool)
    chosen[torch.randperm(num_pairs, generator=generator)[: round(share * num_pairs)]] = True
    return chosen


def distilled_share(progress: float, *, start: float, end: float) -> float:
    """The share of distilled pairs, from `start` to `end` on half a cosine as `progress` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
