"""`import lpclip`: light to import, the selftrain job's results in this process, clear about arrays it cannot use."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, Training, draw
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

import lpclip
from lpclip.config import EncoderConfig
from lpclip.encoders.head import make_head
from lpclip.encoders.prompts import templates
from lpclip.features.describe import describe_encoder
from lpclip.method import chance
from lpclip.method.neighbours import comparison_dtype

ROOT = Path(__file__).parent.parent
NUM_CLASSES, DIM = 4, 16


def planted(num_rows: int = 400, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, lpclip.Head]:
    """Unit-norm features around class directions, their classes, and a head that has the directions roughly right."""
    rng = np.random.default_rng(seed)
    means = unit(rng.normal(size=(NUM_CLASSES, DIM)))
    labels = np.sort(rng.integers(NUM_CLASSES, size=num_rows))
    features = unit(means[labels] + 0.3 * rng.normal(size=(num_rows, DIM)))
    weight = unit(means + 0.25 * rng.normal(size=means.shape)).astype(np.float32)
    names = tuple(f"class {place}" for place in range(NUM_CLASSES))
    return (
        features.astype(np.float16),
        labels,
        lpclip.Head(class_names=names, weight=weight, temperature=0.05),
    )


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def plain(one_thread: None) -> lpclip.SelfTraining:
    """The training on `planted()` with nothing but defaults."""
    features, _, head = planted()
    return lpclip.fit(features, head)


def assert_equal(found: lpclip.Probe, expected: lpclip.Probe) -> None:
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)
    assert found.temperature == expected.temperature


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize(("before", "after"), [("", "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_leave_the_cpu_to_others(before: str, after: str) -> None:
    own = f"os.environ['OMP_WAIT_POLICY'] = '{before}'" if before else "del os.environ['OMP_WAIT_POLICY']"
    assert python(f"import os; {own}; import lpclip; print(os.environ['OMP_WAIT_POLICY'])") == f"{after}\n"


def test_the_import_loads_nothing_heavy() -> None:
    loaded = set(python("import sys, lpclip; print(*sys.modules)").split())
    assert "lpclip" in loaded
    heavy = {"torch", "ray", "mlflow", "numpy", "pyarrow", "sklearn", "matplotlib", "typing"}
    assert not loaded & heavy


def test_each_name_is_imported_when_it_is_used() -> None:
    code = "import sys, lpclip; lpclip.SelfTrainingConfig(rounds=3); print(*sys.modules)"
    loaded = set(python(code).split())
    assert "lpclip.config" in loaded
    assert not loaded & {"torch", "numpy", "ray"}


@pytest.mark.slow
def test_training_and_evaluating_need_neither_ray_nor_mlflow() -> None:
    code = f"import sys, lpclip; [getattr(lpclip, n) for n in {lpclip.__all__}]; print(*sys.modules)"
    loaded = set(python(code).split())
    assert "torch" in loaded
    assert not loaded & {"ray", "mlflow"}


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    assert set(lpclip.__all__) <= set(dir(lpclip))
    for name in lpclip.__all__:
        assert getattr(lpclip, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lpclip.nothing  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(lpclip.__file__).parent / "py.typed").exists()


@pytest.mark.usefixtures("one_thread")
def test_a_probe_trained_without_labels_beats_zero_shot(plain: lpclip.SelfTraining) -> None:
    features, labels, head = planted()
    lines: list[str] = []
    found = lpclip.fit(features, head, tell=lines.append)
    assert found.trusted
    better, before = (
        lpclip.evaluate(p, features, labels)["accuracy"] for p in (found.probe, found.zero_shot)
    )
    assert better is not None
    assert before is not None
    assert better > before + 0.01
    assert found.probe.class_names == head.class_names
    assert found.probe.summary["method"] == "self-trained"
    assert [state.round for state in found.rounds] == list(range(1, len(found.rounds) + 1))
    assert sum(line.startswith("round ") for line in lines) == len(found.rounds)
    assert_equal(plain.probe, found.probe)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rounds", [1, 50])
def test_the_last_student_is_told_as_what_it_is_and_not_as_a_round(rounds: int) -> None:
    features, _, head = planted()
    lines: list[str] = []
    config = lpclip.SelfTrainingConfig(rounds=rounds)
    found = lpclip.fit(features, head, strong=[features], config=config, tell=lines.append)
    told = [line.partition(":")[0] for line in lines if line.startswith(("round ", "last "))]
    numbers = range(1, len(found.rounds))
    assert told == [*(f"round {number}" for number in numbers), "last student, with the strong views"]


@pytest.mark.usefixtures("one_thread")
def test_pseudo_labels_come_in_the_order_of_the_features(plain: lpclip.SelfTraining) -> None:
    features, labels, _ = planted()
    assert (plain.labels == labels).mean() > 0.9
    assert plain.labels.dtype == np.int32
    assert plain.confidence.shape == plain.kept.shape == (len(features),)


@pytest.mark.usefixtures("one_thread")
def test_the_order_of_rows_does_not_matter() -> None:
    features, _, head = planted()
    strong = features[:, ::-1].copy()
    order = np.random.default_rng(1).permutation(len(features))
    found = lpclip.fit(features, head, strong=[strong])
    shuffled = lpclip.fit(features[order], head, strong=[strong[order]])
    assert_equal(shuffled.probe, found.probe)
    assert (shuffled.labels == found.labels[order]).all()
    assert (shuffled.confidence == found.confidence[order]).all()


@pytest.mark.usefixtures("one_thread")
def test_strong_views_and_class_shares_are_used(plain: lpclip.SelfTraining) -> None:
    features, labels, head = planted()
    viewed = lpclip.fit(features, head, strong=[unit(features + 0.1).astype(np.float16)])
    assert len(viewed.rounds) == len(plain.rounds) + 1
    shares = np.bincount(labels) / len(labels)
    known = lpclip.fit(features, head, shares=shares)
    assert known.prior.name == "shares"
    np.testing.assert_allclose(known.prior.prior.shares, shares)
    assert not torch.equal(known.probe.bias, plain.probe.bias)


@pytest.mark.usefixtures("one_thread")
def test_a_teachers_temperature_leaves_the_probes_calibration_alone(plain: lpclip.SelfTraining) -> None:
    features, _, head = planted()
    sharp = lpclip.fit(features, head, config=lpclip.SelfTrainingConfig(temperature=0.01))
    assert_equal(sharp.zero_shot, plain.zero_shot)
    assert not torch.equal(sharp.rounds[0].weight, plain.rounds[0].weight)
    confidence = [
        float(probe.probabilities(features).amax(dim=1).mean()) for probe in (sharp.probe, plain.probe)
    ]
    assert confidence[0] == pytest.approx(confidence[1], abs=0.01), (
        "both as sure as the encoder's own temperature says"
    )


@pytest.mark.usefixtures("one_thread")
def test_with_names_that_mean_nothing_the_probe_is_zero_shot() -> None:
    features, _, head = planted()
    head = replace(head, weight=chance.random_head(torch.from_numpy(head.weight), seed=50).numpy())
    lines: list[str] = []
    found = lpclip.fit(features, head, config=lpclip.SelfTrainingConfig(temperature=1.0), tell=lines.append)
    assert not found.trusted
    assert any("the probe will be zero-shot" in line for line in lines)
    assert_equal(found.probe, found.zero_shot)
    torch.testing.assert_close(found.probe.weight, torch.from_numpy(head.weight) / head.temperature)
    assert found.probe.summary["method"] == "zero-shot (fallback)"
    assert (found.labels == found.probe.logits(features).argmax(dim=1).numpy()).all()
    assert found.kept.all()


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to rounding. Where neighbours are compared in bfloat16, rounding makes others of some."""
    atol = 1e-3 if comparison_dtype() == torch.float32 else 0.01 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_types_give_the_same_probe_up_to_rounding(dtype: type, plain: lpclip.SelfTraining) -> None:
    features, _, head = planted()
    half, other = plain.probe, lpclip.self_train(features.astype(dtype), head)
    assert_alike(other.weight, half.weight)
    # The folds of the temperature are cut in the order of the rows' bytes, which are others.
    confidence = [float(probe.probabilities(features).amax(dim=1).mean()) for probe in (half, other)]
    assert confidence[0] == pytest.approx(confidence[1], abs=0.01)


