"""A step of contrastive training: what it draws, what it computes, and that its parts are its whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lpclip.config import ModelConfig, PretrainConfig
from lpclip.encoders.open_clip import load_trainable
from lpclip.method.contrastive_step import (
    MIN_SCALE,
    Share,
    Towers,
    check_num_pairs,
    crop,
    draw_batch,
    learning_rate,
    make_optimizer,
    num_steps,
    pick_texts,
    train_step,
)

CONFIG = PretrainConfig(batch_size=8, epochs=3)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_epoch_has_each_pair_once_in_another_order() -> None:
    epochs = [
        np.concatenate([draw_batch(4 * e + i, num_pairs=32, config=CONFIG).rows for i in range(4)])
        for e in range(3)
    ]
    assert all(sorted(rows.tolist()) == list(range(32)) for rows in epochs)
    assert len({rows.tobytes() for rows in epochs}) == 3
    assert num_steps(CONFIG, num_pairs=35) == 12


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    first = draw_batch(5, num_pairs=32, config=CONFIG)
    for step in (0, 11, 3):
        draw_batch(step, num_pairs=32, config=CONFIG)
    again, other = (draw_batch(5, num_pairs=32, config=replace(CONFIG, seed=seed)) for seed in (0, 1))
    for name in ("rows", "texts", "crops", "distilled"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name)) or name == "distilled"


@pytest.mark.parametrize(("method", "shares"), [("psd", (0.25, 0.75)), ("infonce", (0.0, 0.0))])
def test_the_distilled_share_grows_from_the_first_step_to_the_last(
    method: Any, shares: tuple[float, float]
) -> None:
    config = replace(CONFIG, method=method, share_start=0.25, share_end=0.75)
    found = [
        draw_batch(step, num_pairs=32, config=config).distilled.float().mean().item() for step in range(12)
    ]
    assert (found[0], found[-1]) == shares
    assert found == sorted(found)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    config = replace(CONFIG, warmup=0.1, learning_rate=2.0)
    rates = [learning_rate(step, total=100, config=config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.01
    assert learning_rate(0, total=1, config=replace(config, warmup=0.0)) == 2.0


def test_texts_are_picked_by_the_draw() -> None:
    assert pick_texts([["a"], ["b", "c"], ["d", "e"]], np.array([0.99, 0.49, 0.5])) == ["a", "b", "e"]


def test_the_whole_image_is_a_crop_and_so_is_its_mirror_image() -> None:
    images = torch.rand(2, 3, 16, 16)
    whole = torch.tensor([[1.0, 0.3, 0.7, 0.1], [1.0, 0.6, 0.2, 0.9]])
    torch.testing.assert_close(crop(images, whole, mirror=False), images, atol=1e-5, rtol=0)
    mirrored = crop(images, whole, mirror=True)
    torch.testing.assert_close(mirrored, torch.stack([images[0].flip(2), images[1]]), atol=1e-5, rtol=0)


def test_crops_reach_the_corners_and_not_beyond() -> None:
    # Brightness tells the place: a crop of the corner has that corner's pixels at its own.
    ramp = torch.linspace(0, 1, 64)
    image = (ramp[None, :] + ramp[:, None]).expand(1, 3, 64, 64)
    near, far = (crop(image, torch.tensor([[0.0, x, x, 0.9]]), mirror=False) for x in (0.0, 1.0))
    assert near[0, 0, 0, 0] == pytest.approx(0.0, abs=0.01)
    assert far[0, 0, -1, -1] == pytest.approx(2.0, abs=0.01)
    assert near[0, 0, -1, -1] == pytest.approx(2 * MIN_SCALE, abs=0.02)


def model_and_batch(count: int = 16, **options: Any) -> tuple[Towers, torch.Tensor, torch.Tensor]:
    trainable = load_trainable(ModelConfig(encoder="tiny-vit-32", **options), seed=0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    # Some captions are there twice.
    tokens = trainable.tokenizer([f"thing {i % (count - 3)}" for i in range(count)])
    return Towers(trainable.model), images, tokens


@pytest.mark.parametrize("method", ["psd", "infonce"])
def test_a_step_in_parts_is_the_step_in_one(method: Any) -> None:
    distilled = torch.arange(16) % 2 == 0 if method == "psd" else torch.zeros(16, dtype=torch.bool)
    found = []
    for accumulate in (1, 4):
        towers, images, tokens = model_and_batch()
        config = PretrainConfig(method=method, accumulate=accumulate)
        optimizer = torch.optim.SGD(towers.parameters(), lr=1.0)
        told = train_step(
            towers,
            optimizer,
            Share(images, tokens, distilled),
            rate=1.0,
            config=config,
            dtype=torch.float32,
        )
        found.append((told, towers.state_dict()))
    (told, state), (parts_told, parts) = found
    assert parts_told == pytest.approx(told, rel=1e-5)
    for name, weight in state.items():
        torch.testing.assert_close(parts[name], weight, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["psd", "infonce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_on_one_batch_learn_it(method: Any, dtype: torch.dtype) -> None:
    towers, images, _ = model_and_batch(8)
    trainable = load_trainable(ModelConfig(encoder="tiny-vit-32"), seed=0)
    tokens = trainable.tokenizer(list("abcdefgh"))
    config = PretrainConfig(method=method, weight_decay=0.0)
    optimizer = make_optimizer(towers, config)
    distilled = torch.tensor([True, False] * 4) if method == "psd" else torch.zeros(8, dtype=torch.bool)
    losses = [
        train_step(towers, optimizer, Share(images, tokens, distilled), rate=3e-3, config=config, dtype=dtype)
        for _ in range(40)
    ]
    # Half of the pairs alone are told what fits.
    assert losses[-1]["loss"] < (0.5 if method == "infonce" else 1.0) * losses[0]["loss"]
    assert (losses[0]["target_entropy"] > 0) == (method == "psd")


def test_a_training_that_comes_apart_is_told() -> None:
    towers, images, tokens = model_and_batch()
    optimizer = make_optimizer(towers, CONFIG)
    images[0] = torch.nan
    with pytest.raises(ValueError, match=r"the loss is nan: .* smaller --learning-rate"):
        train_step(
            towers,
            optimizer,
            Share(images, tokens, torch.zeros(16, dtype=torch.bool)),
            rate=1e-3,
            config=CONFIG,
            dtype=torch.float32,
        )


def test_a_locked_tower_is_not_trained() -> None:
    for lock, other in (("image", "transformer"), ("text", "visual")):
        trainable = load_trainable(ModelConfig(encoder="tiny-vit-32", lock=lock), seed=0)  # type: ignore[arg-type]
        trained = {name for name, p in trainable.model.named_parameters() if p.requires_grad}
        assert any(name.startswith(other) for name in trained)
        assert any(name.startswith("visual") for name in trained) == (lock == "text")
        assert any(name.startswith("transformer") for name in trained) == (lock == "image")


def test_first_weights_follow_the_seed_alone() -> None:
    states = [
        load_trainable(ModelConfig(encoder="tiny-vit-32"), seed=seed).model.state_dict() for seed in (0, 0, 1)
    ]
    name = "visual.proj"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        (
            {"batch_size": 30, "accumulate": 4},
            "--batch-size 30 cannot be shared by 1 worker in 4 parts each",
        ),
        ({"batch_size": 30, "num_workers": 4}, "--batch-size 30 cannot be shared by 4 workers"),
        (
            {"share_start": 0.9},
            "--share-start 0.9 and --share-end 0.5 must lie between 0 and 1, in this order",
        ),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0, not 0"),
        ({"checkpoint_minutes": -1.0}, "--checkpoint-minutes must be at least 0, not -1"),
        ({"teacher_sharpness": -1.0}, "--teacher-sharpness must be above 0, not -1"),
        ({"label_smoothing": 0.1}, "--label-smoothing is for --method infonce"),
        ({"warmup": 1.0}, "--warmup must be at least 0 and below 1, not 1"),
        ({"weight_decay": -0.1}, "--weight-decay must be at least 0, not -0.1"),
        ({"num_workers": -1}, "--num-workers must be at least 0, not -1"),
        ({"batch_size": 200}, "100 pairs, fewer than one batch: choose a smaller --batch-size than 200"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        config = PretrainConfig(**options)
        config.check()
        check_num_pairs(config, num_pairs=100)
    assert told in str(error.value)
