"""The evaluate job: encode each set once for all probes, measure them beside zero-shot, and draw it."""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lpclip import files
from lpclip.config import EncoderConfig, EvaluateJob, check, to_dict
from lpclip.encoders.head import EncoderInfo
from lpclip.errors import UserError
from lpclip.evaluation.evidence import Evidence, ForeignScores, Judgements
from lpclip.evaluation.judge import Labelled, foreign_scores, judge, judgement_curves
from lpclip.evaluation.results import MEAN, ZERO_SHOT, Cell, Result, RetrievalResult, worse_than_zero_shot
from lpclip.evaluation.tabulate import corruption_results, labelled_results, ood_results, shift_results
from lpclip.features.data import Data
from lpclip.features.stored_views import Encoded, Views
from lpclip.images.classes import ClassList, map_labels
from lpclip.images.pixels import decode_image
from lpclip.images.views import base_views
from lpclip.jobs import tracking
from lpclip.jobs.console import print_evaluation, print_evaluation_plan
from lpclip.jobs.evaluate_retrieval import (
    measure_retrieval,
    open_pair_sets,
    retrieval_identity,
    retrieval_job,
)
from lpclip.jobs.evaluate_sets import (
    EvaluationSet,
    check_label_names,
    evaluation_classes,
    open_sets,
    parse_corruptions,
)
from lpclip.jobs.inputs import describe_probes_encoder, evaluation_encoding
from lpclip.jobs.runtime import claim, output_folder, start_ray, versions
from lpclip.method.probe import Probe, load_probe, zero_shot_probe
from lpclip.report.evaluation_figures import corruption_figure
from lpclip.report.evaluation_page import evaluation_page
from lpclip.report.evaluation_tables import corruption_curves, plain_values
from lpclip.report.page import Example
from lpclip.report.style import save

EXAMPLES = 12
# Images that the examples are looked for among: more would be read for pictures alone.
EXAMPLE_ROWS = 2048
THUMBNAIL = 112


@dataclass(kw_only=True)
class _Found:
    """What the evaluation has found so far."""

    results: list[Result] = field(default_factory=list)
    judgements: dict[Cell, Judgements] = field(default_factory=dict)
    scores: dict[str, ForeignScores] = field(default_factory=dict)
    clean: Labelled | None = None
    """The images of --data."""
    ids: np.ndarray | None = None
    encoded: dict[str, list[Encoded]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)


def evaluate_job(job: EvaluateJob) -> dict[str, Any]:
    """Measure probes and zero-shot on everything that was asked for; rows, a page and MLflow runs come of it.

    Retrieval alone has no page. Raises UserError for flags that do not go together, and whatever cannot be read.
    """
    check(job)
    probes, digests = _load_probes(job.probe) if job.probe else ({}, {})
    reference = next(iter(probes.values()), None)
    if job.data is None:
        return retrieval_job(job, reference)
    assert reference is not None
    corruptions = parse_corruptions(job)
    with output_folder(job.out) as out:
        sets = list(open_sets(job, reference, corruptions))
        pairs = open_pair_sets(job, reference)
        classes = evaluation_classes(job, reference)
        for item in sets:
            check_label_names(item, classes)
        start_ray()
        encoder, info = describe_probes_encoder(reference, pretrained=job.pretrained, with_head=True)
        assert info.head is not None
        zero_shot = zero_shot_probe(
            torch.tensor(info.head), temperature=1 / info.logit_scale, class_names=reference.class_names
        )
        shown = {ZERO_SHOT: zero_shot, **probes}
        plan = [
            *((item.kind, item.data, len(item.views)) for item in sets),
            *(("retrieval", item.data, len(item.views)) for item in pairs),
        ]
        print_evaluation_plan(plan, shown, info=info, out=out)
        identity = {**_identity(job, digests, sets), "retrieval": retrieval_identity(pairs)}
        claim(out, identity, mark=False)
        params = {k: v for k, v in to_dict(job).items() if v is not None}
        with tracking.track(
            job.tracking, name=files.split(out)[1], params=params, resume_key=f"evaluate {out}"
        ) as run:
            run.set_tags({"encoder": info.name, "data": sets[0].name, "out": out})
            found = _evaluate(job, out, sets, shown, classes, info, encoder)
            summary = _summary(job, found, sets, shown, info, run)
            summary["retrieval"], retrieval = measure_retrieval(job, out, pairs, info, encoder, run)
            begin = time.monotonic()
            claim(out, identity)
            files.write_json(files.join(out, "summary.json"), summary)
            files.write_parquet(files.join(out, "results.parquet"), results_table(found.results))
            page = evaluation_page(
                _evidence(found, shown, retrieval),
                facts=_facts(summary),
                examples=_examples(found, sets[0], shown),
            )
            files.write_bytes(files.join(out, "report.html"), page.encode())
            _draw(found.results, files.join(out, "figures"))
            summary["timings"]["report"] = round(time.monotonic() - begin, 3)
            files.write_json(files.join(out, "summary.json"), summary)
            _track(job, run, found.results, shown, out)
        print_evaluation(found.results, retrieval, rates=summary["rates"], out=out, run=run)
        return summary


