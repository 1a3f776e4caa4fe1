"""The pretrain job: pairs in, a model out that other jobs take, whatever befalls it on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, draw, refusal, run, start
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from lpclip.config import ModelConfig
from lpclip.encoders.open_clip import SMALL as SMALL_MODELS
from lpclip.encoders.open_clip import load_trainable
from lpclip.features.pairs import PairStore

pytestmark = pytest.mark.usefixtures("cluster")
SMALL = "--encoder tiny-vit-32 --batch-size 32 --epochs 3"
WAIT_SECONDS = 240


def make_pairs(count: int) -> dict[str, list[Any]]:
    return {
        "id": [f"pair-{i}" for i in range(count)],
        "image": [draw(i % 3, i) for i in range(count)],
        "caption": [[f"a {CLASSES[i % 3]}", f"the {CLASSES[i % 3]}"] for i in range(count)],
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pairs with two captions each."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(pa.table(make_pairs(96)), path)
    return path


@pytest.fixture(scope="module")
def undisturbed(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished training's summary."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        return run(f"pretrain.py --data {pairs} --out {out} {SMALL} --pairs {pairs.parent}/stores", patch)


def test_images_and_texts_are_where_their_ids_say(pairs: Path, undisturbed: dict[str, Any]) -> None:
    found = PairStore(undisturbed["pairs"]["store"])
    rows = [95, 0, 17, 17]
    assert len(found) == 96
    assert found.pixels(rows).shape == (4, 32, 32, 3)
    assert np.array_equal(found.pixels(rows)[2], found.pixels([17])[0])
    texts = found.texts(range(96))
    assert sorted(t[0] for t in texts) == sorted(c[0] for c in make_pairs(96)["caption"])
    # The disc alone is green: its images and its captions lie in the same rows.
    hue = found.pixels(range(96)).reshape(96, -1, 3).astype(int)
    green = (hue[:, :, 1] - hue[:, :, 2]).max(1) > 140
    assert sum(g == ("ball" in t[0]) for g, t in zip(green, texts, strict=True)) > 90


@pytest.mark.slow
def test_the_model_is_open_clips_and_other_jobs_take_it(
    undisturbed: dict[str, Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert undisturbed["steps"] == 9
    model = Path(undisturbed["model"])
    loaded = open_clip.create_model(f"local-dir:{model.parent}")
    for name, weight in load_file(model).items():
        assert torch.equal(loaded.state_dict()[name], weight)
    found = run(
        f"selftrain.py --data {photos} --encoder tiny-vit-32 --pretrained {model} --views weak --out {tmp_path}",
        monkeypatch,
    )
    assert found["encoder"]["name"] == "tiny-vit-32"
    assert found["probe"]["accuracy"] is not None


def assert_in_mlflow(summary: dict[str, Any]) -> None:
    """Every step of a training of nine is in its MLflow run once."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    names = [f"training/{name}" for name in ("loss", "temperature", "target_entropy", "distilled_share")]
    for name in (*names, "speed/pairs_per_second"):
        found = client.get_metric_history(summary["mlflow_run"], name)
        assert sorted(metric.step for metric in found) == list(range(1, 10))


def test_metrics_are_in_mlflow(undisturbed: dict[str, Any]) -> None:
    assert_in_mlflow(undisturbed)
    assert [undisturbed["last"]["step"], undisturbed["last"]["distilled_share"]] == [
        9,
        pytest.approx(0.5, abs=0.02),
    ]


