"""The predict job: label images with a saved probe."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from lpclip import files
from lpclip.config import PredictJob, check, counted
from lpclip.encoders.again import refuse_unknown
from lpclip.encoders.hub import local_probe
from lpclip.encoders.passes import mean_view
from lpclip.features.data import Data, open_data
from lpclip.features.find_or_encode import Encoding
from lpclip.features.store import Store, matrix
from lpclip.images.views import View, base_views
from lpclip.jobs.beside import EncodingRun, encoding_metrics
from lpclip.jobs.console import print_mlflow, print_plan, shown
from lpclip.jobs.counts import count_line, refuse_listed
from lpclip.jobs.inputs import describe_probes_encoder
from lpclip.jobs.labelled_folder import LabelledFolder
from lpclip.jobs.process import start_ray
from lpclip.jobs.run import job_run
from lpclip.jobs.runtime import Stopwatch, make_place, output_folder
from lpclip.method.probe import Probe, load_probe, probe_digest
from lpclip.progress import Progress
from lpclip.report.tables import format_table


def predict_job(job: PredictJob) -> dict[str, Any]:
    """Label images with a saved probe: id, label, probability and the top k, one Parquet file.

    Images that cannot be read are listed in a second file beside it.
    """
    check(job)
    watch = Stopwatch()
    probe = load_probe(local_probe(job.probe))
    refuse_unknown(probe.encoder)
    data = open_data(job.data, config=job.source, split="test", limit=job.limit)
    make_place(job.out, kind="Parquet file")
    export = _begin_export(job, data)
    start_ray()
    encoder, info = describe_probes_encoder(probe, job=job, with_head=False)
    views = base_views(probe.encoder["views"])
    # Locked beside OUT, even where it stays empty: many jobs may share --features.
    folder = files.add_suffix(job.out, ".features")
    shared = files.add_suffix(files.absolute(job.features), "") if job.features else None
    with output_folder(folder) as held, contextlib.ExitStack() as stack:
        print_plan(data, None, info=info, views=",".join(map(str, views)), out=job.out)
        watch.lap("start")
        # The key of the run: the same command finds it again, from whatever folder it is given.
        track = partial(
            job_run, "predict", job, out=files.absolute(job.out), encoder=info.name, data=data.name
        )
        run = stack.enter_context(EncodingRun(track))
        encoding = Encoding(
            info=info,
            encoder=encoder,
            folder=shared or held,
            batch_size=job.batch_size,
            device=job.device,
            decode=job.decode,
            tell=run.tell,
        )
        encoded = encoding.one_store_of(data, views)
        store = encoded.store
        watch.lap("encode")
        counts = _write_labels(job, store, probe, views=views)
        quarantine, told = _keep_quarantine(store, job.out), count_line(data, store)
        watch.lap("label")
        exported, sentence = 0, ""
        if export:
            exported, sentence = export.fill(
                job.out, class_names=probe.class_names, min_probability=job.min_probability
            )
            watch.lap("export")
        kept = run.end(encoding_metrics(encoded, watch.seconds))
    if held != shared and files.exists(held):
        files.delete_folder(held)
    print(format_table([{"label": name, "images": count} for name, count in counts.most_common(20)]))
    print(told)
    images, quarantined = counts.total(), store.manifest.num_quarantined
    listed = f", listed in {shown(quarantine)}" if quarantine else ""
    print(f"{counted(images, 'image')} labelled: {shown(job.out)}; {quarantined:,} quarantined{listed}")
    if export:
        print(sentence)
    if kept:
        print_mlflow(kept)
    if quarantine and job.source.strict:
        refuse_listed({quarantine: quarantined})
    return {"images": images, "quarantined": quarantined} | ({"exported": exported} if export else {})


def _begin_export(job: PredictJob, data: Data) -> LabelledFolder | None:
    """The folder for the labelled images, if one is asked for. It is of these images, this probe and no others."""
    if job.export_folder is None:
        return None
    root = data.source.root if data.source else ""
    identity = [data.identity, root, probe_digest(local_probe(job.probe)), job.min_probability]
    return LabelledFolder.begin(job.export_folder, data=data, named=job.data, identity=identity)


def _write_labels(job: PredictJob, store: Store, probe: Probe, *, views: tuple[View, ...]) -> Counter[str]:
    """Write the Parquet file. Returns the number of images by label."""
    counts: Counter[str] = Counter()
    with files.parquet_by_tables(job.out) as add:
        for table in labelled(store, probe, views=views, top_k=job.top_k, with_all=job.probabilities):
            counts.update(table["label"].to_pylist())
            add(table)
    return counts


def labelled(
    store: Store, probe: Probe, *, views: tuple[View, ...], top_k: int, with_all: bool = False
) -> Iterator[pa.Table]:
    """Labels of the images of each part, in the order of the source: only one part's features are in memory.

    `with_all` adds the probabilities of all classes.
    """
    dim, names = store.manifest.dim, list(map(str, views))
    progress = Progress("labelling", total=store.manifest.num_rows)
    for part in store.tables(["id", *names]):
        features = mean_view([matrix(part, name, dim) for name in names])
        table = _label(probe, part["id"], features, top_k=top_k)
        yield _with_probabilities(table, probe, features) if with_all else table
        progress.advance(len(part))
    progress.close()


def _label(probe: Probe, ids: pa.ChunkedArray, features: np.ndarray, *, top_k: int) -> pa.Table:
    """The table of labels of the images with these ids (N,) and features (N, d)."""
    places, top = probe.top(features, top_k)
    names = pa.array(probe.class_names, pa.string())
    ends = pa.array(np.arange(len(ids) + 1) * places.shape[1], pa.int32())
    return pa.table(
        {
            "id": ids.cast(pa.string()),
            "label": names.take(pa.array(places[:, 0])),
            "probability": top[:, 0],
            "top_labels": pa.ListArray.from_arrays(ends, names.take(pa.array(places.ravel()))),
            "top_probabilities": pa.ListArray.from_arrays(ends, pa.array(top.ravel())),
        }
    )


def _with_probabilities(table: pa.Table, probe: Probe, features: np.ndarray) -> pa.Table:
    """The table with the probability of each class, and with the names of the classes in its metadata, as JSON."""
    count = len(probe.class_names)
    column = pa.FixedSizeListArray.from_arrays(pa.array(probe.predict_proba(features).ravel()), count)
    metadata = {"class_names": json.dumps(probe.class_names, ensure_ascii=False)}
    return table.append_column("probabilities", column).replace_schema_metadata(metadata)


def _keep_quarantine(store: Store, out: str) -> str | None:
    """Write the quarantined rows of the store beside the labels; its own list may be deleted with it.

    Returns the path, None when there are none; then a list of an earlier run is deleted.
    """
    base, options = files.split_options(out)
    path = f"{base.removesuffix('.parquet')}.quarantine.parquet{options}"
    if store.manifest.num_quarantined:
        files.write_bytes(path, files.read_bytes(files.join(store.path, "quarantine.parquet")))
        return path
    if files.exists(path):
        files.delete(path)
    return None
