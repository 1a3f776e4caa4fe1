"""The evaluation from probes and images to rows, a page and MLflow runs; features are encoded once for all of it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, Training, draw
from mlflow import MlflowClient
from PIL import Image
from test_page import Page

from lpclip.config import (
    EvaluateJob,
    SourceConfig,
    TrackingConfig,
)
from lpclip.evaluation.bootstrap import mean_interval
from lpclip.evaluation.results import ZERO_SHOT
from lpclip.evaluation.shift import ALEXNET_ERROR
from lpclip.features.store import Store, row_order
from lpclip.jobs.evaluate import evaluate_job
from lpclip.jobs.evaluate_examples import EXAMPLES
from lpclip.jobs.evaluate_names import parse_named
from lpclip.method.probe import Probe, load_probe

pytestmark = pytest.mark.usefixtures("cluster", "lite_map")
ROOT = Path(__file__).parents[1]
CORRUPTIONS = ("glass_blur", "gaussian_noise", "fog")
Summary = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Where the images and the runs lie. RUNS/features is shared by the runs."""

    photos: Path
    lake: Path
    folder: Path
    trained: Path
    store: Path
    """The features of the images that the probes were trained on."""

    @property
    def job(self) -> EvaluateJob:
        """The evaluation that most tests are about: every kind of set."""
        return EvaluateJob(
            probe=(f"{self.trained}/probe", f"ceiling={self.trained}/supervised"),
            data=(str(self.photos),),
            limit=18,
            corruptions=",".join(CORRUPTIONS),
            severities="1,5",
            shift=(f"cards={self.folder}/cards",),
            ood=(f"static={self.folder}/static",),
            corrupted=(f"tiny={self.folder}/tiny-c",),
            out=f"{self.folder}/main",
            features=f"{self.folder}/features",
            tracking=TrackingConfig(experiment="evaluation"),
        )