@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_bit_for_bit_as_if_nothing_had_been(
    pairs: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"pretrain.py --data {pairs} --out {tmp_path} {SMALL} --pairs {pairs.parent}/stores"
    command = f"{command} --checkpoint-minutes 0"
    process = start(command, RAY_OVERRIDE_RESOURCES='{"CPU": 2}')
    state, deadline = tmp_path / "training" / "state.safetensors", time.monotonic() + WAIT_SECONDS
    while not state.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "training" / "finished.json").exists(), "it was killed too late"
    found = run(command, monkeypatch)
    ours, theirs = (load_file(Path(one["model"])) for one in (found, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[entry["loss"] for entry in history(one)] for one in (found, undisturbed)]
    assert losses[0] == losses[1]
    assert_in_mlflow(found)


def history(summary: dict[str, Any]) -> list[dict[str, float]]:
    found = json.loads((Path(summary["model"]).parent.parent / "training" / "metrics.json").read_text())
    assert [entry["step"] for entry in found] == list(range(1, summary["steps"] + 1))
    return found


def write_model(path: Path) -> None:
    """The first weights of a tiny-vit-32."""
    save_file(load_trainable(ModelConfig(encoder="tiny-vit-32"), seed=0).model.state_dict(), path)


@pytest.mark.slow
def test_two_workers_follow_the_curve_of_one(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    # Paths are taken from this folder, wherever workers run.
    monkeypatch.chdir(tmp_path)
    write_model(Path("first.safetensors"))
    for workers in (0, 2):
        found = run(
            f"pretrain.py --data {pairs} --out {workers} --encoder tiny-vit-32 --batch-size 32 --epochs 17 "
            f"--pretrained first.safetensors --pairs stores --num-workers {workers}",
            monkeypatch,
        )
        losses.append([entry["loss"] for entry in history(found)])
    assert len(losses[0]) == 51
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_bad_pairs_are_counted_and_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = make_pairs(60)
    columns["caption"][3] = []
    columns["caption"][4] = ["", "  "]
    columns["caption"][5] = ["word " * 100]
    columns["image"][6] = b"no image"
    columns["image"][7] = columns["image"][7][:200]
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    command = f"pretrain.py --data {tmp_path}/bad.parquet --out {tmp_path}/out {SMALL} --epochs 1"
    found = run(command, monkeypatch)
    quarantine = pq.read_table(Path(found["pairs"]["store"]) / "quarantine.parquet").to_pylist()
    errors = {row["id"]: (row["stage"], row["error"]) for row in quarantine}
    assert errors.keys() == {f"pair-{i}" for i in (3, 4, 6, 7)}
    assert errors["pair-3"] == errors["pair-4"] == ("read", "no text")
    assert errors["pair-6"] == ("decode", "not an image that can be decoded")
    assert (found["pairs"]["read"], found["pairs"]["quarantined"], found["pairs"]["texts_cut"]) == (56, 4, 1)
    output = capsys.readouterr().out
    assert "1 of 7 texts fill the model's context, or are cut to it" in output
    assert re.search(r"^bad +\S+/quarantine.parquet$", output, re.MULTILINE)
    assert re.fullmatch(
        rf"--strict: 4 images in quarantine, as listed in {tmp_path}/out/pairs/\S+/quarantine.parquet; "
        "everything is written",
        refusal(f"{command} --strict", monkeypatch, capsys),
    )


@pytest.mark.slow
def test_a_labelled_folder_becomes_pairs(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "templates.txt").write_text("one {}\ntwo {}\n")
    found = run(
        f"pretrain.py --data {photos} --out {tmp_path}/out --encoder tiny-vit-32 --batch-size 16 --epochs 1 "
        f"--caption-templates {tmp_path}/templates.txt",
        monkeypatch,
    )
    texts = PairStore(found["pairs"]["store"]).texts(range(30))
    assert {text for each in texts for text in each} == {
        f"{number} {name}"
        for number in ("one", "two")
        for name in ("tennis_ball", "stop_sign", "traffic_cone")
    }


@pytest.mark.slow
def test_an_architecture_may_be_a_file(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**SMALL_MODELS["tiny-vit-32"], "embed_dim": 48}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    found = run(
        f"pretrain.py --data {pairs} --out {tmp_path}/out --encoder {tmp_path}/mine.json --batch-size 32 --epochs 1 "
        f"--lock text --accumulate 2 --precision bfloat16 --pairs {pairs.parent}/stores --method infonce "
        "--label-smoothing 0.1 --mirror",
        monkeypatch,
    )
    assert load_file(Path(found["model"]))["visual.proj"].shape[1] == 48
    images = run(
        f"encode.py --data {pairs} --encoder {tmp_path}/mine.json --pretrained {found['model']} --views weak "
        f"--out {tmp_path}/encoded",
        monkeypatch,
    )
    assert images["images"] == 96


@pytest.mark.slow
def test_training_begins_with_a_checkpoint(
    pairs: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(
        f"pretrain.py --data {pairs} --out {tmp_path} {SMALL} --epochs 1 --pairs {pairs.parent}/stores "
        f"--pretrained {undisturbed['model']} --learning-rate 1e-9",
        monkeypatch,
    )
    before, after = (load_file(Path(one["model"])) for one in (undisturbed, found))
    torch.testing.assert_close(after["visual.proj"], before["visual.proj"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--encoder lite", "the lite encoder is not trained: choose an open_clip model, or tiny-32"),
        ("--encoder tiny-vit-33", "unknown encoder 'tiny-vit-33': did you mean tiny-vit-32"),
        ("--encoder none.json", "--encoder none.json: not a JSON file that can be read"),
        ("--encoder coca_ViT-B-32", "coca_ViT-B-32 is trained on captions that it writes"),
        ("--batch-size 128", "96 pairs, fewer than one batch: choose a smaller --batch-size than 128"),
        ("--text-column words", "no column 'words'; there are id, image, caption"),
        ("--caption-templates simple", "has no names of classes to make texts of"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(
    flags: str, told: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert told in refusal(
        f"pretrain.py --data {pairs} --out {tmp_path} --batch-size 32 {flags}", monkeypatch, capsys
    )


def test_other_work_is_not_continued(
    pairs: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = Path(undisturbed["model"]).parent.parent
    same = f"pretrain.py --data {pairs} --out {out} {SMALL} --pairs {pairs.parent}/stores"
    told = refusal(f"{same} --learning-rate 0.5", monkeypatch, capsys)
    assert "holds the results of other work (it differs in learning_rate)" in told
    assert "--pairs" not in told, "the pairs lie elsewhere"
    capsys.readouterr()
    assert run(same, monkeypatch)["last"] == undisturbed["last"]
    assert "finished before" in capsys.readouterr().out
    told = refusal(f"{same} --limit 64", monkeypatch, capsys)
    assert "it differs in pairs" in told
    assert len(list((pairs.parent / "stores").iterdir())) == 1, "refused before images are read"
    other = f"pretrain.py --data {pairs} --out {tmp_path} --encoder tiny-32 --batch-size 32"
    told = refusal(f"{other} --pretrained {undisturbed['model']}", monkeypatch, capsys)
    assert "the weights do not fit the model (Error(s) in loading state_dict for CLIP: Missing key(s)" in told


def test_a_model_that_was_moved_away_is_written_again(
    pairs: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(Path(undisturbed["model"]).parent.parent, out)
    shutil.rmtree(out / "model")
    again = run(f"pretrain.py --data {pairs} --out {out} {SMALL} --pairs {pairs.parent}/stores", monkeypatch)
    assert Path(again["model"]).read_bytes() == Path(undisturbed["model"]).read_bytes()
    assert again["last"] == undisturbed["last"]


def test_a_damaged_checkpoint_or_store_is_told(
    pairs: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(Path(undisturbed["model"]).parent.parent, out)
    shutil.copytree(pairs.parent / "stores", tmp_path / "stores")
    (out / "training" / "finished.json").unlink()
    state = out / "training" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    same = f"pretrain.py --data {pairs} --out {out} {SMALL} --pairs {tmp_path}/stores"
    assert "state.safetensors is damaged" in refusal(same, monkeypatch, capsys)
    state.unlink()
    for pixels in (tmp_path / "stores").glob("*/pixels-*"):
        pixels.write_bytes(pixels.read_bytes()[:1000])
    assert "is damaged: remove its folder, the images are read again" in refusal(same, monkeypatch, capsys)
