"""The selftrain job: encode what is missing, choose the prior, run the rounds, evaluate where labels exist."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure

from lpclip import files
from lpclip.config import SelftrainJob, UserError, config_identity
from lpclip.encoders.head import EncoderInfo, Head, make_head, take_names
from lpclip.encoders.prompts import templates
from lpclip.evaluation.judge import accuracy, evaluate, probe_curves
from lpclip.features.describe import describe_encoder
from lpclip.images.classes import map_labels
from lpclip.images.views import parse_views
from lpclip.jobs import tracking
from lpclip.jobs.console import (
    LITE_NOTE,
    measured_on,
    print_classes,
    print_plan,
    print_result,
    print_training,
)
from lpclip.jobs.counts import check_strict
from lpclip.jobs.inputs import EncodedInputs, Inputs, encode_inputs, evaluated_on, open_inputs
from lpclip.jobs.mlflow_model import log_data, log_probe
from lpclip.jobs.process import start_ray
from lpclip.jobs.run import check_job, job_run, provenance, single_metrics
from lpclip.jobs.runtime import Stopwatch, check_workers, claim, output_folder, versions
from lpclip.jobs.selftrain_page import Outcome, write_training_page
from lpclip.jobs.settle_prior import ChosenPrior, load_prior, settle_prior
from lpclip.method.fit import finish_probe, is_last_student, zero_shot_labels
from lpclip.method.presence import among_all
from lpclip.method.priors import Prior
from lpclip.method.probe import Probe, zero_shot_probe
from lpclip.method.state import State
from lpclip.method.supervised import supervised_probe
from lpclip.report.style import save
from lpclip.report.training_figures import confusion_matrix_figure, reliability_figure, rounds_figure
from lpclip.training.round_files import RoundFiles
from lpclip.training.rounds import make_work, run_rounds


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A job's images, classes, prior and encoder, before anything is encoded."""

    inputs: Inputs
    prior: Prior | None
    """None when the job has to choose it."""
    info: EncoderInfo
    head: Head
    """Zero-shot at the encoder's own temperature, which it was calibrated with."""
    teacher: Head
    """The same at the temperature of the first teacher."""


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """The rounds of a training, and the probes that came of them."""

    chosen: ChosenPrior
    rounds: list[State]
    students: list[Probe]
    """A probe for each round."""
    zero_shot: Probe
    probe: Probe
    """The result: the last student with its temperature, or zero-shot when the rounds are not trusted."""
    supervised: Probe | None
    pseudo_labels: pa.Table

    @property
    def shown(self) -> dict[str, Probe]:
        """The classifiers of the final table, by the names that summaries use."""
        shown = {"zero_shot": self.zero_shot, "probe": self.probe}
        return shown if self.supervised is None else {**shown, "supervised": self.supervised}


def selftrain_job(job: SelftrainJob) -> dict[str, Any]:
    """Encode what is missing, self-train, evaluate where labels exist; everything goes to OUT and MLflow."""
    check_job(job)
    watch = Stopwatch()
    parse_views(job.encode.views)
    with output_folder(job.out) as out:
        opened = _open(job)
        inputs, info = opened.inputs, opened.info
        print_plan(inputs.data, inputs.test, info=info, views=job.encode.views, out=out)
        print_classes(inputs.classes.names, present=inputs.present, given=inputs.given)
        print_training(job, head=opened.head)
        watch.lap("start")
        with job_run("selftrain", job, out=out, encoder=info.name, data=inputs.data.name) as run:
            known = encode_inputs(job, inputs, info=info, head=opened.head, out=out, watch=watch)
            trained = _train(job, opened, known, out=out, watch=watch)
            results = {name: evaluate(probe, known.x, known.y) for name, probe in trained.shown.items()}
            history = [
                {
                    "round": state.round,
                    **state.metrics,
                    "accuracy": accuracy(probe, known.x, known.y),
                }
                for state, probe in zip(trained.rounds, trained.students, strict=True)
            ]
            figures = _draw(job, trained, known, history, folder=files.join(out, "figures"))
            watch.lap("evaluate")
            page = _outcome(opened, known, trained, results, history=history, figures=figures)
            write_training_page(page, files.join(out, "report.html"))
            watch.lap("report")
            summary = {
                **results,
                **_summary(opened, known, trained, history),
                "timings": watch.seconds,
                **provenance(job, run.run_id),
            }
            files.write_json(files.join(out, "summary.json"), summary)
            log_data(run, job, inputs, known)
            log_probe(run, trained.probe, saved=files.join(out, "probe"))
            _track(run, summary, out)
            print_result(summary, inputs.data, known.encoded, inputs.test, known.tested, out, run)
    check_strict(job.source, stores=summary["features"].values())
    return summary


