"""The export job: a saved probe in a form that other programs read."""

from __future__ import annotations

from pathlib import Path

from lpclip import files
from lpclip.config import ExportJob, UserError, check, counted, is_onnx
from lpclip.jobs.console import shown
from lpclip.report.tables import format_table


def export_job(job: ExportJob) -> None:
    """Write a saved probe to OUT. The name of OUT says in which form."""
    check(job)
    if not is_onnx(job.out):
        raise UserError(f"--out {job.out}: its name must end in .onnx")
    _export_onnx(job)


def _export_onnx(job: ExportJob) -> None:
    from lpclip.method.probe import load_probe, probe_digest
    from lpclip.serving.onnx_file import float16_name, write_onnx

    probe = load_probe(job.probe)
    print(f"probe     {shown(job.probe)}: {counted(len(probe.class_names), 'class name')}")
    print(f"writes    {shown(job.out)}: an ONNX graph from pixels to probabilities", flush=True)
    if job.float16:
        print(
            f"          {shown(float16_name(job.out))}: the same with weights stored as float16", flush=True
        )
    _make_place(job.out)
    written, notes = write_onnx(
        probe,
        job.out,
        digest=probe_digest(job.probe),
        pretrained=job.pretrained,
        float16=job.float16,
    )
    for note in notes:
        print(f"note      {note}")
    rows = [
        {"file": shown(one.path), "MB": f"{one.num_bytes / 1e6:.1f}", "difference": f"{one.difference:.1e}"}
        for one in written
    ]
    print(format_table(rows))
    print(
        "difference: the largest of a probability from the original's, as onnxruntime computes random pixels"
    )


def _make_place(out: str) -> None:
    """Make the folder of a file that will be written. Raises UserError when it cannot be."""
    if "://" not in out and Path(out).expanduser().is_dir():
        raise UserError(f"--out {out} is a folder, and a file is written: name a file in it")
    files.make_folder(files.split(files.absolute(out))[0])
