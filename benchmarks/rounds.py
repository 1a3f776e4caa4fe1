"""Seconds and memory of the rounds on random features: speed depends on the shape, not on what the rows say.

    python benchmarks/rounds.py            # 50,000 x 1280 with 10 classes; images doubled; ImageNet's shape
    python benchmarks/rounds.py 50000 1280 10 --neighbours 30

Without a shape, each case runs in a process of its own, so that memory is its own. Times are absolute and belong to
the machine; "linear" is the ratio of a round's time with 100,000 images to that with 50,000. Memory is the process's
largest, with the features (float16) and the libraries in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from lpclip.config import SelfTrainingConfig
from lpclip.method.neighbours import comparison_dtype, nearest
from lpclip.method.priors import Prior
from lpclip.method.self_training import Rounds
from lpclip.method.shard import Shard, fit_whitening
from lpclip.report.tables import format_table

CASES = (
    ("50000", "1280", "10", "--rounds", "10"),
    ("100000", "1280", "10", "--rounds", "10"),
    ("50000", "1280", "10", "--rounds", "10", "--neighbours", "30"),
    ("1280000", "512", "1000", "--rounds", "1"),
    ("1280000", "512", "1000", "--rounds", "1", "--neighbours", "30"),
)


def random_features(num_rows: int, dim: int) -> np.ndarray:
    """(n, d) float16 of unit norm, made in pieces: random directions about a few hundred centres."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((256, dim), dtype=np.float32)
    features = np.empty((num_rows, dim), np.float16)
    for start in range(0, num_rows, 16384):
        size = min(16384, num_rows - start)
        rows = centres[rng.integers(len(centres), size=size)] + rng.standard_normal(
            (size, dim), dtype=np.float32
        )
        features[start : start + size] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return features


def peak_mb() -> float:
    """The process's largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(num_rows: int, dim: int, num_classes: int, *, rounds: int, neighbours: int) -> dict[str, float]:
    """Time the graph and the rounds; no round ends early, since the labels of random rows go on changing."""
    features = random_features(num_rows, dim)
    head = torch.nn.functional.normalize(
        torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0)), dim=1
    )
    begin = time.perf_counter()
    shard = Shard(features=features, num_rows=num_rows)
    if neighbours:
        found = nearest(shard, whitening=fit_whitening(shard), count=neighbours, dtype=comparison_dtype())
        shard = Shard(features=features, num_rows=num_rows, neighbours=found)
    graph = time.perf_counter() - begin
    begin = last = time.perf_counter()
    ends = []
    config = SelfTrainingConfig(rounds=rounds)
    for _ in Rounds(shard, head=head / 0.03, config=config, prior=Prior()).run():
        ends.append(time.perf_counter() - last)
        last = time.perf_counter()
    return {
        "images": num_rows,
        "dim": dim,
        "classes": num_classes,
        "rounds": len(ends),
        "graph s": graph if neighbours else 0.0,
        "rounds s": time.perf_counter() - begin,
        # The first comes after the covariance, the first labels and the prior's first steps.
        "a later round s": float(np.mean(ends[1:])) if len(ends) > 1 else float("nan"),
        "features MB": features.nbytes / 2**20,
        "peak MB": peak_mb(),
    }


def main() -> None:
    """Measure one shape, or all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="*", type=int, help="images, dimensions, classes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--neighbours", type=int, default=0)
    given = parser.parse_args()
    if given.shape:
        print(json.dumps(measure(*given.shape, rounds=given.rounds, neighbours=given.neighbours)))
        return
    rows = []
    for case in CASES:
        print("measuring", *case, flush=True)
        done = subprocess.run([sys.executable, __file__, *case], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(format_table([{k: f"{v:,.4g}" for k, v in row.items()} for row in rows]))
    print(f"linear: {rows[1]['a later round s'] / rows[0]['a later round s']:.2f} for twice the images")


if __name__ == "__main__":
    main()
