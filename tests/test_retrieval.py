"""Ranks as a plain program finds them, and the job from pairs to a table."""

from __future__ import annotations

import bisect
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, draw, refusal, run

from lpclip.config import EncoderConfig, ModelConfig, to_dict
from lpclip.encoders.load import load_encoder
from lpclip.encoders.open_clip import load_trainable
from lpclip.evaluation.bootstrap import mean_interval
from lpclip.evaluation.ranking import ranks, recall_intervals, retrieval_metrics
from lpclip.features.describe import describe_encoder
from lpclip.features.store import Store
from lpclip.features.texts import encode_texts, read_pairs
from lpclip.method.probe import Probe
from lpclip.training.contrastive import WEIGHTS, save_model

DIRECTIONS = ("image_to_text", "text_to_image")
NAMES = ("recall_1", "recall_5", "recall_10", "median_rank")


def plain_rank(scores: list[float], own: set[int]) -> float:
    """The mean of the places that the best own candidate may take in a sorted list of the foreign ones."""
    best = max(scores[place] for place in own)
    falling = sorted(-score for place, score in enumerate(scores) if place not in own)
    first, last = bisect.bisect_left(falling, -best), bisect.bisect_right(falling, -best)
    places = range(first + 1, last + 2)
    return sum(places) / len(places)


