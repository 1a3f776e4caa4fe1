"""The steps after the rounds need little memory beside the features, with a thousand classes too."""

from __future__ import annotations

import subprocess
import sys

import pytest

# 100,000 images of 500 classes have 200 MB of probabilities; their features take 3 MB here.
MEASURE = """
import resource, sys
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

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

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
    command = [sys.executable, "-c", MEASURE, *steps]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 0.3
