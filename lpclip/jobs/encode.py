"""The encode job: images to a feature store, with zero-shot pseudo-labels for class names."""

from __future__ import annotations

from typing import Any

from lpclip import files
from lpclip.config import EncodeJob, check, to_dict
from lpclip.encoders.head import make_head
from lpclip.encoders.prompts import templates
from lpclip.features.data import open_data
from lpclip.features.describe import describe_encoder
from lpclip.features.find_or_encode import Encoding
from lpclip.features.zero_shot_labels import ZeroShotLabels
from lpclip.images.classes import notes_on_names, resolve_classes
from lpclip.images.views import parse_views
from lpclip.jobs.console import encoded_row, print_plan
from lpclip.jobs.process import start_ray
from lpclip.jobs.runtime import Stopwatch, output_folder, versions
from lpclip.report.tables import format_table


def encode_job(job: EncodeJob) -> dict[str, Any]:
    """Encode images into a feature store under OUT/features, with zero-shot pseudo-labels for class names."""
    check(job)
    watch = Stopwatch()
    views = parse_views(job.encode.views)
    with output_folder(job.out) as out:
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
        encoding = Encoding(
            info=info,
            encoder=job.encoder,
            folder=job.encode.features or files.join(out, "features"),
            seed=job.seed,
            batch_size=job.encode.batch_size,
            num_actors=job.encode.num_actors,
            device=job.encode.device,
            decode=job.encode.decode,
        )
        labels = (
            ZeroShotLabels(head=head, folder=files.join(out, f"zero_shot-{head.identity[:12]}"))
            if head
            else None
        )
        watch.lap("start")
        encoded = encoding.store_of(data, views=views, zero_shot=labels)
        watch.lap("encode")
        summary = {
            "features": encoded.store.path,
            "images": encoded.store.manifest.num_rows,
            "quarantined": encoded.store.manifest.num_quarantined,
            "timings": watch.seconds,
            "rates": {"encode": encoded.rate},
            "config": to_dict(job),
            "versions": versions(),
        }
        files.write_json(files.join(out, "summary.json"), summary)
        print(format_table([encoded_row(data, encoded)]))
        return summary
