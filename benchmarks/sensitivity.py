"""How much each constant of the method matters: halved and doubled, one after the other, on feature files.

    python benchmarks/sensitivity.py --features pets.npz dtd.npz cifar10.npz
    python benchmarks/sensitivity.py --features pets.npz --constants text_rows WEAK_STRENGTH --seeds 3 --json rows.json
    python benchmarks/sensitivity.py --features pets.npz --only-as-it-is --seeds 5

Each file (feature_files.py) is cut into its settings. `lpclip.fit` trains on the unlabelled images of each, first as it
is, then with one constant changed, and the probe labels test images. A constant between 0 and 1 has its odds halved and
doubled. The first table has the default, the second the mean changes of accuracy and calibration error in points, and
the change of accuracy on the setting that is harmed most. Constants that feature files cannot tell of are not here:
those of strong views, of very many images, and of memory.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from feature_files import file_settings, read_file
from method_data import Data, Images, Setting

from lpclip.config import SelfTrainingConfig
from lpclip.evaluation.metrics import answers, classification_metrics
from lpclip.jobs.cli import OPTIONS
from lpclip.method.fit import fit
from lpclip.method.priors import PRIORS, Prior
from lpclip.method.probe import Probe
from lpclip.method.recipe import RECIPE
from lpclip.report.tables import format_table

RECIPE_CONSTANTS = (
    "text_rows",
    "confidence",
    "zero_shot_share",
    "neighbour_weight",
    "neighbour_floor",
    "min_neighbours",
    "max_neighbours",
    "stop_flip_rate",
    "first_prior_steps",
)
GRADIENT_CONSTANTS = ("gradient_epochs", "gradient_batch", "gradient_rate")
MODULE_CONSTANTS = {
    "gaussian": ("LEAST_SHRINKAGE", "LEAST_TOTAL_SHRINKAGE", "IDENTITY_ROWS", "ROUNDING"),
    "priors": ("MAX_FACTOR", "WEAK_STRENGTH"),
    "confirmation": ("TOLERANCE", "SUSPICION", "LEAST_ENTROPY", "MIN_KAPPA", "SPLITS", "HALF_ROUNDS"),
    "chance": ("HEADS",),
    "presence": (
        "SURE",
        "ENOUGH_ROWS",
        "ENOUGH_OF_ALL",
        "ENOUGH_SURE",
        "CROWD",
        "CROWD_NAMES",
        "SURE_SHARE",
        "LABEL_SHARE",
        "MOST_LEFT",
        "STEPS",
        "TAKEN",
    ),
    "held_out": ("FOLDS",),
}
PLACES = {name: module for module, names in MODULE_CONSTANTS.items() for name in names}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Halve and double each constant of the method."""

    features: tuple[str, ...]
    """Feature files (.npz, see feature_files.py)."""
    constants: tuple[str, ...] = ()
    """Those to change, by name; all of the solver if none are named."""
    solver: Literal["gaussian", "gradient"] = "gaussian"
    """Solver of the rounds."""
    only_as_it_is: bool = False
    """Change none: the table of the default on every setting is all that is wanted."""
    settings: tuple[str, ...] = ()
    """Settings to keep, by the names in the tables; all but the random heads if none are named."""
    seeds: int = 1
    """Cuts of each file into halves."""
    json: str | None = None
    """File for a row of each run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training on one setting."""

    constant: str
    value: float
    factor: float
    data: str
    setting: str
    seed: int
    accuracy: float
    zero_shot: float
    ece: float
    zero_shot_ece: float


@dataclass(frozen=True)
class FileHead:
    """The zero-shot head of a feature file."""

    class_names: tuple[str, ...]
    weight: np.ndarray
    temperature: float
    encoder: dict[str, Any]


def main(options: Options) -> None:
    """Run all, and print a row for each constant as soon as it is there."""
    torch.set_num_threads(1)
    cases = list(_cases(options))
    everything = GRADIENT_CONSTANTS if options.solver == "gradient" else (*RECIPE_CONSTANTS, *PLACES)
    constants = options.constants or everything
    config = SelfTrainingConfig(solver=options.solver)
    print(f"{len(cases)} settings, {len(constants)} constants, each halved and doubled")
    start = time.perf_counter()
    rows = list(_runs(cases, "as it is", value=0, factor=1, config=config))
    print(format_table(list(_settings_table(rows))))
    if not options.only_as_it_is:
        seconds = time.perf_counter() - start
        print(f"about {seconds * 2 * len(constants) / 60:.0f} minutes for the rest", flush=True)
        rows += _change_each(cases, constants, as_it_is=rows, config=config)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))


def _change_each(
    cases: Sequence[tuple[Data, Setting]],
    constants: Sequence[str],
    *,
    as_it_is: Sequence[Run],
    config: SelfTrainingConfig,
) -> list[Run]:
    table, rows = [], []
    for constant in constants:
        usual = current(constant)
        changed = {}
        for factor in (0.5, 2.0):
            value = scaled(usual, factor=factor)
            with changed_to(constant, value):
                changed[factor] = list(_runs(cases, constant, value=value, factor=factor, config=config))
        rows += [row for found in changed.values() for row in found]
        table.append(_line(constant, usual, changed, as_it_is=as_it_is))
        print(*table[-1].values(), sep="  ", flush=True)
    print(format_table(table))
    return rows


