"""The selftrain job: encode what is missing, choose the prior, run the rounds, evaluate where labels exist."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lpclip import files
from lpclip.config import SelftrainJob, check, to_dict
from lpclip.encoders.head import EncoderInfo, Head, make_head
from lpclip.encoders.prompts import templates
from lpclip.errors import UserError
from lpclip.evaluation.judge import evaluate, probe_curves
from lpclip.features.describe import describe_encoder
from lpclip.features.store import Features
from lpclip.images.classes import ClassList, map_labels
from lpclip.images.views import parse_views
from lpclip.jobs import tracking
from lpclip.jobs.console import print_plan, print_result, print_training
from lpclip.jobs.inputs import Inputs, encode_inputs, evaluated_on, open_inputs
from lpclip.jobs.runtime import claim, output_folder, start_ray, versions
from lpclip.jobs.settle_prior import load_prior, settle_prior
from lpclip.method.fit import finish_probe, zero_shot_labels
from lpclip.method.priors import Prior
from lpclip.method.probe import Probe, zero_shot_probe
from lpclip.method.recipe import RECIPE
from lpclip.method.state import State
from lpclip.method.supervised import supervised_probe
from lpclip.report.style import save
from lpclip.report.training_figures import confusion_matrix_figure, reliability_figure, rounds_figure
from lpclip.training.rounds import fit, make_work, read_labels


def selftrain_job(job: SelftrainJob) -> dict[str, Any]:
    """Encode what is missing, self-train, evaluate where labels exist; everything goes to OUT and MLflow."""
    check(job)
    parse_views(job.encode.views)
    with output_folder(job.out) as out:
        inputs = open_inputs(job)
        classes = inputs.classes
        prior = load_prior(job.training.prior, classes.names)
        if job.supervised and not inputs.data.has_labels:
            raise UserError("--supervised needs labels in --data, and there are none")
        start_ray()
        info = describe_encoder(
            job.encoder, class_names=classes.names, templates=templates(job.names.templates)
        )
        head = make_head(info, classes.names, temperature=job.training.temperature)
        print_plan(inputs.data, inputs.test, info=info, views=job.encode.views, out=out)
        print_training(job, classes, head)
        with tracking.track(
            job.tracking, name=files.split(out)[1], params=_parameters(job), resume_key=f"selftrain {out}"
        ) as run:
            run.set_tags({"encoder": info.name, "data": inputs.data.name, "out": out})
            return _selftrain(job, out, inputs, prior, info, head, run)


def _selftrain(
    job: SelftrainJob,
    out: str,
    inputs: Inputs,
    prior: Prior | None,
    info: EncoderInfo,
    head: Head,
    run: tracking.Run,
) -> dict[str, Any]:
    data, classes = inputs.data, inputs.classes
    known = encode_inputs(job, inputs, info=info, head=head, out=out)
    encoded, tested, features, x, y = known.encoded, known.tested, known.features, known.x, known.y
    seconds = known.seconds
    begin = time.monotonic()
    chosen = settle_prior(
        job.training,
        out=out,
        features=features.base,
        prior=prior,
        head=head,
        fingerprint=encoded.store.manifest.fingerprint,
    )
    seconds["prior"] = time.monotonic() - begin
    work = make_work(
        store_path=encoded.store.path,
        fingerprint=encoded.store.manifest.fingerprint,
        head=head,
        prior=chosen.prior,
        config=job.training,
        folder=files.join(out, "rounds"),
    )
    claim(out, {**work.identity, "eval_data": tested.store.manifest.content_digest if tested else None})
    begin = time.monotonic()
    near = RECIPE.neighbour_count(job.training, num_rows=len(features.ids), num_classes=len(classes.names))
    if near:
        print(f"rounds: first the {near} nearest neighbours of {len(features.ids):,} images", flush=True)
    rounds = fit(work, storage=files.join(out, "ray"))
    seconds["rounds"] = time.monotonic() - begin
    labels_table = read_labels(work.folder)

    begin = time.monotonic()
    about: dict[str, Any] = {"class_names": classes.names, "encoder": known.probe_encoder}
    zero_shot = zero_shot_probe(torch.tensor(head.weight), temperature=head.temperature, **about)
    probes = []
    for state in rounds:
        trained = state.classifier(zero_shot.weight)
        probes.append(Probe(weight=trained.weight, bias=trained.bias, **about))
    best = finish_probe(
        rounds[-1],
        zero_shot=zero_shot,
        calibrated=zero_shot_probe(torch.tensor(head.weight), temperature=1 / info.logit_scale),
        features=features.base,
        config=job.training,
        trusted=chosen.trusted,
    )
    if not chosen.trusted:
        labels_table = _zero_shot_labels(best, features)
    files.write_parquet(files.join(out, "pseudo_labels.parquet"), labels_table)
    zero_shot.save(files.join(out, "zero_shot"))
    best.save(files.join(out, "probe"))
    supervised = None
    if job.supervised:
        train_labels = map_labels(
            known.raw_labels, label_names=data.label_names, classes=classes, data=data.name
        )
        supervised = supervised_probe(features.base, train_labels, like=best)
        supervised.save(files.join(out, "supervised"))
    seconds["probes"] = time.monotonic() - begin

    begin = time.monotonic()
    shown = {"zero_shot": zero_shot, "probe": best, **({"supervised": supervised} if supervised else {})}
    results = {name: evaluate(probe, x, y) for name, probe in shown.items()}
    history = _history(rounds, probes, x, y)
    seconds["evaluate"] = time.monotonic() - begin

    rates = {"encode": encoded.rate, "encode_eval": tested.rate if tested else None}
    summary = {
        **results,
        "evaluated_on": evaluated_on(inputs, y),
        "rounds": history,
        "images": {
            "encoded": encoded.store.manifest.num_rows,
            "quarantined": encoded.store.manifest.num_quarantined,
            "eval_quarantined": tested.store.manifest.num_quarantined if tested else None,
        },
        "probe_temperature": best.temperature,
        "prior": chosen.summary(),
        "classes": list(classes.names),
        "encoder": info.identity,
        "features": {"train": encoded.store.path, "eval": tested.store.path if tested else None},
        "timings": {name: round(value, 3) for name, value in seconds.items()},
        "rates": rates,
        "config": to_dict(job),
        "versions": versions(),
        "mlflow_run": run.run_id,
    }
    files.write_json(files.join(out, "summary.json"), summary)
    _track(run, summary, {name: shown[name] for name in ("zero_shot", "probe")}, x, y, out, classes)
    print_result(summary, data, encoded, inputs.test, tested, out, run)
    return summary


def _zero_shot_labels(probe: Probe, features: Features) -> pa.Table:
    label, confidence, kept = zero_shot_labels(probe, features.base)
    first = np.zeros(len(features.ids), np.int32)
    return pa.table(
        {"id": features.ids, "label": label, "confidence": confidence, "kept": kept, "round": first}
    )


def _history(rounds: list[State], probes: list[Probe], x: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"round": state.round, **state.metrics, "accuracy": evaluate(probe, x, y)["accuracy"]}
        for state, probe in zip(rounds, probes, strict=True)
    ]


def _parameters(job: SelftrainJob) -> dict[str, Any]:
    return {name: value for name, value in to_dict(job).items() if value is not None}


def _track(
    run: tracking.Run,
    summary: dict[str, Any],
    probes: dict[str, Probe],
    x: np.ndarray,
    y: np.ndarray,
    out: str,
    classes: ClassList,
) -> None:
    for entry in summary["rounds"]:
        run.log({k: v for k, v in entry.items() if k != "round"}, step=entry["round"])
    last = len(summary["rounds"])
    run.set_tags({"prior": summary["prior"]["name"], "trusted": str(summary["prior"]["trusted"])})
    for name, found in summary["prior"]["tried"].items():
        run.log(
            {f"views_agreement_{name}": found["agreement"], f"views_kappa_{name}": found["kappa"]}, step=last
        )
    for name in ("zero_shot", "probe", "supervised"):
        if name in summary:
            run.log({f"{name}_{key}": value for key, value in summary[name].items()}, step=last)
    run.log({f"seconds_{k}": v for k, v in summary["timings"].items()}, step=last)
    run.log({f"images_per_second_{k}": v for k, v in summary["rates"].items()}, step=last)
    figures = files.join(out, "figures")
    files.make_folder(figures)
    save(rounds_figure(summary["rounds"]), files.join(figures, "rounds.png"))
    if (y >= 0).any():
        drawn = {name: probe_curves(probe, x, y) for name, probe in probes.items()}
        matrix = confusion_matrix_figure(drawn["probe"].confusion, classes.names)
        save(matrix, files.join(figures, "confusion_matrix.png"))
        bins = {name.replace("_", "-"): found.reliability for name, found in drawn.items()}
        save(reliability_figure(bins), files.join(figures, "reliability.png"))
    for name in ("probe", "figures", "summary.json", "pseudo_labels.parquet"):
        run.artifact(files.join(out, name))
