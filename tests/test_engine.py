"""OpenVINO computes an encoder's features as torch does, from files that are made once and checked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT

from lpclip.config import EncoderConfig, UserError
from lpclip.encoders import kept, on_cpu
from lpclip.encoders.engine import CPU_BATCH, computes_bfloat16
from lpclip.encoders.kept import keep
from lpclip.encoders.load import load_encoder
from lpclip.encoders.on_cpu import describe_on_cpu, load_tower
from lpclip.encoders.prompts import DEFAULT_TEMPLATES
from lpclip.encoders.zero_shot import describe

pytestmark = pytest.mark.usefixtures("lite_map")
LITE = EncoderConfig(precision="float32")


def save_weights(name: str, path: Path, *, seed: int) -> str:
    """Random weights of an open_clip model as a checkpoint."""
    import open_clip

    from lpclip.encoders.open_clip import register

    torch.manual_seed(seed)
    torch.save(open_clip.create_model(register(name)).state_dict(), path)
    return str(path)


def features(config: EncoderConfig) -> np.ndarray:
    """Features of random images, two batches and a bit, as an actor computes them with two threads."""
    info = describe_on_cpu(config, (), ())
    size = info.preprocess.size
    pixels = np.random.default_rng(1).integers(0, 256, (3 * CPU_BATCH, size, size, 3), dtype=np.uint8)
    batches = np.split(pixels, 3)
    return np.concatenate(list(load_tower(config, info, num_threads=2)(batches)))


@pytest.mark.parametrize("name", ["lite", "tiny-32", "tiny-vit-32"])
def test_both_engines_give_the_same_features(name: str, tmp_path: Path) -> None:
    # A modified ResNet and a vision transformer stand for CLIP's two kinds of image towers.
    weights = None if name == "lite" else save_weights(name, tmp_path / "weights.pt", seed=0)
    config = replace(LITE, encoder=name, pretrained=weights)
    assert describe_on_cpu(config, (), ()).engine == "openvino"
    np.testing.assert_allclose(features(config), features(replace(config, engine="torch")), atol=2.5e-4)


def test_a_second_process_describes_and_encodes_without_torch() -> None:
    first = describe_on_cpu(LITE, CLASSES, DEFAULT_TEMPLATES)
    code = f"""
import sys, numpy as np
from lpclip.config import EncoderConfig
from lpclip.encoders.on_cpu import describe_on_cpu, load_tower
from lpclip.encoders.prompts import DEFAULT_TEMPLATES
config = EncoderConfig(precision="float32")
info = describe_on_cpu(config, {CLASSES!r}, DEFAULT_TEMPLATES)
pixels = np.zeros(({CPU_BATCH}, info.preprocess.size, info.preprocess.size, 3), np.uint8)
(found,) = load_tower(config, info, num_threads=1)([pixels])
assert found.shape == ({CPU_BATCH}, 1280), found.shape
assert "torch" not in sys.modules
sys.stdout.buffer.write(info.head.tobytes())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    assert first.head is not None
    assert done.stdout == first.head.tobytes()


