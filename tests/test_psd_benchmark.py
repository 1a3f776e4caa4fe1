"""The benchmark of noisy captions: what it shuffles, and that it runs from images to a table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, draw
from psd import METHODS, TEMPLATES, Images, Options, caption, main

from lpclip.config import PretrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_share_of_the_captions_is_shuffled_and_none_is_lost() -> None:
    labels = np.arange(4000) % 10
    images = Images(
        pixels=torch.zeros(4000, 1, 1, 3, dtype=torch.uint8), labels=labels, names=tuple("abcdefghij")
    )
    right = caption(images, noise=0.0, seed=0)
    assert all(
        text in {t.format("abcdefghij"[y]) for t in TEMPLATES} for text, y in zip(right, labels, strict=True)
    )
    noisy = caption(images, noise=0.4, seed=0)
    assert Counter(noisy) == Counter(right)
    # One in eighty of the shuffled ones meets the caption that it had.
    assert np.mean([a != b for a, b in zip(noisy, right, strict=True)]) == pytest.approx(0.395, abs=0.03)
    assert caption(images, noise=0.4, seed=0) == noisy != caption(images, noise=0.4, seed=1)


@pytest.mark.slow
def test_it_runs_from_images_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [CLASSES[i % 3] for i in range(48)]
    table = pa.table({"image": [draw(i % 3, i) for i in range(48)], "label": labels})
    pq.write_table(table, tmp_path / "images.parquet")
    data, training = str(tmp_path / "images.parquet"), replace(PretrainConfig(), batch_size=16, epochs=15)
    main(
        Options(
            train=data,
            test=data,
            noise="40",
            seeds=1,
            training=training,
            json=str(tmp_path / "rows.json"),
            figure=str(tmp_path / "rows.png"),
        )
    )
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(0 <= row[name] <= 100 for row in rows for name in ("zero_shot", "linear_probe"))
    assert max(row["linear_probe"] for row in rows) > 60
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"40  {method}" in printed for method in METHODS)
    assert "a step of psd takes" in printed