def _parts(path: str) -> list[str]:
    return files.split_options(path)[0].rstrip("/").split("/")


def _load_probes(specs: tuple[str, ...]) -> tuple[dict[str, Probe], dict[str, str]]:
    """The probes by name, which must fit each other, and digests of their files."""
    paths = {}
    for spec in specs:
        name, separator, path = spec.partition("=")
        if separator and not (name and path):
            raise UserError(f"--probe {spec}: give it as NAME=FOLDER")
        if not separator:
            path, parts = spec, _parts(spec)
            name = parts[-1]
            if name in paths or sum(_parts(other)[-1] == name for other in specs) > 1:
                name = "/".join(parts[-2:])
        if name in paths or name == ZERO_SHOT:
            raise UserError(
                f"two classifiers are called {name}: name one of them, as in --probe other={path}"
            )
        paths[name] = path
    probes = {name: load_probe(path) for name, path in paths.items()}
    (first, reference), *others = probes.items()
    for name, probe in others:
        if probe.encoder["identity"] != reference.encoder["identity"]:
            raise UserError(
                f"the probes {first} and {name} are of different encoders: evaluate them one by one"
            )
        if probe.class_names != reference.class_names:
            raise UserError(f"the probes {first} and {name} have different classes: evaluate them one by one")
        for key in ("views", "templates"):
            mine, theirs = (
                tuple(map(str, base_views(p.encoder[key]))) if key == "views" else p.encoder[key]
                for p in (reference, probe)
            )
            if mine != theirs:
                raise UserError(
                    f"the probes {first} and {name} have different {key} ({mine} and {theirs}): "
                    "evaluate them one by one"
                )
    digests = {
        name: hashlib.sha256(
            files.read_bytes(files.join(path, "probe.safetensors"))
            + files.read_bytes(files.join(path, "probe.json"))
        ).hexdigest()
        for name, path in paths.items()
    }
    return probes, digests


def _identity(job: EvaluateJob, digests: dict[str, str], sets: list[EvaluationSet]) -> dict[str, Any]:
    return {
        "probes": digests,
        "sets": {
            item.key: {
                "views": [str(view) for view in item.views],
                "source": item.data.identity,
            }
            for item in sets
        },
        "classes": job.classes and files.read_bytes(job.classes).decode(errors="replace"),
        "seed": job.seed,
    }


def _evaluate(
    job: EvaluateJob,
    out: str,
    sets: list[EvaluationSet],
    probes: Mapping[str, Probe],
    classes: ClassList,
    info: EncoderInfo,
    encoder: EncoderConfig,
) -> _Found:
    found = _Found()
    encoding = evaluation_encoding(job, info=info, encoder=encoder, out=out)
    for item in sets:
        begin = time.monotonic()
        views = encoding.views_of(item.data, item.views)
        found.encoded[item.key] = views.stores
        found.timings["encode"] = found.timings.get("encode", 0.0) + time.monotonic() - begin
        begin = time.monotonic()
        if item.kind == "ood":
            _detect(item, views, probes, found, cosine_temperature=1 / info.logit_scale, seed=job.seed)
        else:
            _judge_set(item, views, probes, classes, found, seed=job.seed)
        found.timings["measure"] = found.timings.get("measure", 0.0) + time.monotonic() - begin
    begin = time.monotonic()
    clean = next((judged for cell, judged in found.judgements.items() if cell.kind == "clean"), None)
    for name in dict.fromkeys(cell.set for cell in found.judgements if cell.corruption):
        cells = {cell: o for cell, o in found.judgements.items() if cell.set == name and cell.corruption}
        # Published files may be damaged in one corruption and not in another.
        stores = [found.encoded[item.key][0] for item in sets if item.name == name]
        found.results += corruption_results(
            clean,
            cells,
            alexnet=name.lower().startswith("imagenet-c"),
            seed=job.seed,
            same_images=len(stores) == 1 or not any(one.store.manifest.num_quarantined for one in stores),
        )
    found.timings["measure"] += time.monotonic() - begin
    return found


