"""The jobs from their command lines to their files, with real images, Ray, Ray Train and MLflow."""

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
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, ROOT, Training, draw, refusal, run, start, write_tar
from mlflow import MlflowClient
from safetensors.torch import save_file

import lpclip
from lpclip.config import SelftrainJob, SourceConfig
from lpclip.evaluation.metrics import METRICS
from lpclip.features.store import Store
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.images.open import open_source
from lpclip.jobs.runtime import output_folder
from lpclip.method.probe import load_probe

pytestmark = pytest.mark.usefixtures("cluster", "lite_map", "one_thread")
NAMES = ",".join(CLASSES)
ARCHITECTURE = "ViT-S-32-alt"


WORDS = NAMES.replace(" ", "%20")


@pytest.fixture(scope="module")
def work(trained: Training) -> Path:
    """A folder for runs; WORK/features is shared by them, and WORK/trained is the one of `base`."""
    return trained.out.parent


@pytest.fixture(scope="module")
def base(trained: Training) -> dict[str, Any]:
    """The summary of one whole run: 60 labelled images in Parquet, tested on 30 others in a folder."""
    return trained.summary


def probe_bytes(out: Path, name: str = "probe") -> bytes:
    return (out / name / "probe.safetensors").read_bytes()


def test_a_run_leaves_all_its_numbers_in_the_summary(base: dict[str, Any], work: Path) -> None:
    assert json.loads((work / "trained" / "summary.json").read_text()) == base
    for name in ("zero_shot", "probe", "supervised"):
        assert set(base[name]) == set(METRICS)
        assert 0 <= base[name]["accuracy"] <= 1
        assert 0 <= base[name]["ece"] <= 1
        assert base[name]["nll"] >= 0
    assert base["supervised"]["accuracy"] == 1, "the shapes are easy to tell apart"
    assert [entry["round"] for entry in base["rounds"]] == list(range(1, len(base["rounds"]) + 1))
    metrics = {"accuracy", "coverage", "mean_confidence", "class_entropy", "flip_rate", "zero_shot_agreement"}
    assert all(metrics <= set(entry) for entry in base["rounds"])
    assert base["rounds"][-1]["accuracy"] == base["probe"]["accuracy"]
    assert base["evaluated_on"] == {"data": "photos", "images": 30, "setting": "inductive", "shared": 0}
    assert base["images"] == {"encoded": 60, "quarantined": 0, "eval_quarantined": 0}
    assert {"encode", "encode_eval", "rounds", "evaluate"} <= set(base["timings"])
    assert base["rates"]["encode"] > 0
    assert base["config"]["classes"] == NAMES
    assert base["config"]["rounds"] == SelftrainJob().training.rounds
    assert {"lpclip", "python", "ray", "torch", "mlflow"} <= set(base["versions"])


def test_pseudo_labels_are_there_to_be_looked_at(base: dict[str, Any], work: Path) -> None:
    table = pq.read_table(work / "trained" / "pseudo_labels.parquet")
    assert table.column_names == ["id", "label", "confidence", "kept", "round"]
    assert sorted(table["id"].to_pylist()) == sorted(f"row-{i}" for i in range(60))
    assert set(table["label"].to_pylist()) <= {0, 1, 2}
    assert all(0 < c <= 1 for c in table["confidence"].to_pylist())
    assert table["kept"].to_pylist() == [True] * 60
    assert set(table["round"].to_pylist()) == {len(base["rounds"])}


@pytest.mark.parametrize("name", ["zero_shot", "probe", "supervised"])
def test_a_saved_probe_loads_and_gives_the_summarys_accuracy(
    base: dict[str, Any], work: Path, name: str
) -> None:
    probe = load_probe(str(work / "trained" / name))
    assert probe.class_names == CLASSES
    found = Store.open(base["features"]["eval"]).features()
    # The folder's labels are its sorted subfolders.
    places = np.array([CLASSES.index(c) for c in sorted(CLASSES)])[found.labels]
    accuracy = (probe.logits(found.base).argmax(dim=1).numpy() == places).mean()
    assert accuracy == pytest.approx(base[name]["accuracy"])


def test_the_prior_was_tried_and_the_outcome_is_kept(base: dict[str, Any], work: Path) -> None:
    tried = base["prior"]["tried"]
    assert set(tried) - {"none"} == {"uniform", "weak"}
    assert base["prior"]["name"] in tried
    assert base["prior"]["trusted"]
    assert json.loads((work / "trained" / "prior.json").read_text())["tried"] == tried
    kept = MlflowClient().get_run(base["mlflow_run"]).data
    assert kept.tags["prior"] == base["prior"]["name"]
    assert kept.metrics["trust/agreement_weak"] == pytest.approx(tried["weak"]["agreement"])