def test_a_file_whose_weights_changed_is_converted_again(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    config = replace(LITE, encoder="tiny-vit-32", pretrained=save_weights("tiny-vit-32", path, seed=0))
    before, first = describe_on_cpu(config, (), ()), features(config)
    save_weights("tiny-vit-32", path, seed=1)
    after, second = describe_on_cpu(config, (), ()), features(config)
    assert before.identity["weights"] != after.identity["weights"]
    assert np.abs(first - second).max() > 0.1
    # The tower of an encoder that a job did not begin with is refused.
    with pytest.raises(UserError, match="another encoder was found"):
        load_tower(config, before, num_threads=1)


def test_a_damaged_network_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPCLIP_CACHE", str(tmp_path / "cache"))
    weights = save_weights("tiny-vit-32", tmp_path / "weights.pt", seed=0)
    config = replace(LITE, encoder="tiny-vit-32", pretrained=weights)
    expected = features(config)
    (network,) = tmp_path.glob("cache/encoders/*/network.bin")
    whole = network.read_bytes()
    network.write_bytes(whole[:-4] + b"\0\0\0\1")
    np.testing.assert_array_equal(features(config), expected)
    assert network.read_bytes() == whole


def test_class_names_that_cannot_be_kept_cost_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPCLIP_CACHE", str(tmp_path / "cache"))
    weights = save_weights("tiny-vit-32", tmp_path / "weights.pt", seed=0)
    config = replace(LITE, encoder="tiny-vit-32", pretrained=weights)
    describe_on_cpu(config, (), ())
    (network,) = tmp_path.glob("cache/encoders/*/network.bin")
    (network.parent / "heads").write_text("a file in the place of a folder")
    info = describe_on_cpu(config, CLASSES, DEFAULT_TEMPLATES)
    assert info.engine == "openvino"
    assert info.head is not None
    assert info.head.shape == (3, 64)


def test_a_job_leaves_alone_what_a_faster_one_kept_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPCLIP_CACHE", str(tmp_path / "cache"))
    weights = save_weights("tiny-vit-32", tmp_path / "weights.pt", seed=0)
    config = replace(LITE, encoder="tiny-vit-32", pretrained=weights)
    info = describe_on_cpu(config, (), ())
    (network,) = tmp_path.glob("cache/encoders/*/network.xml")
    before = network.stat().st_ino
    keep(
        config, info, convert=lambda path: on_cpu.convert(load_encoder(config).image_network(), path, size=32)
    )
    assert network.stat().st_ino == before
    assert [path.name for path in (tmp_path / "cache" / "encoders").iterdir()] == [network.parent.name]


def test_a_job_leaves_alone_what_a_faster_one_keeps_while_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPCLIP_CACHE", str(tmp_path / "cache"))
    weights = save_weights("tiny-vit-32", tmp_path / "weights.pt", seed=0)
    config = replace(LITE, encoder="tiny-vit-32", pretrained=weights)
    info = describe(config, (), (), device="cpu")
    seen, find = list[int](), kept.find

    def kept_files() -> list[int]:
        found = tmp_path.glob("cache/encoders/*/network.*")
        return [path.stat().st_ino for path in found if path.parent.suffix != ".part"]

    def convert(path: Path) -> None:
        path.write_text("network")
        path.with_suffix(".bin").write_text("weights")

    def look(config: EncoderConfig, *, precision: str) -> kept.Kept | None:
        found = find(config, precision=precision)
        monkeypatch.setattr(kept, "find", find)
        keep(config, info, convert=convert)
        seen.extend(kept_files())
        return found

    monkeypatch.setattr(kept, "find", look)
    for _ in range(2):
        keep(config, info, convert=convert)
    assert seen == kept_files()


def test_where_openvino_cannot_run_a_model_torch_does_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in the place of the cache folder: nothing can be kept.
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("LPCLIP_CACHE", str(tmp_path / "cache"))
    weights = save_weights("tiny-vit-32", tmp_path / "weights.pt", seed=0)
    config = replace(LITE, encoder="tiny-vit-32", pretrained=weights)
    info = describe_on_cpu(config, (), ())
    assert info.engine == "torch"
    assert "torch computes the features, more slowly" in info.notes[-1]
    assert features(config).shape == (3 * CPU_BATCH, 64)
    with pytest.raises(UserError, match="--engine openvino cannot run tiny-vit-32"):
        describe_on_cpu(replace(config, engine="openvino"), (), ())


def test_a_converted_network_with_other_features_is_refused(tmp_path: Path) -> None:
    one, other = (
        load_encoder(
            replace(
                LITE,
                encoder="tiny-vit-32",
                pretrained=save_weights("tiny-vit-32", tmp_path / f"{seed}.pt", seed=seed),
            )
        )
        for seed in (0, 1)
    )
    on_cpu.convert(one.image_network(), tmp_path / "network.xml", size=32)
    on_cpu._refuse_other_features(tmp_path / "network.xml", one)
    with pytest.raises(ValueError, match="other features"):
        on_cpu._refuse_other_features(tmp_path / "network.xml", other)


def test_an_engine_is_refused_for_a_precision_in_which_it_does_not_compute() -> None:
    config = replace(LITE, precision="float16")
    assert describe_on_cpu(config, (), ()).engine == "torch"
    with pytest.raises(UserError, match="--engine openvino"):
        describe_on_cpu(replace(config, engine="openvino"), (), ())
    bfloat16 = describe_on_cpu(replace(LITE, precision="bfloat16"), (), ())
    assert bfloat16.engine == ("openvino" if computes_bfloat16() else "torch")
    assert bfloat16.identity["precision"] == "bfloat16"
