"""The encode job: images to a feature store, with zero-shot pseudo-labels for class names."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from lpclip import files
from lpclip.config import EncodeJob, check
from lpclip.encoders.head import make_head
from lpclip.encoders.prompts import templates
from lpclip.features.data import open_data
from lpclip.features.describe import describe_encoder
from lpclip.features.find_or_encode import Encoding
from lpclip.features.zero_shot_labels import ZeroShotLabels
from lpclip.images.classes import notes_on_names, resolve_classes
from lpclip.images.views import parse_views
from lpclip.jobs.beside import EncodingRun, encoding_metrics
from lpclip.jobs.console import encoded_row, print_mlflow, print_plan
from lpclip.jobs.counts import check_strict, count_line
from lpclip.jobs.process import start_ray
from lpclip.jobs.run import job_run, provenance
from lpclip.jobs.runtime import Stopwatch, output_folder
from lpclip.report.tables import format_table


def encode_job(job: EncodeJob) -> dict[str, Any]:
    """Encode images into a feature store under OUT/features, with zero-shot pseudo-labels for class names."""
    check(job)
    watch = Stopwatch()
    views = parse_views(job.encode.views)
    with output_folder(job.out) as out, contextlib.ExitStack() as stack:
        data = open_data(job.data, config=job.source, split="train", limit=job.limit)
        classes = resolve_classes(job.names, label_names=data.label_names) if job.names.classes else None
        data = data.noted(*notes_on_names(classes.names if classes else ()))
        start_ray()
        names = classes.names if classes else ()
        info = describe_encoder(
            job.encoder,
            class_names=names,
            templates=templates(job.names.templates) if names else (),
            device=job.encode.device,
        )
        head = make_head(info, names, temperature=None) if names else None
        print_plan(data, None, info=info, views=job.encode.views, out=out)
        track = partial(job_run, "encode", job, out=out, encoder=info.name, data=data.name)
        run = stack.enter_context(EncodingRun(track))
        encoding = Encoding(
            info=info,
            encoder=job.encoder,
            folder=job.encode.features or files.join(out, "features"),
            seed=job.seed,
            batch_size=job.encode.batch_size,
            num_actors=job.encode.num_actors,
            device=job.encode.device,
            decode=job.encode.decode,
            tell=run.tell,
        )
        labels = (
            ZeroShotLabels(head=head, folder=files.join(out, f"zero_shot-{head.identity[:12]}"))
            if head
            else None
        )
        watch.lap("start")
        encoded = encoding.store_of(data, views=views, zero_shot=labels)
        watch.lap("encode")
        kept = run.end(encoding_metrics(encoded, watch.seconds))
        summary = {
            "features": encoded.store.path,
            "images": encoded.store.manifest.num_rows,
            "quarantined": encoded.store.manifest.num_quarantined,
            "timings": watch.seconds,
            "rates": {"encode": encoded.rate},
            **provenance(job, kept.run_id if kept else None),
        }
        files.write_json(files.join(out, "summary.json"), summary)
        print(format_table([encoded_row(data, encoded)]))
        print(count_line(data, encoded.store), flush=True)
        if kept:
            print_mlflow(kept)
    check_strict(job.source, stores=[encoded.store.path])
    return summary
