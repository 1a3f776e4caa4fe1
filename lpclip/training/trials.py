"""A sweep: Ray Tune's trials, each a training on features that lie once in shared memory.

OUT/trials/NAME.safetensors   the trial's probe: weight, bias
OUT/trials/NAME.json          parameters, rounds, outcome; written after the tensors: the trial is done when it is there

A trial's name is a digest of its parameters; the one without any is the default recipe's. Ray Tune's own record of an
interrupted sweep runs trials again that were finished, so it is not used: what has a file here is not run again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from safetensors.torch import save as save_tensors

from lpclip import files
from lpclip.config import Criterion, SelfTrainingConfig, UserError, digest
from lpclip.encoders.head import Head
from lpclip.method.criteria import Yardstick, measure
from lpclip.method.few_labels import FewLabels
from lpclip.method.linear import Linear
from lpclip.method.neighbours import nearest
from lpclip.method.priors import Prior
from lpclip.method.recipe import RECIPE
from lpclip.method.self_training import Rounds
from lpclip.method.shard import Shard, Whitenings, fit_whitenings
from lpclip.training.search_space import Parameters, SearchSpace, plain, trial_config
from lpclip.training.tensors import read_tensors

# Trials of another format are of another recipe: a sweep never goes on with them.
FORMAT = 2
# The trial without parameters: the training as the job's flags describe it. It runs in every sweep.
DEFAULT = "default"
# Trials share zero-shot scores up to this many elements, each with a scaled copy. Above it, each pass computes its own.
MAX_SHARED_SCORES = 25_000_000
# A failed trial reports this to search algorithms: less than any criterion gives.
FAILED = -1.0
# Rounds before a scheduler may stop a trial.
GRACE_ROUNDS = 4
MAX_ROUNDS = 1000
# Passes over a sweep: each begins what died in the one before it. A trial begins twice at most in each.
PASSES = 3
METRICS = (
    "round",
    "coverage",
    "mean_confidence",
    "class_entropy",
    "flip_rate",
    "zero_shot_agreement",
    "criterion",
)

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial and its outcome."""

    name: str
    parameters: Parameters
    status: Status
    rounds: list[dict[str, float]]
    """For each round its number, its metrics and the criterion."""
    seconds: float
    error: str | None = None


class Listener:
    """A base class: `run_trials` calls its methods in the driver, and Ray Tune waits until they return."""

    def began(self, name: str, parameters: Parameters) -> None:
        """A trial begins, or begins again after its process died."""

    def went_on(self, name: str, metrics: Mapping[str, float]) -> None:
        """A trial has finished a round."""

    def ended(self, record: TrialRecord) -> None:
        """A trial is over. One that failed has a record like any other."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The part of every trial that its parameters do not change."""

    head: Head
    base: SelfTrainingConfig
    """The training that a trial's parameters change."""
    fixed: Parameters
    """The space's constants, which search algorithms do not know."""
    priors: Mapping[str, Prior]
    """By name, all that trials may ask for."""
    yardstick: Yardstick
    criterion: Criterion
    """Each trial measures it after each round."""
    folder: str
    """OUT/trials."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The trials that run, and the way they run."""

    space: SearchSpace
    trials: list[Parameters]
    """The trials that were drawn beforehand; empty with a search algorithm."""
    count: int
    """Trials of the whole sweep, those that are there already among them."""
    search: Literal["random", "optuna"]
    scheduler: Literal["none", "asha"]
    concurrent: int


@dataclass(frozen=True, kw_only=True)
class Material:
    """Everything that trials share. It lies once in Ray's object store, where all trials on a node read it in place."""

    task: Task
    features: np.ndarray
    strong: tuple[np.ndarray, ...]
    neighbours: np.ndarray | None
    """(n, k) int32, the nearest first: a trial takes as many as it uses."""
    scores: np.ndarray | None
    """(n, K) float32 cosines of zero-shot, where they are small enough to share."""
    whitenings: Whitenings
    labels: FewLabels | None = None
    """Labels that people gave, as indices of the head's classes."""


