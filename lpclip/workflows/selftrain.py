"""The selftrain job: encode what is missing, choose the prior, run the rounds, evaluate where labels exist."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lpclip import files, report, tracking
from lpclip.config import (
    SelftrainJob,
    digest,
    to_dict,
)
from lpclip.confirmation import Confirmation, Sample, choose_prior
from lpclip.console import print_plan, print_prior, print_result, print_training, print_tried
from lpclip.encoders import resolve_precision
from lpclip.evaluation import evaluate, label_free_temperature, pictures, supervised_probe
from lpclip.features import Data, encode_data, encode_views, load_labelled, open_data
from lpclip.labels import map_labels, resolve_classes
from lpclip.probe import Probe, zero_shot_probe
from lpclip.prompts import ClassList, templates
from lpclip.pseudo_labels import Prior
from lpclip.runtime import claim, output_folder, start_ray, versions
from lpclip.self_training import PRIORS, State, check_config, config_identity, neighbour_count, read_prior
from lpclip.store import Features
from lpclip.trainer import fit, make_work, read_labels
from lpclip.views import base_views, parse_views
from lpclip.zero_shot import EncoderInfo, Head, describe_encoder, make_head


def selftrain_job(job: SelftrainJob) -> dict[str, Any]:
    """Encode what is missing, self-train, evaluate where labels exist; everything goes to OUT and MLflow."""
    check_config(job.training)
    parse_views(job.encode.views)
    with output_folder(job.out) as out:
        data = open_data(job.data, config=job.source, split="train", limit=job.limit)
        classes = resolve_classes(job.names, label_names=data.label_names)
        prior = read_prior(job.training.prior, classes.names, text=_prior_text(job.training.prior))
        test = _open_eval(job)
        if job.supervised and not data.has_labels:
            raise ValueError("--supervised needs labels in --data, and there are none")
        _check_label_names(data, test, classes)
        start_ray()
        info = describe_encoder(
            job.encoder, class_names=classes.names, templates=templates(job.names.templates)
        )
        head = make_head(info, classes.names, temperature=job.training.temperature)
        print_plan(data, test, info=info, views=job.encode.views, out=out)
        print_training(job, classes, head)
        with tracking.track(
            job.tracking, name=out.rsplit("/", 1)[-1], params=_parameters(job), resume_key=f"selftrain {out}"
        ) as run:
            run.set_tags({"encoder": info.name, "data": data.name, "out": out})
            return _selftrain(job, out, data, test, classes, prior, info, head, run)


def _selftrain(
    job: SelftrainJob,
    out: str,
    data: Data,
    test: Data | None,
    classes: ClassList,
    prior: Prior | None,
    info: EncoderInfo,
    head: Head,
    run: tracking.Run,
) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    options: dict[str, Any] = {
        "info": info,
        "encoder": job.encoder,
        "config": job.encode,
        "seed": job.training.seed,
        "folder": job.encode.features or files.join(out, "features"),
    }
    scores = files.join(out, f"zero_shot-{head.identity[:12]}")
    encoded = encode_data(data, **options, head=head, scores_path=scores)
    seconds["encode"] = encoded.seconds
    features, raw = load_labelled(encoded)
    tested = None
    if test is None:
        x, y = features.base, map_labels(raw, label_names=data.label_names, classes=classes, data=data.name)
    else:
        # Students alone need the other views.
        base = base_views(job.encode.views)
        found = encode_views(test, views=base, **options)
        x, tested = found.mean(*base), found.latest
        y = map_labels(found.labels, label_names=test.label_names, classes=classes, data=test.name)
        seconds["encode_eval"] = tested.seconds
    begin = time.monotonic()
    chosen = _choose_prior(
        job, out, features.base, prior, head=head, fingerprint=encoded.manifest["fingerprint"]
    )
    seconds["prior"] = time.monotonic() - begin
    work = make_work(
        store_path=encoded.path,
        fingerprint=encoded.manifest["fingerprint"],
        head=head,
        prior=chosen.prior,
        config=job.training,
        folder=files.join(out, "rounds"),
    )
    claim(out, {**work.identity, "eval_data": tested.manifest["content_digest"] if tested else None})
    begin = time.monotonic()
    near = neighbour_count(job.training, num_rows=len(features.ids), num_classes=len(classes.names))
    if near:
        print(f"rounds: first the {near} nearest neighbours of {len(features.ids):,} images", flush=True)
    rounds = fit(work, storage=files.join(out, "ray"))
    seconds["rounds"] = time.monotonic() - begin
    labels_table = read_labels(work.folder)

    begin = time.monotonic()
    identity = {
        "config": to_dict(job.encoder),
        "identity": info.identity,
        "views": job.encode.views,
        "templates": list(templates(job.names.templates)),
        "logit_scale": info.logit_scale,
        "features": encoded.manifest["fingerprint"],
    }
    about: dict[str, Any] = {"class_names": classes.names, "encoder": identity}
    zero_shot = zero_shot_probe(torch.tensor(head.weight), temperature=head.temperature, **about)
    logits_head = torch.tensor(head.weight) / head.temperature
    probes = []
    for state in rounds:
        weight, bias = state.probe(logits_head)
        probes.append(Probe(weight=weight, bias=bias, **about))
    fell_back = not chosen.trusted
    temperature = 1.0
    if not fell_back:
        temperature = label_free_temperature(probes[-1], zero_shot=zero_shot, features=features.base)
    best = replace(
        zero_shot if fell_back else probes[-1],
        temperature=temperature,
        summary={
            "method": "zero-shot (fallback)" if fell_back else "self-trained",
            "training": to_dict(job.training),
            "rounds": rounds[-1].round,
            "images": len(features.ids),
        },
    )
    if fell_back:
        labels_table = _zero_shot_labels(best, features)
    files.write_parquet(files.join(out, "pseudo_labels.parquet"), labels_table)
    zero_shot.save(files.join(out, "zero_shot"))
    best.save(files.join(out, "probe"))
    supervised = None
    if job.supervised:
        train_labels = map_labels(raw, label_names=data.label_names, classes=classes, data=data.name)
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
        "evaluated_on": _evaluated_on(data, test, y),
        "rounds": history,
        "images": {
            "encoded": encoded.manifest["num_rows"],
            "quarantined": encoded.manifest["num_quarantined"],
            "eval_quarantined": tested.manifest["num_quarantined"] if tested else None,
        },
        "probe_temperature": temperature,
        "prior": chosen.summary(),
        "classes": list(classes.names),
        "encoder": info.identity,
        "features": {"train": encoded.path, "eval": tested.path if tested else None},
        "timings": {name: round(value, 3) for name, value in seconds.items()},
        "rates": rates,
        "config": to_dict(job),
        "versions": versions(),
        "mlflow_run": run.run_id,
    }
    files.write_json(files.join(out, "summary.json"), summary)
    _track(run, summary, {name: shown[name] for name in ("zero_shot", "probe")}, x, y, out, classes)
    print_result(summary, data, encoded, test, tested, out, run)
    return summary


def _open_eval(job: SelftrainJob) -> Data | None:
    name = job.eval_data
    if name is None and not files.exists(job.data) and ":" not in job.data:
        name = job.data
    if name is None:
        return None
    test = open_data(name, config=job.source, split="test", limit=job.eval_limit)
    if not test.has_labels and test.source is None:
        raise ValueError(f"--eval-data {name} has no labels: there is nothing to evaluate on")
    return test


def _check_label_names(data: Data, test: Data | None, classes: ClassList) -> None:
    """Refuse foreign labels before the work begins, where all names that the data tells do occur: in folders."""
    for item in (data, test):
        if item is not None and item.source is not None and item.source.kind == "folder" and item.label_names:
            places = np.arange(len(item.label_names), dtype=np.int32)
            map_labels(places, label_names=item.label_names, classes=classes, data=item.name)


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The prior of a training, and what the views of a sample make of the rounds with it."""

    name: str
    prior: Prior
    tried: dict[str, Confirmation]
    """By candidate; empty for the gradient solver, whose rounds are too slow to try."""

    @property
    def trusted(self) -> bool:
        """Whether the rounds are to be used at all."""
        return self.name not in self.tried or self.tried[self.name].trusted

    def summary(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trusted": self.trusted,
            "tried": {name: asdict(found) for name, found in self.tried.items()},
        }


