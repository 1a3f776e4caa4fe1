"""The cost of label-free criteria: the regret of every criterion on every data set, over one sweep of each.

    python benchmarks/criteria.py runs/benchmark/features
    python benchmarks/criteria.py runs/benchmark/features --data pacs-photo --trials 16 --json criteria.json

The folder holds finished feature stores with strong views, found by what stands before the hash of their names:

    encode="python jobs/encode.py --out runs/benchmark --views weak,mirror,strong"
    $encode --data cifar10:train
    $encode --data cifar10:test --views weak,mirror
    $encode --data fashion-mnist:train --limit 10000
    $encode --data fashion-mnist:test --limit 5000 --views weak,mirror
    $encode --data pacs-photo/

Each data set as it is, and long-tailed 1:10 and 1:100 (the k-th class of the seed's order keeps n r^(-k / (K - 1))
images, at most 10,000 in all; the test images are cut in the same way). PACS is cut into halves, to train and to test
on. A sweep is what jobs/tune.py runs: the prior is settled once, all trials of the space run, every criterion judges
them on the same sample of unlabelled images. Test labels measure, and nothing else.

Regret: points of test accuracy that the choice lies below the best candidate, zero-shot among the candidates. Rank: the
share of candidates that are better. "default" is the recipe without a sweep, "mean trial" a choice by lot.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from methods import STORES, Images, find_stores, load_encoder_of, long_tailed, pick
from scipy.stats import spearmanr
from torch import Tensor

from lpclip.config import ClassConfig, SelfTrainingConfig, digest
from lpclip.encoders.encoder import resolve_precision
from lpclip.encoders.head import Head
from lpclip.encoders.prompts import DEFAULT_TEMPLATES
from lpclip.encoders.zero_shot import zero_shot_weights
from lpclip.images.classes import map_labels, resolve_classes
from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.process import start_ray
from lpclip.method.confirmation import Sample, choose_prior
from lpclip.method.criteria import CRITERIA, make_yardstick, measure
from lpclip.method.linear import Linear
from lpclip.method.priors import PRIORS
from lpclip.progress import TrialProgress
from lpclip.report.tables import format_table
from lpclip.training.search_space import draw_trials, read_space, trial_config
from lpclip.training.trials import (
    Listener,
    Plan,
    Task,
    TrialRecord,
    prepare,
    read_classifier,
    run_trials,
    trial_name,
)

RATIOS = (1, 10, 100)
LIMIT = 10_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the regret of label-free criteria on finished feature stores."""

    folder: tyro.conf.Positional[str]
    """Folder of feature stores."""
    space: str = "default"
    """The space that is searched."""
    trials: int = 64
    """Trials of each sweep."""
    seed: int = 0
    """Seed of the sample, the order of the classes and the trials."""
    data: str = ",".join(STORES)
    """Data sets, by comma."""
    ratios: str = ",".join(map(str, RATIOS))
    """Imbalances, comma-separated: 10 makes a 1:10 long tail, 1 leaves the data as it is."""
    json: str | None = None
    """File to write the rows to."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Unlabelled images with a strong view, and labelled test images, as features (n, d) float16."""

    name: str
    features: np.ndarray
    strong: np.ndarray
    test: Images
    head: Tensor
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """The outcome of one criterion's choice in one setting, in fractions."""

    setting: str
    criterion: str
    accuracy: float
    regret: float
    rank: float | None = None
    spearman: float | None = None


class _Shown(Listener):
    """Shows the trials as they end."""

    def __init__(self, total: int) -> None:
        self.progress = TrialProgress(total=total, done=0)

    def ended(self, record: TrialRecord) -> None:
        self.progress.advance(record.status)


def settings(options: Options) -> Iterator[Setting]:
    """All data sets that the folder has, each with every ratio."""
    stores = find_stores(options.folder)
    encoder = load_encoder_of(next(iter(stores.values())).manifest.identity["encoder"])
    for name in options.data.split(","):
        paths = [pick(stores, STORES[name][0], view="strong"), pick(stores, STORES[name][1])]
        if STORES[name][0] == STORES[name][1]:
            paths[1] = paths[0]
        if None in paths:
            print(f"{name}: left out, a store of {STORES[name]} is missing", flush=True)
            continue
        train, test = (
            stores[str(path)].features(views=views)
            for path, views in zip(paths, (("strong",), ()), strict=True)
        )
        names = [stores[str(path)].manifest.label_names for path in paths]
        classes = resolve_classes(ClassConfig(), label_names=names[0])
        y, test_y = (
            map_labels(found.labels, label_names=own, classes=classes, data=name)
            for found, own in zip((train, test), names, strict=True)
        )
        head = zero_shot_weights(encoder, classes.names, templates=DEFAULT_TEMPLATES)
        rows, test_rows = np.arange(len(y)), np.arange(len(test_y))
        if paths[0] == paths[1]:
            rows, test_rows = np.array_split(rows, 2)
        for ratio in map(int, options.ratios.split(",")):
            rng = np.random.default_rng(options.seed)
            order = rng.permutation(len(classes.names))
            # The places of images, cut as images are.
            seen = Images(features=rows, labels=y[rows]).take(rng.permutation(len(rows)))
            asked = Images(features=test_rows, labels=test_y[test_rows])
            if ratio > 1:
                seen = long_tailed(seen, ratio=ratio, order=order, limit=LIMIT)
                seen = seen.take(rng.permutation(len(seen)))
                asked = long_tailed(asked, ratio=ratio, order=order)
            yield Setting(
                name=name if ratio == 1 else f"{name} 1:{ratio}",
                features=train.base[seen.features],
                strong=train.strong["strong"][seen.features],
                test=Images(features=test.base[asked.features], labels=asked.labels),
                head=head,
                temperature=1 / encoder.logit_scale,
            )