def _open(job: SelftrainJob) -> _Opened:
    """Open everything that the job names, and refuse what does not fit together before any work."""
    inputs = open_inputs(job)
    names = inputs.classes.names
    prior = load_prior(job.training.prior, names)
    if job.supervised and not inputs.data.has_labels:
        raise UserError("--supervised needs labels in --data, and there are none")
    start_ray()
    check_workers(job.training.num_workers)
    info = describe_encoder(
        job.encoder,
        class_names=names,
        templates=templates(job.names.templates),
        device=job.encode.device,
    )
    head = make_head(info, names, temperature=None)
    teacher = make_head(info, names, temperature=job.training.temperature)
    return _Opened(inputs=inputs, prior=prior, info=info, head=head, teacher=teacher)


def _train(
    job: SelftrainJob, opened: _Opened, known: EncodedInputs, *, out: str, watch: Stopwatch
) -> _Trained:
    """Choose the prior, run the rounds, and make probes of them, which are saved to OUT."""
    fingerprint, given = known.encoded.store.manifest.fingerprint, opened.inputs.given
    identity = {
        "features": fingerprint,
        "head": opened.teacher.identity,
        "training": config_identity(job.training),
        "eval_data": known.tested.store.manifest.content_digest if known.tested else None,
    }
    if given is not None:
        identity["labels"] = given.digest
    # Before anything is written: OUT may hold the results of other work.
    claim(out, identity, mark=False)
    if given is not None:
        given.keep(out)
    chosen = settle_prior(
        job.training,
        out=out,
        features=known.features.base,
        prior=opened.prior,
        head=opened.teacher,
        fingerprint=fingerprint,
        present=opened.inputs.present,
        labels=known.few,
    )
    watch.lap("prior")
    known.held.let_go()  # the rounds read their own, and may need the memory
    rounds, labels = _run_rounds(job, opened, known, chosen=chosen, identity=identity, out=out)
    watch.lap("rounds")
    trained = _make_probes(job, opened, known, chosen=chosen, rounds=rounds, labels=labels)
    files.write_parquet(files.join(out, "pseudo_labels.parquet"), trained.pseudo_labels)
    for name, probe in trained.shown.items():
        probe.save(files.join(out, name))
    watch.lap("probes")
    return trained


def _run_rounds(
    job: SelftrainJob,
    opened: _Opened,
    known: EncodedInputs,
    *,
    chosen: ChosenPrior,
    identity: dict[str, Any],
    out: str,
) -> tuple[list[State], pa.Table]:
    """All rounds, oldest first, and the pseudo-labels of the last one.

    `identity` is the job's, except for the prior.
    """
    head = opened.teacher if chosen.present is None else take_names(opened.teacher, chosen.present)
    work = make_work(
        store=known.encoded.store,
        head=head,
        prior=chosen.prior,
        config=job.training,
        folder=files.join(out, "rounds"),
        labels=None if opened.inputs.given is None else opened.inputs.given.among(chosen.present),
    )
    claim(out, {**work.identity, **identity})
    rounds = run_rounds(work, storage=files.join(out, "ray"), tell=partial(print, flush=True))
    labels = RoundFiles(work.folder).pseudo_labels()
    if chosen.present is not None:
        places = pa.array(chosen.present[labels["label"].to_numpy()], pa.int32())
        labels = labels.set_column(labels.schema.get_field_index("label"), "label", places)
    return rounds, labels


def _make_probes(
    job: SelftrainJob,
    opened: _Opened,
    known: EncodedInputs,
    *,
    chosen: ChosenPrior,
    rounds: list[State],
    labels: pa.Table,
) -> _Trained:
    """Zero-shot, the students and the result as probes; the supervised ceiling where it is asked for."""
    head, features = opened.head, known.features
    about: dict[str, Any] = {"class_names": head.class_names, "encoder": known.probe_encoder}
    weight = torch.tensor(head.weight)
    zero_shot = zero_shot_probe(weight, temperature=head.temperature, **about)
    teacher = weight / opened.teacher.temperature
    if chosen.present is None:
        linears = [state.classifier(teacher) for state in rounds]
    else:
        places, present = chosen.present, teacher[chosen.present]
        linears = [among_all(state.classifier(present), places, num_classes=len(weight)) for state in rounds]
    probe = finish_probe(
        rounds[-1],
        zero_shot=zero_shot,
        teacher=teacher,
        features=features.base,
        config=job.training,
        chosen=chosen,
        labels=known.few,
    )
    return _Trained(
        chosen=chosen,
        rounds=rounds,
        students=[Probe(weight=one.weight, bias=one.bias, **about) for one in linears],
        zero_shot=zero_shot,
        probe=probe,
        supervised=_supervised(opened.inputs, known, like=probe) if job.supervised else None,
        pseudo_labels=labels if chosen.trusted else _zero_shot_labels(probe, known),
    )