@pytest.fixture(scope="module")
def work(photos: Path, lake: Path, trained: Training, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A shifted set of two of the classes, foreign images, a published corrupted set, and trained probes."""
    folder = tmp_path_factory.mktemp("evaluation")
    for place, name in enumerate(CLASSES[:2]):
        (folder / "cards" / name).mkdir(parents=True)
        for seed in range(4):
            (folder / "cards" / name / f"{seed}.png").write_bytes(draw(place, 900 + seed))
    (folder / "static").mkdir()
    for seed in range(7):
        noise = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(noise).save(folder / "static" / f"{seed}.png")
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(draw(i % 3, 500 + i)))) for i in range(6)])
    (folder / "tiny-c").mkdir()
    np.save(folder / "tiny-c" / "contrast.npy", np.concatenate([pixels // step for step in range(1, 6)]))
    np.save(folder / "tiny-c" / "labels.npy", np.tile(np.arange(6) % 3, 5))
    store = Path(trained.summary["features"]["train"])
    return Work(photos=photos, lake=lake, folder=folder, trained=trained.out, store=store)


@pytest.fixture(scope="module")
def found(work: Work) -> Summary:
    """The summary of the evaluation of two probes on every kind of set."""
    return evaluate_job(work.job)


@pytest.fixture(scope="module")
def probes(work: Work) -> dict[str, Probe]:
    names = {ZERO_SHOT: "zero_shot", "probe": "probe", "ceiling": "supervised"}
    return {name: load_probe(str(work.trained / folder)) for name, folder in names.items()}


def value(
    summary: Summary,
    metric: str,
    probe: str,
    name: str = "photos",
    corruption: str | None = None,
    severity: int | None = None,
) -> Any:
    """The one value, and its interval, of a metric of a probe on a set, or under a corruption of it."""
    wanted = (name, corruption, severity, probe, metric)
    keys = ("set", "corruption", "severity", "probe", "metric")
    (row,) = [row for row in summary["results"] if tuple(row[key] for key in keys) == wanted]
    return row["value"], row["interval"]


def stores(summary: Summary, name: str) -> list[str]:
    """The feature stores of a set."""
    return [path for item in summary["sets"] if item["set"] == name for path in item["stores"]]


def truth(ids: list[str]) -> np.ndarray:
    """Classes by the images' names: CLASS/100.png, or contrast-3-00004 with the row's number behind."""
    folders = [name.partition("/")[0].replace("_", " ") for name in ids]
    return np.array(
        [
            CLASSES.index(f) if f in CLASSES else int(name[-5:]) % 3
            for f, name in zip(folders, ids, strict=True)
        ]
    )


def correct(path: str, views: tuple[str, ...], probe: Probe) -> np.ndarray:
    """Which images a probe gets right by the mean of some stored views, in NumPy: (N,) bool, in row order."""
    table = pa.concat_tables([pq.read_table(part) for part in sorted(Path(path).glob("part-*.parquet"))])
    mean = np.sum([np.array(table[view].to_pylist(), np.float32) for view in views], axis=0)
    mean = (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    predicted = (mean @ probe.weight.numpy().T + probe.bias.numpy()).argmax(axis=1)
    ids = table["id"].to_pylist()
    return (predicted == truth(ids))[row_order(np.array(ids))]


def corrupted_views(corruption: str, severity: int) -> tuple[str, str]:
    return f"{corruption}:{severity}", f"{corruption}:{severity}+mirror"


def test_a_probe_is_measured_on_the_features_that_are_there_and_under_a_corruption(
    trained: Training, work: Work, tmp_path: Path
) -> None:
    job = EvaluateJob(
        probe=(f"{work.trained}/probe",),
        data=(str(work.photos),),
        corruptions="fog",
        severities="3",
        out=f"{tmp_path}/out",
        features=str(work.trained.parent / "features"),
        tracking=TrackingConfig(experiment="small"),
    )
    summary = evaluate_job(job)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    old, new = stores(summary, "photos")
    assert old == trained.summary["features"]["eval"], "the clean images are not encoded again"
    for name, folder in ((ZERO_SHOT, "zero_shot"), ("probe", "probe")):
        saved = load_probe(str(work.trained / folder))
        assert value(summary, "accuracy", name)[0] == correct(old, ("weak", "mirror"), saved).mean()
        right = correct(new, corrupted_views("fog", 3), saved)
        assert value(summary, "accuracy", name, "photos", "fog", 3)[0] == right.mean()
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.texts("h2")[:2] == ["Overview", "Corruptions of photos"]
    assert MlflowClient().get_run(summary["mlflow_run"]).info.status == "FINISHED"


@pytest.mark.slow
def test_the_summary_is_what_was_returned_and_its_rows_are_complete(found: Summary, work: Work) -> None:
    assert json.loads((work.folder / "main" / "summary.json").read_text()) == found
    keys = ["set", "kind", "corruption", "severity", "probe", "metric", "value", "interval"]
    assert all(list(row) == keys for row in found["results"])
    places = [tuple(row[key] for key in keys[:6]) for row in found["results"]]
    assert len(set(places)) == len(places)
    cells = {(row["set"], row["kind"], row["corruption"], row["severity"]) for row in found["results"]}
    measured = {cell for cell in cells if cell[2] != "mean" and (cell[2] is None or cell[3] is not None)}
    assert measured == {
        ("photos", "clean", None, None),
        *(("photos", "corrupted", name, severity) for name in CORRUPTIONS for severity in (1, 5)),
        ("cards", "shift", None, None),
        ("static", "ood", None, None),
        *(("tiny", "published corruption", "contrast", severity) for severity in range(1, 6)),
    }
    labelled = {cell for cell in measured if cell[1] != "ood"}
    for metric in ("accuracy", "mean_recall", "ece", "adaptive_ece", "nll", "brier", "aurc", "augrc"):
        for cell in labelled:
            rows = [
                row
                for row in found["results"]
                if row["metric"] == metric and tuple(row[key] for key in keys[:4]) == cell
            ]
            assert {row["probe"] for row in rows} == {ZERO_SHOT, "probe", "ceiling"}
            if metric in ("mean_recall", "adaptive_ece"):
                assert [row["interval"] for row in rows] == [None] * 3, "no mean over images"
            else:
                assert all(row["interval"][0] <= row["interval"][1] for row in rows)
    images = {item["set"]: (item["images"], item["quarantined"]) for item in found["sets"]}
    assert images == {"photos": (18, 0), "cards": (8, 0), "static": (7, 0), "tiny": (6, 0)}
    assert all(item["encoded_now"] for item in found["sets"])
    assert set(found["probes"]) == {ZERO_SHOT, "probe", "ceiling"}
    assert found["classes"] == list(CLASSES)
    assert found["config"]["severities"] == "1,5"
    assert {"start", "encode", "measure", "report"} == set(found["timings"])


@pytest.mark.slow
def test_accuracies_are_those_of_the_stored_features(found: Summary, probes: dict[str, Probe]) -> None:
    (photos,), (cards,), tiny = (stores(found, name) for name in ("photos", "cards", "tiny"))
    seen = []
    for name, probe in probes.items():
        for corruption in CORRUPTIONS:
            for severity in (1, 5):
                right = correct(photos, corrupted_views(corruption, severity), probe)
                assert value(found, "accuracy", name, "photos", corruption, severity)[0] == right.mean()
                seen.append(right.mean())
        for place, path in {"photos": photos, "cards": cards}.items():
            right = correct(path, ("weak", "mirror"), probe)
            assert value(found, "accuracy", name, place)[0] == right.mean()
        for severity, path in enumerate(tiny, start=1):
            right = correct(path, ("weak", "mirror"), probe)
            assert value(found, "accuracy", name, "tiny", "contrast", severity)[0] == right.mean()
    assert len(set(seen)) > 3, "corruptions make a difference"


@pytest.mark.slow
def test_means_over_corruptions_are_means_of_cells(found: Summary) -> None:
    for name in (ZERO_SHOT, "probe", "ceiling"):
        for metric in ("accuracy", "ece", "nll", "brier", "aurc"):
            cells = {
                severity: [value(found, metric, name, "photos", c, severity)[0] for c in CORRUPTIONS]
                for severity in (1, 5)
            }
            for severity, values in cells.items():
                mean = value(found, metric, name, "photos", "mean", severity)[0]
                assert mean == pytest.approx(np.mean(values))
            mean = value(found, metric, name, "photos", "mean")[0]
            assert mean == pytest.approx(np.mean(list(cells.values())))
        kept = value(found, "retained_accuracy", name, "photos", "mean")[0]
        clean = value(found, "accuracy", name)[0]
        assert kept == pytest.approx(value(found, "accuracy", name, "photos", "mean")[0] / clean)
    errors = {
        name: [1 - value(found, "accuracy", name, "photos", "fog", severity)[0] for severity in (1, 5)]
        for name in (ZERO_SHOT, "probe")
    }
    error = value(found, "corruption_error", "probe", "photos", "fog")[0]
    assert error == pytest.approx(sum(errors["probe"]) / sum(errors[ZERO_SHOT]))


@pytest.mark.slow
def test_gains_are_paired_on_the_same_images(found: Summary, probes: dict[str, Probe]) -> None:
    def gain(path: str, views: tuple[str, ...]) -> np.ndarray:
        return correct(path, views, probes["ceiling"]).astype(float) - correct(path, views, probes[ZERO_SHOT])

    def check(differences: np.ndarray, *cell: Any) -> None:
        mean, interval = value(found, "accuracy_gain", "ceiling", *cell)
        assert mean == pytest.approx(differences.mean())
        assert interval == pytest.approx(mean_interval(torch.from_numpy(differences), seed=0).tolist())

    (photos,) = stores(found, "photos")
    check(gain(photos, ("weak", "mirror")), "photos")
    check(gain(photos, corrupted_views("glass_blur", 5)), "photos", "glass_blur", 5)
    both = [gain(photos, corrupted_views(name, 5)) for name in CORRUPTIONS]
    check(np.mean(both, axis=0), "photos", "mean", 5)
    # Of arrays every severity has ids of its own, which order the rows: images are matched all the same.
    matched = [
        gain(path, ("weak", "mirror"))[np.argsort(Store.open(path).ids())] for path in stores(found, "tiny")
    ]
    assert np.any(matched)
    check(np.mean(matched, axis=0), "tiny", "mean")


@pytest.mark.slow
def test_results_as_parquet_are_the_same_rows(found: Summary, work: Work) -> None:
    rows = pq.read_table(work.folder / "main" / "results.parquet").to_pylist()
    for row in rows:
        low, high = row.pop("low"), row.pop("high")
        row["interval"] = None if low is None else [low, high]
    assert rows == found["results"]


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_shows_everything(
    found: Summary, work: Work, probes: dict[str, Probe]
) -> None:
    html = (work.folder / "main" / "report.html").read_text()
    page = Page(html)
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed"}
    assert [link["href"] for link in page.attributes("link")] == ["data:,"]
    assert all((link["href"] or "").startswith("#") for link in page.attributes("a"))
    assert not re.search(r"url\(|@import", html)
    images = page.attributes("img")
    assert all((image["src"] or "").startswith(("data:image/png", "data:image/jpeg")) for image in images)
    assert page.texts("h1") == ["Robustness on photos"]
    assert page.texts("h2") == [
        "Overview",
        "Corruptions of photos",
        "Corruptions of tiny",
        "Natural shifts",
        "Calibration and selective prediction on photos",
        "Foreign images",
        "Classes",
        # Whether probe and zero-shot disagree on an image may depend on a CPU's roundings: see the next test.
        *(["Images"] if disagreements(found, probes, "probe") else []),
    ]
    described = {image["alt"] for image in images}
    assert {
        "Accuracy of every classifier under each corruption of photos",
        *(f"Accuracy against severity of {name.replace('_', ' ')}" for name in (*CORRUPTIONS, "contrast")),
        "Accuracy on shifted sets against accuracy on the clean set, by classifier",
        "Accuracy against confidence for every classifier",
        "Share of errors against share of images kept",
        *(f"Shares of each true class by predicted class, {name}" for name in probes),
    } <= described


def disagreements(summary: Summary, probes: dict[str, Probe], name: str) -> set[str]:
    """Ids of the photos that either zero-shot or the probe `name` gets right, and not the other."""
    (path,) = stores(summary, "photos")
    ids = Store.open(path).ids().tolist()
    right = {who: correct(path, ("weak", "mirror"), probes[who]) for who in (ZERO_SHOT, name)}
    return {image for image, a, b in zip(ids, right[ZERO_SHOT], right[name], strict=True) if a != b}


@pytest.mark.slow
def test_the_page_shows_the_images_on_which_probe_and_zero_shot_disagree(
    found: Summary, work: Work, probes: dict[str, Probe], tmp_path: Path
) -> None:
    # Zero-shot with its first two classes taken for each other: wrong wherever zero-shot is right about these.
    zero_shot, order = probes[ZERO_SHOT], [1, 0, 2]
    mixed = replace(zero_shot, weight=zero_shot.weight[order], bias=zero_shot.bias[order])
    mixed.save(str(tmp_path / "mixed"))
    job = replace(
        work.job,
        probe=(f"{tmp_path}/mixed",),
        corruptions="none",
        shift=(),
        corrupted=(),
        out=f"{tmp_path}/out",
    )
    evaluate_job(job)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.texts("h2")[-1] == "Images"
    changed = disagreements(found, {**probes, "mixed": mixed}, "mixed")
    assert changed
    described = {image["alt"] for image in page.attributes("img")}
    ids = Store.open(stores(found, "photos")[0]).ids().tolist()
    shown = {name for name in ids if f"{name}, {CLASSES[truth([name])[0]]}" in described}
    assert shown <= changed
    assert len(shown) >= min(len(changed), EXAMPLES)


@pytest.mark.slow
def test_mlflow_holds_a_run_for_each_classifier_with_severities_as_steps(found: Summary) -> None:
    client = MlflowClient()
    parent = client.get_run(found["mlflow_run"])
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "main")
    assert parent.data.params["severities"] == "1,5"
    files = {item.path for item in client.list_artifacts(found["mlflow_run"])}
    assert files == {"report.html", "summary.json", "results.parquet", "figures"}
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found['mlflow_run']}'"
    )
    by_name = {child.info.run_name: child for child in children}
    assert len(children) == 3
    assert set(by_name) == {ZERO_SHOT, "probe", "ceiling"}
    assert {child.info.status for child in children} == {"FINISHED"}
    names = {name: set(child.data.metrics) for name, child in by_name.items()}
    assert names["probe"] == names["ceiling"]
    # A gain and a corruption error are over zero-shot: alone it lacks them, and nothing else.
    missing = names["probe"] - names[ZERO_SHOT]
    assert {name.rpartition("/")[2] for name in missing} == {"accuracy_gain"}
    assert names[ZERO_SHOT] < names["probe"]
    assert {
        "clean/accuracy",
        "clean/ece",
        "corrupted/fog/accuracy",
        "corrupted/mean/retained_accuracy",
        "shift/cards/accuracy",
        "ood/static/auroc_msp",
        "published corruption/tiny/contrast/accuracy",
    } <= names[ZERO_SHOT]

    def steps(name: str, metric: str) -> dict[int, float]:
        run_id = by_name[name].info.run_id
        return {item.step: item.value for item in client.get_metric_history(run_id, metric)}

    for name in by_name:
        expected = {s: value(found, "accuracy", name, "photos", "fog", s)[0] for s in (1, 5)}
        assert steps(name, "corrupted/fog/accuracy") == pytest.approx(expected)
        expected = {s: value(found, "accuracy", name, "photos", "mean", s)[0] for s in (1, 5)}
        assert steps(name, "corrupted/mean/accuracy") == pytest.approx(expected)
        mean = value(found, "accuracy", name, "photos", "mean")[0]
        assert steps(name, "corrupted/accuracy") == pytest.approx({0: mean})
        assert parent.data.metrics[f"test/corrupted/accuracy_{name}"] == pytest.approx(mean)
        assert steps(name, "clean/accuracy") == pytest.approx({0: value(found, "accuracy", name)[0]})
        assert set(steps(name, "published corruption/tiny/contrast/accuracy")) == {1, 2, 3, 4, 5}


def times(work: Work) -> dict[str, int]:
    """When each file of the shared features was written. Locks say who had them last."""
    files = (p for p in (work.folder / "features").rglob("*") if p.is_file() and p.name != ".lock")
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_other_probes_under_other_names_encode_nothing(
    found: Summary, work: Work, probes: dict[str, Probe]
) -> None:
    before = times(work)
    shutil.copytree(work.trained / "zero_shot", work.folder / "copy" / "probe")
    other = replace(
        work.job,
        probe=(f"{work.trained}/probe", f"{work.folder}/copy/probe"),
        shift=(f"imagenet-v2={work.folder}/cards",),
        corrupted=(f"ImageNet-C-tiny={work.folder}/tiny-c",),
        out=f"{work.folder}/other",
    )
    again = evaluate_job(other)
    assert not any(item["encoded_now"] for item in again["sets"])
    assert again["rates"] == {"images": None, "features": None}
    assert times(work) == before
    assert list(again["probes"]) == [ZERO_SHOT, "trained/probe", "copy/probe"]

    # A copy of zero-shot is right on the same images: paired, that is certain, though its accuracy is not.
    gains = [r for r in again["results"] if (r["metric"], r["probe"]) == ("accuracy_gain", "copy/probe")]
    assert len(gains) == 1 + 6 + 3 + 1 + 5 + 6
    assert all(row["value"] == 0 and row["interval"] == [0, 0] for row in gains)
    low, high = value(again, "accuracy", "copy/probe", "photos", "mean")[1]
    assert low < high

    alexnet = {r["set"] for r in again["results"] if r["metric"] == "corruption_error_alexnet"}
    assert alexnet == {"ImageNet-C-tiny"}, "its files are read as they are, at all five severities"
    errors = [1 - value(found, "accuracy", "probe", "tiny", "contrast", s)[0] for s in range(1, 6)]
    error = value(again, "corruption_error_alexnet", "trained/probe", "ImageNet-C-tiny", "contrast")[0]
    assert error == pytest.approx(sum(errors) / (5 * ALEXNET_ERROR["contrast"]))
    assert not [
        r for r in found["results"] if r["metric"] in ("corruption_error_alexnet", "effective_robustness")
    ]
    # Three classes are not ImageNet's thousand, for which the published line holds.
    assert not [row for row in again["results"] if row["metric"] == "effective_robustness"]
    page = (Path(other.out) / "report.html").read_text()
    assert (
        "Mean corruption error over 1 of 15 corruptions, which is no mCE (AlexNet has 100%): zero-shot "
        in page
    )


@pytest.mark.slow
def test_one_more_severity_encodes_its_views_alone(found: Summary, work: Work) -> None:
    before = times(work)
    fewer = replace(work.job, shift=(), ood=(), corrupted=(), corruptions="fog")
    more = evaluate_job(replace(fewer, severities="1,3", out=f"{work.folder}/more"))
    (item,) = more["sets"]
    assert item["encoded_now"]
    old, new = item["stores"]
    assert [old] == stores(found, "photos")
    assert Store.open(new).manifest.views == ("weak", *corrupted_views("fog", 3))
    after = times(work)
    assert {name: after[name] for name in before} == before
    for name in (ZERO_SHOT, "probe", "ceiling"):
        for cell in [("photos",), ("photos", "fog", 1)]:
            assert value(more, "accuracy", name, *cell) == value(found, "accuracy", name, *cell)
    right = correct(new, corrupted_views("fog", 3), load_probe(str(work.trained / "probe")))
    assert value(more, "accuracy", "probe", "photos", "fog", 3)[0] == right.mean()


@pytest.mark.slow
def test_the_same_command_again_gives_the_same_rows_and_other_work_is_refused(
    found: Summary, work: Work
) -> None:
    # As after a kill in the last moment of a set: all parts are there, the manifest is not.
    (static,) = stores(found, "static")
    before = times(work)
    (Path(static) / "manifest.json").unlink()
    again = evaluate_job(work.job)
    assert again["results"] == found["results"]
    assert [item["set"] for item in again["sets"] if item["encoded_now"]] == ["static"]
    assert again["rates"] == {"images": None, "features": None}, "a manifest was written, no image encoded"
    after = times(work)
    assert set(after) == set(before)
    written = {name for name in before if after[name] != before[name]}
    assert written == {f"{static}/{name}" for name in ("manifest.json", "quarantine.parquet")}

    summary = (work.folder / "main" / "summary.json").read_bytes()
    message = re.escape(f"{work.folder}/main holds the results of other work (it differs in ")
    for other, difference in {
        replace(work.job, severities="1"): "sets",
        replace(work.job, probe=(f"{work.trained}/probe",)): "probes",
        replace(work.job, seed=1): "seed",
    }.items():
        with pytest.raises(ValueError, match=f"{message}{difference}"):
            evaluate_job(other)
    with pytest.raises(ValueError, match=re.escape(f"{work.trained} holds the results of other work")):
        evaluate_job(replace(work.job, out=str(work.trained)))
    assert (work.folder / "main" / "summary.json").read_bytes() == summary


def start(flags: list[str]) -> subprocess.Popen[str]:
    """The job as a user starts it, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_after_ctrl_c_between_two_sets_the_same_command_goes_on(work: Work, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("".join(f"{i}\t{name}\n" for i, name in enumerate(CLASSES)))
    job = EvaluateJob(
        probe=(f"{work.trained}/probe",),
        data=(f"{work.lake}/labelled.parquet",),
        limit=5,
        ood=(f"static={work.folder}/static",),
        classes=f"{tmp_path}/classes.txt",
        out=f"{tmp_path}/out",
        tracking=TrackingConfig(experiment="interrupted"),
    )
    flags = (
        f"--probe {job.probe[0]} --data {job.data[0]} --limit 5 --ood {job.ood[0]} --classes {job.classes}"
    )
    process = start(f"{flags} --out {job.out} --experiment interrupted".split())
    try:
        deadline = time.monotonic() + 240
        while not (first := list((tmp_path / "out" / "features").glob("*/manifest.json"))):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130
    assert "interrupted: finished work is kept, and the same command resumes from there" in stderr
    assert "Traceback" not in stderr
    kept = {path: path.stat().st_mtime_ns for path in first[0].parent.iterdir()}
    client = MlflowClient()
    experiment = client.get_experiment_by_name("interrupted")
    assert experiment is not None
    (killed,) = client.search_runs([experiment.experiment_id])
    assert killed.info.status == "KILLED"

    done = evaluate_job(job)
    assert [(item["set"], item["encoded_now"]) for item in done["sets"]] == [
        ("lake0-labelled", False),
        ("static", True),
    ]
    assert {path: path.stat().st_mtime_ns for path in first[0].parent.iterdir()} == kept
    assert done["mlflow_run"] == killed.info.run_id
    assert client.get_run(done["mlflow_run"]).info.status == "FINISHED"


@pytest.mark.slow
def test_a_mistake_ends_a_real_job_with_one_line(work: Work, tmp_path: Path) -> None:
    flags = f"--probe {work.trained}/probe --data {work.photos} --corruptions rain --out {tmp_path}/out"
    job = start(flags.split())
    _, stderr = job.communicate(timeout=240)
    assert job.returncode == 1
    assert stderr.splitlines()[-1].startswith("error: --corruptions: 'rain' is no corruption; there are ")
    assert "Traceback" not in stderr


@pytest.fixture(scope="module")
def strange(work: Work) -> Path:
    """What cannot be evaluated, and probes that do not fit the others."""
    folder = work.folder / "strange"
    for name in ("pets/cat", "pets/dog", "text", "empty"):
        (folder / name).mkdir(parents=True)
    for name in ("pets/cat", "pets/dog"):
        (folder / name / "0.png").write_bytes(draw(0, 0))
    (folder / "text" / "notes.txt").write_text("these are my notes")
    table = pq.read_table(work.lake / "labelled.parquet")
    pq.write_table(table.slice(0, 0), folder / "none.parquet")
    (folder / "swapped.txt").write_text("\n".join(reversed(CLASSES)))
    changes: dict[str, Any] = {
        "encoder": {"identity": {"name": "another"}},
        "views": {"views": "weak"},
        "templates": {"templates": ["{}"]},
    }
    probe = load_probe(str(work.trained / "probe"))
    for name, change in changes.items():
        replace(probe, encoder=probe.encoder | change).save(str(folder / name))
    replace(probe, class_names=tuple(reversed(CLASSES))).save(str(folder / "classes"))
    two = replace(probe, weight=probe.weight[:2].clone(), bias=probe.bias[:2].clone())
    replace(two, class_names=CLASSES[:2]).save(str(folder / "two"))
    (folder / "store").symlink_to(work.store)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "{here}/pets"}, "2 labels of pets are not in the class list (cat, dog); the classes are"),
        ({"shift": ("pets={here}/pets",)}, "2 labels of pets are not in the class list"),
        ({"data": "{here}/empty"}, "{here}/empty: the folder holds nothing"),
        ({"data": "{here}/none.parquet"}, "{here}/none.parquet: no rows"),
        ({"data": "{here}/nowhere"}, "{here}/nowhere: no such path, nor one of the data sets"),
        ({"data": "{lake}/unlabelled.parquet"}, "unlabelled has no labels: there is nothing to measure on it"),
        ({"shift": ("x={lake}/unlabelled.parquet",)}, "x has no labels: there is nothing to measure on it"),
        ({"ood": ("x={here}/text",)}, "{here}/text: the folder holds 1 file, and no image"),
        ({"ood": ("x={here}/nowhere",)}, "{here}/nowhere: no such path"),
        ({"corrupted": ("x={photos}",)}, "{photos}: no published corrupted data set; there should be"),
        ({"corrupted": ("x={here}/nowhere",)}, "{here}/nowhere: no such path"),
        ({"probe": ("{here}/empty",)}, "{here}/empty holds no probe"),
        ({"probe": ("{probe}", "b={here}/encoder")}, "probe and b are of different encoders"),
        ({"probe": ("{probe}", "b={here}/classes")}, "probe and b have different classes"),
        ({"probe": ("{probe}", "{here}/views")}, "probe and views have different views"),
        ({"probe": ("{probe}", "{here}/templates")}, "probe and templates have different templates"),
        ({"probe": ("a={probe}", "a={here}/two")}, "two classifiers are called a: name one of them"),
        ({"probe": ("{probe}", "{probe}")}, "two classifiers are called trained/probe: name one"),
        ({"probe": ("zero-shot={probe}",)}, "two classifiers are called zero-shot"),
        ({"probe": ("={probe}",)}, "--probe ={probe}: give it as NAME=FOLDER"),
        ({"shift": ("{photos}",)}, "--shift {photos}: give it as NAME=PATH"),
        ({"ood": ("={photos}",)}, "--ood ={photos}: give it as NAME=PATH"),
        ({"corrupted": ("x=",)}, "--corrupted x=: give it as NAME=PATH"),
        ({"shift": ("x={photos}", "x={photos}")}, "--shift x={photos}: another set is called x"),
        ({"shift": ("x={photos}",), "ood": ("x={photos}",)}, "--ood x={photos}: another set is called x"),
        ({"shift": ("photos={photos}",)}, "--shift photos={photos}: another set is called photos"),
        ({"corruptions": "fog,rain"}, "--corruptions: 'rain' is no corruption; there are gaussian_noise, "),
        ({"corruptions": "fog,fog"}, "--corruptions or --severities name one of them twice"),
        ({"corruptions": ""}, "--corruptions is empty: give it a value"),
        ({"corruptions": "fog", "severities": "0"}, "--severities: '0' is not a whole number from 1 to 5"),
        ({"corruptions": "fog", "severities": "1,6"}, "--severities: '6' is not a whole number"),
        ({"corruptions": "fog", "severities": "2.5"}, "--severities: '2.5' is not a whole number"),
        ({"corruptions": "fog", "severities": "x"}, "--severities: 'x' is not a whole number"),
        ({"classes": "{here}/swapped.txt"}, "has other names than the probe, or another order"),
        ({"limit": 0}, "--limit must be at least 1, not 0"),
        ({"data": "{here}/store", "limit": 3}, "is a feature store: --limit works on images"),
        ({"data": "{here}/store", "corruptions": "fog"}, "{here}/store is a feature store without the view fog:1"),
        (
            {"data": "{here}/store", "probe": ("{here}/two",)},
            "1 label of store is not in the class list (2); the classes are tennis ball, stop sign",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(
    change: dict[str, Any], message: str, work: Work, strange: Path, tmp_path: Path
) -> None:
    names = {"here": strange, "photos": work.photos, "lake": work.lake, "probe": work.trained / "probe"}

    def filled(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(map(filled, entry))
        return entry.format(**names) if isinstance(entry, str) else entry

    job = EvaluateJob(probe=(f"{work.trained}/probe",), data=(str(work.photos),), out=f"{tmp_path}/out")
    with pytest.raises(ValueError, match=re.escape(message.format(**names))):
        evaluate_job(replace(job, **{key: filled(entry) for key, entry in change.items()}))
    assert not (tmp_path / "out" / "summary.json").exists()
    assert not list((tmp_path / "out").glob("features/*"))


def test_foreign_images_that_cannot_be_read_are_refused(work: Work, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for number in range(3):
        (tmp_path / "broken" / f"{number}.png").write_text("no image")
    job = EvaluateJob(
        probe=(f"{work.trained}/probe",),
        data=(str(work.store),),
        ood=(f"x={tmp_path}/broken",),
        out=f"{tmp_path}/out",
        source=SourceConfig(max_bad_fraction=1.0),
        tracking=TrackingConfig(experiment="broken"),
    )
    with pytest.raises(ValueError, match="3 of 3 images of broken cannot be used"):
        evaluate_job(job)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("broken")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert "3 of 3 images of broken cannot be used" in run.data.tags["lpclip.error"]


def test_a_spec_is_parsed_into_a_name_and_a_path() -> None:
    assert parse_named("a=b=c", flag="shift", optional=False) == ("a", "b=c")
    assert parse_named("a=b", flag="probe", optional=True) == ("a", "b")
    assert parse_named("runs/probe", flag="probe", optional=True) == (None, "runs/probe")
    # The = is a path's own.
    assert parse_named("runs/rate=0.1", flag="probe", optional=True) == (None, "runs/rate=0.1")
    for spec, optional in (("a=", True), ("=b", True), ("a", False), ("a=", False), ("=b", False)):
        with pytest.raises(ValueError, match=f"--shift {spec}: give it as NAME=FOLDER"):
            parse_named(spec, flag="shift", optional=optional, place="FOLDER")
