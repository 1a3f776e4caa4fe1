"""The shell that jobs share: one MLflow run around the work, and the part of a summary that is the same for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lpclip import files
from lpclip.config import (
    EncodeJob,
    EvaluateJob,
    PredictJob,
    PretrainJob,
    SelftrainJob,
    TuneJob,
    check,
    to_dict,
)
from lpclip.jobs import tracking
from lpclip.jobs.runtime import versions

Job = EncodeJob | PredictJob | SelftrainJob | TuneJob | EvaluateJob | PretrainJob


def check_job(job: Job) -> None:
    """Raise UserError, before any work, for flags that make no sense and where no MLflow run can be kept."""
    check(job)
    tracking.tracking_uri(job.out)


@contextlib.contextmanager
def job_run(command: str, job: Job, *, out: str, encoder: str, data: str) -> Iterator[tracking.Run]:
    """The MLflow run of a job: named after OUT, with the job's flags as parameters, and with tags to search by.

    A job that was interrupted finds its unfinished run again by `command` and OUT, and continues it.
    Raises UserError when the server or the database cannot be used.
    """
    given = {name: value for name, value in to_dict(job).items() if value is not None}
    params = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in given.items()}
    with tracking.track(
        job.tracking, name=files.split(out)[1], params=params, out=out, resume_key=f"{command} {out}"
    ) as run:
        run.set_tags({"encoder": encoder, "data": data, "out": out})
        yield run


def provenance(job: Job, run_id: str | None) -> dict[str, Any]:
    """The last entries of every summary.json: flags, versions and the id of the MLflow run."""
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in to_dict(job).items()}
    return {"config": config, "versions": versions(), "mlflow_run": run_id}


# What a summary calls its classifiers, and what their measures' names end with in MLflow, where names are sorted.
_ENDINGS = {"probe": "", "chosen": "", "zero_shot": "_zero_shot", "supervised": "_supervised"}


def single_metrics(summary: dict[str, Any]) -> dict[str, float | None]:
    """The single numbers by which MLflow compares runs: the measures, for each classifier, and the speed."""
    # Here, because it imports torch: jobs that only encode do without.
    from lpclip.evaluation.metrics import METRICS

    timings = summary["timings"]
    return {
        **{
            f"test/{metric}{ending}": summary[name][metric]
            for name, ending in _ENDINGS.items()
            if name in summary
            for metric in METRICS
        },
        "speed/images_per_second": summary.get("rates", {}).get("encode"),
        "speed/seconds_encode": timings["encode"],
        "speed/seconds_total": sum(timings.values()),
    }
