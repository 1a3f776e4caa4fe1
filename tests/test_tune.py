"""The tune job: real sweeps of Ray Tune on planted features, real kills, real MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import CLASSES, ROOT, descendants, refusal, run, start
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from test_page import Page
from test_tracking import server

from lpclip.config import EncoderConfig, SelfTrainingConfig, TrackingConfig
from lpclip.encoders.head import EncoderInfo
from lpclip.encoders.prompts import templates
from lpclip.features.describe import describe_encoder
from lpclip.features.encode_stage import store_identity
from lpclip.features.store import Store
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.images.views import parse_views
from lpclip.jobs.mlflow_model import LOADER
from lpclip.jobs.tracking import track
from lpclip.jobs.tune import ALIAS
from lpclip.jobs.tune_runs import OUTCOMES
from lpclip.method.criteria import CRITERIA
from lpclip.method.linear import Linear
from lpclip.method.probe import load_probe
from lpclip.method.trial import ChosenPrior, try_priors
from lpclip.training.search_space import draw_trials, read_space
from lpclip.training.trials import GRACE_ROUNDS, METRICS, read_classifier, read_records, trial_name

pytestmark = pytest.mark.usefixtures("cluster", "lite_map", "one_thread")
NAMES = (*CLASSES, "fire truck")
WORDS = ",".join(NAMES).replace(" ", "%20")
ROWS = 600
Summary = dict[str, Any]

SPACE = """
from ray import tune

SPACE = {
    "temperature_factor": tune.loguniform(0.5, 4.0),
    "threshold": tune.uniform(0.0, 0.6),
    "rounds": tune.randint(3, 12),
    "neighbours": tune.choice([0, 10]),
}
"""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The stores and spaces of the sweeps, and the flags that they share."""

    folder: Path
    labels: np.ndarray

    @property
    def command(self) -> str:
        """The sweep that most tests are about, without --out."""
        return f"tune.py --space {self.folder}/space.py --data {self.folder}/labelled --classes {WORDS} --trials 6"

    def space(self, name: str, text: str) -> Path:
        """A space of this text, as a file."""
        path = self.folder / f"{name}.py"
        path.write_text(f"from ray import tune\n\nSPACE = {{{text}}}\n")
        return path


def plant(path: Path, *, info: EncoderInfo, labels: np.ndarray | None, rows: int, views: str) -> np.ndarray:
    """A store of images that zero-shot half understands, and that lie in a cluster for each class. Their classes."""
    assert info.head is not None
    identity = store_identity(None, info, parse_views(views), seed=0)
    identity["source"] = {"made": path.name, "label_names": None}
    writer = StoreWriter(str(path), identity)
    writer.begin()
    random = np.random.default_rng(0)
    dim = info.head.shape[1]
    places = random.integers(0, len(NAMES), rows)
    centres = random.normal(0, dim**-0.5, (len(NAMES), dim))
    seen = 0.3 * centres[places] + 0.1 * info.head[places] + random.normal(0, dim**-0.5, (rows, dim))
    seen += 0.12 * random.normal(size=(rows, len(NAMES))) @ info.head
    columns: dict[str, Any] = {
        "id": [f"{number:04d}" for number in range(rows)],
        "label": pa.array(labels if labels is not None else [None] * rows, pa.int32()),
    }
    for view in views.split(","):
        own = seen + (0.2 if view == "strong" else 0.02) * random.normal(0, dim**-0.5, (rows, dim))
        own = (own / np.linalg.norm(own, axis=1, keepdims=True)).astype(np.float16)
        columns[view] = pa.FixedSizeListArray.from_arrays(pa.array(own.reshape(-1)), dim)
    part = Part(unit=0, start=0, stop=rows, last=True)
    writer.write_part(part, rows=pa.table(columns), quarantine=[], content_digest=0)
    writer.finish(num_units=1, rate=0)
    return places


@pytest.fixture(scope="module")
def info(cluster: None, lite_map: None) -> EncoderInfo:
    return describe_encoder(EncoderConfig(), class_names=NAMES, templates=templates("default"))