def _judge_set(
    item: EvaluationSet,
    views: Views,
    probes: Mapping[str, Probe],
    classes: ClassList,
    found: _Found,
    *,
    seed: int,
) -> None:
    labels = map_labels(views.labels, label_names=item.data.label_names, classes=classes, data=item.data.name)
    known = np.flatnonzero(labels >= 0)
    if item.kind == "published corruption":
        # Arrays' ids tell the corruption, and so the order of rows does: sorted by id, all have the same images' order.
        known = known[np.argsort(views.ids[known])]
    if not len(known):
        raise UserError(f"{item.name} has no labelled image: there is nothing to measure on it")
    for cell, wanted in item.cells.items():
        images = Labelled(features=views.mean(*wanted)[known], labels=labels[known])
        judgements = judge(probes, images, seed=seed)
        found.judgements[cell] = judgements
        found.results += labelled_results(cell, judgements, seed=seed)
        if cell.kind == "clean":
            found.clean, found.ids = images, views.ids[known]
        elif cell.kind == "shift":
            assert found.clean is not None
            found.results += shift_results(cell, probes, clean=found.clean, shifted=images)


def _detect(
    item: EvaluationSet,
    views: Views,
    probes: Mapping[str, Probe],
    found: _Found,
    *,
    cosine_temperature: float,
    seed: int,
) -> None:
    assert found.clean is not None
    (cell, wanted), *_ = item.cells.items()
    foreign = views.mean(*wanted)
    if not len(foreign):
        raise UserError(f"{item.name} has no image: there is nothing to detect")
    scores = {
        name: foreign_scores(
            probe, inside=found.clean.features, outside=foreign, cosine_temperature=cosine_temperature
        )
        for name, probe in probes.items()
    }
    found.scores[item.name] = scores
    found.results += ood_results(cell, scores, seed=seed)


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


def _summary(
    job: EvaluateJob,
    found: _Found,
    sets: list[EvaluationSet],
    probes: Mapping[str, Probe],
    info: EncoderInfo,
    run: tracking.Run,
) -> dict[str, Any]:
    encoded = [one for many in found.encoded.values() for one in many if one.rate is not None]
    images = sum(one.store.manifest.num_rows for one in encoded)
    features = sum(one.store.manifest.num_rows * len(one.store.manifest.views) for one in encoded)
    seconds = sum(one.seconds for one in encoded)
    losses = [
        {
            key: value
            for key, value in gain.to_json().items()
            if key in ("set", "corruption", "severity", "probe", "value", "interval")
        }
        for gain in worse_than_zero_shot(found.results)
    ]
    return {
        "results": [result.to_json() for result in found.results],
        "significantly_worse": losses,
        "sets": [
            {
                "set": item.name,
                "kind": item.kind,
                "data": item.data.name,
                "images": found.encoded[item.key][0].store.manifest.num_rows,
                "quarantined": found.encoded[item.key][0].store.manifest.num_quarantined,
                "views": len(item.views),
                "stores": [one.store.path for one in found.encoded[item.key]],
                "encoded_now": any(not one.reused for one in found.encoded[item.key]),
            }
            for item in sets
        ],
        "probes": {
            name: {
                "method": probe.summary.get("method", "zero-shot"),
                "temperature": probe.temperature,
                "trained_on": probe.encoder.get("features"),
            }
            for name, probe in probes.items()
        },
        "classes": list(next(iter(probes.values())).class_names),
        "encoder": info.identity,
        "encoder_name": info.name,
        "timings": {name: round(value, 3) for name, value in found.timings.items()},
        "rates": {
            "images": images / seconds if seconds else None,
            "features": features / seconds if seconds else None,
        },
        "config": {key: list(v) if isinstance(v, tuple) else v for key, v in to_dict(job).items()},
        "versions": versions(),
        "mlflow_run": run.run_id,
    }


def _evidence(found: _Found, probes: Mapping[str, Probe], retrieval: Sequence[RetrievalResult]) -> Evidence:
    assert found.clean is not None
    classes = next(iter(probes.values())).class_names
    clean = next(judged for cell, judged in found.judgements.items() if cell.kind == "clean")
    return Evidence(
        results=found.results,
        classes=classes,
        curves={
            name: judgement_curves(judged, found.clean.labels, num_classes=len(classes))
            for name, judged in clean.items()
        },
        scores=found.scores,
        retrieval=retrieval,
    )