def plain_metrics(
    images: np.ndarray, texts: np.ndarray, pairs: list[tuple[int, int]]
) -> dict[str, dict[str, float]]:
    """`retrieval_metrics` in plain Python."""
    found = {}
    for direction, queries, candidates in zip(DIRECTIONS, (images, texts), (texts, images), strict=True):
        oriented = pairs if direction == "image_to_text" else [(text, image) for image, text in pairs]
        places = []
        for number, query in enumerate(queries.astype(float).tolist()):
            scores = [sum(a * b for a, b in zip(query, other, strict=True)) for other in candidates.tolist()]
            places.append(plain_rank(scores, {own for owner, own in oriented if owner == number}))
        places.sort()
        shares = [sum(place <= k for place in places) / len(places) for k in (1, 5, 10)]
        middle = (places[(len(places) - 1) // 2] + places[len(places) // 2]) / 2
        found[direction] = dict(zip(NAMES, (*shares, middle), strict=True))
    return found


def random_case(seed: int, *, num_images: int, num_texts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features in steps of a half, whose scores are exact and often the same, and pairs (P, 2) in any order."""
    random = np.random.default_rng(seed)
    images, texts = (random.integers(-2, 3, (count, 3)) / 2 for count in (num_images, num_texts))
    pairs = {(image, int(random.integers(num_texts))) for image in range(num_images)}
    pairs |= {(int(random.integers(num_images)), text) for text in range(num_texts)}
    return images.astype(np.float16), texts.astype(np.float32), random.permutation(sorted(pairs))


CASES = [(12, 30), (30, 12), (25, 25), (3, 4), (1, 6), (1, 1)]


@pytest.mark.parametrize(("num_images", "num_texts"), CASES)
@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_those_of_a_plain_program(seed: int, num_images: int, num_texts: int) -> None:
    images, texts, pairs = random_case(seed, num_images=num_images, num_texts=num_texts)
    found = retrieval_metrics(images, texts, image_index=pairs[:, 0], text_index=pairs[:, 1])
    expected = plain_metrics(images, texts, [(int(i), int(t)) for i, t in pairs])
    for direction in DIRECTIONS:
        assert found.directions()[direction].numbers() == pytest.approx(expected[direction], abs=1e-12)


def test_the_random_cases_have_whatever_is_hard() -> None:
    images, texts, pairs = random_case(0, num_images=25, num_texts=25)
    for column in (0, 1):
        assert np.bincount(pairs[:, column]).max() > 1, (
            "an image has several texts, and a text several images"
        )
    scores = images.astype(np.float32) @ texts.T
    assert len(np.unique(scores)) < scores.size / 4
    for number, place in enumerate(
        ranks(images, texts, query_index=pairs[:, 0], candidate_index=pairs[:, 1])
    ):
        if place % 1:
            best = scores[number, pairs[pairs[:, 0] == number, 1]].max()
            assert (scores[number] == best).sum() > 1
            return
    pytest.fail("no tie between an own and a foreign candidate")


def test_ranks_that_are_known() -> None:
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [0, 1, 0], [0, 0.5, 1], [0, 1, 0.25]], np.float32)
    # The second image's text ties with a foreign one. Of the third's two the better one counts: one text is above it.
    own = {"query_index": np.array([2, 0, 1, 2]), "candidate_index": np.array([0, 0, 1, 3])}
    assert ranks(images, texts, **own).tolist() == [1, 1.5, 2]
    # A tie of a query's own candidates is none. The third's worst text shares its score with a foreign one.
    own = {"query_index": np.array([2, 0, 1, 1]), "candidate_index": np.array([0, 0, 1, 3])}
    assert ranks(images, texts, **own).tolist() == [1, 1, 3.5]


def test_identical_features_have_the_middle_of_all_ranks() -> None:
    same = np.ones((9, 4), np.float32)
    each = np.arange(9)
    found = retrieval_metrics(same, same, image_index=each, text_index=each)
    for direction in DIRECTIONS:
        assert found.directions()[direction].numbers() == {
            "recall_1": 0,
            "recall_5": 1,
            "recall_10": 1,
            "median_rank": 5,
        }


def test_what_belongs_together_is_found_and_what_is_turned_round_is_last() -> None:
    images = np.eye(12, dtype=np.float32)
    each = np.arange(12)
    right = {"recall_1": 1, "recall_5": 1, "recall_10": 1, "median_rank": 1}
    wrong = {"recall_1": 0, "recall_5": 0, "recall_10": 0, "median_rank": 12}
    for texts, expected in ((images, right), (-images, wrong)):
        found = retrieval_metrics(images, texts, image_index=each, text_index=each)
        # All queries alike: whatever is drawn.
        intervals = {name: [expected[name]] * 2 for name in NAMES[:3]}
        written = {name: direction.to_json() for name, direction in found.directions().items()}
        assert written == {key: {**expected, "intervals": intervals} for key in DIRECTIONS}


def test_intervals_are_those_of_a_mean_where_each_image_has_one_text() -> None:
    hits = np.random.default_rng(0).random((60, 3)) < [0.2, 0.5, 0.9]
    found = recall_intervals(hits, drawn_with=np.arange(60), num_images=60)
    np.testing.assert_allclose(found, mean_interval(torch.from_numpy(hits).double()), atol=1e-6)
    assert (found[0] < hits.mean(axis=0)).all()
    assert (found[1] > hits.mean(axis=0)).all()


def test_texts_of_one_image_are_drawn_together() -> None:
    hits = np.random.default_rng(0).random((60, 1)) < 0.5
    once = recall_intervals(hits, drawn_with=np.arange(60), num_images=60)
    # Five texts of an image that say the same tell no more than one.
    five = recall_intervals(hits.repeat(5, axis=0), drawn_with=np.arange(60).repeat(5), num_images=60)
    np.testing.assert_allclose(five, once, atol=1e-12)
    # Images without a text of their own, as all but one here, are drawn without effect.
    alone = recall_intervals(hits[:2], drawn_with=np.array([7, 7]), num_images=60)
    assert alone.tolist() == [[hits[:2].mean()]] * 2


def without_intervals(direction: dict[str, Any]) -> dict[str, float]:
    return {name: direction[name] for name in NAMES}


@pytest.mark.parametrize("max_scores", [1, 26, 60, 149, 1 << 24])
def test_the_number_of_scores_at_once_changes_nothing(max_scores: int) -> None:
    images, texts, pairs = random_case(7, num_images=23, num_texts=13)
    own = {"query_index": pairs[:, 0], "candidate_index": pairs[:, 1]}
    steps: list[int] = []
    found = ranks(images, texts, **own, max_scores=max_scores, advance=steps.append)
    assert np.array_equal(found, ranks(images, texts, **own))
    assert sum(steps) == 23
    assert max(steps) == min(23, max(1, max_scores // 13))


@pytest.mark.parametrize("place", ["images", "texts"])
def test_damaged_features_have_no_ranks(place: str) -> None:
    features = {name: np.eye(3, dtype=np.float32) for name in ("images", "texts")}
    features[place][1, 1] = np.nan
    with pytest.raises(ValueError, match="features that are NaN or infinite have no ranks"):
        retrieval_metrics(**features, image_index=np.arange(3), text_index=np.arange(3))


@dataclass(frozen=True)
class Work:
    """Pairs of which one has no text and some share one, an encoder, and runs with shared features."""

    folder: Path
    pairs: Path
    encoder: str
    captions: dict[str, list[str]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("retrieval")
    captions = {f"pair-{i}": [f"a {CLASSES[i % 3]}", f"number {i} of {CLASSES[i % 3]}"] for i in range(40)}
    captions["pair-7"], captions["pair-8"] = [], ["a stop sign", " a stop sign "]
    table = pa.table(
        {
            "id": list(captions),
            "image": [draw(i % 3, i) for i in range(40)],
            "words": list(captions.values()),
        }
    )
    pq.write_table(table, folder / "pairs.parquet")
    (folder / "model").mkdir()
    save_model(str(folder / "model"), load_trainable(ModelConfig(encoder="tiny-vit-32"), seed=3))
    encoder = f"--encoder tiny-vit-32 --pretrained {folder}/model/{WEIGHTS}"
    return Work(folder=folder, pairs=folder / "pairs.parquet", encoder=encoder, captions=captions)


def recomputed(entry: dict[str, Any], config: EncoderConfig) -> dict[str, dict[str, float]]:
    """The metrics of a set in plain Python, from the features and texts that lie in its store."""
    (path,) = entry["stores"]
    table = pa.concat_tables([pq.read_table(part) for part in sorted(Path(path).glob("part-*.parquet"))])
    images = np.mean([np.array(table[view].to_pylist(), np.float32) for view in entry["views"]], axis=0)
    if len(entry["views"]) > 1:
        images = (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float16)
    texts = sorted({text for texts in table["texts"].to_pylist() for text in texts})
    pairs = [(i, texts.index(t)) for i, ts in enumerate(table["texts"].to_pylist()) for t in ts]
    encoder = load_encoder(config)
    return plain_metrics(images, encoder.encode_text(texts).numpy(), pairs)


@pytest.fixture(scope="module")
def alone(cluster: None, work: Work) -> dict[str, Any]:
    """The summary of retrieval without a probe."""
    command = f"evaluate.py {work.encoder} --retrieval small={work.pairs} --text-column words --out {work.folder}/alone"
    with pytest.MonkeyPatch.context() as patch:
        return run(command, patch)


def test_an_encoder_is_measured_without_a_probe(alone: dict[str, Any], work: Work) -> None:
    (entry,) = alone["retrieval"]
    texts = {text.strip() for texts in work.captions.values() for text in texts}
    assert (entry["set"], entry["data"], entry["views"]) == ("small", f"{work.folder.name}-pairs", ["weak"])
    counts = [entry[key] for key in ("images", "texts", "pairs", "quarantined")]
    assert counts == [39, len(texts), 2 * 38 + 2, 1]
    quarantine = pq.read_table(Path(entry["stores"][0]) / "quarantine.parquet").to_pylist()
    assert [(row["id"], row["error"]) for row in quarantine] == [("pair-7", "no text")]
    assert json.loads((work.folder / "alone" / "summary.json").read_text()) == alone
    expected = recomputed(
        entry, EncoderConfig(encoder="tiny-vit-32", pretrained=f"{work.folder}/model/{WEIGHTS}")
    )
    for direction in DIRECTIONS:
        # Another order of sums may turn two neighbours round.
        found = without_intervals(entry[direction])
        assert found == pytest.approx(without_intervals(expected[direction]), abs=0.03, rel=0.03)


def test_texts_are_read_in_the_order_of_the_images(alone: dict[str, Any], work: Work) -> None:
    (entry,) = alone["retrieval"]
    texts, image_index, text_index = read_pairs(Store.open(entry["stores"][0]))
    ids = Store.open(entry["stores"][0]).features().ids
    assert len(set(texts)) == len(texts) == entry["texts"]
    found: dict[str, list[str]] = {name: [] for name in ids}
    for image, text in zip(image_index, text_index, strict=True):
        found[ids[image]].append(texts[text])
    assert found == {name: [t.strip() for t in texts] for name, texts in work.captions.items() if texts}


def test_the_metrics_are_in_mlflow(alone: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    logged = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(alone["mlflow_run"])
    (entry,) = alone["retrieval"]
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics == {
        f"retrieval/small/{direction}_{name}": entry[direction][name]
        for direction in DIRECTIONS
        for name in NAMES
    }


def test_again_nothing_is_encoded_and_the_table_comes_last(
    alone: dict[str, Any], work: Work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"evaluate.py {work.encoder} --retrieval small={work.pairs} --text-column words"
    again = run(f"{command} --out {work.folder}/alone", monkeypatch)
    (entry,), (before,) = again["retrieval"], alone["retrieval"]
    assert not entry["encoded_now"]
    assert {name: entry[name] for name in DIRECTIONS} == {name: before[name] for name in DIRECTIONS}
    output = capsys.readouterr().out
    plan, _, rest = output.partition("features of ")
    assert "40 images (parquet, with texts): 1 view," in plan
    rows = [re.split(r"  +", line) for line in rest.split("\n\n")[1].splitlines()]
    assert rows[0][:5] == ["retrieval", "query", "images", "texts", "quarantined"]
    for row, direction in zip(rows[2:], DIRECTIONS, strict=True):
        assert row[:5] == ["small", direction.partition("_")[0], "39", str(entry["texts"]), "1"]
        shares = [
            f"{100 * entry[direction][name]:.1f} ({100 * low:.1f} to {100 * high:.1f})"
            for name, (low, high) in entry[direction]["intervals"].items()
        ]
        assert row[5:] == [*shares, f"{entry[direction]['median_rank']:g}"]
    refused = f"{command} --limit 9 --out {work.folder}/alone"
    assert "holds the results of other work (it differs in retrieval)" in refusal(
        refused, monkeypatch, capsys
    )


@pytest.mark.slow
def test_probes_and_their_encoder_are_measured_together(
    cluster: None, lite_map: None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config, templates = EncoderConfig(), ("a photo of a {}.",)
    info = describe_encoder(config, class_names=CLASSES, templates=templates)
    assert info.head is not None
    about = {
        "config": to_dict(config),
        "identity": info.identity,
        "views": "weak,mirror,strong",
        "templates": list(templates),
        "logit_scale": info.logit_scale,
    }
    weight = torch.from_numpy(info.head)
    probe = Probe(weight=weight, bias=torch.zeros(3), class_names=CLASSES, encoder=about)
    probe.save(str(tmp_path / "probe"))
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n{}\n")
    flags = (
        f"--retrieval {photos} --caption-templates {tmp_path}/templates.txt --features {tmp_path}/features"
    )
    alone = run(f"evaluate.py --probe {tmp_path}/probe {flags} --out {tmp_path}/alone", monkeypatch)
    assert "results" not in alone
    (entry,) = alone["retrieval"]
    assert (entry["set"], entry["views"]) == ("photos", ["weak", "mirror"])
    assert [entry[key] for key in ("images", "texts", "pairs", "quarantined")] == [30, 6, 60, 0]
    expected = recomputed(entry, config)
    for direction in DIRECTIONS:
        found = without_intervals(entry[direction])
        assert found == pytest.approx(without_intervals(expected[direction]), abs=0.04)
    assert entry["image_to_text"]["recall_1"] > 0.5, "an encoder that knows them finds the classes' names"

    capsys.readouterr()
    command = (
        f"evaluate.py --probe {tmp_path}/probe --data {entry['stores'][0]} {flags} --out {tmp_path}/both"
    )
    both = run(command, monkeypatch)
    (same,) = both["retrieval"]
    assert {name: same[name] for name in DIRECTIONS} == {name: entry[name] for name in DIRECTIONS}
    assert {row["metric"] for row in both["results"]} >= {"accuracy", "ece"}
    assert both["sets"][0]["images"] == 30
    assert ">Retrieval<" in (tmp_path / "both" / "report.html").read_text()
    tables = capsys.readouterr().out.split("\n\n")
    assert "zero-shot acc %" in tables[-3]
    assert tables[-2].startswith("retrieval  query")


def test_texts_are_encoded_by_no_other_encoder(cluster: None, work: Work) -> None:
    config = EncoderConfig(encoder="tiny-vit-32", pretrained=f"{work.folder}/model/{WEIGHTS}")
    info = describe_encoder(config)
    texts = [f"number {i}" for i in range(300)]
    found = encode_texts(texts, info=info, encoder=config)
    assert (found.shape, found.dtype) == ((300, 64), np.float32)
    alone = load_encoder(config).encode_text([texts[0], texts[299]]).numpy()
    np.testing.assert_allclose(found[[0, 299]], alone, atol=1e-4)
    other = replace(info, identity={**info.identity, "weights": "others"})
    with pytest.raises(ValueError, match="another encoder was found on .* than where the job began"):
        encode_texts(texts, info=other, encoder=config)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", "there is nothing to measure: give --probe and --data, or --retrieval, or all of them"),
        ("--encoder lite", "there is nothing to measure"),
        ("--probe p", "there is nothing to measure"),
        ("--data {pairs}", "--data has the images that probes are measured on: it needs --probe"),
        ("--data {pairs} --retrieval {pairs} --encoder lite", "it needs --probe"),
        ("--retrieval {pairs}", "--retrieval needs an encoder: give --encoder, or --probe to take its own"),
        ("--retrieval {pairs} --encoder lite --probe p", "--encoder is for --retrieval without --probe"),
        ("--probe p --data d --encoder lite", "--encoder is for --retrieval without --probe"),
        ("--probe p --retrieval {pairs} --corruptions fog", "--corruptions needs --probe and --data"),
        ("--encoder lite --retrieval {pairs} --ood x=y", "--ood needs --probe and --data"),
        ("--encoder lite --retrieval {pairs} --shift x=y", "--shift needs --probe and --data"),
        ("--encoder lite --retrieval {pairs} --corrupted x=y", "--corrupted needs --probe and --data"),
        ("--encoder lite --retrieval {pairs} --classes c.txt", "--classes needs --probe and --data"),
        ("--probe p --data d --caption-templates simple", "--caption-templates needs --retrieval"),
        ("--probe p --data d --text-column words", "--text-column needs --retrieval"),
        ("--probe p --retrieval {pairs}", "p holds no probe"),
        ("--encoder lite --retrieval x=", "--retrieval x=: give it as NAME=PATH"),
        ("--encoder lite --retrieval ={pairs}", "--retrieval ={pairs}: give it as NAME=PATH"),
        ("--encoder lite --retrieval {pairs}", "no column of texts; there are id, image, words"),
        ("--encoder lite --retrieval {pairs} --text-column none", "no column 'none'; there are id, image"),
        ("--encoder lite --retrieval {pairs} --caption-templates simple", "has no names of classes"),
        ("--encoder lite --retrieval a=b/c=d", "b/c=d: no such path"),
        ("--encoder lite --retrieval a/b=c", "a/b=c: no such path"),
        (
            "--encoder lite --retrieval a={pairs} a={pairs} --text-column words",
            "--retrieval a={pairs}: another set is called a; give it a name, as in other={pairs}",
        ),
        ("--encoder lite --retrieval {pairs} --text-column words --limit 0", "--limit must be at least 1"),
        ("--encoder tiny-vit-32 --retrieval {pairs} --text-column words", "without --pretrained would have"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    flags: str, told: str, cluster: None, work: Work, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    command = f"evaluate.py {flags.format(pairs=work.pairs)} --out {tmp_path}/out"
    assert told.format(pairs=work.pairs) in refusal(command, monkeypatch, capsys)
    assert not (tmp_path / "out" / "summary.json").exists()
