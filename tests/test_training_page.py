"""The page of a self-training shows what changed, on images, whatever the images, names and classes are."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import CLASSES, Training
from PIL import Image
from test_store import part

from lpclip.evaluation.notable import (
    KINDS,
    Labelling,
    Pair,
    centred,
    examples_of_classes,
    frequent_pairs,
    misfits,
    near_duplicates,
    num_repeated,
    principal,
    reasons,
)
from lpclip.features.store import Store
from lpclip.features.store_writer import StoreWriter
from lpclip.features.stored_views import Encoded
from lpclip.features.thumbnails import thumbnail
from lpclip.jobs.inputs import EncodedInputs, Held
from lpclip.jobs.selftrain_page import Outcome, write_training_page
from lpclip.method.confirmation import Confirmation
from lpclip.method.priors import PRIORS
from lpclip.method.probe import Probe, zero_shot_probe
from lpclip.method.trial import ChosenPrior
from lpclip.report.training_figures import rounds_figure

DIM = 32
TITLES = [
    *("Verdict", "Class shares", "Changed labels", "Classes", "Images that no class name seems to fit"),
    *("Near-duplicates", "Quarantined images", "Rounds and their guard", "Confusions"),
]


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def images(self) -> list[bytes]:
        sources = [about["src"] or "" for tag, about in self.tags if tag == "img"]
        return [base64.b64decode(source.partition("base64,")[2]) for source in sources]


def titles(text: str) -> list[str]:
    return re.findall(r"<h2 [^>]*>(.*?)</h2>", text)


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text()
    return text, Page(text)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def picture(number: int) -> bytes:
    found = thumbnail(Image.new("RGB", (160, 120), (number % 256, number // 256 % 256, 90)))
    assert found is not None
    return found


def made(
    folder: Path,
    *,
    names: Sequence[str],
    num_images: int = 200,
    ids: Sequence[str] | None = None,
    thumbnails: Sequence[bytes | None] | None = None,
    quarantine: Sequence[dict[str, str]] = (),
    bias: float = 0.0,
    with_labels: bool = True,
    kappa: float = 0.6,
    **given: int,
) -> Outcome:
    """A training on made features: a cloud for each class, and a probe that is nearer to it than zero-shot.

    `bias` is of the first class, in zero-shot and probe: with a large one, all images are of that class.
    """
    random, num_classes = np.random.default_rng(0), len(names)
    means = unit(random.normal(size=(num_classes, DIM)))
    truth = np.arange(num_images) % num_classes
    features = unit(means[truth] + 0.1 * random.normal(size=(num_images, DIM)))
    # Every seventh label is wrong: these are the probe's mistakes.
    told = np.where(np.arange(num_images) % 7 == 0, (truth + 1) % num_classes, truth)
    images = [picture(row) for row in range(num_images)] if thumbnails is None else list(thumbnails)
    table = pa.table(
        {
            "id": list(ids or (f"{row:05d}.jpg" for row in range(num_images))),
            "label": pa.array(told if with_labels else [None] * num_images, pa.int32()),
            "weak": pa.FixedSizeListArray.from_arrays(pa.array(features.astype(np.float16).reshape(-1)), DIM),
            "thumbnail": pa.array(images, pa.binary()),
        }
    )
    identity: dict[str, Any] = {
        "encoder": {"name": "toy", "dim": DIM},
        "views": ["weak"],
        "seed": None,
        "source": {"label_names": None},
    }
    writer = StoreWriter(str(folder / "store"), identity)
    writer.begin()
    writer.write_part(part(0, 0, num_images), rows=table, quarantine=list(quarantine), content_digest=1)
    store = writer.finish(num_units=1, rate=None)
    loaded = store.features()
    about: dict[str, Any] = {"class_names": tuple(names)}
    first = torch.zeros(num_classes)
    first[0] = bias
    noisy = unit(means + 0.25 * random.normal(size=means.shape))
    zero_shot = replace(zero_shot_probe(torch.from_numpy(noisy), temperature=0.1, **about), bias=first)
    probe = Probe(weight=torch.from_numpy(means), bias=first, temperature=0.1, **about)
    found = Confirmation(agreement=0.7, kappa=kappa, entropy=0.9, confidence=0.6, chance=0.3, **given)
    chosen = ChosenPrior(
        name="weak", prior=PRIORS["weak"], tried={"weak": found}, present=None, why="all of them"
    )
    history = [
        {"round": 1, "flip_rate": 0.1, "coverage": 1.0, "mean_confidence": 0.8, "zero_shot_agreement": 0.9}
    ]
    known = EncodedInputs(
        encoded=Encoded(store=store, seconds=0.0, reused=True, rate=None),
        tested=None,
        held=Held(store),
        tested_x=None,
        raw_labels=loaded.labels,
        y=loaded.labels.astype(np.int64),
        probe_encoder={},
    )
    metrics: dict[str, float | None] = {"accuracy": 0.5, "ece": 0.1, "nll": 1.0}
    return Outcome(
        data="toys",
        known=known,
        chosen=chosen,
        zero_shot=zero_shot,
        probe=probe if chosen.trusted else replace(zero_shot, temperature=zero_shot.temperature),
        results={"zero_shot": metrics, "probe": metrics},
        measured_on="toys, all images" if with_labels else "",
        history=history,
        figures={"rounds": rounds_figure(history)},
        facts={"images": "toys"},
    )


def page_of(outcome: Outcome, folder: Path) -> tuple[str, Page]:
    write_training_page(outcome, str(folder / "report.html"))
    return read(folder / "report.html")


def test_a_run_writes_its_page(trained: Training) -> None:
    text, page = read(trained.out / "report.html")
    assert titles(text) == [title for title in TITLES if title in titles(text)]
    assert {"Verdict", "Class shares", "Classes", "Near-duplicates", "Rounds and their guard"} <= set(
        titles(text)
    )
    assert "The rounds were trusted" in page.text
    for name in ("zero_shot", "probe", "supervised"):
        assert f"{100 * trained.summary[name]['accuracy']:.1f}" in page.text
    shown = re.findall(r"<h3>([^<→,]+) \(\d+ images?\)</h3>", text)
    assert set(shown) <= set(CLASSES)
    assert len(shown) > 1
    assert len(page.images()) > 30
    # Nothing is loaded and nothing runs.
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)


def test_without_labels_the_page_has_images_and_no_accuracy(blind: Training) -> None:
    text, page = read(blind.out / "report.html")
    assert "There are no labels to measure accuracy with" in page.text
    assert "accuracy %" not in page.text
    assert "Confusions" not in titles(text)
    assert 'class="wrong"' not in text
    assert len(page.images()) > 20


def test_what_changed_is_counted_and_shown(tmp_path: Path) -> None:
    outcome = made(tmp_path, names=[f"toy {number}" for number in range(12)], num_images=600)
    text, page = page_of(outcome, tmp_path)
    features = outcome.known.features.base
    before, after = (found.predict(features) for found in (outcome.zero_shot, outcome.probe))
    changed = int((before != after).sum())
    assert changed > 10
    assert titles(text) == TITLES
    assert f"gives {changed} of 600 images ({changed / 600:.1%}) another label" in page.text
    largest = frequent_pairs(before, after, num_classes=12)[0]
    assert f"toy {largest.first} → toy {largest.second} ({largest.count} image" in page.text
    again = made(tmp_path / "again", names=[f"toy {number}" for number in range(12)], num_images=600)
    assert page_of(again, tmp_path)[0] == text, "the same page each time"
    # Everything is reached with the keyboard and read aloud.
    assert all(about.get("alt") for tag, about in page.tags if tag == "img")
    scrolled = [about for tag, about in page.tags if about.get("class") == "scroll"]
    assert all(about["tabindex"] == "0" and about["aria-label"] for about in scrolled)


def test_a_fallback_says_why(tmp_path: Path) -> None:
    text, page = page_of(made(tmp_path, names=["cat", "dog"], kappa=0.1), tmp_path)
    assert "The probe fell back to zero-shot" in page.text
    assert "the halves hardly confirm them (kappa 0.10, 0.28 is needed)" in page.text
    assert "Changed labels" not in titles(text)
    assert "cat (100 images)" in page.text


@pytest.mark.parametrize(
    ("kappa", "won", "sentence"),
    [
        (
            0.6,
            0,
            "The rounds were trusted: two halves of the features, which cannot see each other, confirm them.",
        ),
        (0.1, 9, "The rounds were trusted: they have more of the given labels right than zero-shot."),
        (0.1, 0, "The probe is zero-shot with the given labels alone, because the rounds cannot be trusted"),
    ],
)
def test_the_verdict_tells_what_given_labels_did(
    tmp_path: Path, kappa: float, won: int, sentence: str
) -> None:
    outcome = made(tmp_path, names=["cat", "dog"], kappa=kappa, labelled=20, won=won)
    _, page = page_of(outcome, tmp_path)
    assert sentence in page.text
    assert "Training was given 20 labels, and these images are not evaluated on." in page.text


def test_all_images_of_one_class(tmp_path: Path) -> None:
    text, page = page_of(made(tmp_path, names=["cat", "dog", "owl"], bias=100.0, with_labels=False), tmp_path)
    assert "cat (200 images)" in page.text
    assert "cat 100.0 100.0 +0.0 200 200" in page.text
    assert "The probe gives 2 of them no image." in page.text
    assert "<h3>dog" not in text


def test_a_thousand_classes_have_a_small_page(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    images = [thumbnail(Image.fromarray(noise.integers(0, 256, (160, 160, 3), np.uint8))) for _ in range(3)]
    names = [f"class {number}" for number in range(1000)]
    outcome = made(
        tmp_path, names=names, num_images=3000, thumbnails=[images[row % 3] for row in range(3000)]
    )
    text, page = page_of(outcome, tmp_path)
    assert len(text) < 10e6
    assert 500 < len(page.images()) < 1400
    assert "Of 1,000 classes, these are the 100 that changed most." in page.text
    assert "The surest image of each class" in page.text


HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7 * 7 }}"


def test_hostile_names_of_classes_and_files_stay_text(tmp_path: Path) -> None:
    ids = [f"{HOSTILE}/{row}" for row in range(200)]
    bad = [{"id": f"{HOSTILE}/bad", "stage": "decode", "error": HOSTILE}]
    outcome = made(tmp_path, names=[HOSTILE, "</section></body>", "$x$"], ids=ids, quarantine=bad)
    outcome = replace(outcome, data=HOSTILE, facts={HOSTILE: HOSTILE}, measured_on=HOSTILE)
    text, page = page_of(outcome, tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, about in page.tags for name in about)
    assert all((about["src"] or "").startswith("data:") for tag, about in page.tags if tag == "img")
    assert page.text.count(HOSTILE) > 10
    assert text.count("</body>") == 1


def test_damaged_thumbnails_are_left_out_and_a_store_without_any_is_told(tmp_path: Path) -> None:
    whole = picture(7)
    strange = [b"\xff\xd8\xff no image", whole[:50], b"", whole]
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(buffer, "JPEG")
    strange.append(buffer.getvalue())
    for name, images in {"damaged": strange, "none": [None]}.items():
        outcome = made(
            tmp_path / name,
            names=["cat", "dog"],
            thumbnails=[images[row % len(images)] for row in range(200)],
        )
        _, page = page_of(outcome, tmp_path / name)
        if name == "none":
            assert "has no thumbnails" in page.text
            assert len(page.images()) == 1, "the figure alone"
        else:
            assert len(page.images()) > 5
            assert all(Image.open(io.BytesIO(image)).size[0] <= 112 for image in page.images()[1:])


def test_quarantined_images_are_listed_by_reason(tmp_path: Path) -> None:
    bad = [{"id": f"{row}.png", "stage": "decode", "error": "empty"} for row in range(5)]
    bad.append({"id": "x.png", "stage": "read", "error": "no such file"})
    _, page = page_of(made(tmp_path, names=["cat", "dog"], quarantine=bad), tmp_path)
    assert "decode empty 5 0.png, 1.png, 2.png read no such file 1 x.png" in page.text
    assert reasons(bad, most=1) == [("decode", "empty", 5, ["0.png", "1.png", "2.png"])]


def test_pairs_are_counted() -> None:
    first, second = np.array([0, 0, 1, 2, 2, 2]), np.array([1, 1, 1, 0, 0, 1])
    assert frequent_pairs(first, second, num_classes=3) == [
        Pair(first=0, second=1, count=2),
        Pair(first=2, second=0, count=2),
        Pair(first=2, second=1, count=1),
    ]


def test_examples_of_a_class_are_the_surest_the_least_sure_and_the_nearest_to_the_mean() -> None:
    angles = np.array([0.0, 0.1, 0.2, 0.3, 0.9, 2.0])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    labels = Labelling(
        label=np.array([1, 1, 1, 1, 1, 0]), confidence=np.array([0.9, 0.5, 0.6, 0.7, 0.3, 0.2], np.float32)
    )
    found = examples_of_classes(features, labels, num_classes=3, each=1)
    assert found == {
        0: dict(zip(KINDS, ([5], [], []), strict=True)),
        1: dict(zip(KINDS, ([0], [4], [3]), strict=True)),
    }


def test_near_duplicates_are_found_and_strangers_are_not() -> None:
    random = np.random.default_rng(0)
    features = unit(random.normal(size=(500, 64)) + 1)
    features[400] = unit(features[3:4] + 0.02 * random.normal(size=(1, 64)))[0]
    features[401] = features[7]
    central = centred(features)
    found = near_duplicates(principal(central), central)
    assert [(pair.first, pair.second) for pair in found] == [(7, 401), (3, 400)]
    assert found[0].cosine == pytest.approx(1, abs=1e-6)
    assert num_repeated(features) == 1
    same = np.repeat(features[:1], 50, axis=0)
    assert num_repeated(same) == 49
    assert near_duplicates(principal(centred(same)), centred(same)) == []


def test_a_group_without_a_name_stands_out() -> None:
    random = np.random.default_rng(0)
    means = unit(random.normal(size=(6, 64)))
    truth = np.arange(1800) % 6
    features = unit(means[truth] + 0.05 * random.normal(size=(1800, 64)))
    central = centred(features)
    options: dict[str, Any] = {"confidence": np.full(1800, 0.5, np.float32), "most": 3}
    groups = misfits(principal(central), features, means[:5], **options)
    assert groups
    assert all((truth[group.rows] == 5).all() for group in groups)
    assert misfits(principal(central)[:100], features[:100], means, **options) == []


def test_a_store_lists_its_quarantine(tmp_path: Path) -> None:
    outcome = made(tmp_path, names=["a", "b"], quarantine=[{"id": "q", "stage": "read", "error": "gone"}])
    store = Store.open(outcome.known.encoded.store.path)
    assert store.quarantine() == [{"id": "q", "stage": "read", "error": "gone"}]
    assert store.quarantined() == {"read": 1}
