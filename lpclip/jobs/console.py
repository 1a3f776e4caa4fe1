"""Words of the jobs on the terminal: the plan first, the tables last."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lpclip import files
from lpclip.config import PredictJob, SelftrainJob, UiJob, counted, flags
from lpclip.encoders.head import EncoderInfo, Head
from lpclip.features.data import Data
from lpclip.features.stored_views import Encoded
from lpclip.images.views import base_views, parse_views
from lpclip.jobs import tracking
from lpclip.jobs.counts import count_line
from lpclip.jobs.given_labels import GivenLabels
from lpclip.report.tables import format_table

LITE_NOTE = (
    "the embedded lite encoder is not CLIP: use it for a first impression, its figures say nothing of CLIP"
)


def print_plan(data: Data, test: Data | None, *, info: EncoderInfo, views: str, out: str) -> None:
    """Print the plan of a job before the work begins."""
    for title, item in (("data", data), ("evaluate", test)):
        if item is not None:
            print(f"{title:<9} {item.describe()}")
            print_examples(item)
    print_encoder(info, f", views {views}")
    for item, needed in ((data, parse_views(views)), (test, base_views(views))):
        if item is not None and item.source is not None and item.source.num_rows:
            size = 2 * info.identity["dim"] * len(needed) * item.source.num_rows / 1e6
            print(f"features  {item.name}: about {size:,.0f} MB when all are encoded")
    print(f"output    {shown(out)}")
    noted = [note for item in (data, test) if item is not None and item.source for note in item.source.notes]
    for note in (*noted, *info.notes):
        print(f"note      {note}")


def print_examples(data: Data) -> None:
    """Print the line of a plan with three images and their labels, where they are known."""
    if examples := data.examples():
        print(f"{'':<9} as in {examples}")


def print_encoder(info: EncoderInfo, more: str = "") -> None:
    """Print an encoder's line of a plan, which ends with `more`."""
    engine = " by OpenVINO" if info.engine == "openvino" else ""
    print(f"encoder   {info.name}, {info.preprocess.size} px, {info.identity['precision']}{engine}{more}")
    if info.name == "lite":
        print(f"          ({LITE_NOTE})")


def shown(path: str) -> str:
    """A path as the user would type it: relative where it lies below the working directory."""
    return path.replace(f"{os.getcwd()}/", "")


def command_line(name: str, job: object) -> str:
    """The command that runs a job, fit for a shell in the folder where this process was started.

    A process that is one of the scripts in jobs/ names the script beside it, any other names `lpclip`, with the
    folder that it lies in unless the shell finds it by itself.
    """
    started = Path(sys.argv[0])
    script = started.with_name(f"{name}.py")
    if started.parent.name == "jobs" and started.suffix == ".py" and script.is_file():
        return shlex.join([shown(sys.executable), shown(str(script)), *flags(job)])
    installed = started if started.name == "lpclip" else Path(sys.executable).with_name("lpclip")
    found = shutil.which("lpclip")
    is_found = found is not None and installed.exists() and Path(found).samefile(installed)
    program = "lpclip" if is_found or not installed.exists() else shown(str(installed))
    return shlex.join([program, name, *flags(job)])


def print_places(out: str, run: tracking.Run, **names: str) -> None:
    """Print where a job's files lie, each under its name, and how its MLflow run is seen."""
    for label, name in names.items():
        print(f"{label:<8} {shown(files.join(out, name))}")
    print_mlflow(run)


def print_mlflow(run: tracking.Run) -> None:
    """Print the address of a server's charts, or the command that shows those of a database."""
    here = run.database in (None, Path("mlflow.db").absolute())
    show = UiJob(database=None if here else shown(str(run.database)))
    print(f"MLflow   compare the runs: {run.charts or command_line('ui', show)}", flush=True)