def prepare(
    features: np.ndarray,
    *,
    strong: tuple[np.ndarray, ...],
    task: Task,
    configs: Sequence[SelfTrainingConfig],
    dtype: torch.dtype,
    tell: Callable[[str], None],
    labels: FewLabels | None = None,
) -> Material:
    """Do once what trainings with these configurations need and what depends on the features (n, d) alone.

    Neighbours are compared in `dtype`; `tell` gets a line about them.
    """
    num_classes = len(task.head.weight)
    shard = Shard(features=features, strong=strong, num_rows=len(features))
    whitenings = fit_whitenings(shard)
    count = max(RECIPE.neighbour_count(c, num_rows=len(features), num_classes=num_classes) for c in configs)
    neighbours = scores = None
    if count:
        tell(f"neighbours: the {count} nearest of {len(features):,} images, once for all trials")
        neighbours = nearest(shard, count=count, whitening=whitenings.base, dtype=dtype).numpy()
    if len(features) * num_classes <= MAX_SHARED_SCORES:
        weight = torch.tensor(task.head.weight)
        scores = torch.cat([rows @ weight.T for _, rows in shard.chunks()]).numpy()
    return Material(
        task=task,
        features=features,
        strong=strong,
        neighbours=neighbours,
        scores=scores,
        whitenings=whitenings,
        labels=labels,
    )


def trial_name(parameters: Parameters) -> str:
    """A digest of the trial's parameters; `DEFAULT` for the training that none of them changes."""
    return digest(parameters)[:12] if parameters else DEFAULT


def run_trials(
    material: Material,
    *,
    plan: Plan,
    storage: str,
    done: Mapping[str, TrialRecord],
    listener: Listener,
) -> list[TrialRecord]:
    """Run what is not `done`: the plan's drawn trials, or with a search algorithm as many as make up its count."""
    # The sweep does without Tune's tables on the terminal, its logs and working directory for each trial, and its way
    # with Ctrl-C, which would pass for the end of the sweep.
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
        RAY_CHDIR_TO_TRIAL_DIR="0",
        RAY_AIR_NEW_OUTPUT="0",
    )
    if plan.search == "random" and not plan.trials:
        return []
    watch = _Watch(material.task.folder, material.task.fixed, listener)
    # The reference is in a list, so that Tune does not fetch it for every trial: each process does so once.
    trainable = tune.with_parameters(_run_trial, shared=[ray.put(material)])
    for number in range(1, PASSES + 1):
        watch.is_last = number == PASSES
        _run_pass(trainable, plan=plan, task=material.task, storage=storage, done=done, watch=watch)
        if not watch.died:
            break
        # Those that a scheduler would compare them with are over.
        plan = replace(plan, trials=watch.died, search="random", scheduler="none")
        watch.died = []
    return watch.records


def _run_pass(
    trainable: Any, *, plan: Plan, task: Task, storage: str, done: Mapping[str, TrialRecord], watch: _Watch
) -> None:
    algorithm, num_samples = None, 1
    parameter_space: dict[str, Any] = {"parameters": tune.grid_search(plan.trials)}
    if plan.search == "optuna":
        algorithm = _optuna(plan.space, done, seed=task.base.seed)
        num_samples = plan.count - len(done)
        parameter_space = {}  # the algorithm has it
        if num_samples < 1:
            return
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space=parameter_space,
        tune_config=tune.TuneConfig(
            metric="criterion",
            mode="max",
            search_alg=algorithm,
            scheduler=_scheduler(plan.scheduler),
            num_samples=num_samples,
            max_concurrent_trials=plan.concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=storage,
            verbose=0,
            callbacks=[watch],
            # A trial's own mistakes are caught in it: what fails here is a process or a host that died. The trial
            # begins again at once, but only once: a host that is cut off looks well to Ray for a minute.
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    ).fit()


