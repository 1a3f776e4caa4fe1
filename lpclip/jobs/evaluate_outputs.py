"""The evaluation's results: summary.json, results.parquet, report.html, figures, MLflow runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from lpclip import files
from lpclip.config import EvaluateJob
from lpclip.encoders.head import EncoderInfo
from lpclip.evaluation.results import MEAN, ZERO_SHOT, Result, worse_than_zero_shot
from lpclip.jobs import tracking
from lpclip.jobs.evaluate_examples import find_examples
from lpclip.jobs.evaluate_measure import Measured, MeasuredSet, Subjects
from lpclip.jobs.evaluate_retrieval import MeasuredPairs
from lpclip.jobs.run import provenance
from lpclip.jobs.runtime import Stopwatch, versions
from lpclip.report.evaluation_figures import corruption_figure
from lpclip.report.evaluation_page import evaluation_page
from lpclip.report.evaluation_tables import corruption_curves, plain_values
from lpclip.report.style import save


def write_evaluation(
    subjects: Subjects, measured: Measured, pairs: Sequence[MeasuredPairs], *, watch: Stopwatch, run_id: str
) -> dict[str, Any]:
    """Write all files, summary.json last, and return the summary; its seconds of the report end before it."""
    out = subjects.out
    files.write_parquet(files.join(out, "results.parquet"), results_table(measured.results))
    classes = next(iter(subjects.classifiers.values())).class_names
    page = evaluation_page(
        measured.evidence(classes, [found.result for found in pairs]),
        facts=_facts(subjects, measured),
        examples=find_examples(subjects.sets[0].data, measured.clean, classes),
    )
    files.write_bytes(files.join(out, "report.html"), page.encode())
    _draw(measured.results, files.join(out, "figures"))
    watch.lap("report")
    summary = _summary(subjects, measured) | {"timings": watch.seconds}
    summary |= provenance(subjects.job, run_id)
    summary["retrieval"] = [found.to_json() for found in pairs]
    files.write_json(files.join(out, "summary.json"), summary)
    return summary


def write_retrieval(
    job: EvaluateJob,
    out: str,
    pairs: Sequence[MeasuredPairs],
    *,
    info: EncoderInfo,
    watch: Stopwatch,
    run_id: str,
) -> dict[str, Any]:
    """Write the summary of an evaluation of retrieval alone, and return it."""
    summary = {
        "retrieval": [found.to_json() for found in pairs],
        "encoder": info.identity,
        "encoder_name": info.name,
        "timings": watch.seconds,
        **provenance(job, run_id),
    }
    files.write_json(files.join(out, "summary.json"), summary)
    return summary


def _summary(subjects: Subjects, measured: Measured) -> dict[str, Any]:
    classifiers = subjects.classifiers
    losses = [
        {
            key: value
            for key, value in gain.to_json().items()
            if key in ("set", "corruption", "severity", "probe", "value", "interval")
        }
        for gain in worse_than_zero_shot(measured.results)
    ]
    return {
        "results": [result.to_json() for result in measured.results],
        "significantly_worse": losses,
        "sets": [_about_set(found) for found in measured.sets],
        "probes": {
            name: {
                "method": probe.summary.get("method", "zero-shot"),
                "temperature": probe.temperature,
                "trained_on": probe.encoder.get("features"),
            }
            for name, probe in classifiers.items()
        },
        "classes": list(next(iter(classifiers.values())).class_names),
        "encoder": subjects.encoding.info.identity,
        "encoder_name": subjects.encoding.info.name,
        "rates": measured.rates()._asdict(),
    }


def _about_set(found: MeasuredSet) -> dict[str, Any]:
    manifest = found.stores[0].store.manifest
    return {
        "set": found.item.name,
        "kind": found.item.kind,
        "data": found.item.data.name,
        "images": manifest.num_rows,
        "quarantined": manifest.num_quarantined,
        "views": len(found.item.views),
        "stores": [one.store.path for one in found.stores],
        "encoded_now": any(not one.reused for one in found.stores),
    }


def _facts(subjects: Subjects, measured: Measured) -> dict[str, str]:
    """The page's short list of names and values."""
    info, classifiers = subjects.encoding.info, subjects.classifiers
    sizes: dict[str, int] = {}
    for found in measured.sets:
        sizes.setdefault(found.item.name, found.stores[0].store.manifest.num_rows)
    methods = {name: probe.summary.get("method", "zero-shot") for name, probe in classifiers.items()}
    lite = ", which is not CLIP: its figures say nothing of CLIP" if info.name == "lite" else ""
    return {
        "images": ", ".join(f"{name} ({size:,})" for name, size in sizes.items()),
        "classifiers": ", ".join(
            name if name == ZERO_SHOT else f"{name} ({method})" for name, method in methods.items()
        ),
        "encoder": info.name + lite,
        "classes": f"{len(next(iter(classifiers.values())).class_names)}",
        "seed": f"{subjects.job.seed}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def results_table(results: Sequence[Result]) -> pa.Table:
    """The results as Parquet: the interval as two columns."""
    rows = [
        {
            **{key: value for key, value in vars(result).items() if key != "interval"},
            "low": result.interval and result.interval[0],
            "high": result.interval and result.interval[1],
        }
        for result in results
    ]
    kinds = {"severity": pa.int32(), "value": pa.float64(), "low": pa.float64(), "high": pa.float64()}
    names = list(rows[0])
    return pa.Table.from_pylist(rows, schema=pa.schema([(n, kinds.get(n, pa.string())) for n in names]))


def _draw(results: Sequence[Result], folder: str) -> None:
    """The overviews of corruptions as pictures of their own."""
    files.make_folder(folder)
    (clean,) = plain_values(results, "clean", "accuracy").values()
    for name, kind in dict.fromkeys((found.set, found.kind) for found in results if found.corruption):
        curves = corruption_curves(results, name)
        figure = corruption_figure(curves, clean=clean if kind == "corrupted" else None)
        save(figure, files.join(folder, f"corruptions-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.png"))


TRACKED = ("accuracy", "accuracy_gain", "ece", "adaptive_ece", "nll", "brier", "aurc", "retained_accuracy")


def track_evaluation(subjects: Subjects, results: Sequence[Result], run: tracking.Run) -> None:
    """A nested run for each classifier, all with the same metric names: that is what the pages compare."""
    job, out = subjects.job, subjects.out
    for name in ("report.html", "summary.json", "results.parquet", "figures"):
        run.artifact(files.join(out, name))
    for name in subjects.classifiers:
        params = {
            "probe": name,
            "data": " ".join(job.data),
            "limit": job.limit,
            "corruptions": job.corruptions,
        }
        with tracking.track(
            job.tracking,
            name=name,
            params={key: value for key, value in params.items() if value is not None},
            resume_key=f"evaluate {out} {name}",
            parent=run,
        ) as child:
            child.set_tags({"probe": name})
            for step in (0, 1, 2, 3, 4, 5):
                mine = [r for r in results if r.probe == name and (r.severity or 0) == step]
                found: dict[str, float | None] = dict(pair for result in mine for pair in _metrics_of(result))
                child.log(found, step=step)
                if step == 0:
                    run.log({f"test/{key}_{name}": v for key, v in found.items() if key.count("/") == 1})


def _metrics_of(result: Result) -> Iterator[tuple[str, float]]:
    """A result's name in MLflow, without probe and severity: these are the run and the step.

    A mean over all severities has a name of its own: the pages show a metric's last step.
    """
    if result.value is None or (result.kind != "ood" and result.metric not in TRACKED):
        return
    own = {"clean": "clean", "corrupted": "corrupted"}
    place = own.get(result.kind, f"{result.kind}/{result.set}")
    if result.corruption is not None and (result.corruption, result.severity) != (MEAN, None):
        place = f"{place}/{result.corruption}"
    yield f"{place}/{result.metric}", result.value