def sweep(setting: Setting, options: Options) -> list[Row]:
    """One sweep, judged by every criterion."""
    base = SelfTrainingConfig(seed=options.seed)
    space = read_space(options.space)
    trials = draw_trials(space, count=options.trials, seed=options.seed)
    default = {"rounds": base.rounds}
    configs = [trial_config(p, base=base, own_temperature=setting.temperature) for p in (*trials, default)]
    dtype = resolve_precision("auto", device=torch.device("cpu"))
    sample = Sample(
        setting.features, zero_shot=setting.head, temperature=setting.temperature, config=base, dtype=dtype
    )
    prior, _ = choose_prior(sample)
    zero_shot = Linear(weight=setting.head / setting.temperature, bias=torch.zeros(len(setting.head)))
    yardstick = make_yardstick(
        setting.features, num_classes=len(setting.head), seed=options.seed, zero_shot=zero_shot
    )
    names = tuple(map(str, range(len(setting.head))))
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            head=Head(
                class_names=names,
                weight=setting.head.numpy(),
                temperature=setting.temperature,
                identity=digest(setting.name),
            ),
            base=base,
            fixed=space.fixed,
            priors={"auto": PRIORS[prior], **PRIORS},
            yardstick=yardstick,
            criterion="structure",
            folder=folder,
        )
        material = prepare(
            setting.features,
            strong=(setting.strong,),
            task=task,
            configs=configs,
            dtype=dtype,
            tell=print,
        )
        plan = Plan(
            space=space,
            trials=[*trials, default],
            count=len(configs),
            search="random",
            scheduler="none",
            concurrent=torch.get_num_threads(),
        )
        outcomes = run_trials(
            material,
            plan=plan,
            storage=str(Path(folder, "ray")),
            done={},
            listener=_Shown(len(configs)),
        )
        finished = sorted(o.name for o in outcomes if o.status == "finished")
        found = {name: read_classifier(folder, name) for name in finished}
    plain = found.pop(trial_name(default))
    candidates = [zero_shot, *found.values()]

    def accuracy(candidate: Linear) -> float:
        return float((candidate.predict(setting.test.features) == setting.test.labels).mean())

    accuracies = np.array([accuracy(candidate) for candidate in candidates])
    best = float(accuracies.max())
    rows = [
        Row(setting=setting.name, criterion=name, accuracy=float(value), regret=float(best - value))
        for name, value in (
            ("zero-shot", accuracies[0]),
            ("default", accuracy(plain)),
            ("mean trial", accuracies[1:].mean()),
        )
    ]
    for criterion in CRITERIA:
        values = np.array([measure(yardstick, one, criterion=criterion) for one in candidates])
        chosen = accuracies[values.argmax()]
        rows.append(
            Row(
                setting=setting.name,
                criterion=criterion,
                accuracy=float(chosen),
                regret=float(best - chosen),
                rank=float((accuracies > chosen).mean()),
                spearman=float(spearmanr(values, accuracies).statistic),
            )
        )
    return rows


def main(options: Options) -> None:
    """Run all sweeps and print the tables."""
    start_ray()
    rows: list[Row] = []
    for setting in settings(options):
        begin = time.monotonic()
        found = sweep(setting, options)
        rows += found
        shown = [{k: v for k, v in asdict(row).items() if k != "setting"} for row in found]
        columns = {"accuracy": "accuracy %", "regret": "regret %", "rank": "rank %"}
        print(f"\n{setting.name}: {len(setting.features):,} images, {time.monotonic() - begin:.0f} s")
        print(format_table([{columns.get(k, k): v for k, v in row.items()} for row in shown]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    names = list(dict.fromkeys(row.setting for row in rows))
    by = {(row.criterion, row.setting): row for row in rows}
    print("\nregret in points / Spearman correlation with test accuracy")
    table = []
    for criterion in dict.fromkeys(row.criterion for row in rows):
        found = [by[criterion, name] for name in names]
        cells = {
            row.setting: f"{100 * row.regret:.1f}"
            + (f" / {row.spearman:.2f}" if row.spearman is not None else "")
            for row in found
        }
        regrets = [row.regret for row in found]
        table.append(
            {
                "criterion": criterion,
                **cells,
                "mean %": float(np.mean(regrets)),
                "worst %": float(np.max(regrets)),
            }
        )
    print(format_table(table))


if __name__ == "__main__":
    main(tyro.cli(Options, config=OPTIONS))
