"""Image-text retrieval in the evaluate job: images and texts are encoded, and each is ranked for the other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from lpclip import files
from lpclip.config import EncoderConfig, EvaluateJob, to_dict
from lpclip.encoders.head import EncoderInfo
from lpclip.errors import UserError
from lpclip.evaluation.ranking import retrieval_metrics
from lpclip.evaluation.results import RetrievalResult
from lpclip.features.data import Data
from lpclip.features.describe import describe_encoder
from lpclip.features.texts import encode_texts, read_pairs
from lpclip.images.views import WEAK, View, base_views
from lpclip.jobs import tracking
from lpclip.jobs.console import print_evaluation_plan, print_retrieval
from lpclip.jobs.inputs import describe_probes_encoder, evaluation_encoding, open_pairs
from lpclip.jobs.runtime import claim, output_folder, start_ray, versions
from lpclip.method.probe import Probe
from lpclip.progress import Progress


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Image-text pairs, and the views whose mean is an image's feature."""

    name: str
    data: Data
    views: tuple[View, ...]


def open_pair_sets(job: EvaluateJob, probe: Probe | None) -> list[PairSet]:
    """The sets of --retrieval, opened but not read. Raises UserError when there are no texts, or a name is taken."""
    views = base_views(probe.encoder["views"]) if probe else (WEAK,)
    found: dict[str, PairSet] = {}
    for spec in job.retrieval:
        name, separator, path = spec.partition("=")
        if not separator or "/" in name:  # the = is a path's own
            name, path = "", spec
        elif not name or not path:
            raise UserError(f"--retrieval {spec}: give it as NAME=PATH")
        source = open_pairs(
            path, config=job.source, caption_templates=job.caption_templates, split="test", limit=job.limit
        )
        name = name or source.name
        if name in found:
            raise UserError(
                f"--retrieval {spec}: another set is called {name}; give it a name, as in other={path}"
            )
        found[name] = PairSet(name=name, data=Data(source), views=views)
    return list(found.values())


def retrieval_identity(sets: list[PairSet]) -> dict[str, Any] | None:
    """Whatever changes the ranks but the encoder; None without sets."""
    return {
        item.name: {"views": [str(view) for view in item.views], "source": item.data.source.identity}
        for item in sets
        if item.data.source is not None
    } or None


def retrieval_job(job: EvaluateJob, probe: Probe | None) -> dict[str, Any]:
    """Measure retrieval alone, of the probe's encoder or of the one that the job names. Returns the summary."""
    with output_folder(job.out) as out:
        sets = open_pair_sets(job, probe)
        start_ray()
        if probe is not None:
            encoder, info = describe_probes_encoder(probe, pretrained=job.pretrained, with_head=False)
        else:
            assert job.encoder is not None
            encoder = EncoderConfig(encoder=job.encoder, pretrained=job.pretrained)
            info = describe_encoder(encoder)
        plan = [("retrieval", item.data, len(item.views)) for item in sets]
        print_evaluation_plan(plan, {}, info=info, out=out)
        identity = {"encoder": info.identity, "retrieval": retrieval_identity(sets)}
        claim(out, identity, mark=False)
        params = {k: v for k, v in to_dict(job).items() if v is not None}
        with tracking.track(
            job.tracking, name=files.split(out)[1], params=params, resume_key=f"evaluate {out}"
        ) as run:
            run.set_tags({"encoder": info.name, "data": sets[0].name, "out": out})
            entries, results = measure_retrieval(job, out, sets, info, encoder, run)
            summary = {
                "retrieval": entries,
                "encoder": info.identity,
                "encoder_name": info.name,
                "config": {key: list(v) if isinstance(v, tuple) else v for key, v in to_dict(job).items()},
                "versions": versions(),
                "mlflow_run": run.run_id,
            }
            claim(out, identity)
            files.write_json(files.join(out, "summary.json"), summary)
            run.artifact(files.join(out, "summary.json"))
        print_retrieval(results, out=out, run=run)
        return summary


def measure_retrieval(
    job: EvaluateJob,
    out: str,
    sets: list[PairSet],
    info: EncoderInfo,
    encoder: EncoderConfig,
    run: tracking.Run,
) -> tuple[list[dict[str, Any]], list[RetrievalResult]]:
    """What the summary tells of each set: what it holds, recalls and median rank, and what it took in seconds.

    Raises UserError when too many pairs are bad.
    """
    entries, results = [], []
    encoding = evaluation_encoding(job, info=info, encoder=encoder, out=out)
    for item in sets:
        begin = time.monotonic()
        views = encoding.views_of(item.data, item.views)
        seconds = {"images": time.monotonic() - begin}
        begin = time.monotonic()
        images = views.mean(*item.views)
        texts, image_index, text_index = read_pairs(views.stores[0].store)
        text_features = encode_texts(texts, info=info, encoder=encoder, name=item.data.name)
        seconds["texts"] = time.monotonic() - begin
        begin = time.monotonic()
        progress = Progress(
            f"ranking {item.data.name}", total=len(images) + len(texts), unit="images and texts"
        )
        found = retrieval_metrics(
            images,
            text_features,
            image_index=image_index,
            text_index=text_index,
            advance=progress.advance,
        )
        progress.close()
        seconds["ranks"] = time.monotonic() - begin
        run.log(
            {
                f"retrieval/{item.name}/{direction}_{metric}": value
                for direction, values in found.directions().items()
                for metric, value in values.numbers().items()
            },
            step=0,
        )
        results.append(
            RetrievalResult(
                set=item.name,
                images=len(images),
                texts=len(texts),
                quarantined=views.stores[0].store.manifest.num_quarantined,
                retrieval=found,
            )
        )
        entries.append(
            {
                "set": item.name,
                "data": item.data.name,
                "images": len(images),
                "texts": len(texts),
                "pairs": len(text_index),
                "quarantined": views.stores[0].store.manifest.num_quarantined,
                **{name: direction.to_json() for name, direction in found.directions().items()},
                "views": [str(view) for view in item.views],
                "stores": [one.store.path for one in views.stores],
                "encoded_now": any(not one.reused for one in views.stores),
                "seconds": {name: round(value, 3) for name, value in seconds.items()},
            }
        )
    return entries, results
