"""The evaluate job: encode each set once for all probes, measure them beside zero-shot, and draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lpclip import files
from lpclip.config import EncoderConfig, EvaluateJob
from lpclip.evaluation.results import ZERO_SHOT
from lpclip.features.describe import describe_encoder
from lpclip.features.find_or_encode import Encoding
from lpclip.jobs import tracking
from lpclip.jobs.counts import check_strict
from lpclip.jobs.evaluate_measure import Subjects, measure_sets
from lpclip.jobs.evaluate_outputs import track_evaluation, write_evaluation, write_retrieval
from lpclip.jobs.evaluate_print import print_evaluation, print_evaluation_plan, print_retrieval
from lpclip.jobs.evaluate_probes import Probes, load_probes
from lpclip.jobs.evaluate_retrieval import (
    PairSet,
    measure_retrieval,
    open_pair_sets,
    retrieval_identity,
    retrieval_metrics_of,
)
from lpclip.jobs.evaluate_sets import (
    EvaluationSet,
    checked_set,
    evaluation_classes,
    open_sets,
    parse_corruptions,
)
from lpclip.jobs.inputs import describe_probes_encoder, evaluation_encoding
from lpclip.jobs.process import start_ray
from lpclip.jobs.run import check_job, job_run
from lpclip.jobs.runtime import Stopwatch, claim, output_folder
from lpclip.method.probe import zero_shot_probe


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """Everything that is measured, opened and checked, before any image is encoded."""

    job: EvaluateJob
    out: str
    subjects: Subjects | None
    """None where retrieval alone is measured."""
    pairs: Sequence[PairSet]
    encoding: Encoding
    identity: dict[str, Any]
    """Decides whether OUT holds this work's results."""


def evaluate_job(job: EvaluateJob) -> dict[str, Any]:
    """Measure probes and zero-shot on everything that was asked for: results, a page and MLflow runs.

    Retrieval alone has no page. Raises UserError for flags that do not go together, and for what cannot be read.
    """
    check_job(job)
    watch = Stopwatch()
    probes = load_probes(job.probe)
    corruptions = parse_corruptions(job) if job.data else []
    with output_folder(job.out) as out:
        opened = _open(job, probes, corruptions, out=out)
        _print_plan(opened)
        claim(out, opened.identity, mark=False)
        first = opened.subjects.sets[0].name if opened.subjects else opened.pairs[0].name
        with job_run("evaluate", job, out=out, encoder=opened.encoding.info.name, data=first) as run:
            watch.lap("start")
            summary = _measure_and_tell(opened, run, watch)
    sets = [*summary.get("sets", ()), *summary.get("retrieval", ())]
    check_strict(job.source, stores=[store for item in sets for store in item["stores"]])
    return summary


def _open(job: EvaluateJob, probes: Probes, corruptions: list[tuple[str, int]], *, out: str) -> _Opened:
    """Open all sets, then start Ray and describe the encoder."""
    reference = probes.reference
    sets: list[EvaluationSet] = []
    if job.data:
        assert reference is not None
        sets = list(open_sets(job, reference, corruptions))
    pairs = open_pair_sets(job, reference)
    classes = None
    if sets and reference is not None:
        classes = evaluation_classes(job, reference)
        sets = [checked_set(item, classes) for item in sets]
    start_ray()
    if reference is None:
        assert job.encoder is not None
        encoder = EncoderConfig(encoder=job.encoder, pretrained=job.pretrained, engine=job.engine)
        info = describe_encoder(encoder, device=job.device)
    else:
        encoder, info = describe_probes_encoder(reference, job=job, with_head=classes is not None)
    encoding = evaluation_encoding(job, info=info, encoder=encoder, out=out)
    subjects = None
    identity: dict[str, Any] = {"encoder": info.identity}
    if classes is not None:
        assert info.head is not None
        zero_shot = zero_shot_probe(
            torch.tensor(info.head), temperature=1 / info.logit_scale, class_names=classes.names
        )
        subjects = Subjects(
            job=job,
            out=out,
            sets=sets,
            classifiers={ZERO_SHOT: zero_shot, **probes.by_name},
            classes=classes,
            encoding=encoding,
        )
        identity = _identity(job, probes, sets)
    identity |= {"retrieval": retrieval_identity(list(pairs))}
    return _Opened(
        job=job,
        out=out,
        subjects=subjects,
        pairs=pairs,
        encoding=encoding,
        identity=identity,
    )


def _identity(job: EvaluateJob, probes: Probes, sets: Sequence[EvaluationSet]) -> dict[str, Any]:
    return {
        "probes": probes.digests,
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


def _print_plan(opened: _Opened) -> None:
    sets = opened.subjects.sets if opened.subjects else ()
    plan = [
        *((str(item.kind), item.data, len(item.views)) for item in sets),
        *(("retrieval", item.data, len(item.views)) for item in opened.pairs),
    ]
    probes = opened.subjects.classifiers if opened.subjects else {}
    print_evaluation_plan(plan, probes, info=opened.encoding.info, out=opened.out)


def _measure_and_tell(opened: _Opened, run: tracking.Run, watch: Stopwatch) -> dict[str, Any]:
    """Measure, write, track and print. Returns the summary."""
    job, out, subjects, info = opened.job, opened.out, opened.subjects, opened.encoding.info
    measured = measure_sets(subjects, watch) if subjects else None
    pairs = measure_retrieval(opened.pairs, opened.encoding)
    if pairs:
        watch.lap("retrieval")
    run.log(retrieval_metrics_of(pairs))
    retrieval = [found.result for found in pairs]
    claim(out, opened.identity)
    if subjects is None or measured is None:
        summary = write_retrieval(job, out, pairs, info=info, watch=watch, run_id=run.run_id)
        run.artifact(files.join(out, "summary.json"))
        print_retrieval(retrieval, out=out, run=run)
        return summary
    summary = write_evaluation(subjects, measured, pairs, watch=watch, run_id=run.run_id)
    track_evaluation(subjects, measured.results, run)
    print_evaluation(measured.results, retrieval, rates=measured.rates(), out=out, run=run)
    return summary