def _supervised(inputs: Inputs, known: EncodedInputs, *, like: Probe) -> Probe:
    """The ceiling: a probe fitted to the true labels of the training images."""
    data = inputs.data
    labels = map_labels(
        known.raw_labels, label_names=data.label_names, classes=inputs.classes, data=data.name
    )
    return supervised_probe(known.features.base, labels, like=like)


def _zero_shot_labels(probe: Probe, known: EncodedInputs) -> pa.Table:
    """The pseudo-labels of a training that fell back to zero-shot: round 0, all kept but those of no class."""
    label, confidence, kept = zero_shot_labels(probe, known.features.base, labels=known.few)
    ids, first = pa.array(known.features.ids, pa.string()), np.zeros(len(label), np.int32)
    return pa.table({"id": ids, "label": label, "confidence": confidence, "kept": kept, "round": first})


def _summary(
    opened: _Opened,
    known: EncodedInputs,
    trained: _Trained,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """OUT/summary.json but for the classifiers' own numbers."""
    encoded, tested = known.encoded, known.tested
    return {
        "evaluated_on": evaluated_on(opened.inputs, known),
        **({"labels": opened.inputs.given.summary()} if opened.inputs.given is not None else {}),
        "rounds": history,
        "images": {
            "encoded": encoded.store.manifest.num_rows,
            "quarantined": encoded.store.manifest.num_quarantined,
            "eval_quarantined": tested.store.manifest.num_quarantined if tested else None,
        },
        "probe_temperature": trained.probe.temperature,
        "prior": trained.chosen.summary(opened.head.class_names),
        "classes": list(opened.head.class_names),
        "encoder": opened.info.identity,
        "features": {"train": encoded.store.path, "eval": tested.store.path if tested else None},
        "rates": {"encode": encoded.rate, "encode_eval": tested.rate if tested else None},
    }


def _outcome(
    opened: _Opened,
    known: EncodedInputs,
    trained: _Trained,
    results: dict[str, dict[str, float | None]],
    *,
    history: list[dict[str, Any]],
    figures: dict[str, Figure],
) -> Outcome:
    """The contents of OUT/report.html."""
    where, data, test = evaluated_on(opened.inputs, known), opened.inputs.data, opened.inputs.test
    lite = f": {LITE_NOTE}" if opened.info.name == "lite" else ""
    sets = [(data, known.encoded)] + ([(test, known.tested)] if test and known.tested else [])
    return Outcome(
        data=data.name,
        known=known,
        chosen=trained.chosen,
        zero_shot=trained.zero_shot,
        probe=trained.probe,
        results=results,
        measured_on=measured_on(where) if where["setting"] else "",
        history=history,
        figures=figures,
        facts={
            "images": ", ".join(f"{one.name} ({its.store.manifest.num_rows:,})" for one, its in sets),
            "encoder": opened.info.name + lite,
            "classes": f"{len(opened.head.class_names):,}",
            "rounds": f"{trained.rounds[-1].round}",
            **({"given labels": f"{len(known.few.places):,}"} if known.few is not None else {}),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        },
    )


def _draw(
    job: SelftrainJob,
    trained: _Trained,
    known: EncodedInputs,
    history: list[dict[str, Any]],
    *,
    folder: str,
) -> dict[str, Figure]:
    """Draw the rounds and, where labels exist, the confusion matrix and the reliability diagram. Returns them."""
    *_, before, last = [None, *trained.rounds]
    assert last is not None
    is_extra = is_last_student(last.round, before=before.metrics if before else None, config=job.training)
    figures = {"rounds": rounds_figure(history, with_last_student=is_extra)}
    if (known.y >= 0).any():
        drawn = {
            name: probe_curves(probe, known.x, known.y)
            for name, probe in (("zero-shot", trained.zero_shot), ("probe", trained.probe))
        }
        matrix = confusion_matrix_figure(drawn["probe"].confusion, trained.probe.class_names)
        bins = {name: found.reliability for name, found in drawn.items()}
        figures |= {"confusion_matrix": matrix, "reliability": reliability_figure(bins)}
    files.make_folder(folder)
    for name, figure in figures.items():
        save(figure, files.join(folder, f"{name}.png"))
    return figures


def _track(run: tracking.Run, summary: dict[str, Any], out: str) -> None:
    """Log what runs are compared by to MLflow, and upload the files of OUT that people look at."""
    for entry in summary["rounds"]:
        run.log({f"rounds/{k}": v for k, v in entry.items() if k != "round"}, step=entry["round"])
    run.set_tags({"prior": summary["prior"]["name"], "trusted": str(summary["prior"]["trusted"])})
    for name, found in summary["prior"]["tried"].items():
        run.log({f"trust/agreement_{name}": found["agreement"], f"trust/kappa_{name}": found["kappa"]})
    run.log(single_metrics(summary))
    for name in ("probe", "figures", "report.html", "summary.json", "pseudo_labels.parquet"):
        run.artifact(files.join(out, name))