@pytest.fixture(scope="module")
def work(info: EncoderInfo, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Two stores of the same features, one of them without labels."""
    folder = tmp_path_factory.mktemp("tune")
    options: dict[str, Any] = {"info": info, "rows": ROWS, "views": "weak,mirror,strong"}
    labels = plant(folder / "unlabelled", labels=None, **options)
    plant(folder / "labelled", labels=labels, **options)
    (folder / "space.py").write_text(SPACE)
    return Work(folder=folder, labels=labels)


@pytest.fixture(scope="module")
def swept(work: Work) -> Summary:
    """The summary of a whole sweep of six trials, in WORK/main."""
    with pytest.MonkeyPatch.context() as patch:
        return run(f"{work.command} --out {work.folder}/main --experiment main", patch)


@pytest.fixture
def copy(swept: Summary, work: Work, tmp_path: Path) -> Path:
    """A copy of the sweep's folder, to go on with."""
    return Path(shutil.copytree(work.folder / "main", tmp_path / "copy"))


def records(out: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a trial with its time and its bytes."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "trials").iterdir()}


def values(summary: Summary) -> dict[str, Any]:
    """All that a sweep says of its trials, but for time and labels."""
    return {
        trial["name"]: {
            key: value for key, value in trial.items() if key not in ("seconds", "accuracy", "ece")
        }
        for trial in summary["trials"]
    }


def worth(summary: Summary, criterion: str) -> dict[str, float]:
    """What the finished trials and zero-shot are worth by a criterion."""
    every = (summary["default"], *summary["trials"])
    rows = {trial["name"]: trial for trial in every if trial["status"] == "finished"}
    return {
        name: row["criteria"][criterion] for name, row in {"zero_shot": summary["zero_shot"], **rows}.items()
    }


def experiment_runs(name: str, client: MlflowClient | None = None) -> tuple[list[MlflowRun], list[MlflowRun]]:
    """The parent runs of an experiment, and their children."""
    client = client or MlflowClient()
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return [run for run in runs if run not in children], children


def test_a_sweep_leaves_every_trial_and_the_choice_in_its_summary(swept: Summary, work: Work) -> None:
    assert json.loads((work.folder / "main" / "summary.json").read_text()) == swept
    drawn = draw_trials(read_space(f"{work.folder}/space.py"), count=6, seed=0)
    assert {trial["name"]: trial["parameters"] for trial in swept["trials"]} == {
        trial_name(parameters): parameters for parameters in drawn
    }
    assert len(swept["trials"]) == 6
    for trial in swept["trials"]:
        assert trial["status"] == "finished"
        assert trial["error"] is None
        assert set(trial["criteria"]) == set(CRITERIA)
        assert trial["criterion"] == trial["criteria"]["structure"]
        assert 0 < trial["accuracy"] < 1
        assert trial["seconds"] > 0
        # One more with the strong views.
        assert 1 < trial["rounds"] <= trial["parameters"]["rounds"] + 1
    assert (swept["default"]["name"], swept["default"]["status"]) == ("default", "finished")
    own = {"temperature_factor": 1.0, "threshold": 0.0, "rounds": 20, "neighbours": 30}
    assert swept["default"]["parameters"] == own
    assert {"prior", "prepare", "trials", "choose"} <= set(swept["timings"])
    assert swept["parameters"] == ["temperature_factor", "threshold", "rounds", "neighbours"]
    assert swept["evaluated_on"] == {
        "data": "labelled",
        "images": ROWS,
        "setting": "transductive",
        "shared": ROWS,
    }
    assert swept["config"]["trials"] == 6
    assert swept["prior"]["trusted"]


def test_the_chosen_trial_is_the_best_by_the_criterion(swept: Summary) -> None:
    best = worth(swept, "structure")
    chosen = swept["chosen"]
    assert chosen["name"] != "zero_shot"
    assert chosen["criterion"] == best[chosen["name"]] == max(best.values())
    assert len(set(best.values())) == 8, "or there was nothing to choose between"
    assert swept["rejected"] == []
    every = {trial["name"]: trial for trial in (swept["default"], *swept["trials"])}
    assert chosen["accuracy"] == every[chosen["name"]]["accuracy"]
    assert chosen["accuracy"] > swept["zero_shot"]["accuracy"] + 0.1


def test_the_evidence_compares_with_all_candidates(swept: Summary) -> None:
    every = (swept["zero_shot"], swept["default"], *swept["trials"])
    accuracy, criterion = ([row[key] for row in every] for key in ("accuracy", "criterion"))
    evidence = swept["evidence"]
    assert evidence["trials"] == 8
    assert evidence["best_accuracy"] == max(accuracy)
    assert evidence["regret"] == pytest.approx(max(accuracy) - swept["chosen"]["accuracy"])
    assert evidence["rank"] == sorted(accuracy, reverse=True).index(swept["chosen"]["accuracy"]) + 1
    # Ranks, equals sharing theirs.
    ranks = [
        [sum(other < value for other in found) + found.count(value) / 2 for value in found]
        for found in (criterion, accuracy)
    ]
    assert evidence["spearman"] == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-6)


def test_the_winners_probe_is_its_trials_and_classifies_as_the_summary_says(
    swept: Summary, work: Work
) -> None:
    out = work.folder / "main"
    probe = load_probe(f"{out}/probe")
    trained = read_classifier(f"{out}/trials", swept["chosen"]["name"])
    assert torch.equal(probe.weight, trained.weight)
    assert torch.equal(probe.bias, trained.bias)
    assert probe.class_names == NAMES
    features = Store.open(f"{work.folder}/labelled").features()
    candidates: dict[str, Linear] = {
        "chosen": probe,
        "default": read_classifier(f"{out}/trials", "default"),
        **{trial["name"]: read_classifier(f"{out}/trials", trial["name"]) for trial in swept["trials"]},
    }
    for name, candidate in candidates.items():
        accuracy = (candidate.predict(features.base) == features.labels).mean()
        rows = {
            "chosen": swept["chosen"],
            "default": swept["default"],
            **{trial["name"]: trial for trial in swept["trials"]},
        }
        assert accuracy == pytest.approx(rows[name]["accuracy"])
    confidence = [
        load_probe(f"{out}/{name}").probabilities(features.base).max(dim=1).values.mean()
        for name in ("probe", "zero_shot")
    ]
    assert confidence[0] < 0.99, "the temperature is set, without labels"
    assert sorted(path.name for path in (out / "figures").iterdir()) == ["criterion.png"]
    page = Page((out / "report.html").read_text())
    text = " ".join(page.texts("body"))
    assert swept["chosen"]["command"] in text
    assert "structure" in text
    assert len(page.attributes("img")) == 1


def test_mlflow_holds_the_sweep_and_a_run_for_each_trial(swept: Summary) -> None:
    client = MlflowClient()
    (parent,), children = experiment_runs("main", client)
    assert parent.info.run_id == swept["mlflow_run"]
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "main")
    expected = {
        "test/accuracy_zero_shot": swept["zero_shot"]["accuracy"],
        "test/accuracy": swept["chosen"]["accuracy"],
        "tune/criterion": swept["chosen"]["criterion"],
        "tune/regret": swept["evidence"]["regret"],
        "tune/spearman": swept["evidence"]["spearman"],
        "tune/trials_finished": 6,
        "tune/trials_stopped": 0,
        "tune/trials_failed": 0,
    }
    assert {key: parent.data.metrics[key] for key in expected} == pytest.approx(expected)
    assert parent.data.tags["chosen"] == swept["chosen"]["name"]
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {
        "probe",
        "figures",
        "summary.json",
        "report.html",
    }
    (default,) = [child for child in children if child.info.run_name == "default recipe"]
    assert (default.data.params["threshold"], default.data.params["rounds"]) == ("0.0", "20")
    assert default.data.metrics["tune/criterion"] == pytest.approx(swept["default"]["criterion"])
    children.remove(default)
    trials = {trial["name"][:6]: trial for trial in swept["trials"]}
    assert len(children) == 6
    assert {child.info.run_name.split()[0] for child in children} == set(trials)
    for child in children:
        trial = trials[child.info.run_name.split()[0]]
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["status"] == "finished"
        assert child.data.tags["chosen"] == str(trial["name"] == swept["chosen"]["name"])
        assert {key: child.data.params[key] for key in trial["parameters"]} == {
            key: str(value) for key, value in trial["parameters"].items()
        }
        assert child.data.metrics["tune/criterion"] == pytest.approx(trial["criterion"])
        assert child.data.metrics["test/accuracy"] == pytest.approx(trial["accuracy"])
        for criterion, value in trial["criteria"].items():
            assert child.data.metrics[f"tune/criterion_{criterion}"] == pytest.approx(value)
        steps = list(range(1, trial["rounds"] + 1))
        for metric in {*METRICS} - {"round"}:
            history = client.get_metric_history(child.info.run_id, f"rounds/{metric}")
            assert [entry.step for entry in history] == steps, metric
        for metric in ("tune/criterion", "test/accuracy", "speed/seconds_total"):
            assert [m.step for m in client.get_metric_history(child.info.run_id, metric)] == [0]


