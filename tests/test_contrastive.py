"""InfoNCE is open_clip's, distillation is what its equations say, and workers see one loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, distributed, multiprocessing

from lpclip.method.contrastive_loss import choose_distilled, contrastive_loss, distilled_share, gather


def pairs(num: int, *, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.randn(2, num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    images, texts = F.normalize(random, dim=2).float()
    return images.requires_grad_(), texts.requires_grad_()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("num", [1, 2, 33])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("none", [None, 0.0])
def test_without_distilled_pairs_it_is_open_clips_loss(num: int, scale: float, none: float | None) -> None:
    images, texts = pairs(num)
    factor = torch.tensor(scale, requires_grad=True)
    mask = None if none is None else choose_distilled(num, share=none, generator=torch.Generator())
    loss = contrastive_loss(images, texts, scale=factor, distilled=mask)
    expected = ClipLoss()(images, texts, factor)
    torch.testing.assert_close(loss.total, expected, atol=1e-6, rtol=1e-6)
    leaves = (images, texts, factor)
    for found, own in zip(gradients(loss.total, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(found, own, atol=1e-6, rtol=1e-5)
    assert loss.target_entropy == 0


@pytest.mark.parametrize("teacher_scale", [None, 3.0])
@pytest.mark.parametrize("targets", ["swapped", "own", "images"])
def test_distilled_pairs_follow_the_equations(targets: Any, teacher_scale: float | None) -> None:
    images, texts = pairs(5)
    distilled = torch.tensor([True, False, True, False, False])
    loss = contrastive_loss(
        images, texts, scale=10.0, distilled=distilled, teacher_scale=teacher_scale, targets=targets
    )
    expected, entropy = torch.zeros(()), 0.0
    for i in range(5):
        for here, there in ((images, texts), (texts, images)):
            student = torch.stack([10.0 * (here[i] @ there[j]) for j in range(5)]).log_softmax(0)
            if not distilled[i]:
                expected = expected - student[i] / 10
                continue
            # From whom and among whom the teacher looks, as constants.
            one, among = {"swapped": (there, here), "own": (here, there), "images": (images, images)}[targets]
            seen = (
                torch.stack([(teacher_scale or 10.0) * (one[i] @ among[j]) for j in range(5)]).exp().detach()
            )
            seen[i] *= targets != "images"
            target = seen / seen.sum()
            expected = expected - (target * student).sum() / 10
            entropy -= float(torch.special.xlogy(target, target).sum()) / 4
    torch.testing.assert_close(loss.total, expected, atol=1e-6, rtol=1e-6)
    assert float(loss.target_entropy) == pytest.approx(entropy, rel=1e-5)
    for found, own in zip(
        gradients(loss.total, images, texts), gradients(expected, images, texts), strict=True
    ):
        torch.testing.assert_close(found, own, atol=1e-6, rtol=1e-5)


def test_a_sharp_teacher_of_right_pairs_says_what_one_hot_targets_say() -> None:
    images, _ = pairs(6, dim=32)
    distilled = torch.ones(6, dtype=torch.bool)
    soft = contrastive_loss(
        images, images, scale=5.0, distilled=distilled, teacher_scale=1e4, targets="swapped"
    )
    torch.testing.assert_close(soft.total, contrastive_loss(images, images, scale=5.0).total)
    assert soft.target_entropy < 1e-6


def test_smoothed_labels_are_spread_over_the_batch() -> None:
    images, texts = pairs(4)
    found = contrastive_loss(images, texts, scale=7.0, label_smoothing=0.2).total
    targets = 0.8 * torch.eye(4) + 0.2 / 4
    logits = 7.0 * images @ texts.T
    expected = -(targets * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum() / 8
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_chosen_pairs_are_as_many_as_the_share_says_and_follow_the_generator(share: float) -> None:
    a, b, c = (
        choose_distilled(64, share=share, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert a.sum() == 64 * share
    assert torch.equal(a, b)
    assert torch.equal(a, c) == (share in (0, 1))


def test_the_share_grows_on_half_a_cosine() -> None:
    shares = [distilled_share(i / 10, start=0.2, end=0.8) for i in range(11)]
    assert shares == sorted(shares)
    assert (shares[0], shares[5], shares[10]) == pytest.approx((0.2, 0.5, 0.8))
    assert distilled_share(2.0, start=0.2, end=0.8) == pytest.approx(0.8)


def _work(rank: int, path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    images, texts = (side.detach()[4 * rank : 4 * rank + 4].requires_grad_() for side in pairs(8))
    distilled = choose_distilled(8, share=0.5, generator=torch.Generator().manual_seed(0))
    loss = contrastive_loss(gather(images), gather(texts), scale=10.0, distilled=distilled).total
    torch.save([loss.detach(), *gradients(loss, images, texts)], path / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_see_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_work, args=(tmp_path,), nprocs=2)
    images, texts = pairs(8)
    distilled = choose_distilled(8, share=0.5, generator=torch.Generator().manual_seed(0))
    loss = contrastive_loss(gather(images), gather(texts), scale=10.0, distilled=distilled).total
    expected = gradients(loss, images, texts)
    for rank in range(2):
        found, *own = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, loss.detach(), atol=1e-6, rtol=1e-6)
        for whole, part in zip(expected, own, strict=True):
            # Summed over two workers; DDP's mean halves it.
            torch.testing.assert_close(part / 2, whole[4 * rank : 4 * rank + 4], atol=1e-6, rtol=1e-5)