def test_rounds_that_nothing_confirms_are_not_believed(
    base: dict[str, Any],
    work: Path,
    lake: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lpclip.method.confirmation.MIN_KAPPA", 1.1)
    found = run(
        f"selftrain.py --data {lake}/labelled.parquet --eval-data {photos} --classes {WORDS} --rounds 2 --prior weak "
        f"--features {work}/features --temperature 1 --out {work}/doubted",
        monkeypatch,
    )
    assert not found["prior"]["trusted"]
    assert found["zero_shot"] == base["zero_shot"], "the teacher's temperature is not zero-shot's"
    printed = capsys.readouterr().out
    assert (
        "WARNING: the probe will be zero-shot itself, because the rounds cannot be trusted: the halves"
        in printed
    )
    assert "images for each class name" not in printed
    assert probe_bytes(work / "doubted") == probe_bytes(work / "doubted", "zero_shot")
    assert found["probe"] == found["zero_shot"]
    probe = load_probe(str(work / "doubted" / "probe"))
    assert probe.temperature == 1
    assert probe.summary["method"] == "zero-shot (fallback)"
    features = Store.open(found["features"]["train"]).features()
    labels = dict(zip(features.ids.tolist(), probe.logits(features.base).argmax(dim=1).tolist(), strict=True))
    table = pq.read_table(work / "doubted" / "pseudo_labels.parquet")
    assert dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True)) == labels
    assert set(table["round"].to_pylist()) == {0}


def test_mlflow_holds_the_run(base: dict[str, Any]) -> None:
    client = MlflowClient()
    kept = client.get_run(base["mlflow_run"])
    assert kept.info.status == "FINISHED"
    assert kept.data.params["encoder"] == "lite"
    assert kept.data.metrics["test/accuracy"] == pytest.approx(base["probe"]["accuracy"])
    assert kept.data.metrics["test/accuracy_zero_shot"] == pytest.approx(base["zero_shot"]["accuracy"])
    steps = [m.step for m in client.get_metric_history(base["mlflow_run"], "rounds/flip_rate")]
    assert steps == [entry["round"] for entry in base["rounds"]]
    # Sections of charts: lines for the rounds, and bars for what a run has once, which are numbers at step 0.
    sections = {name.rpartition("/")[0] for name in kept.data.metrics}
    assert sections == {"rounds", "speed", "test", "trust"}
    single = [name for name in kept.data.metrics if not name.startswith("rounds/")]
    found = [m.step for name in single for m in client.get_metric_history(base["mlflow_run"], name)]
    assert found == [0] * len(single)
    files = {item.path for item in client.list_artifacts(base["mlflow_run"])}
    assert files == {"probe", "figures", "report.html", "summary.json", "pseudo_labels.parquet"}
    figures = {item.path for item in client.list_artifacts(base["mlflow_run"], "figures")}
    assert figures == {
        "figures/rounds.png",
        "figures/confusion_matrix.png",
        "figures/reliability.png",
    }


def test_without_labels_the_probe_is_the_same_and_the_accuracies_are_null(
    trained: Training, blind: Training
) -> None:
    summary = blind.summary
    assert summary["rates"]["encode"] > 0, "encoded anew, for itself"
    for name in ("zero_shot", "probe"):
        assert summary[name] == dict.fromkeys(METRICS)
        assert probe_bytes(blind.out, name) == probe_bytes(trained.out, name)
    assert {entry["accuracy"] for entry in summary["rounds"]} == {None}
    assert summary["evaluated_on"]["setting"] is None
    tables = [pq.read_table(one.out / "pseudo_labels.parquet") for one in (blind, trained)]
    assert tables[0] == tables[1]
    client = MlflowClient()
    assert "test/accuracy" not in client.get_run(summary["mlflow_run"]).data.metrics


@pytest.mark.slow
def test_a_second_run_finds_its_features_and_is_identical(
    base: dict[str, Any], work: Path, lake: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        f"selftrain.py --data {lake}/labelled.parquet --eval-data {photos} --classes {WORDS} "
        f"--features {work}/features --supervised"
    )
    before = probe_bytes(work / "trained")
    for out in ("trained", "again"):  # the same folder, and a new one
        again = run(f"{command} --out {work}/{out}", monkeypatch)
        assert again["rates"] == {"encode": None, "encode_eval": None}
        for key in ("zero_shot", "probe", "supervised", "rounds", "probe_temperature", "features"):
            assert again[key] == base[key]
        for name in ("zero_shot", "probe", "supervised"):
            assert probe_bytes(work / out, name) == probe_bytes(work / "trained", name)
        assert probe_bytes(work / out) == before
    labels = [(work / out / "pseudo_labels.parquet").read_bytes() for out in ("trained", "again")]
    assert labels[0] == labels[1]