def damaged(place: int, value: float) -> np.ndarray:
    features = planted()[0]
    features[place, 3] = value
    return features


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"features": damaged(17, np.nan)}, "features hold a NaN or an infinite value in row 17"),
    "infinite": ({"features": damaged(399, np.inf)}, "infinite value in row 399"),
    "norm": ({"features": damaged(5, 3)}, "unit norm, and row 5 has norm 3"),
    "zero": ({"features": np.zeros((5, DIM), np.float32)}, "row 0 has norm 0"),
    "integers": ({"features": np.ones((5, DIM), np.uint8)}, "must be float16, float32 or float64, not uint8"),
    "one image": ({"features": planted()[0][0]}, r"shape \(N, d\) with at least one row, not \(16,\)"),
    "no image": ({"features": planted()[0][:0]}, r"not \(0, 16\)"),
    "other encoder": ({"features": unit(np.ones((5, 8)))}, "8 dimensions and the zero-shot head has 16"),
    "views": ({"strong": [planted()[0][1:]]}, "as many rows as the features: 400"),
    "view": ({"strong": [damaged(17, np.nan)]}, "strong views hold a NaN or an infinite value in row 17"),
    "names": ({"head": replace(planted()[2], class_names=("one",))}, "1 class name and 4 rows of weights"),
    "weights": (
        {"head": replace(planted()[2], weight=np.ones((4, DIM)))},
        "the head's weights must have rows of",
    ),
    "temperature": ({"head": replace(planted()[2], temperature=0.0)}, "temperature must be above 0"),
    "config": ({"config": lpclip.SelfTrainingConfig(rounds=0)}, "--rounds must be at least 1"),
    "prior": (
        {"config": lpclip.SelfTrainingConfig(prior="shares.txt")},
        "give the classes' shares as shares=",
    ),
    "shares": ({"shares": [0.5, 0.5]}, "2 weights for 4 classes"),
    "no share": ({"shares": [0.5, 0.5, 0, 0]}, "must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_a_sentence(name: str) -> None:
    features, _, head = planted()
    arguments, message = REFUSED[name]
    with pytest.raises(lpclip.UserError, match=message):
        lpclip.self_train(**{"features": features, "head": head} | arguments)


@pytest.mark.usefixtures("one_thread")
def test_the_api_gives_the_jobs_probe_on_the_same_features(blind: Training, tmp_path: Path) -> None:
    folder, summary = blind.out, blind.summary
    head = lpclip.zero_shot_head(CLASSES, device="cpu")
    features = lpclip.Store.open(summary["features"]["train"]).features()
    found = lpclip.fit(features, head)
    assert found.trusted
    assert_equal(found.probe, lpclip.Probe.load(str(folder / "probe")))
    assert_equal(found.zero_shot, lpclip.Probe.load(str(folder / "zero_shot")))
    found.probe.save(str(tmp_path / "probe"))
    saved, expected = (json.loads((path / "probe/probe.json").read_text()) for path in (tmp_path, folder))
    assert saved == expected, "with all that predict.py needs to encode images"
    table = pq.read_table(folder / "pseudo_labels.parquet")
    assert table["id"].to_pylist() == features.ids.tolist()
    for name in ("label", "confidence", "kept"):
        assert table[name].to_pylist() == getattr(found, {"label": "labels"}.get(name, name)).tolist()
    assert [(state.round, state.metrics) for state in found.rounds] == [
        (entry["round"], {key: value for key, value in entry.items() if key not in ("round", "accuracy")})
        for entry in summary["rounds"]
    ]
    assert found.prior.summary(head.class_names) == summary["prior"]
    other = replace(
        head, encoder=head.encoder | {"identity": head.encoder["identity"] | {"precision": "float16"}}
    )
    with pytest.raises(lpclip.UserError, match="another encoder made the features .* differ in precision"):
        lpclip.fit(features, other)


@pytest.mark.usefixtures("cluster", "lite_map")
def test_the_zero_shot_head_is_that_of_the_jobs() -> None:
    head = lpclip.zero_shot_head(CLASSES, templates="simple", device="cpu")
    info = describe_encoder(EncoderConfig(), class_names=CLASSES, templates=templates("simple"))
    expected = make_head(info, CLASSES, temperature=None)
    assert (head.weight == expected.weight).all()
    assert (head.temperature, head.identity) == (expected.temperature, expected.identity)
    assert head.encoder["identity"] == info.identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ["dog"]}, "two or more different class names, not dog"),
        ({"class_names": "dog"}, "two or more different class names, not dog"),
        ({"class_names": ["dog", "dog"]}, "different class names, not dog, dog"),
        ({"class_names": ["dog", "cat"], "templates": ["a photo"]}, "needs {} for the class name"),
        ({"class_names": ["dog", "cat"], "templates": []}, "there must be one"),
        ({"class_names": ["dog", "cat"], "pretrained": "x"}, "carries its own weights"),
    ],
)
def test_a_zero_shot_head_needs_names_and_prompts(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(lpclip.UserError, match=message):
        lpclip.zero_shot_head(**arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_pages_examples_run_and_give_the_jobs_probe(
    blind: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(blind.summary["features"]["train"], tmp_path / "runs/selftrain/features/photos")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(draw(1, 7))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    out = capsys.readouterr().out
    assert "row 0 has norm 3" in out
    assert "not an image that can be decoded" in out
    assert len(names["answer"].labels) == 2
    assert names["after"]["accuracy"] > names["before"]["accuracy"]
    assert_equal(lpclip.Probe.load("runs/notebook/probe"), lpclip.Probe.load(str(blind.out / "probe")))
    assert set(re.findall(r"^\| `(\w+)", text, re.MULTILINE)) | {"SelfTraining", "__version__"} == set(
        lpclip.__all__
    )


def random_head(dim: int) -> lpclip.Head:
    weight = unit(np.random.default_rng(dim).normal(size=(2, dim))).astype(np.float32)
    return lpclip.Head(class_names=("one", "other"), weight=weight, temperature=0.1)


class OnAnyWidth(lpclip.SelfTrainedProbe):
    """scikit-learn's checks come with features of many widths: a head of random directions for each."""

    def fit(self, X: Any, y: Any = None) -> OnAnyWidth:
        given = self.head
        shape = X.shape if hasattr(X, "shape") else np.asarray(X).shape
        self.head = random_head(shape[1] if len(shape) == 2 else 1)
        try:
            return super().fit(X, y)
        finally:
            self.head = given


IGNORES_Y = "labels are ignored: classes come from the head"
NOT_APPLICABLE = {
    "check_classifiers_one_label": IGNORES_Y,
    "check_classifiers_classes": IGNORES_Y,
    "check_classifiers_train": IGNORES_Y,
    "check_classifiers_regression_target": IGNORES_Y,
    "check_supervised_y_no_nan": IGNORES_Y,
    "check_supervised_y_2d": IGNORES_Y,
    "check_estimators_dtypes": "a row of zeros has no direction and is refused",
}


@pytest.mark.usefixtures("one_thread")
def test_the_estimator_passes_scikit_learns_checks() -> None:
    config = lpclip.SelfTrainingConfig(prior="none", rounds=2)
    results = check_estimator(
        OnAnyWidth(random_head(2), config=config), expected_failed_checks=NOT_APPLICABLE, on_skip=None
    )
    status = {(found["check_name"], found["status"]) for found in results}
    assert {name for name, found in status if found == "xfail"} == set(NOT_APPLICABLE), (
        "each is listed for a reason"
    )
    assert sum(found == "passed" for _, found in status) >= 40


def test_the_estimator_is_the_probe(plain: lpclip.SelfTraining) -> None:
    features, labels, head = planted()
    model = clone(lpclip.SelfTrainedProbe(head)).fit(3 * features.astype(np.float32))
    assert_alike(model.probe_.weight, plain.probe.weight)
    assert (model.predict(features) == plain.probe.predict(features)).mean() > 0.99
    assert model.score(features, labels) == pytest.approx(
        lpclip.evaluate(plain.probe, features, labels)["accuracy"], abs=0.01
    )
    assert (model.decision_function(features).argmax(axis=1) == model.predict(features)).all()
    assert set(model.get_params()) == {"head", "config", "shares"}