def _settings_table(rows: Sequence[Run]) -> Iterator[dict[str, str]]:
    by_setting: dict[tuple[str, str], list[Run]] = {}
    for row in rows:
        by_setting.setdefault((row.data, row.setting), []).append(row)
    for (data, setting), found in {**by_setting, ("mean", ""): list(rows)}.items():
        gains = [row.accuracy - row.zero_shot for row in found]
        means = {field: _mean(found, field) for field in ("zero_shot", "accuracy", "zero_shot_ece", "ece")}
        yield {
            "data": data,
            "setting": setting,
            "zero-shot": f"{means['zero_shot']:.1f}",
            "lpclip": f"{means['accuracy']:.1f}",
            "worst run": f"{min(gains):+.1f}",
            "zero-shot ECE": f"{means['zero_shot_ece']:.1f}",
            "ECE": f"{means['ece']:.1f}",
        }


def current(constant: str) -> float:
    """The value of a constant. Raises KeyError when there is none of this name."""
    if hasattr(RECIPE, constant):
        return float(getattr(RECIPE, constant))
    return float(getattr(importlib.import_module(f"lpclip.method.{PLACES[constant]}"), constant))


def scaled(value: float, *, factor: float) -> float:
    """A value times the factor; of one between 0 and 1, the odds are multiplied."""
    if 0 < value < 1:
        odds = factor * value / (1 - value)
        return odds / (1 + odds)
    return max(1.0, round(factor * value)) if value == int(value) else factor * value


@contextmanager
def changed_to(constant: str, value: float) -> Iterator[None]:
    """The method with another value of a constant, in this process."""
    usual = current(constant)
    _set(constant, value)
    try:
        yield
    finally:
        _set(constant, usual)


def _set(constant: str, value: float) -> None:
    number = int(value) if value == int(value) else value
    if hasattr(RECIPE, constant):
        # A frozen dataclass, of which the whole method has the one object.
        object.__setattr__(RECIPE, constant, number)
        return
    setattr(importlib.import_module(f"lpclip.method.{PLACES[constant]}"), constant, number)
    if constant == "WEAK_STRENGTH":
        PRIORS["weak"] = Prior(strength=value)


def _cases(options: Options) -> Iterator[tuple[Data, Setting]]:
    files = [read_file(path) for path in options.features]
    for seed in range(options.seeds):
        for file in files:
            others = [other for other in files if other is not file]
            for data, setting in file_settings(file, seed=seed, others=others):
                if setting.name in options.settings or (
                    not options.settings and setting.name != "random head"
                ):
                    yield data, setting


def _runs(
    cases: Sequence[tuple[Data, Setting]],
    constant: str,
    *,
    value: float,
    factor: float,
    config: SelfTrainingConfig,
) -> Iterator[Run]:
    for data, setting in cases:
        names = tuple(map(str, range(len(data.head))))
        head = FileHead(class_names=names, weight=data.head.numpy(), temperature=data.temperature, encoder={})
        found = fit(setting.unlabelled.features, head, config=config)
        own, other = (_measured(probe, setting.test) for probe in (found.probe, found.zero_shot))
        yield Run(
            constant=constant,
            value=value,
            factor=factor,
            data=data.name,
            setting=setting.name,
            seed=setting.seed,
            accuracy=own[0],
            zero_shot=other[0],
            ece=own[1],
            zero_shot_ece=other[1],
        )


def _measured(probe: Probe, images: Images) -> tuple[float, float]:
    """Accuracy and expected calibration error in points."""
    p = torch.softmax(probe.logits(images.features) / probe.temperature, dim=1)
    found = classification_metrics(answers(p, torch.from_numpy(images.labels)))
    accuracy, ece = found["accuracy"], found["ece"]
    if accuracy is None or ece is None:
        raise ValueError("no test image has a label")
    return 100 * accuracy, 100 * ece


def _mean(rows: Sequence[Run], field: str) -> float:
    return float(np.mean([getattr(row, field) for row in rows]))


def _line(
    constant: str, usual: float, changed: dict[float, list[Run]], *, as_it_is: Sequence[Run]
) -> dict[str, str]:
    line = {"constant": constant, "as it is": f"{usual:g}"}
    for factor, rows in changed.items():
        worst = min(row.accuracy - before.accuracy for row, before in zip(rows, as_it_is, strict=True))
        gain, ece = (_mean(rows, field) - _mean(as_it_is, field) for field in ("accuracy", "ece"))
        name = f"x {factor:g}"
        line |= {name: f"{rows[0].value:.3g}", f"mean, {name}": f"{gain:+.2f}"}
        line |= {f"worst, {name}": f"{worst:+.1f}", f"ECE, {name}": f"{ece:+.2f}"}
    return line


if __name__ == "__main__":
    main(tyro.cli(Options, config=OPTIONS))
