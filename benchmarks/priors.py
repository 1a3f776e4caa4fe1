"""Priors under class imbalance: zero-shot and the rounds' accuracy on a test set cut as the unlabelled images are.

    python benchmarks/priors.py runs/c10 runs/demo

takes finished runs of jobs/selftrain.py that had `--eval-data`, and reads their features and zero-shot heads.
Settings: all images; long-tailed 1:10 and 1:100 (class k keeps n r^(-k / (K - 1)) images, in row order); the
first, middle and last class only; 200 images. Labels make the cuts and the accuracies, nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lpclip import report, store
from lpclip.config import SelfTrainingConfig
from lpclip.labels import map_labels
from lpclip.neighbours import nearest
from lpclip.probe import load_probe
from lpclip.prompts import ClassList
from lpclip.self_training import Shard, fit_space, neighbour_count, read_prior, self_train

Rows = tuple[np.ndarray, np.ndarray]


def load(path: str, classes: ClassList) -> Rows:
    """Features and class indices of a store."""
    found = store.load(path, views=())
    manifest = store.read_manifest(path)
    assert manifest is not None
    names = manifest["identity"]["source"]["label_names"]
    labels = map_labels(found.labels, label_names=tuple(names) if names else None, classes=classes, data=path)
    return found.base, labels


def long_tailed(rows: Rows, ratio: int) -> Rows:
    """Class k keeps n ratio^(-k / (K - 1)) rows, n those of the smallest class."""
    x, y = rows
    counts = np.bincount(y)
    keep = [int(counts.min() * ratio ** (-k / (len(counts) - 1))) for k in range(len(counts))]
    places = np.sort(np.concatenate([np.flatnonzero(y == k)[:n] for k, n in enumerate(keep)]))
    return x[places], y[places]


def three_classes(rows: Rows) -> Rows:
    """Only the first, the middle and the last class."""
    x, y = rows
    keep = np.isin(y, (0, y.max() // 2, y.max()))
    return x[keep], y[keep]


def settings(train: Rows, test: Rows) -> Iterator[tuple[str, Rows, Rows]]:
    """Name, unlabelled rows and test rows of each setting."""
    yield "all", train, test
    for ratio in (10, 100):
        yield f"long-tailed 1:{ratio}", long_tailed(train, ratio), long_tailed(test, ratio)
    yield "3 classes", three_classes(train), three_classes(test)
    yield "200 images", (train[0][:200], train[1][:200]), test


def main(*runs: str) -> None:
    """Measure, and print the table."""
    table = []
    for run in runs:
        stores = json.loads((Path(run) / "summary.json").read_text())["features"]
        zero_shot = load_probe(f"{run}/zero_shot")
        classes = ClassList(names=zero_shot.class_names)
        scale = float(zero_shot.weight.norm(dim=1).mean())
        for name, (x, _), (tx, ty) in settings(load(stores["train"], classes), load(stores["eval"], classes)):
            row = {"run": Path(run).name, "setting": name, "images": len(x)}
            row["zero-shot %"] = float((zero_shot.logits(tx).argmax(dim=1).numpy() == ty).mean())
            shard = Shard(features=x, num_rows=len(x))
            count = neighbour_count(SelfTrainingConfig(), num_rows=len(x), num_classes=len(classes.names))
            if count:
                found = nearest(
                    x, among=x, first_row=0, space=fit_space(shard), count=count, dtype=torch.bfloat16
                )
                shard = Shard(features=x, num_rows=len(x), neighbours=found)
            for prior in ("estimated", "uniform", "none"):
                *_, (state, _) = self_train(
                    shard,
                    zero_shot=zero_shot.weight / scale,
                    temperature=1 / scale,
                    config=SelfTrainingConfig(),
                    prior=read_prior(prior, classes.names),
                )
                logits = torch.from_numpy(tx).float() @ state.weight.T + state.probe_bias()
                row[f"{prior} %"] = float((logits.argmax(dim=1).numpy() == ty).mean())
            table.append(row)
    print(report.table(table))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
