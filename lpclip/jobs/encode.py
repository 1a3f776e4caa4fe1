"""The encode job: images to a feature store, with zero-shot pseudo-labels for class names."""

from __future__ import annotations

from typing import Any

from lpclip import files
from lpclip.config import EncodeJob, check, to_dict
from lpclip.encoders.head import make_head
from lpclip.encoders.prompts import templates
from lpclip.features.describe import describe_encoder
from lpclip.features.find_or_encode import encode_data, open_data
from lpclip.images.classes import resolve_classes
from lpclip.images.views import parse_views
from lpclip.jobs.console import encoded_row, print_plan
from lpclip.jobs.runtime import output_folder, start_ray, versions
from lpclip.report.tables import format_table


def encode_job(job: EncodeJob) -> dict[str, Any]:
    """Encode images into a feature store under OUT/features, with zero-shot pseudo-labels for class names."""
    check(job)
    parse_views(job.encode.views)
    with output_folder(job.out) as out:
        data = open_data(job.data, config=job.source, split="train", limit=job.limit)
        classes = resolve_classes(job.names, label_names=data.label_names) if job.names.classes else None
        start_ray()
        names = classes.names if classes else ()
        info = describe_encoder(
            job.encoder, class_names=names, templates=templates(job.names.templates) if names else ()
        )
        head = make_head(info, names, temperature=None) if names else None
        print_plan(data, None, info=info, views=job.encode.views, out=out)
        encoded = encode_data(
            data,
            info=info,
            encoder=job.encoder,
            config=job.encode,
            seed=job.seed,
            folder=job.encode.features or files.join(out, "features"),
            head=head,
            scores_path=files.join(out, f"zero_shot-{head.identity[:12]}") if head else "",
        )
        summary = {
            "features": encoded.store.path,
            "images": encoded.store.manifest.num_rows,
            "quarantined": encoded.store.manifest.num_quarantined,
            "timings": {"encode": encoded.seconds},
            "rates": {"encode": encoded.rate},
            "config": to_dict(job),
            "versions": versions(),
        }
        files.write_json(files.join(out, "summary.json"), summary)
        print(format_table([encoded_row(data, encoded)]))
        return summary