def _choose_prior(
    job: SelftrainJob, out: str, features: np.ndarray, prior: Prior | None, *, head: Head, fingerprint: str
) -> _Chosen:
    """Try the rounds on a sample: with the prior that was asked for, or with those that `auto` has to choose from.

    OUT/prior.json keeps the outcome, so that a job which goes on goes on with the same prior.
    """
    spec = job.training.prior
    name = "weak" if spec == "auto" else spec
    tried: dict[str, Confirmation] = {}
    if job.training.solver == "gaussian":
        path = files.join(out, "prior.json")
        shares = None if prior is None or prior.shares is None else prior.shares.tolist()
        identity = digest([fingerprint, head.identity, config_identity(job.training), shares])
        kept = files.read_json(path) if files.exists(path) else {}
        if kept.get("identity") != identity:
            print(
                "prior: trying the rounds on a sample, and on halves of its features (a minute)", flush=True
            )
            sample = Sample(
                features,
                zero_shot=torch.tensor(head.weight),
                temperature=head.temperature,
                config=job.training,
                dtype=resolve_precision("auto", device=torch.device("cpu")),
            )
            if prior is None:
                name, tried = choose_prior(sample, show=print_tried)
            else:
                tried = {name: sample.confirm(prior)}
                print_tried(name, tried[name])
            kept = {"identity": identity, "name": name, "tried": {k: asdict(v) for k, v in tried.items()}}
            files.write_json(path, kept)
        name, tried = kept["name"], {k: Confirmation(**v) for k, v in kept["tried"].items()}
    chosen = _Chosen(name=name, prior=PRIORS[name] if prior is None else prior, tried=tried)
    print_prior(name, tried, trusted=chosen.trusted)
    return chosen