def read_records(folder: str) -> dict[str, TrialRecord]:
    """The trials that are there, by name."""
    names = [name for name in files.list_names(folder) if name.endswith(".json")]
    found = [TrialRecord(**files.read_json(files.join(folder, name))) for name in names]
    return {record.name: record for record in found}


def read_classifier(folder: str, name: str) -> Linear:
    """The classifier that a finished trial has trained. Raises UserError when it is damaged."""
    path = files.join(folder, f"{name}.safetensors")
    tensors = read_tensors(path, remedy=f"remove it and {name}.json, the trial runs again")
    return Linear(weight=tensors["weight"], bias=tensors["bias"])


@functools.lru_cache(maxsize=1)
def _fetch(shared: ray.ObjectRef) -> Material:
    return cast("Material", ray.get(shared))


def _run_trial(config: dict[str, Any], *, shared: list[ray.ObjectRef]) -> None:
    """A trial, in a process of Ray Tune's: train, tell Tune of every round, leave the probe and the record."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
    _give_back_memory()
    material = _fetch(shared[0])
    task = material.task
    parameters = _parameters(config, fixed=task.fixed)
    name = trial_name(parameters)
    path = files.join(task.folder, f"{name}.json")
    if files.exists(path):  # a search algorithm may ask twice for the same
        tune.report(_last_word(TrialRecord(**files.read_json(path))))
        return
    begin, rounds, error = time.monotonic(), list[dict[str, float]](), None
    try:
        training = trial_config(parameters, base=task.base, own_temperature=task.head.temperature)
        for last, metrics in _train(training, material=material):
            classifier = last
            rounds.append(metrics)
            tune.report(metrics)
    except UserError as found:
        error = str(found)
    if error is None:
        tensors = {"weight": classifier.weight.contiguous(), "bias": classifier.bias.contiguous()}
        files.write_bytes(files.join(task.folder, f"{name}.safetensors"), save_tensors(tensors))
    record = TrialRecord(
        name=name,
        parameters=parameters,
        status="finished" if error is None else "failed",
        rounds=rounds,
        seconds=time.monotonic() - begin,
        error=error,
    )
    files.write_json(path, vars(record))
    if error is not None:
        tune.report(_last_word(record))


def _give_back_memory() -> None:
    """To the system, what earlier trials left free.

    Tune runs each trial in a thread of its own, and the C library keeps a heap for each: they would add up.
    """
    with contextlib.suppress(AttributeError):  # only glibc has it, and needs it
        ctypes.CDLL(None).malloc_trim(0)


def _train(training: SelfTrainingConfig, *, material: Material) -> Iterator[tuple[Linear, dict[str, float]]]:
    """The rounds of a trial: classifier and metrics of each. Raises UserError when nothing can come of them."""
    assert training.temperature is not None
    head = torch.from_numpy(material.task.head.weight) / training.temperature
    count = RECIPE.neighbour_count(training, num_rows=len(material.features), num_classes=len(head))
    near, scores = material.neighbours, material.scores
    shard = Shard(
        features=material.features,
        strong=material.strong,
        num_rows=len(material.features),
        neighbours=torch.from_numpy(near[:, :count]) if near is not None and count else None,
        zero_shot=torch.from_numpy(scores) / training.temperature if scores is not None else None,
    )
    rounds = Rounds(
        shard,
        head=head,
        prior=material.task.priors[training.prior],
        config=training,
        whitenings=material.whitenings,
        labels=material.labels,
    )
    for state, found in rounds.run():
        classifier = state.classifier(head)
        if not (classifier.weight.isfinite().all() and classifier.bias.isfinite().all()):
            raise UserError(f"the probe of round {state.round} is not finite")
        if len(np.unique(found.labels)) < 2:
            raise UserError(f"collapse: in round {state.round} all labels fell into one class")
        criterion = measure(material.task.yardstick, classifier, criterion=material.task.criterion)
        yield classifier, {"round": state.round, **state.metrics, "criterion": criterion}


def _last_word(record: TrialRecord) -> dict[str, float]:
    """The last report to schedulers and search algorithms of a trial that is over."""
    last = record.rounds[-1] if record.rounds else {"round": 0.0}
    return last if record.status == "finished" else {**last, "criterion": FAILED}


def _parameters(config: dict[str, Any], *, fixed: Parameters) -> Parameters:
    """A drawn trial's own, which has the space's constants already, or those that a search algorithm gives."""
    return plain(config["parameters"]) if "parameters" in config else {**fixed, **plain(config)}


class _Watch(tune.Callback):
    """Turns what Tune says of trials, in the driver, into records."""

    def __init__(self, folder: str, fixed: Parameters, listener: Listener) -> None:
        self.records: list[TrialRecord] = []
        self.died: list[Parameters] = []
        """What a later pass begins again."""
        self.is_last = False
        self._folder, self._fixed, self._listener = folder, fixed, listener
        self._rounds: dict[str, list[dict[str, float]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy beside its own record of the sweep, which is not used.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._rounds[trial.trial_id] = []  # those of a process that died do not count
        parameters = _parameters(trial.config, fixed=self._fixed)
        self._listener.began(trial_name(parameters), parameters)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        kept = {k: v for k, v in result.items() if k in METRICS}
        self._rounds[trial.trial_id].append(kept)
        if kept.get("criterion") != FAILED:
            self._listener.went_on(trial_name(_parameters(trial.config, fixed=self._fixed)), kept)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial, status="stopped", error=None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if not self.is_last:
            self.died.append(_parameters(trial.config, fixed=self._fixed))
            return
        # Ray's reason differs with the moment of the death: "The actor never ran" says little to a reader.
        lines = str(trial.get_error() or "no reason is known").strip().splitlines()
        self._end(trial, status="failed", error=f"it died each time it was begun: {lines[-1]}")

    def _end(self, trial: Trial, *, status: Status, error: str | None) -> None:
        parameters = _parameters(trial.config, fixed=self._fixed)
        name = trial_name(parameters)
        path = files.join(self._folder, f"{name}.json")
        rounds = self._rounds.pop(trial.trial_id, [])
        if files.exists(path):
            record = TrialRecord(**files.read_json(path))
        else:
            record = TrialRecord(
                name=name,
                parameters=parameters,
                status=status,
                rounds=rounds,
                seconds=trial.last_result.get("time_total_s", 0.0),
                error=error,
            )
            if status == "stopped":  # what a process took with it may be tried again
                files.write_json(path, vars(record))
        self.records.append(record)
        self._listener.ended(record)


def _scheduler(name: Literal["none", "asha"]) -> TrialScheduler:
    if name == "none":
        return FIFOScheduler()
    return ASHAScheduler(time_attr="round", grace_period=GRACE_ROUNDS, max_t=MAX_ROUNDS, reduction_factor=3)


def _optuna(space: SearchSpace, done: Mapping[str, TrialRecord], *, seed: int) -> Searcher:
    """Optuna's TPE, which starts from the trials that are there already."""
    told = [record for record in done.values() if record.status != "stopped"]
    points = [{name: record.parameters[name] for name in space.searched} for record in told]
    rewards = [record.rounds[-1]["criterion"] if record.status == "finished" else FAILED for record in told]
    logging.getLogger("optuna").setLevel(logging.WARNING)
    return OptunaSearch(
        OptunaSearch.convert_search_space(space.searched),
        metric="criterion",
        mode="max",
        # The seed is another than before: the same one would draw the known trials again.
        seed=(seed + 7919 * len(done)) % 2**32,
        points_to_evaluate=points or None,
        evaluated_rewards=rewards or None,
    )
