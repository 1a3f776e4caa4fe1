"""The tune job: encode what is missing, run the sweep, choose without labels, show what the choice was worth."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, get_args

import ray
import torch
from scipy.stats import spearmanr

from lpclip import files
from lpclip.config import (
    Criterion,
    SelfTrainingConfig,
    SelftrainJob,
    TuneJob,
    UserError,
    config_identity,
    counted,
    to_dict,
)
from lpclip.encoders.head import EncoderInfo, Head, make_head, take_names
from lpclip.encoders.prompts import templates
from lpclip.evaluation.judge import accuracy, evaluate
from lpclip.features.describe import describe_encoder
from lpclip.images.views import parse_views
from lpclip.jobs import tracking
from lpclip.jobs.console import LITE_NOTE, command_line, print_classes, print_plan
from lpclip.jobs.counts import check_strict
from lpclip.jobs.inputs import EncodedInputs, Inputs, encode_inputs, evaluated_on, open_inputs
from lpclip.jobs.mlflow_model import log_data, log_probe
from lpclip.jobs.process import start_ray
from lpclip.jobs.run import check_job, job_run, provenance, single_metrics
from lpclip.jobs.runtime import Stopwatch, claim, output_folder
from lpclip.jobs.settle_prior import load_prior, print_tried, settle_prior
from lpclip.jobs.tune_print import print_sweep, print_sweep_plan
from lpclip.jobs.tune_runs import TrialRuns
from lpclip.method.calibration import label_free_temperature
from lpclip.method.criteria import CRITERIA, make_yardstick, measure
from lpclip.method.few_labels import FewLabels
from lpclip.method.fit import corrected_zero_shot
from lpclip.method.linear import Linear
from lpclip.method.neighbours import comparison_dtype
from lpclip.method.presence import with_absent
from lpclip.method.priors import Prior
from lpclip.method.probe import Probe, zero_shot_probe
from lpclip.method.recipe import RECIPE
from lpclip.method.trial import ChosenPrior, try_priors
from lpclip.progress import TrialProgress
from lpclip.report.style import save
from lpclip.report.sweep_page import ZERO_SHOT_KEY, criterion_figure, sweep_page
from lpclip.training.search_space import (
    FACTOR,
    Parameters,
    SearchSpace,
    check_space,
    draw_trials,
    read_space,
    trial_config,
)
from lpclip.training.trials import (
    DEFAULT,
    FORMAT,
    Material,
    Plan,
    Status,
    Task,
    TrialRecord,
    prepare,
    read_classifier,
    read_records,
    run_trials,
    trial_name,
)

# The alias of the winner in the model registry.
ALIAS = "champion"


def tune_job(job: TuneJob) -> dict[str, Any]:
    """Search without labels on features that are encoded once; everything goes to OUT and MLflow."""
    check_job(job)
    watch = Stopwatch()
    if job.training.present == "auto":  # trials are compared on the same names
        job = replace(job, training=replace(job.training, present="all"))
    parse_views(job.encode.views)
    space = read_space(job.space)
    if job.search == "optuna" and space.undrawable:
        raise UserError(
            f"--search optuna draws values itself, and cannot draw {', '.join(space.undrawable)} of {job.space}: use "
            "other search spaces than tune.grid_search and tune.sample_from, or --search random"
        )
    if job.resume and not files.exists(job.out):
        raise UserError(f"--resume: {job.out} is not there, so there is no sweep to resume")
    with output_folder(job.out) as out:
        inputs = open_inputs(job)
        names = inputs.classes.names
        # The encoder's temperature is not known yet. With 1 in its place most mistakes are reported at once.
        check_space(space, base=job.training, own_temperature=1.0)
        priors = {spec: load_prior(spec, names) for spec in _prior_specs(job, space)}
        start_ray()
        info = describe_encoder(
            job.encoder,
            class_names=names,
            templates=templates(job.names.templates),
            device=job.encode.device,
        )
        head = make_head(info, names, temperature=None)
        trials = (
            draw_trials(space, count=job.trials, seed=job.training.seed) if job.search == "random" else []
        )
        options: dict[str, Any] = {"base": job.training, "own_temperature": head.temperature}
        drawn = trials or [{**space.fixed, name: v} for name in space.searched for v in space.values(name)]
        configs = [trial_config(parameters, **options) for parameters in ({}, *drawn)]
        # A function of the space's own may name further ones.
        priors |= {c.prior: load_prior(c.prior, names) for c in configs if c.prior not in priors}
        count = len(trials) or job.trials
        concurrent = job.concurrent or max(1, int(ray.cluster_resources().get("CPU", 1)))
        print_plan(inputs.data, inputs.test, info=info, views=job.encode.views, out=out)
        print_classes(names, present=inputs.present, given=inputs.given)
        print_sweep_plan(job, space, count=count, concurrent=concurrent)
        with job_run("tune", job, out=out, encoder=info.name, data=inputs.data.name) as run:
            watch.lap("start")
            sweep = _Sweep(job, out, space, inputs, info, head, run)
            summary = sweep.run(trials, configs, priors, count=count, concurrent=concurrent, watch=watch)
    check_strict(job.source, stores=summary["features"].values())
    return summary


def _strong_views(job: TuneJob) -> tuple[str, ...]:
    return tuple(str(view) for view in parse_views(job.encode.views) if not view.is_base)


def _prior_specs(job: TuneJob, space: SearchSpace) -> list[str]:
    """Every prior that a trial may ask for, the default recipe's first."""
    return [job.training.prior, *space.values("prior")]


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The winner of a sweep, and what every candidate is worth."""

    zero_shot: Probe
    probe: Probe
    """The winner, with its temperature."""
    best: str
    """The winner's name: a trial's, DEFAULT or ZERO_SHOT_KEY."""
    record: TrialRecord | None
    """The winner's trial; None for zero-shot."""
    worth: dict[str, dict[Criterion, float]]
    """By candidate and criterion."""
    accuracy: dict[str, float | None]
    """By candidate; None without labels."""
    trusted: bool
    rejected: list[str]
    """Candidates that the criterion prefers to the winner, but whose own rounds the halves do not confirm."""


