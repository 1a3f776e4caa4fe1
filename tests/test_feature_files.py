"""Feature files are read and cut into settings as the benchmark's page says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from feature_files import file_settings, read_file
from method_data import Data, Setting

NUM_CLASSES, NAMED, DIM = 12, 9, 16


def write(path: Path, *, with_texts: bool, images: int = 60) -> str:
    """Images of 12 classes, of which 9 have a text where there are any; feature 0 is an image's number."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(images * NUM_CLASSES) % NUM_CLASSES)
    means = rng.normal(size=(NUM_CLASSES, DIM))
    features = means[labels] + 0.3 * rng.normal(size=(len(labels), DIM))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    texts = means / np.linalg.norm(means, axis=1, keepdims=True)
    texts[NAMED:] = np.nan
    more = {"text_of_some": texts.astype(np.float32)} if with_texts else {}
    np.savez(path, features=features.astype(np.float32), labels=labels.astype(np.int16), **more)
    return str(path)


def cut(path: str, *, seed: int = 0) -> dict[str, tuple[Data, Setting]]:
    return {s.name: (d, s) for d, s in file_settings(read_file(path), seed=seed, others=[])}


def test_images_of_classes_without_a_text_are_foreign(tmp_path: Path) -> None:
    found = cut(write(tmp_path / "some.npz", with_texts=True))
    data, everything = found["all"]
    assert (data.name, data.temperature, data.head.shape) == ("some", 0.01, (NAMED, DIM))
    assert (len(everything.unlabelled), len(everything.test)) == (270, 270)
    both = np.concatenate([everything.unlabelled.features, everything.test.features])
    assert len(np.unique(both, axis=0)) == 540, "no image is in both halves"
    right = (everything.test.features @ data.head.numpy().T).argmax(axis=1) == everything.test.labels
    assert right.mean() > 0.9, "labels follow the classes that stay"
    _, mixed = found["20% foreign"]
    assert (mixed.unlabelled.labels == -1).mean() == pytest.approx(0.2, abs=0.01)


def test_without_texts_an_image_of_each_class_stands_in_and_is_left_out(tmp_path: Path) -> None:
    found = cut(write(tmp_path / "none.npz", with_texts=False))
    data, everything = found["all"]
    assert (data.name, data.temperature) == ("none (one-image heads)", 0.02)
    seen = np.concatenate([everything.unlabelled.features, everything.test.features])
    assert len(seen) == 60 * NUM_CLASSES - NUM_CLASSES
    assert (data.head.numpy() @ seen.T).max() < 1 - 1e-4
    assert "20% foreign" not in found


def test_settings_are_cut_as_they_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "some.npz", with_texts=True)
    found = cut(path)
    shown = {name: np.unique(s.unlabelled.labels, return_counts=True) for name, (_, s) in found.items()}
    assert len(shown["few classes"][0]) == 3
    assert len(shown["half of the classes"][0]) == 4
    assert set(np.unique(found["few classes"][1].test.labels)) == set(shown["few classes"][0])
    assert set(shown["10 a class"][1]) == {10}
    assert set(shown["3 a class"][1]) == {3}
    tail = np.sort(shown["long-tailed 1:10"][1])
    assert tail[-1] / tail[0] == pytest.approx(10, rel=0.3)
    data, everything = found["random head"]
    right = (everything.test.features @ data.head.numpy().T).argmax(axis=1) == everything.test.labels
    assert right.mean() < 0.35
    again, other = cut(path), cut(path, seed=1)
    assert (again["3 a class"][1].unlabelled.features == found["3 a class"][1].unlabelled.features).all()
    assert (other["all"][1].test.features != found["all"][1].test.features).any()


def test_what_is_no_feature_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", features=np.zeros((3, 2), np.float32))
    np.savez(tmp_path / "b.npz", features=np.zeros((3, 2), np.float32), labels=np.zeros(2, int))
    for name, message in {"a": "is no feature file", "b": "do not fit"}.items():
        with pytest.raises(ValueError, match=message):
            read_file(str(tmp_path / f"{name}.npz"))
