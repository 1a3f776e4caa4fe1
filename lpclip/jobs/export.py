"""The export job: a saved probe in a form that other programs read."""

from __future__ import annotations

import shlex

from lpclip.config import ExportJob, check, counted
from lpclip.encoders.again import refuse_unknown
from lpclip.encoders.hub import local_probe
from lpclip.jobs.console import shown
from lpclip.jobs.runtime import make_place
from lpclip.method.probe import Probe, load_probe, probe_digest
from lpclip.report.tables import format_table
from lpclip.serving.hub_folder import write_hub_folder
from lpclip.serving.onnx_file import float16_name, write_onnx
from lpclip.serving.open_clip_head import write_open_clip

FORMS = {
    "onnx": "an ONNX graph from pixels to probabilities",
    "open_clip": "a classifier for open_clip's zero-shot evaluation",
    "folder": "a folder for the Hugging Face Hub: the probe, config.json and a model card",
}


def export_job(job: ExportJob) -> None:
    """Write a saved probe to OUT. The name of OUT says in which form."""
    check(job)
    folder = local_probe(job.probe)
    probe = load_probe(folder)
    refuse_unknown(probe.encoder)
    print(f"probe     {shown(job.probe)}: {counted(len(probe.class_names), 'class name')}")
    print(f"writes    {shown(job.out)}: {FORMS[job.form]}", flush=True)
    if job.float16:
        print(
            f"          {shown(float16_name(job.out))}: the same with weights stored as float16", flush=True
        )
    notes, told = _write(job, probe, folder=folder, digest=probe_digest(folder))
    for note in notes:
        print(f"note      {note}")
    print(told)


def _write(job: ExportJob, probe: Probe, *, folder: str, digest: str) -> tuple[list[str], str]:
    """Write what the job asks for. Returns notes, and what is to be told at the end."""
    if job.form == "folder":
        notes = write_hub_folder(probe, folder, job.out, digest=digest)
        return notes, f"written: look at README.md, then `hf upload OWNER/NAME {shlex.quote(shown(job.out))}`"
    make_place(job.out)
    if job.form == "open_clip":
        return write_open_clip(probe, job.out, digest=digest), f"written: {shown(job.out)}"
    written, notes = write_onnx(probe, job.out, digest=digest, pretrained=job.pretrained, float16=job.float16)
    rows = [
        {"file": shown(one.path), "MB": f"{one.num_bytes / 1e6:.1f}", "difference": f"{one.difference:.1e}"}
        for one in written
    ]
    told = (
        "difference: the largest of a probability from the original's, as onnxruntime computes random pixels"
    )
    return notes, f"{format_table(rows)}\n{told}"