def _trial_row(
    trial: TrialRecord, choice: _Choice, *, criterion: Criterion, ece: float | None
) -> dict[str, Any]:
    """A trial in summary.json; `ece` is the winner's."""
    worth = choice.worth.get(trial.name, {})
    return {
        "name": trial.name,
        "parameters": trial.parameters,
        "criterion": worth.get(criterion),
        "criteria": worth,
        "accuracy": choice.accuracy.get(trial.name),
        "ece": ece if trial.name == choice.best else None,
        "rounds": len(trial.rounds),
        "seconds": round(trial.seconds, 3),
        "status": trial.status,
        "error": trial.error,
    }


class _Sweep:
    """A sweep of a job whose inputs are open: its parts in the order of `run`."""

    def __init__(
        self,
        job: TuneJob,
        out: str,
        space: SearchSpace,
        inputs: Inputs,
        info: EncoderInfo,
        head: Head,
        run: tracking.Run,
    ) -> None:
        self._job, self._out, self._space, self._inputs = job, out, space, inputs
        self._info, self._head, self._run = info, head, run
        # Trials know the names that have images, where --present names them; the probes know all.
        self._present = inputs.present
        self._used = head if inputs.present is None else take_names(head, inputs.present)
        self._folder = files.join(out, "trials")
        self._runs: Mapping[str, tracking.Run] = {}
        self._prior: ChosenPrior | None = None
        self._few: FewLabels | None = None

    def run(
        self,
        trials: list[Parameters],
        configs: list[SelfTrainingConfig],
        priors: Mapping[str, Prior | None],
        *,
        count: int,
        concurrent: int,
        watch: Stopwatch,
    ) -> dict[str, Any]:
        """All of it. Returns the summary."""
        job, out, head = self._job, self._out, self._head
        known = encode_inputs(job, self._inputs, info=self._info, head=head, out=out, watch=watch)
        self._few = known.few
        self._x, self._y, self._features = known.x, known.y, known.features.base
        fingerprint = known.encoded.store.manifest.fingerprint
        claim(out, self._identity(fingerprint))
        # Whichever priors are searched: where a sample's views do not agree on the rounds, no trial is to be trusted.
        spec = next(iter(priors)) if len(priors) == 1 else "auto"
        self._prior = settle_prior(
            replace(job.training, prior=spec),
            out=out,
            features=known.features.base,
            prior=priors.get(spec),
            head=head,
            fingerprint=fingerprint,
            present=self._present,
            labels=self._few,
        )
        watch.lap("prior")
        material = self._prepare(known, configs, priors)
        watch.lap("prepare")
        records = self._run_trials(material, trials, count=count, concurrent=concurrent)
        watch.lap("trials")
        choice = self._choose(known, records, material)
        summary = self._summary(known, records, choice)
        watch.lap("choose")
        summary["timings"] = watch.seconds
        log_data(self._run, self._job, self._inputs, known)
        log_probe(self._run, choice.probe, saved=files.join(out, "probe"))
        self._tell_all(summary)
        print_sweep(summary, out=out, run=self._run)
        return summary

    @property
    def _few_used(self) -> FewLabels | None:
        """The given labels, as indices of the names that trials know."""
        if self._few is None or self._present is None:
            return self._few
        return self._few.among(self._present)

    @property
    def _steered(self) -> bool:
        """True where the criterion decides which trials run: it cannot be changed afterwards."""
        return self._job.search != "random" or self._job.scheduler != "none"

    def _identity(self, fingerprint: str) -> dict[str, Any]:
        job = self._job
        given = self._inputs.given
        labels = {} if given is None else {"labels": given.digest}
        return {
            **labels,
            "job": "tune",
            "format": FORMAT,
            "space": self._space.identity,
            "features": fingerprint,
            "head": self._used.identity,
            "training": config_identity(job.training),
            "search": [job.search, job.scheduler, job.criterion if self._steered else None],
        }

    def _prepare(
        self,
        known: EncodedInputs,
        configs: list[SelfTrainingConfig],
        priors: Mapping[str, Prior | None],
    ) -> Material:
        job, head, chosen = self._job, self._used, self._prior
        strong = _strong_views(job)
        loaded = known.encoded.store.features(views=strong, with_labels=False).strong if strong else {}
        print("criteria: finding the clusters and neighbours of a sample, to compare trials with", flush=True)
        weight = torch.tensor(head.weight) / head.temperature
        yardstick = make_yardstick(
            known.features.base,
            num_classes=len(head.class_names),
            seed=job.training.seed,
            zero_shot=Linear(weight=weight, bias=torch.zeros(len(weight))),
        )
        found = {spec: chosen.prior if prior is None and chosen else prior for spec, prior in priors.items()}
        task = Task(
            head=head,
            base=job.training,
            fixed=self._space.fixed,
            priors={
                spec: prior if self._present is None else prior.among(self._present)
                for spec, prior in found.items()
                if prior is not None
            },
            yardstick=yardstick,
            criterion=job.criterion,
            folder=self._folder,
        )
        return prepare(
            known.features.base,
            strong=tuple(loaded.values()),
            task=task,
            configs=configs,
            dtype=comparison_dtype(),
            tell=functools.partial(print, flush=True),
            labels=self._few_used,
        )

    def _run_trials(
        self, material: Material, trials: list[Parameters], *, count: int, concurrent: int
    ) -> list[TrialRecord]:
        files.make_folder(self._folder)
        there = read_records(self._folder)
        wanted = {DEFAULT, *map(trial_name, trials)}
        done = {name: record for name, record in there.items() if not trials or name in wanted}
        if done:
            own = " and the default recipe" if DEFAULT in done else ""
            print(f"trials: {len(done) - len(own[:1])} of {count}{own} are there already", flush=True)
        self._progress = TrialProgress(total=count + 1, done=len(done))
        now = []
        with TrialRuns(self._track_trial, results=self._results, tell=self._tell) as runs:
            for record in done.values():
                runs.keep(record)
            for plan in self._plans(
                [p for p in ({}, *trials) if trial_name(p) not in done], count, concurrent
            ):
                now += run_trials(
                    material,
                    plan=plan,
                    storage=files.join(self._out, "ray"),
                    done={name: record for name, record in done.items() if name != DEFAULT},
                    listener=runs,
                )
        self._runs = runs.runs
        return sorted({o.name: o for o in (*done.values(), *now)}.values(), key=lambda record: record.name)

    def _plans(self, trials: list[Parameters], count: int, concurrent: int) -> list[Plan]:
        """The default recipe and the drawn trials at once; where a search algorithm or a scheduler steers, before them.

        Search algorithms cannot draw the default recipe, and schedulers may not stop it.
        """
        job = self._job
        drawn = Plan(
            space=self._space,
            trials=trials,
            count=count,
            search="random",
            scheduler="none",
            concurrent=concurrent,
        )
        if not self._steered:
            return [drawn]
        first, rest = ([p for p in trials if bool(p) == others] for others in (False, True))
        steered = replace(drawn, trials=rest, search=job.search, scheduler=job.scheduler)
        return [replace(drawn, trials=first), steered]

    def _tell(self, record: TrialRecord) -> None:
        last = record.rounds[-1] if record.rounds else {}
        text = f"{record.status}, {counted(len(record.rounds), 'round')} in {record.seconds:.1f} s"
        if record.error:
            text += f": {record.error}"
        elif "criterion" in last:
            text += f", {self._job.criterion} {last['criterion']:.3f}"
        self._progress.advance(f"the default recipe {text}" if record.name == DEFAULT else text)

    def _track_trial(self, name: str, parameters: Parameters) -> AbstractContextManager[tracking.Run]:
        """A nested run of a trial."""
        return tracking.track(
            self._job.tracking,
            name=_title(name, parameters),
            params=self._training(parameters),
            resume_key=f"tune {self._out} {name}",
            parent=self._run,
        )

    def _results(self, record: TrialRecord) -> dict[str, float | None]:
        if record.status != "finished":
            return {}
        candidate = self._whole(read_classifier(self._folder, record.name))
        return {"test/accuracy": accuracy(candidate, self._x, self._y)}

    def _whole(self, classifier: Linear) -> Linear:
        """A trial's classifier as one of all names."""
        if self._present is None:
            return classifier
        head = self._head
        zero_shot = zero_shot_probe(torch.tensor(head.weight), temperature=head.temperature)
        return with_absent(classifier, self._present, zero_shot=zero_shot, features=self._features)

    def _choose(self, known: EncodedInputs, records: list[TrialRecord], material: Material) -> _Choice:
        """Compare all candidates by every criterion; the winner's probe goes to OUT/probe."""
        head, prior = self._head, self._prior
        about: dict[str, Any] = {"class_names": head.class_names, "encoder": known.probe_encoder}
        zero_shot = zero_shot_probe(torch.tensor(head.weight), temperature=head.temperature, **about)
        finished = {record.name: record for record in records if record.status == "finished"}
        # Ties are decided for zero-shot, then for the default recipe.
        order = sorted(finished, key=lambda name: (name != DEFAULT, name))
        used = zero_shot_probe(torch.tensor(self._used.weight), temperature=head.temperature)
        candidates: dict[str, Linear] = {ZERO_SHOT_KEY: used}
        candidates |= {name: read_classifier(self._folder, name) for name in order}
        whole = {name: self._whole(one) for name, one in candidates.items()} | {ZERO_SHOT_KEY: zero_shot}
        own = ", the default recipe" if DEFAULT in finished else ""
        print(
            f"choosing among {counted(len(finished) - len(own[:1]), 'trial')}{own} and zero-shot", flush=True
        )
        worth = {
            name: {c: measure(material.task.yardstick, candidate, criterion=c) for c in CRITERIA}
            for name, candidate in candidates.items()
        }
        trusted = prior is None or prior.trusted
        best, rejected, confirmed = ZERO_SHOT_KEY, list[str](), None
        if trusted:
            ranked = sorted(worth, key=lambda name: -worth[name][self._job.criterion])
            for best in ranked:
                if best == ZERO_SHOT_KEY:
                    break
                confirmed = self._confirmed(finished[best], known, material)
                if confirmed is not None:
                    break
                rejected.append(best)
        return _Choice(
            zero_shot=zero_shot,
            probe=self._winner(zero_shot, candidates[best], finished.get(best), known, confirmed=confirmed),
            best=best,
            record=finished.get(best),
            worth=worth,
            accuracy={name: accuracy(one, self._x, self._y) for name, one in whole.items()},
            trusted=trusted,
            rejected=rejected,
        )

    def _confirmed(self, record: TrialRecord, known: EncodedInputs, material: Material) -> ChosenPrior | None:
        """Try the rounds as the command that repeats a trial does; None where they cannot be trusted."""
        config = self._config(record)
        assert config.temperature is not None
        print(
            f"{_title(record.name, record.parameters)}: trying its rounds in random halves of the features' directions",
            flush=True,
        )
        try:
            found = try_priors(
                known.features.base,
                torch.tensor(self._used.weight),
                temperature=config.temperature,
                config=config,
                prior=material.task.priors[record.parameters.get("prior", self._job.training.prior)],
                labels=self._few_used,
                show=print_tried,
            )
            why = "" if found.trusted else "; ".join(found.tried[found.name].doubts)
        except UserError as error:  # with a high threshold, a half may keep no label
            why = str(error)
        if why:
            print(
                f"{_title(record.name, record.parameters)}: not chosen, because its rounds cannot be trusted: {why}",
                flush=True,
            )
        return None if why else found

    def _summary(self, known: EncodedInputs, records: list[TrialRecord], choice: _Choice) -> dict[str, Any]:
        """OUT/summary.json but for the timings."""
        criterion = self._job.criterion
        found = evaluate(choice.probe, self._x, self._y)
        trials = [_trial_row(one, choice, criterion=criterion, ece=found["ece"]) for one in records]
        default = next((row for row in trials if row["name"] == DEFAULT), None)
        if default is not None:
            trials.remove(default)
            default["parameters"] = self._shown_default(len(known.features.ids))
        encoded, tested = known.encoded.store, known.tested.store if known.tested else None
        return {
            "criterion": criterion,
            "parameters": list(self._space.searched),
            "trials": trials,
            "default": default,
            "zero_shot": {
                "criterion": choice.worth[ZERO_SHOT_KEY][criterion],
                "criteria": choice.worth[ZERO_SHOT_KEY],
                **evaluate(choice.zero_shot, self._x, self._y),
            },
            "chosen": {
                "name": choice.best,
                "parameters": choice.record.parameters if choice.record else {},
                "criterion": choice.worth[choice.best][criterion],
                "command": self._command(choice.record) if choice.record else None,
                **found,
            },
            "trusted": choice.trusted,
            "rejected": choice.rejected,
            "evidence": _evidence(choice.accuracy, choice.worth, choice.best, criterion=criterion),
            "evaluated_on": evaluated_on(self._inputs, known),
            **({"labels": self._inputs.given.summary()} if self._inputs.given is not None else {}),
            "prior": self._prior.summary(self._head.class_names) if self._prior else None,
            "classes": list(self._head.class_names),
            "encoder": self._info.identity,
            "features": {"train": encoded.path, "eval": tested.path if tested else None},
            "images": {
                "encoded": encoded.manifest.num_rows,
                "quarantined": encoded.manifest.num_quarantined,
            },
            **provenance(self._job, self._run.run_id),
        }

    def _winner(
        self,
        zero_shot: Probe,
        candidate: Linear,
        record: TrialRecord | None,
        known: EncodedInputs,
        *,
        confirmed: ChosenPrior | None,
    ) -> Probe:
        """The winner as a probe with its temperature, saved."""
        probe = zero_shot
        if record is not None:
            whole = self._whole(candidate)
            probe = replace(zero_shot, weight=whole.weight, bias=whole.bias)
            teacher = float(self._training(record.parameters)["temperature"])
            temperature = label_free_temperature(
                probe,
                zero_shot=zero_shot,
                features=known.features.base,
                trained=candidate,
                head=torch.tensor(self._used.weight) / teacher,
            )
            assert confirmed is not None, "a trial wins only if its rounds are trusted"
            probe = replace(probe, temperature=temperature * confirmed.labelled_factor)
        elif self._few is not None:
            probe, temperature = corrected_zero_shot(zero_shot, self._few, features=known.features.base)
            probe = replace(probe, temperature=temperature)
        summary = {
            "method": "self-trained, chosen by a sweep" if record else "zero-shot (chosen by a sweep)",
            "training": {**to_dict(self._job.training), **(record.parameters if record else {})},
            "rounds": len(record.rounds) if record else 0,
            "images": len(known.features.ids),
            "criterion": self._job.criterion,
        }
        probe = replace(probe, summary=summary)
        zero_shot.save(files.join(self._out, "zero_shot"))
        probe.save(files.join(self._out, "probe"))
        return probe

    def _training(self, parameters: Parameters) -> dict[str, Any]:
        """A trial's whole configuration, with the parameters as they were searched."""
        own, base = self._head.temperature, self._job.training
        values = {**to_dict(base), "temperature": base.temperature or own, **parameters}
        if FACTOR in values:
            values["temperature"] = own * values[FACTOR]
        if values["prior"] == "auto" and self._prior is not None:
            values["prior"] = self._prior.name
        return values

    def _config(self, record: TrialRecord) -> SelfTrainingConfig:
        """The training that gives a trial's probe."""
        return SelfTrainingConfig(
            **{k: v for k, v in self._training(record.parameters).items() if k != FACTOR}
        )

    def _shown_default(self, num_rows: int) -> Parameters:
        """The default recipe's values of what the space searches."""
        base, head = self._job.training, self._used
        count = RECIPE.neighbour_count(base, num_rows=num_rows, num_classes=len(head.class_names))
        temperature = base.temperature or head.temperature
        found = {**to_dict(base), "temperature": temperature, FACTOR: temperature / head.temperature}
        return {name: found[name] for name in self._space.searched} | (
            {"neighbours": count} if "neighbours" in self._space.searched else {}
        )

    def _command(self, record: TrialRecord) -> str:
        """The selftrain command that trains the same probe."""
        job = self._job
        # A feature store given as --data holds the features itself, so it needs no folder.
        folder = files.join(job.out, "features") if self._inputs.data.source is not None else None
        again = SelftrainJob(
            data=job.data,
            eval_data=job.eval_data,
            out=files.join(job.out, "again"),
            limit=job.limit,
            eval_limit=job.eval_limit,
            labels=job.labels,
            source=job.source,
            encoder=job.encoder,
            encode=replace(job.encode, features=job.encode.features or folder),
            names=job.names,
            training=self._config(record),
            tracking=replace(job.tracking, run_name=None),
        )
        return command_line("selftrain", again)

    def _names(self) -> str:
        """How many class names there are, and which of them `--present` names."""
        count, used = len(self._head.class_names), self._used.class_names
        if self._present is None:
            return str(count)
        return f"{count}, of which {len(used)} have images, as --present says: {', '.join(used)}"

    def _tell_all(self, summary: dict[str, Any]) -> None:
        """To files, to the page and to MLflow."""
        out, run, criterion = self._out, self._run, self._job.criterion
        files.write_json(files.join(out, "summary.json"), summary)
        facts = {
            "Data": f"{self._inputs.data.describe()}",
            "Encoder": self._info.name + (f" ({LITE_NOTE})" if self._info.name == "lite" else ""),
            "Class names": self._names(),
            "Space": self._job.space,
            "Chosen by": criterion,
        }
        files.write_bytes(files.join(out, "report.html"), sweep_page(summary, facts=facts).encode())
        figures = files.join(out, "figures")
        files.make_folder(figures)
        save(criterion_figure(summary), files.join(figures, "criterion.png"))
        for trial in (*summary["trials"], *([summary["default"]] if summary["default"] else [])):
            values = {f"tune/criterion_{name}": value for name, value in trial["criteria"].items()}
            if child := self._runs.get(trial["name"]):
                child.log({tracking.SWEEP_CRITERION: trial["criterion"], **values})
                child.set_tags({"chosen": trial["name"] == summary["chosen"]["name"]})
        counts = {s: sum(t["status"] == s for t in summary["trials"]) for s in get_args(Status)}
        run.log({f"tune/trials_{status}": count for status, count in counts.items()})
        run.log({f"tune/{name}": value for name, value in (summary["evidence"] or {}).items()})
        run.log({tracking.SWEEP_CRITERION: summary["chosen"]["criterion"], **single_metrics(summary)})
        run.set_tags({"chosen": summary["chosen"]["name"], "criterion": criterion})
        for name in ("probe", "figures", "summary.json", "report.html"):
            run.artifact(files.join(out, name))
        default = summary["default"]
        if not summary["trusted"] or not (
            counts["finished"] or (default and default["status"] == "finished")
        ):
            return  # nothing that deserves the alias
        model = self._job.register or f"lpclip-{self._inputs.data.name}"
        version = run.register(model, alias=ALIAS)
        if version is not None:
            print(f"registry  {model} version {version}, alias {ALIAS}", flush=True)


def _title(name: str, parameters: Parameters) -> str:
    if name == DEFAULT:
        return "default recipe"
    values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in parameters.values()]
    return f"{name[:6]} {' '.join(values)}"[:80]


def _evidence(
    accuracy: Mapping[str, float | None],
    worth: Mapping[str, Mapping[Criterion, float]],
    chosen: str,
    *,
    criterion: Criterion,
) -> dict[str, Any] | None:
    """Regret and rank of the choice among all candidates, zero-shot included; None with too few labels or trials."""
    known = {name: value for name, value in accuracy.items() if value is not None}
    if len(known) < 3:
        return None
    pairs = [(worth[name][criterion], value) for name, value in known.items()]
    first, second = torch.tensor(pairs, dtype=torch.float64).T
    varied = len(first.unique()) > 1 and len(second.unique()) > 1
    return {
        "spearman": float(spearmanr(first, second).statistic) if varied else None,
        "regret": max(known.values()) - known[chosen],
        "best_accuracy": max(known.values()),
        "rank": 1 + sum(value > known[chosen] for value in known.values()),
        "trials": len(known),
    }