def print_classes(names: tuple[str, ...], *, present: np.ndarray | None, given: GivenLabels | None) -> None:
    """Print a plan's class names, those at the places `present` (K',) that `--present` names, and the given labels."""
    print(f"classes   {_listed(names)}")
    if present is not None:
        print(
            f"present   {_listed([names[place] for place in present])}, as --present says; the rounds use these"
        )
    if given is not None:
        print(f"labels    {given.told()}")


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def print_training(job: SelftrainJob, *, head: Head) -> None:
    """The plan of the rounds."""
    t = job.training
    workers = counted(t.num_workers, "Ray Train worker") if t.num_workers else "in this process"
    print(
        f"training  {t.solver}, at most {counted(t.rounds, 'round')}, temperature {head.temperature:.4g}, "
        f"threshold {t.threshold:g}, prior {t.prior}, {workers}",
        flush=True,
    )


def print_zero_shot(accuracy: float | None, *, images: int, data: str) -> None:
    """Print zero-shot's accuracy as a first number, where there are labelled images."""
    if accuracy is not None:
        print(
            f"zero-shot: right on {accuracy:.1%} of {counted(images, 'labelled image')} of {data}", flush=True
        )


def encoded_row(data: Data, encoded: Encoded) -> dict[str, Any]:
    """A store's row in the table of features: rates are of images encoded in this run."""
    return {
        "features": data.name,
        "images": encoded.store.manifest.num_rows,
        "quarantined": encoded.store.manifest.num_quarantined,
        "encoded": "found" if encoded.reused else "now",
        "seconds": round(encoded.seconds),
        "images/s": round(encoded.rate) if encoded.rate else None,
        "store": shown(encoded.store.path),
    }


def measured_on(where: dict[str, Any]) -> str:
    """The images that were evaluated on, in a few words, from the `evaluated_on` of a summary."""
    text = f"{where['data']}, {counted(where['images'], 'labelled image')}, {where['setting']}"
    if where["setting"] == "inductive" and where["shared"]:
        text += f" but for {where['shared']:,} that are among the unlabelled images too"
    return text


def print_result(
    summary: dict[str, Any],
    data: Data,
    encoded: Encoded,
    test: Data | None,
    tested: Encoded | None,
    out: str,
    run: tracking.Run,
) -> None:
    """Print the tables of a job, and where its results lie."""
    sets = [(data, encoded)] + ([(test, tested)] if test is not None and tested is not None else [])
    print(f"\n{format_table([encoded_row(*one) for one in sets])}")
    for one, its in sets:
        print(count_line(one, its.store))
    print()
    where = summary["evaluated_on"]
    if where["setting"] is None:
        print("there are no labels to evaluate on: the report shows what the labels are worth")
    else:
        print(f"{measured_on(where)}:")
        trusted = summary["prior"]["trusted"]
        kind = "self-trained" if trusted else "fell back to zero-shot"
        if "labels" in summary:
            kind += f", {summary['labels']['images']:,} labels given"
        names = {"zero_shot": "zero-shot", "probe": f"probe ({kind})", "supervised": "supervised"}
        print(
            format_table(
                [
                    {
                        "classifier": text,
                        "accuracy %": summary[name]["accuracy"],
                        "ECE %": summary[name]["ece"],
                        "NLL": summary[name]["nll"],
                    }
                    for name, text in names.items()
                    if name in summary
                ]
            )
        )
        before, after = summary["zero_shot"]["accuracy"], summary["probe"]["accuracy"]
        if after < before:
            print(
                f"\nThe probe is {100 * (before - after):.1f} points below zero-shot here: use "
                f"{shown(files.join(out, 'zero_shot'))} instead, or more images. --prior auto and --present auto, the "
                "defaults, are the most careful; where they went wrong, give the true shares of the classes (--prior)."
            )
    print()
    print_places(out, run, probe="probe", pictures="figures", summary="summary.json")
    decode = encoded.store.manifest.identity.get("decoded_by", "cpu")
    more = PredictJob(
        probe=shown(files.join(out, "probe")), data=("FOLDER",), out="labels.parquet", decode=decode
    )
    print(f"next     label other images: {command_line('predict', more)}")
    print(f"look at what it did: {shown(files.join(out, 'report.html'))}", flush=True)
