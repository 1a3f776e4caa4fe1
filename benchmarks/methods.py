"""Every method on every setting: accuracy and calibration of the recipe, the field's baselines and zero-shot.

    python benchmarks/methods.py runs/benchmark/features
    python benchmarks/methods.py runs/benchmark/features --quick --json methods.json
    python benchmarks/methods.py --features pets.npz food101.npz --seeds 5

The folder holds finished feature stores, found by what stands before the hash of their names. These make them:

    encode="python jobs/encode.py --out runs/benchmark"
    $encode --data cifar10:train
    $encode --data cifar10:test
    $encode --data cifar10:train --limit 10000 --views weak,gaussian_noise:3,motion_blur:3
    $encode --data cifar10:test --limit 5000 --views weak,gaussian_noise:3,motion_blur:3
    $encode --data cifar100:test --limit 5000
    $encode --data fashion-mnist:train --limit 10000
    $encode --data fashion-mnist:test --limit 5000
    $encode --data pacs-photo/

Settings: all images; long-tailed 1:10 and 1:100 (the k-th class of the seed's order keeps n r^(-k / (K - 1)) images);
three classes, all names candidates; a fifth of the images foreign, of no class (CIFAR-100 in CIFAR-10, CIFAR-10 in the
others); 200 images; corrupted images. Test images are cut and corrupted like the unlabelled ones. At most 10,000
unlabelled images, 3,000 with --quick; without it CIFAR-10's "all" has every image. A seed decides the sample, the order
of the classes and which three; "all" and the corrupted settings run once. Labels cut, measure, and fit the supervised
ceiling (on at most 10,000 images); no method sees them. Seconds are for learning and for labelling the test images.
On a busy machine OMP_NUM_THREADS=1 saves most of the time.

--json writes every mean over seeds as a row. Its `kind` is inductive (test images), transductive (the unlabelled ones),
balanced (the uncut test images where the setting cuts them) or temperature (`method` is lpclip's temperature).
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from baselines import METHODS, NUM_NEIGHBOURS, Problem, cosine_neighbours, supervised
from calibrated import baseline_temperature
from feature_files import file_settings, read_file
from method_data import Data, Images, Setting, long_tailed, only_classes, with_foreign
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from lpclip.config import ClassConfig, EncoderConfig, SelfTrainingConfig
from lpclip.encoders.encoder import Encoder
from lpclip.encoders.load import load_encoder
from lpclip.encoders.prompts import DEFAULT_TEMPLATES
from lpclip.encoders.zero_shot import zero_shot_weights
from lpclip.evaluation.metrics import answers, classification_metrics
from lpclip.features.store import Store
from lpclip.images.classes import map_labels, resolve_classes
from lpclip.jobs.cli import OPTIONS
from lpclip.method.calibration import (
    CALIBRATION_ROWS,
    expected_accuracy,
    label_free_temperature,
    mean_confidence,
    temperature_at,
)
from lpclip.method.confirmation import Sample, choose_prior, with_neighbours
from lpclip.method.presence import with_absent
from lpclip.method.priors import PRIORS
from lpclip.method.probe import Probe, zero_shot_probe
from lpclip.method.self_training import Rounds
from lpclip.method.shard import Shard, fit_whitening
from lpclip.report.tables import format_table

# Unlabelled and test images: one store of both is cut into halves of its row order, which is that of a hash.
STORES = {
    "cifar10": ("cifar10-train", "cifar10-test"),
    "fashion-mnist": ("fashion-mnist-train", "fashion-mnist-test"),
    "pacs-photo": ("pacs-photo", "pacs-photo"),
}
FOREIGN = {"cifar10": "cifar100-test", "fashion-mnist": "cifar10-train", "pacs-photo": "cifar10-train"}
CORRUPTIONS = ("gaussian_noise:3", "motion_blur:3")
ROWS, QUICK_ROWS = 10_000, 3_000
FEW_IMAGES = 2_500
# Baselines that need the graph of cosines, made once: its time is added to each of theirs.
GRAPH_METHODS = ("StatA", "TransCLIP", "ZLaP")
SINGLE_PROMPT = ("a photo of a {}.",)
CONFIG = SelfTrainingConfig()

# Which of `temperatures` lpclip has in the tables of methods.
DEFAULT_TEMPERATURE = "(f) (e), on images held out"
ORACLE = "oracle (test labels)"
CANDIDATES = tuple(PRIORS)
# Accuracy below which a choice is worse than zero-shot, or than the other candidate.
MISS, REGRET = 0.005, 0.01
HEADINGS = {
    "zero-shot (one prompt)": "one prompt",
    "domain-centred zero-shot": "centred",
    "naive hard labels": "hard labels",
    "LP-CLIP (reconstructed)": "LP-CLIP",
    "logit centring": "logits",
    "lpclip --solver gradient": "gradient",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare label-free methods on finished feature stores."""

    folder: tyro.conf.Positional[str | None] = None
    """Folder of feature stores."""
    features: tuple[str, ...] = ()
    """Feature files (.npz, see feature_files.py), such as real CLIP's, as further data sets."""
    quick: bool = False
    """One seed and fewer images: some minutes on two cores."""
    json: str | None = None
    """File to write the rows to."""
    seeds: int = 3
    """Samples of each setting that is one, and cuts of each feature file into halves."""
    data: str = ",".join(STORES)
    """Data sets, by comma."""
    baselines: tuple[str, ...] = tuple(METHODS)
    """Baselines beside zero-shot, by the names in the tables."""


