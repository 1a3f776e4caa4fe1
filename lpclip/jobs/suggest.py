"""The suggest job: which images to label by hand, as a CSV file to fill in and a page to look at while doing so."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lpclip import files
from lpclip.config import ReviewJob, SuggestJob, UserError, check, counted
from lpclip.features.store import Features
from lpclip.jobs.console import command_line, shown
from lpclip.jobs.corrections import read_csv
from lpclip.jobs.finished_run import FinishedRun
from lpclip.jobs.selftrain_page import shrunk
from lpclip.method.suggestions import Suggestions, suggest
from lpclip.report.page import Example, Section, render_page

COLUMNS = ("id", "label", "guess", "confidence", "why")
MOST_ROWS = 20_000
"""Images among which the suggestions are looked for: a fair sample has all regions."""


def suggest_job(job: SuggestJob) -> dict[str, Any]:
    """Write OUT/suggested.csv and OUT/suggested.html. Returns the images that were looked at and the suggestions.

    Raises UserError when OUT holds no run, or the file of earlier suggestions has answers in it.
    """
    check(job)
    run = FinishedRun.open(job.run)
    path, page = (files.join(run.out, f"suggested.{kind}") for kind in ("csv", "html"))
    _refuse_answers(path)
    features, thumbnails = run.store.features(views=(), with_labels=False), run.store.thumbnails()
    known = run.corrections().labels()
    rows = _candidates(features, thumbnails=thumbnails, known=known)
    if not len(rows):
        raise UserError(f"all images of {run.out} that could be asked for have a label already")
    print(f"suggest: choosing {job.count:,} of {counted(len(rows), 'image')}", flush=True)
    sample = features.base[rows]
    probabilities = run.probe.probabilities(sample).numpy()
    found = suggest(sample, probabilities, count=job.count, seed=job.seed)
    guesses, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    lines = [
        {
            "id": features.ids[rows[place]],
            "label": "",
            "guess": run.probe.class_names[guesses[place]],
            "confidence": f"{confidence[place]:.3f}",
            "why": _why(found, number),
        }
        for number, place in enumerate(found.places)
    ]
    facts = {"Run": shown(run.out), "Images": f"{len(features.ids):,}", "Suggested": f"{len(lines):,}"}
    files.write_bytes(page, _page(lines, thumbnails, path=shown(path), facts=facts).encode())
    files.write_bytes(path, _csv(lines).encode())
    print(f"{counted(len(lines), 'image')} to label: {shown(path)}, with pictures in {shown(page)}")
    print(f"next     label them in the browser: {command_line('review', ReviewJob(run=job.run))}")
    if known:
        print(
            f"         review adds them, and labels that the file has by then, to the "
            f"{counted(len(known), 'answer')} in {shown(run.corrections().path)}, and prints the command that trains "
            "again",
            flush=True,
        )
    else:
        print(f"         or in the file, then:      {run.again(labels=path)}", flush=True)
    return {"images": len(rows), "suggested": len(lines)}


def _csv(lines: Sequence[Mapping[str, str]]) -> str:
    sink = io.StringIO(newline="")
    table = csv.DictWriter(sink, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return sink.getvalue()


def _page(
    lines: Sequence[Mapping[str, str]],
    thumbnails: Mapping[str, bytes],
    *,
    path: str,
    facts: Mapping[str, str],
) -> str:
    """The page that shows the images of the lines of the file at `path`."""
    examples = [
        Example(
            image=image,
            name=f"{number}. {line['id']}",
            predictions={"probe": (line["guess"], float(line["confidence"]))},
        )
        for number, line in enumerate(lines, 1)
        if (image := shrunk(thumbnails.get(line["id"], b""))) is not None
    ]
    text = (
        f"Fill in the column label of {path} for these images, in any order and as many as you like: a class "
        'name, or "none of these". The first ones help most. The numbers are those of the lines.'
    )
    if not examples:
        text += "\n\nThere are no pictures, because the feature store has no thumbnails."
    section = Section(title="Images", text=text, examples=[("", examples)])
    return render_page("Images to label", facts=facts, sections=[section])


def _candidates(features: Features, *, thumbnails: dict[str, bytes], known: dict[str, str]) -> np.ndarray:
    """Rows (n,) that could be asked for: images that can be shown, where there are thumbnails, and have no label."""
    rows = [
        row
        for row, name in enumerate(features.ids.tolist())
        if name not in known and (not thumbnails or name in thumbnails)
    ]
    return np.array(rows[:MOST_ROWS], np.int64)


def _why(found: Suggestions, number: int) -> str:
    size, unsure = int(found.stands_for[number]), float(found.unsure[number])
    return f"stands for {counted(size, 'image')}, of which the probe is unsure by {unsure:.0%} on average"


def _refuse_answers(path: str) -> None:
    """Refuse to overwrite a file of suggestions in which somebody has filled in labels."""
    if not files.exists(path):
        return
    if any(row["label"].strip() for row in read_csv(path, columns=("id", "label"))[1]):
        raise UserError(f"{path} has labels that were filled in: move it, and give it to --labels")
