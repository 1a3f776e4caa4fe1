"""The steps after the rounds need little memory beside the features, with a thousand classes too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import PEAK

# 100,000 images of 500 classes have 200 MB of probabilities; their features take 3 MB here.
MEASURE = """
import sys
import numpy as np, torch
from lpclip.evaluation.judge import Labelled, accuracy_among, evaluate, foreign_scores, judge, probe_curves
from lpclip.method.fit import zero_shot_labels
from lpclip.method.linear import Linear
from lpclip.method.presence import with_absent
from lpclip.method.probe import Probe

torch.set_num_threads(1)
num_rows, num_classes, dim = 100_000, 500, 16
random = np.random.default_rng(0)

def unit(count):
    rows = random.normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

probe = Probe(weight=20 * torch.from_numpy(unit(num_classes)), bias=torch.zeros(num_classes))
places = np.arange(0, num_classes, 2)
half = Linear(weight=probe.weight[places], bias=probe.bias[places])
steps = {
    "evaluate": lambda x, y: evaluate(probe, x, y),
    "judge": lambda x, y: judge({"probe": probe}, Labelled(features=x, labels=y), seed=0),
    "curves": lambda x, y: probe_curves(probe, x, y),
    "among": lambda x, y: accuracy_among(probe, Labelled(features=x, labels=y), classes=places),
    "foreign": lambda x, y: foreign_scores(probe, inside=x, outside=x[:100], cosine_temperature=0.1),
    "labels": lambda x, y: zero_shot_labels(probe, x),
    "absent": lambda x, y: with_absent(half, places, zero_shot=probe, features=x),
}
x, y = unit(num_rows).astype(np.float16), random.integers(0, num_classes, num_rows)

wanted = [steps[name] for name in sys.argv[1:]]
# Code that is loaded when it is first used is no part of it.
for step in wanted:
    step(x[:100], y[:100])
before = peak()
for step in wanted:
    step(x, y)
print((peak() - before) / (4 * num_rows * num_classes))
"""


@pytest.mark.parametrize(
    "steps",
    [
        ("evaluate", "labels"),
        pytest.param(("judge", "curves", "among", "foreign", "absent"), marks=pytest.mark.slow),
    ],
)
def test_probabilities_of_all_rows_are_never_there(steps: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", PEAK + MEASURE, *steps]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 0.7


LABEL = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa, torch
from lpclip import files
from lpclip.features.store import Store
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.images.views import WEAK
from lpclip.jobs.predict import labelled
from lpclip.method.probe import Probe

torch.set_num_threads(1)
folder, units, dim, classes = sys.argv[1], 200, 512, 1000
random = np.random.default_rng(0)

def unit(count):
    rows = random.normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

identity = {"encoder": {"dim": dim}, "views": ["weak"], "seed": None, "source": {"label_names": None}}
writer = StoreWriter(folder, identity)
writer.begin()
for number in range(units):
    flat = pa.array(unit(256).astype(np.float16).reshape(-1))
    columns = {
        "id": [f"{number}/{i}" for i in range(256)],
        "label": pa.array([None] * 256, pa.int32()),
        "weak": pa.FixedSizeListArray.from_arrays(flat, dim),
    }
    part = Part(unit=number, start=0, stop=256, last=True)
    writer.write_part(part, rows=pa.table(columns), quarantine=[], content_digest=number)
writer.finish(num_units=units, rate=None, known={})
probe = Probe(
    weight=torch.from_numpy(unit(classes)), bias=torch.zeros(classes), class_names=tuple(map(str, range(classes)))
)

store = Store.open(folder)
next(labelled(store, probe, views=(WEAK,), top_k=5, with_all=True))
before, rows = peak(), 0
with files.parquet_by_tables(folder + "/labels.parquet", group_rows=1 << 10) as add:
    for table in labelled(store, probe, views=(WEAK,), top_k=5, with_all=True):
        rows += len(table)
        add(table)
assert rows == 256 * units
print((peak() - before) / (2 * rows * dim + 4 * rows * classes))
"""


@pytest.mark.slow
def test_labels_are_written_without_all_features_or_probabilities_in_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK + LABEL, str(tmp_path / "store")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 0.5, "of the bytes of both"
    written = pq.ParquetFile(tmp_path / "store" / "labels.parquet")
    assert written.metadata.num_rows == 256 * 200
    assert written.num_row_groups == 50
    assert written.read(columns=["id"])["id"].to_pylist()[:257:256] == ["0/0", "1/0"]