def test_the_champion_of_the_registry_is_the_winners_probe(swept: Summary, work: Work) -> None:
    client = MlflowClient()
    champion = client.get_model_version_by_alias("lpclip-labelled", ALIAS)
    assert champion.run_id == swept["mlflow_run"]
    folder = mlflow.artifacts.download_artifacts(
        artifact_uri=f"models:/lpclip-labelled@{ALIAS}", tracking_uri=os.environ["MLFLOW_TRACKING_URI"]
    )
    probe, own = load_probe(f"{folder}/data/lpclip/probe"), load_probe(f"{work.folder}/main/probe")
    assert torch.equal(probe.weight, own.weight)
    assert (probe.temperature, probe.class_names) == (own.temperature, own.class_names)
    assert mlflow.models.Model.load(folder).flavors["python_function"]["loader_module"] == LOADER


def test_a_run_has_one_version_of_a_model_however_often_it_is_registered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrackingConfig(experiment="registry")

    def write(folder: Path, model: mlflow.models.Model) -> None:
        folder.mkdir()
        model.save(str(folder / "MLmodel"))

    with track(config, name="first", params={}, resume_key="first") as first:
        first.model("probe", write)
        assert [first.register("model", alias=ALIAS) for _ in range(2)] == ["1", "1"]
        assert first.register("other", alias=ALIAS) == "1", "a model of another name is another model"
    with track(config, name="second", params={}) as second:
        second.model("probe", write)
        assert second.register("model", alias=ALIAS) == "2"
    client = MlflowClient()
    found = client.search_model_versions("name='model'")
    runs = {str(version.version): version.run_id for version in found}
    assert runs == {"1": first.run_id, "2": second.run_id}
    assert client.get_model_version_by_alias("model", ALIAS).run_id == second.run_id
    assert capsys.readouterr().err == ""
    with track(config, name="third", params={}) as third:
        assert third.register("model", alias=ALIAS) is None
        third.model("probe", write)
        assert third.register("a/b:c", alias=ALIAS) is None
        third.log({"accuracy": 0.5}, step=0)
    warnings = capsys.readouterr().err
    assert "warning: MLflow did not take the artifact as model model (the run has no model)" in warnings
    assert "warning: MLflow did not take the artifact as model a/b:c" in warnings
    assert client.get_run(third.run_id).data.metrics == {"accuracy": 0.5}, "the run goes on without it"


