"""The review job: a page on this machine that asks for the labels of images, and writes each answer at once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lpclip import files
from lpclip.config import ReviewJob, SourceConfig, SuggestJob, UserError, check, counted
from lpclip.encoders.passes import mean_view
from lpclip.features.store import Store, matrix
from lpclip.images.open import open_source
from lpclip.images.pixels import decode_image
from lpclip.images.views import BASE_VIEWS
from lpclip.jobs.console import shown
from lpclip.jobs.corrections import NONE, Corrections, read_csv
from lpclip.jobs.finished_run import FinishedRun, configured
from lpclip.jobs.review_server import ADDRESS, Question, Review, ReviewServer
from lpclip.jobs.suggest import suggest_job
from lpclip.method.probe import Probe

KEYS = 9
"""Likely labels that have a key."""
IMAGE_PIXELS = 1200
"""The longer side of an image on the page, at most."""


def review_job(job: ReviewJob) -> dict[str, int]:
    """Serve the page until Ctrl-C. Returns the number of the answers and of the images.

    Raises UserError when OUT holds no run, its list of images is of another one, or the port is taken.
    """
    check(job)
    run = FinishedRun.open(job.run)
    out, probe, store = run.out, run.probe, run.store
    if NONE in probe.class_names:
        raise UserError(
            f'a class is called "{NONE}", which stands for images of no class: give it another name'
        )
    file = files.absolute(job.labels) if job.labels else files.join(out, "corrections.csv")
    corrections = Corrections(file)
    rows, given = _suggested(out), corrections.labels()
    for row in rows:
        if row["label"] and row["id"] not in given:
            if row["label"] not in (*probe.class_names, NONE):
                raise UserError(
                    f"{files.join(out, 'suggested.csv')}: {row['label']} is no class of this run, nor {NONE}"
                )
            corrections.set(row["id"], row["label"])
    ids = [row["id"] for row in rows]
    guesses = _guesses(store, probe, ids, path=files.join(out, "suggested.csv"))
    pictures = _Pictures(run.summary["config"], store, ids)
    review = Review(
        questions=[Question(row["id"], guesses[row["id"]], row.get("why", "")) for row in rows],
        classes=probe.class_names,
        none=NONE,
        file=shown(file),
        command=run.again(labels=file),
        answers=corrections.labels,
        take=corrections.set,
        image=pictures.jpeg,
    )
    with ReviewServer(review, port=job.port) as server:
        print(
            f"open http://{ADDRESS}:{server.server_port}/ in the browser of this machine; Ctrl-C ends it",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    answers = corrections.labels()
    count = sum(name in answers for name in ids)
    print(f"\n{count:,} of {counted(len(ids), 'image')} answered, in {shown(file)}")
    if count:
        print(f"next     {review.command}")
    return {"answered": count, "images": len(ids)}


def _suggested(out: str) -> list[dict[str, str]]:
    """The images to ask about, in order."""
    path = files.join(out, "suggested.csv")
    if not files.exists(path):
        suggest_job(SuggestJob(run=out))
    _, rows = read_csv(path, columns=("id", "label"))
    if not rows:
        raise UserError(f"{path} names no image: remove it, and it is made again")
    return list({row["id"]: row for row in rows}.values())


def _guesses(
    store: Store, probe: Probe, ids: Sequence[str], *, path: str
) -> dict[str, list[tuple[str, float]]]:
    """The most probable classes of each image. Raises UserError for an id that the store does not have."""
    wanted = pa.array(ids, pa.string())
    names = [view for view in store.manifest.views if view in BASE_VIEWS]
    found: dict[str, list[tuple[str, float]]] = {}
    for part in store.tables(["id", *names]):
        part = part.filter(pc.is_in(part["id"].cast(pa.string()), value_set=wanted))
        if len(part):
            features = mean_view([matrix(part, name, store.manifest.dim) for name in names])
            places, top = probe.top(features, KEYS)
            for name, row, shares in zip(part["id"].to_pylist(), places.tolist(), top.tolist(), strict=True):
                found[name] = [(probe.class_names[k], share) for k, share in zip(row, shares, strict=True)]
    missing = [name for name in ids if name not in found]
    if missing:
        raise UserError(
            f"{path}: {missing[0]} is no image of this run: remove the file, and it is made again"
        )
    return found


class _Pictures:
    """JPEGs of the images: made of the image itself where it is a file of this machine, else the store's thumbnail."""

    def __init__(self, config: dict[str, Any], store: Store, ids: Sequence[str]) -> None:
        self._files: dict[str, str] = {}
        self._thumbnails: dict[str, bytes] = {}
        wanted = {*ids}
        # The images may have moved since the run: then their thumbnails do.
        with contextlib.suppress(UserError, OSError):
            data = [value for value in config["data"] if "://" not in value]
            source = open_source(data, config=configured(SourceConfig, config), limit=config.get("limit"))
            for unit in source.units:
                paths = source.reader.paths(unit)
                if paths:
                    listed = zip(source.reader.listed(unit), paths, strict=True)
                    self._files |= {name: path for (name, _), path in listed if path and name in wanted}
        if len(self._files) < len(wanted):
            self._thumbnails = {name: data for name, data in store.thumbnails().items() if name in wanted}
        limits = configured(SourceConfig, config)
        self._limits = {"max_pixels": limits.max_pixels, "max_bytes": limits.max_bytes}

    def jpeg(self, name: str) -> bytes | None:
        """The JPEG of an image, None where there is none."""
        with contextlib.suppress(UserError, OSError):
            if name in self._files:
                image = decode_image(files.read_bytes(self._files[name]), **self._limits)
                image.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
                sink = io.BytesIO()
                image.save(sink, "JPEG", quality=90)
                return sink.getvalue()
        return self._thumbnails.get(name)