def test_an_output_folder_belongs_to_one_configuration(
    base: dict[str, Any],
    work: Path,
    lake: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = (
        f"selftrain.py --data {lake}/labelled.parquet --eval-data {photos} "
        f"--features {work}/features --out {work}/trained"
    )
    before = probe_bytes(work / "trained")
    prior = (work / "trained" / "prior.json").read_bytes()
    message = refusal(f"{command} --classes {WORDS} --rounds 2", monkeypatch, capsys)
    assert f"{work}/trained holds the results of other work (it differs in training)" in message
    other_words = refusal(f"{command} --classes {WORDS} --templates simple", monkeypatch, capsys)
    assert "differs in head" in other_words
    assert probe_bytes(work / "trained") == before
    assert (work / "trained" / "prior.json").read_bytes() == prior


def test_a_second_job_on_one_output_folder_is_refused(
    base: dict[str, Any], work: Path, lake: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command = f"--data {lake}/labelled.parquet --classes {WORDS} --out {work}/trained"
    with output_folder(str(work / "trained")):
        for job in ("selftrain.py", "encode.py"):
            message = refusal(f"{job} {command}", monkeypatch, capsys)
            assert message.startswith(f"another job is writing to {work}/trained (")
            assert message.endswith("): wait for it, or choose another --out")
            assert f", process {os.getpid()}, since 20" in message


def test_predict_labels_images_as_the_probe_does(
    base: dict[str, Any], work: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = work / "predicted.parquet"
    result = run(
        f"predict.py --probe {work}/trained/probe --data {photos} --out {out} --top-k 9", monkeypatch
    )
    assert result == {"images": 30, "quarantined": 0}
    table = pq.read_table(out)
    assert table.column_names == ["id", "label", "probability", "top_labels", "top_probabilities"]
    rows = {row["id"]: row for row in table.to_pylist()}
    # In the order of the folder, whatever order the features are kept in.
    assert list(rows) == sorted(f"{p.parent.name}/{p.name}" for p in photos.glob("*/*.png"))
    right = [row["label"].replace(" ", "_") == name.partition("/")[0] for name, row in rows.items()]
    assert np.mean(right) == pytest.approx(base["probe"]["accuracy"])
    for row in rows.values():
        assert (row["top_labels"][0], row["top_probabilities"][0]) == (row["label"], row["probability"])
        assert sorted(row["top_labels"]) == sorted(CLASSES)
        assert sum(row["top_probabilities"]) == pytest.approx(1, abs=1e-5)
    assert not list(work.glob("*.quarantine.parquet"))


def test_predict_labels_a_store_that_is_given_whatever_computed_it(
    base: dict[str, Any], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = base["features"]["train"]
    labels = []
    for name, flags in (("own", ""), ("other", "--engine torch"), ("gpu", "--decode gpu")):
        out = tmp_path / f"{name}.parquet"
        command = f"predict.py --probe {work}/trained/probe --data {store} --out {out} {flags}"
        assert run(command, monkeypatch)["images"] == 60
        labels.append(pq.read_table(out))
    assert labels[0] == labels[1] == labels[2]
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet"}


def test_predict_keeps_the_list_of_the_images_that_it_left_out(
    base: dict[str, Any],
    work: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(photos / "stop_sign", tmp_path / "some")
    (folder / "100.png").write_bytes(b"no image")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    command = f"predict.py --probe {work}/trained/probe --data {folder} --out {tmp_path}/labels.parquet"
    assert run(command, monkeypatch) == {"images": 9, "quarantined": 2}
    printed = capsys.readouterr().out
    assert f"2 quarantined, listed in {tmp_path}/labels.quarantine.parquet" in printed
    assert " by OpenVINO" in printed
    rows = pq.read_table(tmp_path / "labels.quarantine.parquet").to_pylist()
    assert {(row["id"], row["stage"]) for row in rows} == {("100.png", "decode"), ("gone.png", "read")}
    assert {path.name for path in tmp_path.iterdir()} == {
        "some",
        "labels.parquet",
        "labels.quarantine.parquet",
    }
    for name in ("100.png", "gone.png"):
        (folder / name).unlink()
    labels = pq.read_table(tmp_path / "labels.parquet")
    assert run(f"{command} --engine torch", monkeypatch) == {"images": 9, "quarantined": 0}
    assert "by OpenVINO" not in capsys.readouterr().out
    assert not (tmp_path / "labels.quarantine.parquet").exists()
    again = pq.read_table(tmp_path / "labels.parquet")
    assert again.select(["id", "label"]) == labels.select(["id", "label"])
    # In bfloat16, on CPUs that compute in it, the engines are further apart than in float32.
    assert np.allclose(again["probability"], labels["probability"], atol=1e-2)


def test_predict_gives_all_probabilities_and_sorts_the_images_by_their_labels(
    base: dict[str, Any],
    work: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "stop_sign" / "bad.png").write_bytes(b"no image")
    flags = (
        f"--features {tmp_path}/features --out {tmp_path}/labels.parquet --export-folder {tmp_path}/sorted"
    )
    command = f"predict.py --probe {work}/trained/probe --data {folder} {flags} --probabilities"
    assert run(command, monkeypatch) == {"images": 30, "quarantined": 1, "exported": 30}
    assert f"30 images in {tmp_path}/sorted/CLASS: 30 linked, 0 copied\n" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "labels.parquet")
    names = json.loads(table.schema.metadata[b"class_names"])
    assert names == list(CLASSES)
    assert table.schema.field("probabilities").type == pa.list_(pa.float32(), 3)
    rows = table.to_pylist()
    for row in rows:
        found = dict(zip(names, row["probabilities"], strict=True))
        assert found == pytest.approx(dict(zip(row["top_labels"], row["top_probabilities"], strict=True)))
    there = {
        path.relative_to(tmp_path / "sorted"): path.resolve() for path in (tmp_path / "sorted").glob("*/*")
    }
    assert there == {
        Path(row["label"], row["id"].replace("/", "__")): folder.resolve() / row["id"] for row in rows
    }
    # The page's first program, which brings probabilities and features together.
    page = (ROOT / "docs" / "labels.md").read_text()
    program = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/labels.md", "exec"), read := {})
    wanted = load_probe(str(work / "trained" / "probe")).predict_proba(read["features"])
    assert np.allclose(read["pred_probs"], wanted, atol=1e-3)
    assert read["ids"] == [row["id"] for row in rows]
    assert set(read["given"]) == set(CLASSES)
    first, *others = sorted(there)
    # What an interrupted export did stays, and the rest is done; a copy that it began is no file of the export.
    (tmp_path / "sorted" / first).unlink()
    (tmp_path / "sorted" / first.parent / f"{'0' * 32}.{'0' * 32}.tmp").touch()
    kept = (tmp_path / "sorted" / others[0]).lstat()
    assert run(command, monkeypatch)["exported"] == 30
    assert {path.relative_to(tmp_path / "sorted") for path in (tmp_path / "sorted").glob("*/*")} == {*there}
    assert (tmp_path / "sorted" / others[0]).lstat() == kept
    assert "name an empty folder" in refusal(f"{command} --limit 9", monkeypatch, capsys)


def test_predict_copies_the_images_of_other_sources(
    base: dict[str, Any], work: Path, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    table = pq.read_table(lake / "labelled.parquet").slice(0, 8)
    # Two ids that differ in capitals alone, a path out of the folder, and one without an image.
    ids = pa.array(["a/1", "A/1", "../../out", "17", "x.png", "y" * 300, "same", "none"])
    images = [*table["image"].to_pylist()[:7], b"no image"]
    pq.write_table(pa.table({"id": ids, "image": pa.array(images, pa.binary())}), tmp_path / "data.parquet")
    command = (
        f"predict.py --probe {work}/trained/probe --data {tmp_path}/data.parquet --out {tmp_path}/labels.parquet "
        f"--export-folder {tmp_path}/deep/sorted"
    )
    assert run(command, monkeypatch) == {"images": 7, "quarantined": 1, "exported": 7}
    assert ": 0 linked, 7 copied\n" in capsys.readouterr().out
    files_there = [path for path in (tmp_path / "deep").rglob("*.png") if path.is_file()]
    assert sorted(path.read_bytes() for path in files_there) == sorted(images[:7])
    assert {path.parent.parent for path in files_there} == {tmp_path / "deep" / "sorted"}
    labels = {row["id"]: row for row in pq.read_table(tmp_path / "labels.parquet").to_pylist()}
    assert (tmp_path / "deep/sorted" / labels["17"]["label"] / "17.png").read_bytes() == images[3]
    # Read as a data set with labels, each image has the label that it was given.
    source = open_source(str(tmp_path / "deep" / "sorted"), config=SourceConfig())
    assert (source.num_rows, source.label_names) == (
        7,
        tuple(sorted({row["label"] for row in labels.values()})),
    )
    least = float(np.median([row["probability"] for row in labels.values()]))
    again = command.replace("/deep/sorted", "/likely")
    assert run(f"{again} --min-probability {least}", monkeypatch)["exported"] == 4
    assert f"; left out: 3 images less probable than {least:g}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_images_to_evaluate_on_that_are_trained_on_too_are_found_out_by_what_they_show(
    base: dict[str, Any], work: Path, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    table, data = pq.read_table(lake / "labelled.parquet"), tmp_path / "data"
    data.mkdir()
    pq.write_table(table.slice(0, 48), data / "train-0.parquet")
    pq.write_table(table.slice(48), data / "test-0.parquet")
    ids = pa.array([f"other-{i}" for i in range(18)])
    mixed = table.slice(42).set_column(0, "id", ids)
    pq.write_table(mixed, tmp_path / "mixed.parquet")
    command = f"selftrain.py --classes {WORDS} --rounds 1 --views weak --features {tmp_path}/features"

    def evaluated(images: str, test: Path, out: str) -> Any:
        flags = f"--data {images} --eval-data {test} --out {tmp_path}/{out}"
        return run(f"{command} {flags}", monkeypatch)["evaluated_on"]

    whole = evaluated(f"{data}/*", data / "test-0.parquet", "whole")
    assert (whole["setting"], whole["shared"]) == ("transductive", 12)
    apart = evaluated(f"{data}/train-*", data / "test-0.parquet", "apart")
    assert (apart["setting"], apart["shared"]) == ("inductive", 0)
    capsys.readouterr()
    some = evaluated(f"{data}/train-*", tmp_path / "mixed.parquet", "some")
    assert (some["setting"], some["shared"]) == ("inductive", 6)
    told = "mixed, 18 labelled images, inductive but for 6 that are among the unlabelled images too:"
    assert told in capsys.readouterr().out


def write_store(path: Path, *, like: Store, base: np.ndarray, labels: np.ndarray) -> Path:
    """A store of 4,200 rows, two chunks of the rounds: noise around `base` (n, 1280), with labels (n,)."""
    identity = {**like.manifest.identity, "source": {"made": "from noise", "label_names": None}}
    writer = StoreWriter(str(path), identity)
    writer.begin()
    random = np.random.default_rng(0)
    for unit in range(6):
        columns: dict[str, Any] = {
            "id": [f"{unit}-{i}" for i in range(700)],
            "label": pa.array(labels[np.arange(700) % len(labels)], pa.int32()),
        }
        for view in ("weak", "mirror", "strong"):
            rows = base[np.arange(700) % len(labels)] + random.normal(0, 0.03, (700, 1280))
            rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
            columns[view] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 1280)
        part = Part(unit=unit, start=0, stop=700, last=True)
        writer.write_part(part, rows=pa.table(columns), quarantine=[], content_digest=unit)
    writer.finish(num_units=6, rate=0)
    return path


@pytest.fixture(scope="module")
def crowd(base: dict[str, Any], work: Path) -> Path:
    """A store of the base run's features and noise around them."""
    made = Store.open(base["features"]["train"])
    seen = made.features()
    return write_store(work / "crowd", like=made, base=seen.base, labels=seen.labels)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["gaussian", "gradient"])
def test_the_probe_does_not_depend_on_the_number_of_workers(
    crowd: Path, work: Path, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A given prior: which one to take is found out before the workers come.
    command = f"selftrain.py --data {crowd} --classes {WORDS} --solver {solver} --rounds 3 --prior weak"
    alone = run(f"{command} --num-workers 0 --out {work}/{solver}-0", monkeypatch)
    assert alone["rates"]["encode"] is None
    probe = load_probe(str(work / f"{solver}-0" / "probe"))
    features = Store.open(str(crowd)).features().base
    labels = pq.read_table(work / f"{solver}-0" / "pseudo_labels.parquet")
    assert len(labels) == 4200
    run(f"{command} --num-workers 2 --out {work}/{solver}-2", monkeypatch)
    other = load_probe(str(work / f"{solver}-2" / "probe"))
    limit = 1e-4 * float(probe.weight.abs().max())
    assert float((other.weight - probe.weight).abs().max()) <= limit
    assert float((other.bias - probe.bias).abs().max()) <= 1e-4 * float(probe.bias.abs().max().clamp_min(1))
    assert torch.equal(other.logits(features).argmax(dim=1), probe.logits(features).argmax(dim=1))
    table = pq.read_table(work / f"{solver}-2" / "pseudo_labels.parquet")
    assert table.select(["id", "label"]) == labels.select(["id", "label"])


@pytest.mark.slow
def test_names_without_images_are_left_out_of_the_rounds_and_stay_in_the_probe(
    base: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (*NAMES.split(","), "zebra", "submarine", "piano", "castle", "violin", "tractor")
    head = lpclip.zero_shot_head(names)
    # Images of the first three names, as the texts would have them.
    store = write_store(
        work / "three", like=Store.open(base["features"]["train"]), base=head.weight[:3], labels=np.arange(3)
    )
    words = ",".join(names).replace(" ", "%20")
    command = f"selftrain.py --data {store} --classes {words} --out {work}/absent"
    found = run(command, monkeypatch)
    assert found["prior"]["absent"] == list(names[3:])
    assert "classes: 3 of 9 names seem to have images" in capsys.readouterr().out
    assert found["probe"]["accuracy"] > 0.98
    assert all(entry["accuracy"] > 0.99 for entry in found["rounds"])
    labels = pq.read_table(work / "absent" / "pseudo_labels.parquet")["label"].to_numpy()
    assert set(labels) == {0, 1, 2}
    probe = load_probe(str(work / "absent" / "probe"))
    assert probe.predict(head.weight).tolist() == list(range(9)), "an image of another name may come later"
    # The Python API takes the same store to the same probe.
    same = lpclip.fit(Store.open(str(store)).features(views=("strong",)), head)
    assert (same.labels == labels).all()
    assert float((same.probe.weight - probe.weight).abs().max()) <= 1e-4 * float(probe.weight.abs().max())
    capsys.readouterr()
    assert run(command, monkeypatch)["probe"] == found["probe"]
    assert "trying the rounds" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_names_that_have_images_can_be_told(
    base: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (*NAMES.split(","), "zebra", "submarine", "piano")
    head = lpclip.zero_shot_head(names)
    like = Store.open(base["features"]["train"])
    store = write_store(work / "told", like=like, base=head.weight[:3], labels=np.arange(3))
    told, shares = work / "told.txt", work / "told-shares.txt"
    told.write_text("\n".join((*names[:3], "zebra")) + "\n")
    shares.write_text("\n".join("422111"))
    command = (
        f"selftrain.py --data {store} --classes {','.join(names).replace(' ', '%20')} --out {work}/told-out"
    )
    command += f" --prior {shares} --present {told}"
    found = run(command, monkeypatch)
    assert found["prior"]["absent"] == ["submarine", "piano"]
    assert found["prior"]["why_these_names"] == "as --present says"
    plan = capsys.readouterr().out
    assert f"present   4: {', '.join((*names[:3], 'zebra'))}, as --present says; the rounds use these" in plan
    probe = load_probe(str(work / "told-out" / "probe"))
    config = lpclip.SelfTrainingConfig(present=",".join((*names[:3], "zebra")))
    views = Store.open(str(store)).features(views=("strong",))
    same = lpclip.fit(views, head, config=config, shares=[4, 2, 2, 1, 1, 1])
    assert float((same.probe.weight - probe.weight).abs().max()) <= 1e-4 * float(probe.weight.abs().max())
    # Other names are other work, even under the same file's name; the same names go on.
    assert run(command, monkeypatch)["probe"] == found["probe"]
    assert "trying the rounds" not in capsys.readouterr().out
    told.write_text("\n".join(names[:3]) + "\n")
    assert "other" in refusal(command, monkeypatch, capsys)


@pytest.mark.slow
def test_finished_rounds_are_gone_on_from(crowd: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"selftrain.py --data {crowd} --classes {WORDS} --rounds 4 --neighbours 0 --prior weak"
    whole = run(f"{command} --out {work}/whole", monkeypatch)
    shutil.copytree(work / "whole", work / "broken-off")
    rounds = sorted(path.name for path in (work / "whole" / "rounds").glob("round-*.json"))
    assert len(rounds) > 2
    for name in ("finished.json", "labels-0.parquet", *rounds[2:]):
        (work / "broken-off" / "rounds" / name).unlink()
    first = work / "broken-off" / "rounds" / rounds[0]
    written = first.stat().st_mtime_ns
    again = run(f"{command} --out {work}/broken-off", monkeypatch)
    # The last round that is there is done again, for its labels; those before it are not.
    assert first.stat().st_mtime_ns == written
    assert probe_bytes(work / "broken-off") == probe_bytes(work / "whole")
    assert again["rounds"] == whole["rounds"]


@pytest.fixture(scope="module")
def checkpoint(work: Path) -> Path:
    """Random weights of a small CLIP, as open_clip makes them."""
    torch.manual_seed(0)
    (work / "weights").mkdir()
    path = work / "weights" / "clip.safetensors"
    save_file(open_clip.create_model(ARCHITECTURE).state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:clip.safetensors does not say")
def test_a_local_clip_runs_the_same_path_and_its_features_are_its_own(
    base: dict[str, Any],
    checkpoint: Path,
    work: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"selftrain.py --encoder {ARCHITECTURE} --rounds 2 --views weak,strong"
    summary = run(
        f"{command} --pretrained {checkpoint} --data {photos} --solver gradient --out {work}/clip",
        monkeypatch,
    )
    assert summary["encoder"]["name"] == ARCHITECTURE
    assert summary["evaluated_on"] == {
        "data": "photos",
        "images": 30,
        "setting": "transductive",
        "shared": 30,
    }
    assert summary["probe"]["accuracy"] is not None
    assert load_probe(str(work / "clip" / "probe")).class_names == tuple(
        sorted(c.replace(" ", "_") for c in CLASSES)
    )
    clip_store = summary["features"]["train"]

    again = run(
        f"{command} --pretrained {checkpoint} --data {clip_store} --solver gradient --out {work}/clip-store",
        monkeypatch,
    )
    assert probe_bytes(work / "clip-store") == probe_bytes(work / "clip")
    assert again["probe"] == summary["probe"]

    message = refusal(
        f"selftrain.py --data {clip_store} --views weak,strong --out {work}/no", monkeypatch, capsys
    )
    assert f"the feature store {clip_store} was made with another encoder" in message
    message = refusal(
        f"{command} --pretrained {checkpoint} --data {base['features']['train']} --classes {WORDS} --out {work}/no",
        monkeypatch,
        capsys,
    )
    assert "was made with another encoder" in message
    # The same weights, and an image preprocessing of their own.
    (work / "other").mkdir()
    shutil.copy(checkpoint, work / "other")
    config = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (work / "other" / "open_clip_config.json").write_text(json.dumps(config))
    other = f"{work}/other/clip.safetensors"
    message = refusal(
        f"{command} --pretrained {other} --data {clip_store} --out {work}/no", monkeypatch, capsys
    )
    assert "and another preprocessing" in message
    message = refusal(
        f"predict.py --probe {work}/clip/probe --pretrained {other} --data {photos} --out {work}/no.parquet",
        monkeypatch,
        capsys,
    )
    assert "was trained on features of another encoder" in message


def test_a_half_written_store_is_refused_as_data(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"selftrain.py --data {tmp_path}/store --classes {WORDS} --out {tmp_path}/out"
    shutil.copytree(base["features"]["train"], tmp_path / "store")
    (part,) = (tmp_path / "store").glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:1000])
    assert f"{part.name} is damaged" in refusal(command, monkeypatch, capsys)
    part.unlink()
    assert f"has lost {part.name}" in refusal(command, monkeypatch, capsys)
    (tmp_path / "store" / "manifest.json").write_text('{"format"')
    assert "is not valid JSON" in refusal(command, monkeypatch, capsys)
    (tmp_path / "store" / "manifest.json").unlink()
    message = refusal(command, monkeypatch, capsys)
    assert "is a feature store that is not complete; run the job that made it again" in message
    assert "--limit works on images" in refusal(
        f"selftrain.py --data {base['features']['train']} --limit 5 --classes {WORDS} --out {tmp_path}/out",
        monkeypatch,
        capsys,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data {tmp}/nowhere --classes {words}", "{tmp}/nowhere: no such path, nor one of the data sets"),
        ("--data {tmp}/empty --classes {words}", "{tmp}/empty: the folder holds nothing"),
        (
            "--data {lake}/unlabelled.parquet",
            "no class names: give --classes comma-separated names or a text file",
        ),
        ("--data {lake}/unlabelled.parquet --classes cat", "at least two class names are needed, got 1"),
        ("--data {lake}/unlabelled.parquet --classes cat,dog,Cat", "class name 'cat' occurs twice"),
        ("--data {lake}/unlabelled.parquet --classes cat,,dog", "class name 2 of 3 is empty"),
        ("--data {lake}/unlabelled.parquet --classes {tmp}/none.txt", "no such file: {tmp}/none.txt"),
        ("--data {photos} --rounds 0", "--rounds must be at least 1, not 0"),
        ("--data {photos} --threshold 1", "--threshold must be at least 0 and below 1"),
        ("--data {photos} --num-workers -1", "--num-workers must be at least 0"),
        ("--data {photos} --temperature 0", "--temperature must be above 0"),
        (
            "--data {photos} --prior some",
            "--prior some is none of auto, uniform, weak, none, nor a text file",
        ),
        (
            "--data {photos} --present al",
            "--present al: at least two class names are needed, got 1, did you mean all?",
        ),
        ("--data {photos} --present {tmp}/none.txt", "--present {tmp}/none.txt: no such file"),
        (
            "--data {photos} --present stop%20sign,tennis%20bull",
            "--present names 'tennis bull', which is none of the 3 classes",
        ),
        ("--data {photos} --views strong,blurry", "blurry"),
        ("--data {photos} --limit 0", "--limit must be at least 1, not 0"),
        ("--data {photos} --templates few", "unknown templates 'few'"),
        ("--data {photos} --eval-data {tmp}/nowhere", "{tmp}/nowhere: no such path"),
        (
            "--data {lake}/unlabelled.parquet --classes {words} --supervised",
            "--supervised needs labels in --data",
        ),
        ("--data {photos} --encoder light", "unknown encoder 'light': did you mean lite"),
        (
            "--data {photos} --encoder ViT-S-32-alt",
            "ViT-S-32-alt without --pretrained would have random weights",
        ),
        ("--data {photos} --out {tmp}/file/out", "cannot write to the output folder {tmp}/file/out"),
        ("--data {tmp}/text.parquet --classes {words}", "text.parquet: not a Parquet file that can be read"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    flags: str,
    message: str,
    tmp_path: Path,
    lake: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "text.parquet").write_text("no Parquet")
    names = {"tmp": tmp_path, "lake": lake, "photos": photos, "words": WORDS}
    out = "" if "--out" in flags else "--out {tmp}/out"
    line = refusal(f"selftrain.py {flags} {out}".format(**names), monkeypatch, capsys)
    assert message.format(**names) in line


def test_labels_outside_the_class_list_are_refused_and_nothing_is_lost(
    base: dict[str, Any],
    work: Path,
    lake: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = f"--features {work}/features"
    message = refusal(
        f"selftrain.py --data {lake}/labelled.parquet --classes apple,pear {shared} --out {work}/two",
        monkeypatch,
        capsys,
    )
    assert "labelled is not in the class list (2)" in message
    message = refusal(
        f"selftrain.py --data {lake}/labelled.parquet --eval-data {photos} --classes apple,pear,plum {shared} "
        f"--out {work}/three",
        monkeypatch,
        capsys,
    )
    assert "3 labels of photos are not in the class list (stop_sign, tennis_ball, traffic_cone)" in message
    assert Store.find(base["features"]["train"])


@pytest.mark.parametrize(
    "flags",
    [
        "--data {lake}/labelled.parquet",
        "--data {lake}/unlabelled.parquet --eval-data {lake}/labelled.parquet",
        "--data {lake}/labelled.parquet --eval-data {two} --supervised",
    ],
)
def test_a_label_that_is_no_class_stops_the_job_before_any_work(
    flags: str,
    lake: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = pq.read_table(lake / "labelled.parquet")
    pq.write_table(table.filter(pa.compute.less(table["label"], 2)), two := tmp_path / "two.parquet")
    command = f"selftrain.py {flags.format(lake=lake, two=two)} --classes apple,pear --out {tmp_path}/out"
    assert "labelled is not in the class list (2)" in refusal(command, monkeypatch, capsys)
    assert not list(tmp_path.glob("out/*"))


def test_predict_refuses_what_it_cannot_do(
    base: dict[str, Any],
    work: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    probe = f"--probe {work}/trained/probe"
    (tmp_path / "a.parquet").mkdir()
    (tmp_path / "b.parquet").touch()
    for flags, message in {
        f"--probe {tmp_path} --data {photos} --out {tmp_path}/x.parquet": "holds no probe",
        f"--probe {work}/trained --data {photos} --out {tmp_path}/x.parquet": f"; {work}/trained/probe holds one",
        f"{probe} --data {photos} --out {tmp_path}/labels": "its name must end in .parquet",
        f"{probe} --data {tmp_path}/none --out {tmp_path}/x.parquet": "no such path",
        f"{probe} --data {photos} --out {tmp_path}/x.parquet --top-k 0": "--top-k must be at least 1",
        f"{probe} --data {photos} --out {tmp_path}/a.parquet": "a.parquet is a folder",
        f"{probe} --data {photos} --out {tmp_path}/b.parquet/x.parquet": "b.parquet is a file",
        f"{probe} --data {photos} --out {tmp_path}/x.parquet --min-probability 0.5": "--min-probability is for",
        f"{probe} --data {base['features']['train']} --out {tmp_path}/x.parquet --export-folder {tmp_path}/sorted": (
            "name its images"
        ),
    }.items():
        assert message in refusal(f"predict.py {flags}", monkeypatch, capsys)
    shutil.copytree(work / "trained" / "probe", tmp_path / "probe")
    (tmp_path / "probe" / "probe.safetensors").write_bytes(b"damaged")
    line = refusal(
        f"predict.py --probe {tmp_path}/probe --data {photos} --out {tmp_path}/x.parquet", monkeypatch, capsys
    )
    assert "probe.safetensors is damaged" in line


@pytest.mark.slow
def test_a_wrong_path_ends_a_real_job_with_one_line(tmp_path: Path) -> None:
    job = start(f"selftrain.py --data {tmp_path}/nowhere --out {tmp_path}/out")
    _, stderr = job.communicate(timeout=240)
    assert job.returncode == 1
    assert stderr.splitlines()[-1].startswith(f"error: {tmp_path}/nowhere: no such path")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        # Schedulers send it to Ray's processes too.
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
    ],
)
def test_after_ctrl_c_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, code: int, word: str
) -> None:
    (tmp_path / "images").mkdir()
    for tar in range(30):
        write_tar(
            tmp_path / "images" / f"{tar:02d}.tar",
            {f"{i}.png": draw(i % 3, 100 * tar + i) for i in range(12)},
        )
    command = f"encode.py --data {tmp_path}/images --classes {WORDS} --views weak,mirror --out {tmp_path}/out"
    job = start(command)
    try:
        deadline = time.monotonic() + 240
        while not (parts := list((tmp_path / "out").glob("features/*/part-*.parquet"))):
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(job.pid, sent)  # a terminal's Ctrl-C reaches the whole group
        _, stderr = job.communicate(timeout=240)
    finally:
        if job.poll() is None:
            job.kill()
    assert job.returncode == code
    assert f"{word}: finished work is kept, and the same command resumes from there" in stderr
    assert "Traceback" not in stderr
    (folder,) = (tmp_path / "out" / "features").iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}
    assert {path.name for path in parts} <= set(kept)
    assert len(kept) < 30
    assert Store.find(str(folder)) is None

    again = run(command, monkeypatch)
    assert again["images"] == 360
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