@pytest.mark.slow
def test_labels_choose_nothing(swept: Summary, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = run(
        f"{work.command} --out {work.folder}/blind --experiment blind".replace("/labelled", "/unlabelled"),
        monkeypatch,
    )
    assert values(blind) == values(swept)
    assert blind["chosen"]["name"] == swept["chosen"]["name"]
    assert blind["zero_shot"]["criteria"] == swept["zero_shot"]["criteria"]
    for name in ("probe.safetensors", "probe.json"):
        ours, theirs = ((work.folder / out / "probe" / name).read_bytes() for out in ("blind", "main"))
        if name == "probe.json":
            # The stores differ in their labels, and so in their names.
            ours, theirs = (json.dumps(json.loads(text)["temperature"]).encode() for text in (ours, theirs))
        assert ours == theirs
    assert {trial["accuracy"] for trial in blind["trials"]} == {None}
    assert blind["zero_shot"]["accuracy"] is None
    assert blind["chosen"]["accuracy"] is None
    assert blind["evidence"] is None
    assert blind["evaluated_on"]["setting"] is None
    (parent,), children = experiment_runs("blind")
    assert not [key for run in (parent, *children) for key in run.data.metrics if "accuracy" in key]
    assert not [key for key in parent.data.metrics if key.startswith("sweep_")]
    assert (
        "With labels, this picture would show accuracy" in (work.folder / "blind" / "report.html").read_text()
    )


@pytest.mark.slow
def test_the_winners_command_trains_the_same_probe(
    swept: Summary, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, job, *flags = shlex.split(swept["chosen"]["command"])
    assert (Path(program).name, job) == ("lpclip", "selftrain")
    place = flags.index("--out")
    assert flags[place + 1] == f"{work.folder}/main/again"
    flags[place + 1] = f"{work.folder}/again"
    again = run(shlex.join(["selftrain.py", *flags]), monkeypatch)
    assert again["rates"]["encode"] is None
    assert not (work.folder / "again" / "features").exists()
    assert again["prior"]["name"] == swept["prior"]["name"]
    probe, own = load_probe(f"{work.folder}/again/probe"), load_probe(f"{work.folder}/main/probe")
    for name in ("weight", "bias"):
        ours, theirs = getattr(probe, name), getattr(own, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert probe.temperature == pytest.approx(own.temperature, rel=1e-4)
    assert again["probe"]["accuracy"] == swept["chosen"]["accuracy"]


@pytest.mark.slow
def test_trials_know_the_names_that_have_images_and_the_winner_knows_all(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = WORDS.rpartition(",")[0]
    found = run(f"{work.command} --trials 1 --present {told} --out {work.folder}/told", monkeypatch)
    assert found["prior"]["absent"] == ["fire truck"]
    assert "4, of which 3 have images, as --present says" in (work.folder / "told/report.html").read_text()
    trained = read_classifier(str(work.folder / "told" / "trials"), "default")
    own = load_probe(f"{work.folder}/told/probe")
    assert (len(trained.weight), len(own.weight)) == (3, 4)
    flags = shlex.split(found["chosen"]["command"])[2:]
    flags[flags.index("--out") + 1] = f"{work.folder}/told-again"
    again = run(shlex.join(["selftrain.py", *flags]), monkeypatch)
    assert again["prior"]["absent"] == ["fire truck"]
    probe = load_probe(f"{work.folder}/told-again/probe")
    torch.testing.assert_close(probe.weight, own.weight, rtol=0, atol=1e-5 * float(own.weight.abs().max()))
    # Another number of threads rounds otherwise, and one image may lie between two classes.
    assert again["probe"]["accuracy"] == pytest.approx(found["chosen"]["accuracy"], abs=1.5 / ROWS)


@pytest.mark.slow
def test_the_same_command_on_a_finished_sweep_runs_no_trial(
    swept: Summary,
    work: Work,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = records(copy)
    for more in ("", "--resume"):
        again = run(f"{work.command} --out {copy} {more}", monkeypatch)
        stdout, stderr = capsys.readouterr()
        assert "trials: 6 of 6 and the default recipe are there already" in stdout
        assert not re.findall("^trial .*$", stderr, re.MULTILINE)
        assert records(copy) == before
        for key in ("trials", "zero_shot", "evidence"):
            assert again[key] == swept[key]
        # Its command names the folder and the experiment.
        assert {**again["chosen"], "command": None} == {**swept["chosen"], "command": None}


@pytest.mark.slow
def test_another_criterion_chooses_anew_among_the_same_trials(
    swept: Summary,
    work: Work,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = records(copy)
    for criterion in ("class_ami", "neighbours"):
        again = run(f"{work.command} --out {copy} --criterion {criterion}", monkeypatch)
        assert records(copy) == before
        expected = worth(swept, criterion)
        assert worth(again, criterion) == expected
        assert again["criterion"] == criterion
        assert again["chosen"]["name"] == max(expected, key=lambda name: expected[name])
        assert [trial["criterion"] for trial in again["trials"]] == [
            trial["criteria"][criterion] for trial in swept["trials"]
        ]
        assert not re.findall("^trial .*$", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.slow
def test_a_trial_whose_own_rounds_are_not_confirmed_is_not_chosen(
    swept: Summary, work: Work, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[SelfTrainingConfig]()

    def doubting(*args: Any, config: SelfTrainingConfig, **options: Any) -> ChosenPrior:
        asked.append(config)
        found = try_priors(*args, config=config, **options)
        assert found.trusted
        if len(asked) > 1:
            return found
        return replace(found, tried={found.name: replace(found.tried[found.name], kappa=0.0)})

    monkeypatch.setattr("lpclip.jobs.tune.try_priors", doubting)
    again = run(f"{work.command} --out {copy}", monkeypatch)
    first, second, *_ = sorted(worth(swept, "structure").items(), key=lambda item: -item[1])
    assert again["rejected"] == [first[0]]
    assert again["chosen"]["name"] == second[0]
    rows = {row["name"]: row["parameters"] for row in (swept["default"], *swept["trials"])}
    for config, (name, _) in zip(asked, (first, second), strict=True):
        assert config.threshold == rows[name]["threshold"], "with the trial's own settings"


@pytest.mark.slow
def test_more_trials_are_added_to_those_that_are_there(
    swept: Summary,
    work: Work,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = records(copy)
    more = run(f"{work.command} --trials 8 --out {copy} --experiment more", monkeypatch)
    assert len(re.findall("^trial [89] of 9: finished", capsys.readouterr().err, re.MULTILINE)) == 2
    after = records(copy)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 4
    assert len(more["trials"]) == 8
    for trial in swept["trials"]:
        (kept,) = [found for found in more["trials"] if found["name"] == trial["name"]]
        assert kept["criteria"] == trial["criteria"]
    parents, children = experiment_runs("more")
    assert (len(parents), len(children)) == (1, 9)
    fewer = run(f"{work.command} --trials 2 --out {copy}", monkeypatch)
    assert [trial["name"] for trial in fewer["trials"]] == sorted(
        trial_name(parameters)
        for parameters in draw_trials(read_space(f"{work.folder}/space.py"), count=2, seed=0)
    )
    assert records(copy) == after


def test_other_work_on_the_same_folder_is_refused(
    swept: Summary, work: Work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = work.folder / "main"
    before, summary = records(out), (out / "summary.json").read_bytes()
    other = work.space("other", '"threshold": tune.uniform(0.0, 0.5)')
    command = f"{work.command} --out {out}"
    for changed, difference in {
        command.replace(f"{work.folder}/space.py", str(other)): "space",
        command.replace("/labelled", "/unlabelled"): "features",
        f"{command} --seed 1 --views weak,mirror,strong": "seed",
        f"{command} --rounds 7": "training",
        f"{command} --templates simple": "head",
        f"{command} --scheduler asha": "search",
        f"{command} --search optuna": "search",
    }.items():
        message = refusal(changed, monkeypatch, capsys)
        if difference == "seed":  # it draws the strong views
            assert "labelled was made with another seed" in message
        else:
            assert f"{out} holds the results of other work (it differs in {difference})" in message
    assert records(out) == before
    assert (out / "summary.json").read_bytes() == summary


@pytest.mark.slow
def test_only_the_code_of_a_space_counts(
    swept: Summary,
    work: Work,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moved = work.folder / "moved.py"
    moved.write_text(f'"""My space."""\n{SPACE.replace(", ", ",  ")}# The end.\n')
    run(f"{work.command} --out {copy}".replace(f"{work.folder}/space.py", str(moved)), monkeypatch)
    assert "trials: 6 of 6 and the default recipe are there already" in capsys.readouterr().out


def test_there_must_be_something_to_resume(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(f"{work.command} --out {tmp_path}/empty --resume", monkeypatch, capsys)
    assert message == f"--resume: {tmp_path}/empty is not there, so there is no sweep to resume"


def wait_for_trials(process: subprocess.Popen[str], out: Path, *, count: int) -> None:
    """Until so many trials of a running sweep have their records."""
    deadline = time.monotonic() + 240
    while len(list((out / "trials").glob("*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_as_if_nothing_had_been(
    swept: Summary, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"{work.command} --concurrent 1 --out {tmp_path}/out --experiment killed"
    process = start(command, RAY_OVERRIDE_RESOURCES='{"CPU": 2}', OMP_NUM_THREADS="1")
    try:
        wait_for_trials(process, tmp_path / "out", count=2)
        below = descendants(process.pid)
        assert any("raylet" in title for title in below.values())
        for pid in (process.pid, *below):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it died with its parent
                continue
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = {name: found for name, found in records(tmp_path / "out").items() if name.endswith(".json")}
    assert 2 <= len(kept) < 7
    (parent,), _ = experiment_runs("killed")
    assert parent.info.status == "RUNNING"

    again = run(f"{command} --resume", monkeypatch)
    after = records(tmp_path / "out")
    assert {name: after[name] for name in kept} == kept
    assert sorted(name for name in after if name.endswith(".json")) == [
        f"{name}.json" for name in sorted(("default", *(trial["name"] for trial in swept["trials"])))
    ]
    assert values(again) == values(swept)
    for key in ("zero_shot", "evidence", "prior"):
        assert again[key] == swept[key]
    assert again["chosen"]["name"] == swept["chosen"]["name"]
    ours, theirs = (load_probe(f"{out}/probe") for out in (tmp_path / "out", work.folder / "main"))
    assert torch.equal(ours.weight, theirs.weight)

    client = MlflowClient()
    (found,), children = experiment_runs("killed", client)
    assert (found.info.run_id, found.info.status) == (parent.info.run_id, "FINISHED")
    rounds = {trial["name"][:6]: trial["rounds"] for trial in swept["trials"]}
    rounds["default"] = swept["default"]["rounds"]
    assert sorted(child.info.run_name.split()[0] for child in children) == sorted(rounds)
    for child in children:
        assert child.info.status == "FINISHED"
        steps = [m.step for m in client.get_metric_history(child.info.run_id, "rounds/flip_rate")]
        assert steps == list(range(1, rounds[child.info.run_name.split()[0]] + 1))
    assert len(client.search_model_versions(f"run_id='{parent.info.run_id}'")) == 1


class Killer(threading.Thread):
    """Kills the first processes of this cluster that run trials, as the system does when memory is short."""

    def __init__(self, number: int) -> None:
        super().__init__(daemon=True)
        self.killed: set[int] = set()
        self._number = number
        self._over = threading.Event()

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while len(self.killed) < self._number and not self._over.wait(0.05):
            for pid, title in descendants(os.getpid()).items():
                if "ImplicitFunc" in title and pid not in self.killed and len(self.killed) < self._number:
                    os.kill(pid, signal.SIGKILL)
                    self.killed.add(pid)


@pytest.mark.slow
def test_a_trial_whose_process_dies_twice_begins_again_when_the_others_are_over(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = work.space("two", '"threshold": tune.grid_search([0.0, 0.5]), "rounds": 6')
    # The default recipe is the first: it dies twice, and the next one once.
    with Killer(3) as killer:
        found = run(
            f"tune.py --space {space} --data {work.folder}/labelled --classes {WORDS} --prior weak --trials 2 "
            f"--concurrent 1 --out {work.folder}/murdered --experiment murdered",
            monkeypatch,
        )
    assert len(killer.killed) == 3
    assert {trial["status"] for trial in (found["default"], *found["trials"])} == {"finished"}
    _, children = experiment_runs("murdered")
    assert [child.data.tags["status"] for child in children] == 3 * ["finished"]


@pytest.mark.slow
def test_a_trial_whose_process_always_dies_has_failed_and_may_be_tried_again(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = work.space("one", '"threshold": tune.grid_search([0.5]), "rounds": 6')
    command = (
        f"tune.py --space {space} --data {work.folder}/labelled --classes {WORDS} --prior weak --trials 1 "
        f"--concurrent 1 --out {work.folder}/doomed --experiment doomed"
    )
    monkeypatch.setattr("lpclip.training.trials.PASSES", 1)
    with Killer(100) as killer:
        found = run(command, monkeypatch)
    assert len(killer.killed) == 4  # of two trials, twice
    failed = found["default"]
    assert [failed["status"], found["trials"][0]["status"]] == ["failed", "failed"]
    assert "died each time" in failed["error"]
    assert (failed["criterion"], failed["accuracy"], failed["criteria"]) == (None, None, {})
    assert found["chosen"]["name"] == "zero_shot"
    _, children = experiment_runs("doomed")
    assert {child.data.tags["status"] for child in children} == {"failed"}
    assert not list((work.folder / "doomed" / "trials").glob("*.json"))

    again = run(command, monkeypatch)
    assert [again["default"]["status"], again["trials"][0]["status"]] == ["finished", "finished"]


@pytest.fixture(scope="module")
def halved(work: Work) -> Summary:
    """A sweep in which asha stops what lags behind, and some trials find no label to learn from."""
    space = work.space(
        "halved",
        '"threshold": tune.grid_search([0.0, 0.4, 0.9999]), "temperature_factor": tune.uniform(2.0, 6.0), '
        '"neighbours": tune.choice([0, 10])',
    )
    with pytest.MonkeyPatch.context() as patch:
        return run(
            f"tune.py --space {space} --data {work.folder}/labelled --classes {WORDS} --prior weak --trials 9 "
            f"--scheduler asha --concurrent 1 --out {work.folder}/halved --experiment halved",
            patch,
        )


@pytest.mark.slow
def test_asha_stops_what_lags_behind_and_chooses_among_the_finished(halved: Summary, work: Work) -> None:
    by_status = {
        status: [trial for trial in halved["trials"] if trial["status"] == status]
        for status in ("finished", "stopped", "failed")
    }
    assert len(halved["trials"]) == 9
    assert by_status["stopped"]
    assert by_status["finished"]
    outcomes = read_records(f"{work.folder}/halved/trials")
    for trial in by_status["stopped"]:
        assert trial["rounds"] >= GRACE_ROUNDS
        assert (trial["criterion"], trial["accuracy"], trial["criteria"]) == (None, None, {})
        steps = [entry["round"] for entry in outcomes[trial["name"]].rounds]
        assert steps == list(range(1, trial["rounds"] + 1))
    assert halved["default"]["status"] == "finished", "nobody stops it"
    assert halved["chosen"]["name"] in {"default", *(trial["name"] for trial in by_status["finished"])}
    counts = {f"tune/trials_{status}": len(found) for status, found in by_status.items()}
    (parent,), children = experiment_runs("halved")
    assert {key: parent.data.metrics[key] for key in counts} == counts
    assert sorted(child.data.tags["status"] for child in children) == sorted(
        trial["status"] for trial in (halved["default"], *halved["trials"])
    )
    for child in children:
        assert child.info.status == OUTCOMES[child.data.tags["status"]]


@pytest.mark.slow
def test_a_trial_that_can_learn_nothing_fails_with_its_reason_and_the_others_go_on(
    halved: Summary, work: Work
) -> None:
    failed = [trial for trial in halved["trials"] if trial["parameters"]["threshold"] == 0.9999]
    assert len(failed) == 3
    for trial in failed:
        assert trial["status"] == "failed"
        assert "no pseudo-label has a confidence of at least 0.9999" in trial["error"]
        assert (trial["criterion"], trial["accuracy"]) == (None, None)
        assert (work.folder / "halved" / "trials" / f"{trial['name']}.json").exists()
    others = [trial for trial in halved["trials"] if trial not in failed]
    assert {trial["status"] for trial in others} <= {"finished", "stopped"}
    assert "3 failed" in (work.folder / "halved" / "report.html").read_text()
    _, children = experiment_runs("halved")
    told = [child.data.tags["error"] for child in children if child.data.tags["status"] == "failed"]
    assert sorted(told) == sorted(trial["error"] for trial in failed)


@pytest.mark.slow
def test_where_all_trials_fail_the_default_recipe_is_chosen(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = work.space("hopeless", '"threshold": tune.grid_search([0.9999]), "temperature_factor": 6.0')
    found = run(
        f"tune.py --space {space} --data {work.folder}/labelled --classes {WORDS} --prior weak --trials 5 "
        f"--out {work.folder}/hopeless",
        monkeypatch,
    )
    assert [trial["status"] for trial in found["trials"]] == ["failed"], "the space has no more"
    assert found["chosen"]["name"] == "default"
    assert "--prior weak" in found["chosen"]["command"]
    assert found["chosen"]["accuracy"] == found["default"]["accuracy"]
    own = read_classifier(f"{work.folder}/hopeless/trials", "default")
    assert torch.equal(load_probe(f"{work.folder}/hopeless/probe").weight, own.weight)


@pytest.mark.slow
def test_optuna_runs_as_many_trials_as_asked_for_and_goes_on_with_new_ones(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = work.space(
        "learnt",
        '"temperature_factor": tune.loguniform(0.5, 4.0), "threshold": tune.quniform(0.0, 0.6, 0.05), "rounds": 4',
    )
    command = (
        f"tune.py --space {space} --data {work.folder}/labelled --classes {WORDS} --prior weak --search optuna "
        f"--out {work.folder}/learnt"
    )
    first = run(f"{command} --trials 3 --experiment learnt", monkeypatch)
    before = records(work.folder / "learnt")
    assert [trial["status"] for trial in first["trials"]] == ["finished"] * 3
    assert len(before) == 8
    for trial in first["trials"]:
        assert set(trial["parameters"]) == {"temperature_factor", "threshold", "rounds"}
        assert trial["parameters"]["rounds"] == 4
        assert trial["rounds"] <= 5
    _, children = experiment_runs("learnt")
    assert sorted(child.data.params["rounds"] for child in children) == ["20", "4", "4", "4"]

    more = run(f"{command} --trials 6", monkeypatch)
    after = records(work.folder / "learnt")
    assert {name: after[name] for name in before} == before
    assert len(more["trials"]) == 6
    assert {trial["name"] for trial in first["trials"]} < {trial["name"] for trial in more["trials"]}
    assert {trial["status"] for trial in more["trials"]} == {"finished"}
    assert len(after) == 14


def wait_for_server(uri: str, process: subprocess.Popen[bytes]) -> None:
    """Until a server answers, on a busy machine as well."""
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{uri}/health", timeout=20).close()
            return
        time.sleep(0.2)


@pytest.mark.slow
def test_images_are_decoded_once_and_a_server_holds_the_sweep(
    work: Work,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = Path(shutil.copytree(photos, tmp_path / "drawn"))
    space = work.space("few", '"temperature_factor": tune.grid_search([0.5, 1.0, 2.0]), "rounds": 2')
    command = f"tune.py --space {space} --data {images} --views weak,mirror --prior weak --out {tmp_path}/out"
    (tmp_path / "server").mkdir()
    with (
        server(f"sqlite:///{tmp_path}/server/mlflow.db", tmp_path / "server") as (uri, process),
        monkeypatch.context() as patch,
    ):
        wait_for_server(uri, process)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        found = run(f"{command} --trials 2 --register shapes --experiment remote", patch)
        assert "warning" not in capsys.readouterr().err
        client = MlflowClient(uri)
        (parent,), children = experiment_runs("remote", client)
        assert (parent.info.run_id, parent.info.status) == (found["mlflow_run"], "FINISHED")
        assert parent.data.metrics["test/accuracy"] == found["chosen"]["accuracy"]
        assert len(children) == 3
        for child in children:
            history = client.get_metric_history(child.info.run_id, "rounds/flip_rate")
            assert [metric.step for metric in history] == list(range(1, len(history) + 1))
            assert history
        champion = client.get_model_version_by_alias("shapes", ALIAS)
        assert champion.run_id == parent.info.run_id
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=f"models:/shapes@{ALIAS}", tracking_uri=uri, dst_path=str(tmp_path / "downloaded")
        )
        assert Path(folder, "MLmodel").is_file()
        probe = load_probe(f"{folder}/data/lpclip/probe")
        assert torch.equal(probe.weight, load_probe(f"{tmp_path}/out/probe").weight)

    # From here on no picture can be decoded, and nothing tells that from outside.
    for path in images.glob("*/*.png"):
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").rglob("*")}
    again = run(f"{command} --trials 3", monkeypatch)
    assert len(again["trials"]) == 3
    assert again["features"] == found["features"]
    assert again["images"] == {"encoded": 30, "quarantined": 0}
    trained = run(
        f"selftrain.py --data {images} --views weak,mirror --prior weak --rounds 2 --out {tmp_path}/again "
        f"--features {tmp_path}/out/features",
        monkeypatch,
    )
    assert trained["rates"]["encode"] is None
    assert trained["features"]["train"] == found["features"]["train"]
    # The encoder's own temperature is a trial's as well.
    (own,) = [trial for trial in again["trials"] if trial["parameters"]["temperature_factor"] == 1]
    trial = read_classifier(f"{tmp_path}/out/trials", own["name"])
    weight, bias = trial.weight, trial.bias
    probe = load_probe(f"{tmp_path}/again/probe")
    torch.testing.assert_close(probe.weight, weight, rtol=0, atol=1e-5 * float(weight.abs().max()))
    torch.testing.assert_close(probe.bias, bias, rtol=0, atol=1e-5 * float(bias.abs().max()))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "features").rglob("*")} == made


SWEEP = """
import sys
from lpclip.config import TrackingConfig
from lpclip.jobs.mlflow_model import LOADER
from lpclip.jobs.tracking import track
driver = sys.argv[1]
config = TrackingConfig(experiment="crowd")
with track(config, name=driver, params={"driver": driver}, resume_key=f"tune {driver}") as parent:
    for number in range(4):
        options = {"resume_key": f"tune {driver} {number}", "parent": parent}
        with track(config, name=f"{driver}{number}", params={"number": number}, **options) as run:
            for step in range(1, 11):
                run.log({f"m{i}": int(driver) * 1000 + number * 100 + step + i / 10 for i in range(6)}, step=step)
    parent.log({"trials": 4})
"""


@pytest.mark.slow
def test_four_sweeps_at_once_share_one_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def drive(driver: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", SWEEP, str(driver)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri},
            capture_output=True,
            text=True,
            timeout=300,
        )

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(drive, range(4)))
    assert [(end.returncode, end.stdout, end.stderr) for end in ends] == [(0, "", "")] * 4
    client = MlflowClient(uri)
    parents, children = experiment_runs("crowd", client)
    assert sorted(parent.info.run_name for parent in parents) == list("0123")
    assert all(parent.data.metrics == {"trials": 4} for parent in parents)
    assert sorted(child.info.run_name for child in children) == [
        f"{d}{n}" for d in range(4) for n in range(4)
    ]
    names = {parent.info.run_id: parent.info.run_name for parent in parents}
    for one in (*parents, *children):
        assert one.info.status == "FINISHED"
    for child in children:
        driver, number = map(int, child.info.run_name)
        assert names[child.data.tags["mlflow.parentRunId"]] == str(driver)
        assert child.data.params == {"number": str(number)}
        for i in range(6):
            assert [(m.step, m.value) for m in client.get_metric_history(child.info.run_id, f"m{i}")] == [
                (step, driver * 1000 + number * 100 + step + i / 10) for step in range(1, 11)
            ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--trials 0", "--trials must be at least 1, not 0"),
        ("--trials -3", "--trials must be at least 1, not -3"),
        ("--concurrent 0", "--concurrent must be at least 1, not 0"),
        ("--space {here}/none.py", "--space {here}/none.py cannot be read"),
        ("--space {here}", "--space {here} cannot be read"),
        ("--space {here}/unknown.py", "unknown.py names learning_rate, which the training does not have"),
        ("--space {here}/nothing.py", "--space {here}/nothing.py is empty"),
        ("--space {here}/fixed.py", "--space {here}/fixed.py is empty"),
        ("--space {here}/missing.py", "missing.py has no SPACE"),
        ("--space {here}/high.py", "--threshold must be at least 0 and below 1, not 1.4"),
        ("--space {here}/cold.py", "temperature_factor the value -1.0: it must be above 0"),
        ("--space {here}/wrong.py", "gives rounds the value 'many', which it cannot have"),
        ("--space {here}/broken.py", "broken.py does not run: ModuleNotFoundError: No module named 'no_such_module'"),
        ("--space {here}/syntax.py", "syntax.py does not run: SyntaxError"),
        ("--space {here}/both.py", "both.py has both temperature and temperature_factor"),
        ("--space {here}/prior.py", "--prior {here}/nowhere.txt is none of auto, uniform, weak, none, nor a text"),
        ("--space {here}/grid.py --search optuna", "--search optuna draws values itself, and cannot draw"),
        ("--threshold 1", "--threshold must be at least 0 and below 1"),
        ("--views blurry", "blurry"),
        ("--data {here}/nowhere", "{here}/nowhere: no such path"),
        ("--eval-data {here}/nowhere", "{here}/nowhere: no such path"),
        ("--limit 5", "--limit works on images"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused_in_a_sentence(
    flags: str,
    message: str,
    work: Work,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in {
        "unknown": 'SPACE = {"learning_rate": tune.uniform(0.0, 1.0), "rounds": tune.randint(1, 4)}',
        "nothing": "SPACE = {}",
        "fixed": 'SPACE = {"rounds": 5}',
        "missing": 'space = {"rounds": tune.randint(1, 4)}',
        "high": 'SPACE = {"threshold": tune.choice([0.5, 1.4])}',
        "cold": 'SPACE = {"temperature_factor": tune.uniform(-1.0, 1.0)}',
        "wrong": 'SPACE = {"rounds": tune.choice([3, "many"])}',
        "broken": "import no_such_module",
        "syntax": "SPACE = {",
        "both": 'SPACE = {"temperature": tune.uniform(0.1, 1.0), "temperature_factor": 1.0}',
        "prior": f'SPACE = {{"prior": tune.choice(["weak", "{tmp_path}/nowhere.txt"])}}',
        "grid": 'SPACE = {"rounds": tune.grid_search([1, 2])}',
    }.items():
        (tmp_path / f"{name}.py").write_text(f"from ray import tune\n\n{text}\n")
    line = refusal(
        f"{work.command} --out {tmp_path}/out {flags}".format(here=tmp_path, work=work.folder),
        monkeypatch,
        capsys,
    )
    assert message.format(here=tmp_path) in line
    assert not (tmp_path / "out" / "job.json").exists(), "what is refused claims no folder"


def test_a_criterion_that_is_none_is_a_wrong_flag(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(f"{work.command} --out {tmp_path}/out --criterion nonsense", monkeypatch)
    assert stop.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    for criterion in CRITERIA:
        assert criterion in text
    assert not (tmp_path / "out").exists()