def _examples(
    found: _Found, data: EvaluationSet, probes: Mapping[str, Probe]
) -> list[tuple[str, list[Example]]]:
    """Captions and images on which zero-shot and the first probe disagree."""
    assert found.clean is not None
    assert found.ids is not None
    labels = found.clean.labels
    clean = next(judged for cell, judged in found.judgements.items() if cell.kind == "clean")
    rival = next(name for name in probes if name != ZERO_SHOT)
    before, after = clean[ZERO_SHOT], clean[rival]
    groups = {
        f"zero-shot wrong, {rival} right": ~before.correct & after.correct,
        f"zero-shot right, {rival} wrong": before.correct & ~after.correct,
    }
    images = _thumbnails(data.data, {title: found.ids[rows].tolist() for title, rows in groups.items()})
    places = {name: place for place, name in enumerate(found.ids.tolist())}
    names = probes[rival].class_names

    def example(name: str, image: bytes) -> Example:
        place = places[name]
        answers = {
            who: (names[clean[who].predicted[place]], float(clean[who].confidence[place]))
            for who in (ZERO_SHOT, rival)
        }
        return Example(image=image, predictions=answers, truth=names[labels[place]], name=name)

    return [
        (
            f"{title} ({len(items)} of {int(groups[title].sum()):,})",
            [example(name, image) for name, image in items.items()],
        )
        for title, items in images.items()
    ]


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The page's short list of names and values."""
    lite = ", which is not CLIP: it serves first impressions" if summary["encoder_name"] == "lite" else ""
    sizes = {item["set"]: item["images"] for item in reversed(summary["sets"])}
    names = dict.fromkeys(item["set"] for item in summary["sets"])
    return {
        "images": ", ".join(f"{name} ({sizes[name]:,})" for name in names),
        "classifiers": ", ".join(
            name if name == ZERO_SHOT else f"{name} ({about['method']})"
            for name, about in summary["probes"].items()
        ),
        "encoder": summary["encoder_name"] + lite,
        "classes": f"{len(summary['classes'])}",
        "seed": f"{summary['config']['seed']}",
        "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    }


def _thumbnails(data: Data, wanted: dict[str, list[str]]) -> dict[str, dict[str, bytes]]:
    """Small JPEGs of up to EXAMPLES wanted ids each, in their order, from the images that come first in the source."""
    found: dict[str, dict[str, bytes]] = {title: {} for title in wanted}
    if data.source is None:
        return found
    rank = {title: {name: place for place, name in enumerate(ids)} for title, ids in wanted.items()}
    seen = 0
    for unit in data.source.units:
        for row in data.source.reader.rows(unit):
            seen += 1
            for title, ranks in rank.items():
                if row.id in ranks and row.image is not None:
                    found[title][row.id] = row.image
                    if len(found[title]) > EXAMPLES:
                        del found[title][max(found[title], key=ranks.__getitem__)]
        if seen >= EXAMPLE_ROWS:
            break
    small: dict[str, dict[str, bytes]] = {}
    for title, images in found.items():
        small[title] = {}
        for name in sorted(images, key=rank[title].__getitem__):
            image = decode_image(
                images[name], max_pixels=data.source.config.max_pixels, max_bytes=data.source.config.max_bytes
            )
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
            small[title][name] = buffer.getvalue()
    return small


def _draw(results: Sequence[Result], folder: str) -> None:
    """The overviews of corruptions as pictures of their own."""
    files.make_folder(folder)
    (clean,) = plain_values(results, "clean", "accuracy").values()
    for name, kind in dict.fromkeys((found.set, found.kind) for found in results if found.corruption):
        curves = corruption_curves(results, name)
        figure = corruption_figure(curves, clean=clean if kind == "corrupted" else None)
        save(figure, files.join(folder, f"corruptions-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.png"))


TRACKED = ("accuracy", "accuracy_gain", "ece", "adaptive_ece", "nll", "brier", "aurc", "retained_accuracy")


def _track(
    job: EvaluateJob, run: tracking.Run, results: Sequence[Result], probes: Mapping[str, Probe], out: str
) -> None:
    """A nested run for each classifier, all with the same metric names: that is what the pages compare."""
    for name in ("report.html", "summary.json", "results.parquet", "figures"):
        run.artifact(files.join(out, name))
    for name in probes:
        params = {"probe": name, "data": job.data, "limit": job.limit, "corruptions": job.corruptions}
        with tracking.track(
            job.tracking,
            name=name,
            params={key: value for key, value in params.items() if value is not None},
            tags={"probe": name},
            resume_key=f"evaluate {out} {name}",
            parent=run,
        ) as child:
            for step in (0, 1, 2, 3, 4, 5):
                mine = [r for r in results if r.probe == name and (r.severity or 0) == step]
                found: dict[str, float | None] = dict(pair for result in mine for pair in _metrics_of(result))
                child.log(found, step=step)
                if step == 0:
                    run.log({f"{name}/{key}": v for key, v in found.items() if key.count("/") == 1}, step=0)


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