def _zero_shot_labels(probe: Probe, features: Features) -> pa.Table:
    confidence, label = probe.probabilities(features.base).max(dim=1)
    count = len(features.ids)
    return pa.table(
        {
            "id": features.ids,
            "label": label.numpy().astype(np.int32),
            "confidence": confidence.numpy(),
            "kept": np.ones(count, bool),
            "round": np.zeros(count, np.int32),
        }
    )


def _prior_text(spec: str) -> str | None:
    if spec == "auto" or spec in PRIORS:
        return None
    try:
        return files.read_bytes(spec).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prior {spec} is none of auto, uniform, weak, none, nor a text file: {error}"
        ) from error


def _evaluated_on(data: Data, test: Data | None, labels: np.ndarray) -> dict[str, Any]:
    known = int((labels >= 0).sum())
    same = test is None or (
        test.source is not None
        and data.source is not None
        and (test.source.root, test.source.identity) == (data.source.root, data.source.identity)
    )
    return {
        "data": (test or data).name,
        "images": known,
        "setting": None if not known else "transductive" if same else "inductive",
    }


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
    report.save(report.rounds_figure(summary["rounds"]), files.join(figures, "rounds.png"))
    if (y >= 0).any():
        drawn = {name: pictures(probe, x, y) for name, probe in probes.items()}
        matrix = report.confusion_matrix_figure(drawn["probe"]["confusion"], classes.names)
        report.save(matrix, files.join(figures, "confusion_matrix.png"))
        bins = {name.replace("_", "-"): found["reliability"] for name, found in drawn.items()}
        report.save(report.reliability_figure(bins), files.join(figures, "reliability.png"))
    for name in ("probe", "figures", "summary.json", "pseudo_labels.parquet"):
        run.artifact(files.join(out, name))
