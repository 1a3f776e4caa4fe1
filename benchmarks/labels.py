"""Accuracy with a few given labels: none, random ones, suggested ones, and suggested ones of which a tenth is wrong.

python benchmarks/labels.py cifar10.npz pets.npz --seeds 5 --counts 50,200

Each argument is a feature file (benchmarks/feature_files.py). A seed cuts its images into unlabelled ones, at most
`--unlabelled`, and others to test on. The probe of the self-training without labels suggests the images to label; the
true labels then stand in for a person. The prior is the one that the training without labels chose, and given labels
play their part in the guard and the temperature. `supervised` is a probe of the suggested images and their labels
alone. Settings: all unlabelled images, and a long tail of them (1:10).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from feature_files import file_settings, read_file
from method_data import Data, Images, long_tailed

from lpclip.config import SelfTrainingConfig
from lpclip.encoders.head import Head
from lpclip.evaluation.judge import evaluate
from lpclip.method.confirmation import Sample, with_neighbours
from lpclip.method.few_labels import Correction, FewLabels, mean_feature
from lpclip.method.fit import SelfTraining, finish_probe, fit
from lpclip.method.linear import Linear
from lpclip.method.neighbours import comparison_dtype
from lpclip.method.probe import Probe
from lpclip.method.self_training import Rounds
from lpclip.method.shard import Shard, Whitenings, compute_device, fit_whitenings
from lpclip.method.suggestions import suggest
from lpclip.report.tables import format_table

CONFIG = SelfTrainingConfig()
WRONG = 0.1


class Problem:
    """Unlabelled images with what all trainings on them share."""

    def __init__(self, data: Data, images: Images) -> None:
        self.images = images
        self.names = tuple(f"class {k}" for k in range(len(data.head)))
        head = Head(weight=data.head.numpy(), class_names=self.names, temperature=data.temperature)
        self.plain: SelfTraining = fit(images.features, head)
        self.teacher = data.head / data.temperature
        shard = Shard(features=images.features, num_rows=len(images), device=compute_device())
        self.sample = Sample(
            images.features,
            zero_shot=data.head,
            temperature=data.temperature,
            config=CONFIG,
            dtype=comparison_dtype(),
        )
        self.whitenings: Whitenings = fit_whitenings(shard)
        self.places = (
            np.arange(len(self.names)) if self.plain.prior.present is None else self.plain.prior.present
        )
        self.shard = with_neighbours(
            shard,
            config=CONFIG,
            num_classes=len(self.names),
            whitening=self.whitenings.base,
            dtype=comparison_dtype(),
        )

    def labelled(self, rows: np.ndarray, labels: np.ndarray) -> Probe:
        """The probe of a training that is given the labels of these rows."""
        features, few = self.images.features, self._few(rows, labels)
        places = np.union1d(self.places, labels)
        chosen = self.plain.prior
        right = self.plain.probe.predict(few.features) == labels
        before = self.plain.zero_shot.predict(few.features) == labels
        tried = replace(
            chosen.tried[chosen.name],
            labelled=len(rows),
            won=int((right & ~before).sum()),
            lost=int((before & ~right).sum()),
        )
        chosen = replace(
            chosen,
            tried={**chosen.tried, chosen.name: tried},
            present=None if len(places) == len(self.names) else places,
            labelled_factor=self.sample.factor_of_labels(chosen.prior, labels=few, present=places),
        )
        *_, (last, _) = Rounds(
            self.shard,
            head=self.teacher[places],
            prior=chosen.prior,
            config=CONFIG,
            whitenings=self.whitenings,
            labels=few.among(places),
        ).run()
        return finish_probe(
            last,
            zero_shot=self.plain.zero_shot,
            teacher=self.teacher,
            features=features,
            config=CONFIG,
            chosen=chosen,
            labels=few,
        )

    def supervised(self, rows: np.ndarray, labels: np.ndarray) -> Probe:
        """A probe of these rows and their labels alone, with the same ridge."""
        few = self._few(rows, labels)
        nothing = Linear(weight=torch.zeros_like(self.teacher), bias=torch.zeros(len(self.teacher)))
        found = Correction(few, mean=mean_feature(self.images.features)).apply(nothing)
        return replace(self.plain.zero_shot, weight=found.weight, bias=found.bias)

    def _few(self, rows: np.ndarray, labels: np.ndarray) -> FewLabels:
        return FewLabels(
            places=torch.from_numpy(rows),
            features=torch.from_numpy(self.images.features[rows]).float(),
            classes=torch.from_numpy(labels).long(),
        )

    def rows(self, kind: str, count: int, *, seed: int) -> np.ndarray:
        """Images to label."""
        if kind == "random":
            return np.random.default_rng(seed).permutation(len(self.images))[:count]
        probabilities = self.plain.probe.probabilities(self.images.features).numpy()
        return suggest(self.images.features, probabilities, count=count, seed=seed).places


def run(data: Data, images: Images, *, setting: str, counts: list[int], seed: int) -> list[dict[str, Any]]:
    """A row for each classifier."""
    problem = Problem(data, images)

    def row(kind: str, count: int, probe: Probe) -> dict[str, Any]:
        found = evaluate(probe, data.test.features, data.test.labels)
        return {
            "data": data.name,
            "setting": setting,
            "labels": count,
            "chosen": kind,
            "seed": seed,
            "accuracy": found["accuracy"],
            "ece": found["ece"],
            "prior": problem.plain.prior.name,
            "trusted": problem.plain.trusted,
        }

    rows = [row("zero-shot", 0, problem.plain.zero_shot), row("none", 0, problem.plain.probe)]
    for count in counts:
        for kind in ("random", "suggested"):
            places = problem.rows(kind, count, seed=seed)
            truth = images.labels[places]
            rows.append(row(kind, len(places), problem.labelled(places, truth)))
        rng = np.random.default_rng(seed)
        wrong = truth.copy()
        bad = rng.permutation(len(truth))[: round(WRONG * len(truth))]
        wrong[bad] = (wrong[bad] + rng.integers(1, len(problem.names), len(bad))) % len(problem.names)
        rows.append(row("suggested, a tenth wrong", len(places), problem.labelled(places, wrong)))
        if len(np.unique(truth)) > 1:
            rows.append(row("supervised", len(places), problem.supervised(places, truth)))
    return rows


def main() -> None:
    """Print a table of means over the seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--counts", default="50,200")
    parser.add_argument("--unlabelled", type=int, default=10_000)
    parser.add_argument("--settings", default="all,long tail")
    parser.add_argument("--json")
    options = parser.parse_args()
    counts, settings = [int(count) for count in options.counts.split(",")], options.settings.split(",")
    found: list[dict[str, Any]] = []
    begin = time.monotonic()
    for path in options.files:
        for seed in range(options.seeds):
            data, _ = next(file_settings(read_file(path), seed=seed, others=()))
            train = data.train.take(slice(options.unlabelled))
            order = np.random.default_rng(seed).permutation(len(data.head))
            cuts = {"all": train, "long tail": long_tailed(train, ratio=10, order=order)}
            for setting in settings:
                found += run(data, cuts[setting], setting=setting, counts=counts, seed=seed)
                print(f"{data.name}, {setting}, seed {seed}: {time.monotonic() - begin:.0f} s", flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps(found, indent=1))
    keys = list(dict.fromkeys((r["data"], r["setting"], r["labels"], r["chosen"]) for r in found))
    table = []
    for key in keys:
        mine = [r for r in found if (r["data"], r["setting"], r["labels"], r["chosen"]) == key]
        accuracy = [r["accuracy"] for r in mine]
        table.append(
            {
                "data": key[0],
                "setting": key[1],
                "labels": key[2],
                "chosen": key[3],
                "accuracy %": float(np.mean(accuracy)),
                "worst %": min(accuracy),
                "ECE %": float(np.mean([r["ece"] for r in mine])),
                "seeds": len(mine),
            }
        )
    print(format_table(table))
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {time.monotonic() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