Kind = Literal["inductive", "transductive", "balanced", "temperature"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the results."""

    data: str
    setting: str
    images: int
    method: str
    kind: Kind
    accuracy: float | None = None
    ece: float | None = None
    nll: float | None = None
    seconds: float | None = None
    seeds: int = 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The choices of criteria between the candidates' priors on one sample, and what that was worth."""

    setting: str
    zero_shot: float
    accuracy: dict[str, float]
    """By candidate."""
    choices: dict[str, str]
    """Candidate by criterion."""


def settings(data: Data, *, seed: int, limit: int, limit_all: int) -> Iterator[Setting]:
    """All settings of a seed; those that are no sample come with the first seed only."""
    rng = np.random.default_rng(seed)
    train, test = data.train.take(rng.permutation(len(data.train))), data.test
    order, few = rng.permutation(len(data.head)), rng.permutation(len(data.head))[:3]
    if seed == 0:
        yield Setting(name="all", seed=seed, unlabelled=train.take(slice(limit_all)), test=test)
    for ratio in (10, 100):
        yield Setting(
            name=f"long-tailed 1:{ratio}",
            seed=seed,
            unlabelled=long_tailed(train, ratio=ratio, order=order, limit=limit),
            test=long_tailed(test, ratio=ratio, order=order),
            balanced=test,
        )
    present = only_classes(train, few).take(slice(limit))
    yield Setting(
        name="3 classes", seed=seed, unlabelled=present, test=only_classes(test, few), balanced=test
    )
    if data.foreign is not None:
        mixed = with_foreign(train, data.foreign, share=0.2, limit=limit, rng=rng)
        yield Setting(name="20% foreign", seed=seed, unlabelled=mixed, test=test)
    yield Setting(name="200 images", seed=seed, unlabelled=train.take(slice(200)), test=test)
    for view, (seen, tested) in data.corrupted.items() if seed == 0 else ():
        unlabelled = seen.take(rng.permutation(len(seen))[:limit])
        yield Setting(name=f"corrupted {view}", seed=seed, unlabelled=unlabelled, test=tested)


def find_stores(folder: str) -> dict[str, Store]:
    """The folder's finished stores by path, all of one encoder; ValueError when they are not."""
    paths = [str(file.parent) for file in sorted(Path(folder).glob("*/manifest.json"))]
    found = {path: Store.open(path) for path in paths}
    encoders = [store.manifest.identity["encoder"] for store in found.values()]
    if not encoders or any(encoder != encoders[0] for encoder in encoders):
        raise ValueError(f"{folder} must hold finished feature stores, all of one encoder")
    return found


def pick(stores: dict[str, Store], name: str, *, view: str | None = None) -> str | None:
    """Path of the largest store of that name, with a view that is asked for, else without corruptions."""
    fits = []
    for path, store in stores.items():
        views = store.manifest.views
        right = view in views if view else not any(":" in other for other in views)
        if right and Path(path).name.rpartition("-")[0] == name:
            fits.append((store.manifest.num_rows, path))
    return max(fits)[1] if fits else None


def load_data(stores: dict[str, Store], name: str, *, encoder: Encoder) -> Data | None:
    """A data set, or None, after a line that says so, when stores are missing."""
    names = STORES[name]
    paths = [pick(stores, part) for part in names]
    if missing := [part for part, path in zip(names, paths, strict=True) if path is None]:
        print(f"{name}: left out, there is no store {missing[0]}", flush=True)
        return None
    classes = resolve_classes(ClassConfig(), label_names=stores[str(paths[0])].manifest.label_names)

    def load(path: str | None, *, view: str | None = None) -> Images:
        assert path is not None
        found = stores[path].features(views=(view,) if view else ())
        own = stores[path].manifest.label_names
        labels = map_labels(found.labels, label_names=own, classes=classes, data=path)
        return Images(features=found.strong[view] if view else found.base, labels=labels)

    train, test = (load(path) for path in paths)
    if names[0] == names[1]:
        train, test = train.take(slice(len(train) // 2)), train.take(slice(len(train) // 2, None))
    foreign = pick(stores, FOREIGN[name])
    if foreign is None:
        print(f"{name}: no foreign images, there is no store {FOREIGN[name]}", flush=True)
    seen = {view: [pick(stores, part, view=view) for part in names] for view in CORRUPTIONS}
    corrupted = {v: (load(a, view=v), load(b, view=v)) for v, (a, b) in seen.items() if a and b}
    return Data(
        name=name,
        head=zero_shot_weights(encoder, classes.names, templates=DEFAULT_TEMPLATES),
        single_head=zero_shot_weights(encoder, classes.names, templates=SINGLE_PROMPT),
        temperature=1 / encoder.logit_scale,
        train=train,
        test=test,
        foreign=stores[foreign].features(views=(), with_labels=False).base if foreign else None,
        corrupted=corrupted if names[0] != names[1] else {},
    )


def load_encoder_of(identity: dict[str, Any]) -> Encoder:
    """The encoder that made the stores. Raises ValueError when it cannot be had, or has changed."""
    name, pretrained = identity["name"], identity.get("pretrained")
    config = EncoderConfig(encoder=name, pretrained=pretrained, precision=identity["precision"])
    encoder = load_encoder(config)
    if {**encoder.identity, "dim": encoder.dim} != identity:
        raise ValueError(f"the stores were made with another {name} than this machine's")
    return encoder


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the lowest NLL, which is convex in its inverse; within 2^-8 to 2^8."""

    def nll(power: float) -> float:
        return float(F.cross_entropy(logits.double() / 2**power, labels, ignore_index=-1))

    low, high = -8.0, 8.0
    for _ in range(40):
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        low, high = (low, right) if nll(left) < nll(right) else (left, high)
    return 2.0 ** ((low + high) / 2)


def temperatures(
    probe: Probe, *, zero_shot: Probe, features: np.ndarray, agreement: float | None
) -> dict[str, float]:
    """The label-free temperatures of a probe of temperature 1, on the images that it was fitted to.

    Without an agreement (b) and (d) are (a).
    """
    sample = features[:CALIBRATION_ROWS]
    base, own = mean_confidence(zero_shot, sample), mean_confidence(probe, sample)
    agreement = base if agreement is None else agreement
    targets = {
        "(a) as confident as zero-shot": base,
        "(b) as confident as views agree": agreement,
        "(c) midpoint of zero-shot and itself": (base + own) / 2,
        "(d) midpoint of (a) and (b)": (base + agreement) / 2,
        "(e) zero-shot's odds squared": expected_accuracy(base),
    }
    logits = probe.logits(sample)
    return {name: temperature_at(logits, confidence=target) for name, target in targets.items()}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of the rounds with one prior."""

    probe: Probe
    labels: np.ndarray
    temperatures: dict[str, float]


def train(
    problem: Problem,
    shard: Shard,
    *,
    prior: str,
    agreement: float | None,
    present: np.ndarray | None = None,
    config: SelfTrainingConfig = CONFIG,
) -> Trained:
    """The rounds with a prior, and their probe at the default temperature; among the names `present`, if given."""
    zero_shot = zero_shot_probe(problem.head, temperature=problem.temperature)
    head = zero_shot.weight if present is None else zero_shot.weight[present]
    *_, (state, found) = Rounds(shard, head=head, config=config, prior=PRIORS[prior]).run()
    own = student = state.classifier(head)
    if present is not None:
        found = replace(found, labels=present[found.labels])
        student = with_absent(student, present, zero_shot=zero_shot, features=problem.features)
    probe = Probe(weight=student.weight, bias=student.bias)
    options = temperatures(probe, zero_shot=zero_shot, features=problem.features, agreement=agreement)
    options[DEFAULT_TEMPERATURE] = label_free_temperature(
        probe, zero_shot=zero_shot, features=problem.features, trained=own, head=head
    )
    probe = replace(probe, temperature=options[DEFAULT_TEMPERATURE])
    return Trained(probe=probe, labels=found.labels, temperatures=options)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The methods on one setting of a data set; each part gives rows."""

    data: Data
    setting: Setting
    problem: Problem
    zero_shot: Probe
    methods: tuple[str, ...]
    """Names of the baselines."""

    def row(
        self,
        method: str,
        kind: Kind,
        p: Tensor | None,
        *,
        images: Images | None = None,
        seconds: float | None = None,
    ) -> Row:
        """The metrics of probabilities (n, K) of images, by default the test images."""
        size = len(self.setting.unlabelled)
        row = Row(
            data=self.data.name,
            setting=self.setting.name,
            images=size,
            method=method,
            kind=kind,
            seconds=seconds,
        )
        if p is None:
            return row
        labels = torch.from_numpy((images or self.setting.test).labels)
        found = classification_metrics(answers(p, labels))
        return replace(row, accuracy=found["accuracy"], ece=found["ece"], nll=found["nll"])

    def baselines(self) -> Iterator[Row]:
        """Baselines, and on "all" the ceiling."""
        unlabelled, test = self.setting.unlabelled, self.setting.test
        x, clock = unlabelled.features, Clock()
        _, graph = cosine_neighbours(x, among=x, count=NUM_NEIGHBOURS, same=True)
        problem, graph_seconds = replace(self.problem, neighbours=graph), clock.lap()
        for name in self.methods:
            clock.lap()
            solution = METHODS[name](problem)
            logits, q = solution.logits(test.features), solution.transductive
            seconds = clock.lap() + graph_seconds * (name in GRAPH_METHODS)
            temperature = baseline_temperature(METHODS[name], problem, solution=solution)
            p = torch.softmax(logits / temperature, dim=1)
            yield self.row(name, "inductive", p, seconds=seconds)
            if q is not None:
                yield self.row(name, "transductive", q, images=unlabelled, seconds=seconds)
        yield self.row("zero-shot", "transductive", self.zero_shot.probabilities(x), images=unlabelled)
        if self.setting.name == "all":
            clock.lap()
            ceiling = supervised(
                replace(problem, features=x[:ROWS], neighbours=None), unlabelled.labels[:ROWS]
            )
            p = ceiling.predict(test.features)
            yield self.row("supervised", "inductive", p, seconds=clock.lap())

    def ours(self) -> tuple[list[Row], Trial]:
        """lpclip with each prior and its own choice, which is zero-shot where the rounds are not trusted."""
        head, temperature, x = self.problem.head, self.problem.temperature, self.problem.features
        test, rows, clock = self.setting.test, [], Clock()
        sample = Sample(x, zero_shot=head, temperature=temperature, config=CONFIG, dtype=torch.bfloat16)
        chosen, views = choose_prior(sample)
        choice_seconds = clock.lap()
        shard = Shard(features=x, num_rows=len(x))
        whitening = fit_whitening(shard)
        shard = with_neighbours(
            shard, config=CONFIG, num_classes=len(head), whitening=whitening, dtype=torch.bfloat16
        )
        graph_seconds, found, seconds = clock.lap(), {}, {}
        for prior in PRIORS:
            clock.lap()
            agreement = views[prior].agreement if prior in views else None
            found[prior] = train(self.problem, shard, prior=prior, agreement=agreement)
            p = found[prior].probe.probabilities(test.features)
            seconds[prior] = graph_seconds + clock.lap()
            rows.append(self.row(f"lpclip {prior}", "inductive", p, seconds=seconds[prior]))
        trial = self._trial(rows, found, chosen=chosen)
        best, prior, places = found[chosen], chosen, None
        present = sample.present().places
        if len(present) < len(head):
            clock.lap()
            shard = with_neighbours(
                replace(shard, neighbours=None),
                config=CONFIG,
                num_classes=len(present),
                whitening=whitening,
                dtype=torch.bfloat16,
            )
            prior, places = "weak", present
            best = train(self.problem, shard, prior=prior, agreement=None, present=places)
            seconds[chosen] += clock.lap()
        clock.lap()
        other = replace(CONFIG, solver="gradient")
        gradient = train(self.problem, shard, prior=prior, agreement=None, present=places, config=other).probe
        gradient_seconds = choice_seconds + graph_seconds + clock.lap()
        if not views[chosen].trusted:
            print(f"  {self.data.name}, {self.setting.name}: not trusted, zero-shot stays", flush=True)
            labels = self.zero_shot.logits(x).argmax(dim=1).numpy()
            same = dict.fromkeys(best.temperatures, 1.0)
            best = Trained(probe=self.zero_shot, labels=labels, temperatures=same)
            gradient = self.zero_shot
        p = gradient.probabilities(test.features)
        rows.append(self.row("lpclip --solver gradient", "inductive", p, seconds=gradient_seconds))
        rows += self._product(best, seconds=choice_seconds + seconds[chosen])
        return rows, trial

    def _product(self, best: Trained, *, seconds: float) -> Iterator[Row]:
        unlabelled, test, probe = self.setting.unlabelled, self.setting.test, best.probe
        yield self.row("lpclip", "inductive", probe.probabilities(test.features), seconds=seconds)
        p = probe.probabilities(unlabelled.features)
        yield self.row("lpclip's probe", "transductive", p, images=unlabelled, seconds=seconds)
        known = unlabelled.labels >= 0
        right = float((best.labels == unlabelled.labels)[known].mean())
        yield replace(self.row("lpclip", "transductive", None, seconds=seconds), accuracy=right)
        if (whole := self.setting.balanced) is not None:
            for name, one in {"zero-shot": self.zero_shot, "lpclip": probe}.items():
                yield self.row(name, "balanced", one.probabilities(whole.features), images=whole)
        logits = probe.logits(test.features)
        tried = {**best.temperatures, ORACLE: best_temperature(logits, torch.from_numpy(test.labels))}
        yield self.row("zero-shot", "temperature", self.zero_shot.probabilities(test.features))
        for name, value in tried.items():
            yield self.row(name, "temperature", torch.softmax(logits / value, dim=1))

    def _trial(self, rows: Sequence[Row], found: dict[str, Trained], *, chosen: str) -> Trial:
        base = self.zero_shot.logits(self.problem.features).argmax(dim=1).numpy()
        p = self.zero_shot.probabilities(self.setting.test.features)
        accuracy = {row.method.removeprefix("lpclip "): row.accuracy or 0.0 for row in rows}
        mutual = {name: adjusted_mutual_info_score(base, found[name].labels) for name in CANDIDATES}
        equal = {name: (base == found[name].labels).mean() for name in CANDIDATES}
        return Trial(
            setting=f"{self.data.name} {self.setting.name}",
            zero_shot=self.row("zero-shot", "inductive", p).accuracy or 0.0,
            accuracy={name: accuracy[name] for name in CANDIDATES},
            choices={
                "views' agreement (lpclip)": chosen,
                "mutual information with zero-shot": max(CANDIDATES, key=lambda name: mutual[name]),
                "agreement with zero-shot": max(CANDIDATES, key=lambda name: equal[name]),
                **{f"always {name}": name for name in CANDIDATES},
                ORACLE: max(CANDIDATES, key=lambda name: accuracy[name]),
            },
        )


def run(
    data: Data, setting: Setting, *, baselines: Sequence[str] = tuple(METHODS)
) -> tuple[list[Row], Trial]:
    """lpclip, zero-shot and the baselines on a setting."""
    head, temperature = data.head, data.temperature
    x = setting.unlabelled.features
    problem = Problem(features=x, head=head, single_head=data.single_head, temperature=temperature)
    zero_shot = zero_shot_probe(head, temperature=temperature)
    methods = tuple(name for name in METHODS if name == "zero-shot" or name in baselines)
    bench = Bench(data=data, setting=setting, problem=problem, zero_shot=zero_shot, methods=methods)
    others = list(bench.baselines())
    rows, trial = bench.ours()
    return others + rows, trial


def mean(values: Iterable[float | None]) -> float | None:
    """The mean; None of nothing, or where a value is missing."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(known) else None


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Means of the rows that differ in nothing but the seed, in order of appearance."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.data, row.setting, row.method, row.kind].append(row)
    return [
        replace(
            group[0],
            seeds=len(group),
            images=round(sum(row.images for row in group) / len(group)),
            accuracy=mean(row.accuracy for row in group),
            ece=mean(row.ece for row in group),
            nll=mean(row.nll for row in group),
            seconds=mean(row.seconds for row in group),
        )
        for group in groups.values()
    ]


def accuracy_table(rows: Sequence[Row], *, summary: bool = False) -> list[dict[str, Any]]:
    """A line for each setting and a column for each method; with a summary of all lines at the end."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        place = {"data": row.data, "setting": row.setting, "images": row.images, "seeds": row.seeds}
        line = lines.setdefault((row.data, row.setting), place)
        line[f"{HEADINGS.get(row.method, row.method)} %"] = row.accuracy
    table = list(lines.values())
    if not summary:
        return table
    columns = list(dict.fromkeys(name for line in table for name in line if name.endswith("%")))
    few = [line for line in table if line["images"] < FEW_IMAGES]
    means = {"mean of all": table, f"mean under {FEW_IMAGES:,} images": few}
    ends: list[dict[str, Any]] = [
        {"data": name, **{c: mean(line.get(c) for line in chosen) for c in columns}}
        for name, chosen in means.items()
    ]
    worst = {c: worst_gap((line.get(c), line.get("zero-shot %")) for line in table) for c in columns}
    return [*table, *ends, {"data": "worst gap to zero-shot", **worst}]


def worst_gap(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """The lowest difference of first and second; None of nothing."""
    return min((a - b for a, b in pairs if a is not None and b is not None), default=None)


def method_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each method: means over settings, and how it compares with zero-shot. Inductive rows."""
    base = {(row.data, row.setting): row.accuracy for row in rows if row.method == "zero-shot"}
    table = []
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        pairs = [(row.accuracy, base[row.data, row.setting]) for row in mine]
        table.append(
            {
                "method": method,
                "settings": len(mine),
                "accuracy %": mean(row.accuracy for row in mine),
                "ece": mean(row.ece for row in mine),
                "nll": mean(row.nll for row in mine),
                "seconds": mean(row.seconds for row in mine),
                "worst gap %": worst_gap(pairs),
                "below zero-shot": sum(a < b - MISS for a, b in pairs if a is not None and b is not None),
            }
        )
    return table


def guard_table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A line for each criterion: what its choices were worth, each sample for itself.

    `missed` counts choices that fell more than 0.5 points below zero-shot while the other candidate did not,
    `regret` those more than 1 point below the other candidate. The mean is over settings, of means over seeds.
    """
    table = []
    for criterion in trials[0].choices if trials else ():
        by_setting: dict[str, list[float]] = defaultdict(list)
        gaps, missed, regret = [], 0, 0
        for trial in trials:
            mine = trial.accuracy[trial.choices[criterion]]
            best, floor = max(trial.accuracy.values()), trial.zero_shot - MISS
            by_setting[trial.setting].append(mine)
            gaps.append(mine - trial.zero_shot)
            missed += mine < floor <= best
            regret += mine < best - REGRET
        table.append(
            {
                "criterion": criterion,
                "accuracy %": mean(mean(values) for values in by_setting.values()),
                "worst gap %": min(gaps),
                "missed": missed,
                "regret": regret,
                "samples": len(trials),
            }
        )
    return table


def print_tables(rows: Sequence[Row], trials: Sequence[Trial]) -> None:
    """All tables, from means over seeds and from each sample's choices."""
    of: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of[row.kind].append(row)
    columns = ("method", "settings", "ece", "nll")
    temperature_table = [{name: line[name] for name in columns} for line in method_table(of["temperature"])]
    tables = {
        "Accuracy on test images": accuracy_table(of["inductive"], summary=True),
        "The same on uncut test images": accuracy_table(of["balanced"]),
        "Methods, means over settings": method_table(of["inductive"]),
        "Accuracy on the unlabelled images": accuracy_table(of["transductive"], summary=True),
        "Temperatures of lpclip's probe, means over settings": temperature_table,
        "Choice between the uniform and the weak prior": guard_table(trials),
    }
    for title, table in tables.items():
        print(f"\n{title}\n\n{format_table(table)}" if table else "")


def _of_stores(options: Options) -> Iterator[tuple[Data, Setting]]:
    """The settings of the feature stores' data sets."""
    if options.folder is None:
        return
    names = options.data.split(",")
    if unknown := set(names) - set(STORES):
        raise ValueError(f"unknown data {', '.join(sorted(unknown))}: use {', '.join(STORES)}")
    stores = find_stores(options.folder)
    encoder = load_encoder_of(next(iter(stores.values())).manifest.identity["encoder"])
    for name in names:
        data = load_data(stores, name, encoder=encoder)
        if data is None:
            continue
        limit = QUICK_ROWS if options.quick else ROWS
        limit_all = len(data.train) if name == "cifar10" and not options.quick else limit
        for seed in range(1 if options.quick else options.seeds):
            for setting in settings(data, seed=seed, limit=limit, limit_all=limit_all):
                yield data, setting


def _of_files(options: Options) -> Iterator[tuple[Data, Setting]]:
    """The settings of the feature files."""
    files = [read_file(path) for path in options.features]
    for file in files:
        for seed in range(1 if options.quick else options.seeds):
            yield from file_settings(file, seed=seed, others=[other for other in files if other is not file])


def main(options: Options) -> None:
    """Run every setting, print the tables, write the rows."""
    begin, clock = time.perf_counter(), Clock()
    rows: list[Row] = []
    trials = []
    for data, setting in chain(_of_stores(options), _of_files(options)):
        clock.lap()
        found, trial = run(data, setting, baselines=options.baselines)
        rows += found
        trials.append(trial)
        size, running = len(setting.unlabelled), time.perf_counter() - begin
        took = f"{clock.lap():.0f} s, running {running:.0f} s"
        print(f"{data.name}, {setting.name}, seed {setting.seed}: {size:,} images, {took}", flush=True)
    means = over_seeds(rows)
    print_tables(means, trials)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in means], indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, config=OPTIONS))
