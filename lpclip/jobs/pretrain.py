"""The pretrain job: pairs to a store of pixels and texts, training, and a model that other jobs take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lpclip import files
from lpclip.config import (
    EncoderConfig,
    ModelConfig,
    PretrainConfig,
    PretrainJob,
    SelftrainJob,
    counted,
    digest,
    to_dict,
)
from lpclip.encoders.encoder import weights_digest
from lpclip.encoders.open_clip import Trainable, load_trainable
from lpclip.features.describe import has_gpus
from lpclip.features.pairs import PairStore, pairs_identity, prepare_pairs
from lpclip.features.pipeline import check_quarantine
from lpclip.features.store import Store, fingerprint
from lpclip.features.store_writer import find_or_make
from lpclip.images.source import Source
from lpclip.jobs import tracking
from lpclip.jobs.console import command_line, print_mlflow, shown
from lpclip.jobs.counts import check_strict
from lpclip.jobs.inputs import open_pairs
from lpclip.jobs.process import start_ray
from lpclip.jobs.run import check_job, job_run, provenance
from lpclip.jobs.runtime import Stopwatch, check_workers, claim, output_folder
from lpclip.method.contrastive_step import check_num_pairs, num_steps
from lpclip.progress import Progress, watched
from lpclip.report.tables import format_table
from lpclip.training.contrastive import WEIGHTS, Pretraining, is_finished, pretrain, read_metrics, resume_step

# At most this many different texts are tokenized to count the cut ones: more would take over a minute.
COUNTED_TEXTS = 200_000


def pretrain_job(job: PretrainJob) -> dict[str, Any]:
    """Train on pairs; the model goes to OUT/model, metrics to MLflow. Returns the summary."""
    check_job(job)
    watch = Stopwatch()
    with output_folder(job.out) as out:
        source = open_pairs(
            job.data,
            config=job.source,
            caption_templates=job.caption_templates,
            split="train",
            limit=job.limit,
        )
        if source.num_rows is not None:
            check_num_pairs(job.training, num_pairs=source.num_rows)
        trainable = load_trainable(job.model, seed=job.training.seed)
        stored = pairs_identity(source, trainable.preprocess)
        identity = _work_identity(job, fingerprint(stored), trainable)
        claim(out, identity, mark=False, shared="pairs")
        start_ray()
        check_workers(job.training.num_workers)
        _print_plan(job, source, trainable, out)
        watch.lap("start")
        with job_run("pretrain", job, out=out, encoder=trainable.name, data=source.name) as run:
            read = _read_pairs(job, source, trainable, out=out, identity=identity)
            cut = _count_cut_texts(read.pairs, trainable)
            if cut.cut:
                print(
                    f"note      {cut.cut:,} of {cut.counted:,} texts fill the model's context, or are cut to it",
                    flush=True,
                )
            watch.lap("pairs")
            work = _train(job, read, out=out, run=run)
            watch.lap("training")
            summary = {
                **_summary(job, read, cut, work, trainable),
                "timings": watch.seconds,
                **provenance(job, run.run_id),
            }
            files.write_json(files.join(out, "summary.json"), summary)
            run.artifact(files.join(out, "summary.json"))
            run.artifact(files.join(work.model_folder, "open_clip_config.json"), "model")
            _print_result(job, summary, run)
    check_strict(job.source, stores=[summary["pairs"]["store"]])
    return summary


@dataclass(frozen=True, kw_only=True)
class _Read:
    """The store of decoded pairs, and its pairs by row."""

    store: Store
    pairs: PairStore


class _CutTexts(NamedTuple):
    """The number of texts that fill the model's context or are longer, among the different texts counted."""

    cut: int
    counted: int


def _read_pairs(
    job: PretrainJob, source: Source, trainable: Trainable, *, out: str, identity: dict[str, Any]
) -> _Read:
    """Find the store of the pairs, or decode them into one. Raises UserError when they are too bad or too few."""
    # Ray Train's workers run in folders of their own, so the path is absolute.
    folder = files.absolute(job.pairs or files.join(out, "pairs"))
    path = files.join(folder, f"{source.name}-{identity['pairs'][:12]}")

    def make() -> Store:
        print(f"pairs: reading to {shown(path)}", flush=True)
        return prepare_pairs(source, preprocess=trainable.preprocess, path=path)

    store, is_new = find_or_make(path, name="pairs", make=make)
    if not is_new:
        check_quarantine(source, store)
        print(f"pairs: found in {shown(path)}", flush=True)
    pairs = PairStore(path)
    check_num_pairs(job.training, num_pairs=len(pairs))
    claim(out, identity, shared="pairs")
    return _Read(store=store, pairs=pairs)


def _train(job: PretrainJob, read: _Read, *, out: str, run: tracking.Run) -> Pretraining:
    """Train from the last checkpoint on, with progress on the terminal and metrics in MLflow."""
    total, size = num_steps(job.training, num_pairs=len(read.pairs)), job.training.batch_size
    work = Pretraining(
        store_path=read.store.path,
        model=_reachable(job.model),
        config=job.training,
        folder=files.join(out, "training"),
        model_folder=files.join(out, "model"),
    )
    done = resume_step(work.folder)
    if is_finished(work):
        print("training: finished before, nothing is left to do", flush=True)
    elif done:
        print(f"training: goes on after step {done:,} of {total:,}", flush=True)
    progress = Progress("training", total=total * size, done=done * size, unit="pairs")
    with watched(_teller(job.training, work, total=total, progress=progress, run=run), seconds=1.0):
        pretrain(work, storage=files.join(out, "ray"), use_gpu=has_gpus())
    progress.close()
    return work


def _summary(
    job: PretrainJob, read: _Read, texts: _CutTexts, work: Pretraining, trainable: Trainable
) -> dict[str, Any]:
    """The part of OUT/summary.json about the pairs, the training and the model."""
    manifest = read.store.manifest
    return {
        "model": files.join(work.model_folder, WEIGHTS),
        "encoder": trainable.name,
        "pairs": {
            "store": read.store.path,
            "read": manifest.num_rows,
            "quarantined": manifest.num_quarantined,
            "texts_cut": texts.cut,
            "texts_counted": texts.counted,
        },
        "steps": num_steps(job.training, num_pairs=len(read.pairs)),
        "last": read_metrics(work.folder)[-1],
    }


def _teller(
    config: PretrainConfig, work: Pretraining, *, total: int, progress: Progress, run: tracking.Run
) -> Callable[[], None]:
    """Report new measurements at each call: progress, finished epochs, metrics to MLflow."""
    per_epoch = total // config.epochs
    # From the first: MLflow may have missed what was measured just before a kill, and takes no step twice.
    told, epochs = 0, progress.done // config.batch_size // per_epoch

    def tell() -> None:
        nonlocal told, epochs
        metrics = read_metrics(work.folder)
        for entry in metrics[told:]:
            step = int(entry["step"])
            run.log({_metric(k): v for k, v in entry.items() if k != "step"}, step=step)
            progress.advance(max(0, step * config.batch_size - progress.done))
            if step // per_epoch > epochs:
                epochs = step // per_epoch
                losses = [one["loss"] for one in metrics if step - per_epoch < one["step"] <= step]
                print(
                    f"epoch {epochs} of {config.epochs}: mean loss {sum(losses) / len(losses):.3f}, temperature "
                    f"{entry['temperature']:.3f}, {entry['distilled_share']:.0%} distilled, "
                    f"{entry['pairs_per_second']:.0f} pairs a second",
                    flush=True,
                )
        # A lost worker's measurements beyond the last checkpoint come again.
        told = max(told, len(metrics))

    return tell


def _metric(name: str) -> str:
    """A measurement's name in MLflow."""
    return f"speed/{name}" if name.endswith("_per_second") else f"training/{name}"


def _work_identity(job: PretrainJob, pairs: str, trainable: Trainable) -> dict[str, Any]:
    """Everything that changes the result, by the names of the flags; the number of workers does not."""
    training = to_dict(job.training)
    return {
        "pairs": pairs,
        "encoder": [trainable.name, digest(trainable.open_clip_config)],
        "pretrained": weights_digest(trainable.model.state_dict()),
        "lock": job.model.lock,
        **{k: v for k, v in training.items() if k not in ("num_workers", "checkpoint_minutes")},
    }


def _reachable(model: ModelConfig) -> ModelConfig:
    """The model with absolute paths, which any worker on this machine finds."""
    encoder, weights = model.encoder, model.pretrained
    if encoder.endswith(".json"):
        encoder = files.absolute(encoder)
    if weights is not None and Path(weights).is_file():
        weights = files.absolute(weights)
    return replace(model, encoder=encoder, pretrained=weights)


def _count_cut_texts(pairs: PairStore, trainable: Trainable) -> _CutTexts:
    """Count the texts that fill the context of the model or are longer, and the different texts that were looked at."""
    different: set[str] = set()
    for start in range(0, len(pairs), 4096):
        rows = range(start, min(len(pairs), start + 4096))
        different.update(text for texts in pairs.texts(rows) for text in texts)
        if len(different) > COUNTED_TEXTS:
            break
    texts = sorted(different)[:COUNTED_TEXTS]
    padding = trainable.tokenizer([""])[0, -1]
    cut = 0
    for start in range(0, len(texts), 1024):
        cut += int((trainable.tokenizer(texts[start : start + 1024])[:, -1] != padding).sum())
    return _CutTexts(cut=cut, counted=len(texts))


def _print_plan(job: PretrainJob, source: Source, trainable: Trainable, out: str) -> None:
    t, size = job.training, trainable.preprocess.size
    count = counted(source.num_rows, "pair") if source.num_rows is not None else "an unknown number of pairs"
    print(f"data      {source.name}: {count} ({source.kind})")
    begin = f"from {job.model.pretrained}" if job.model.pretrained else "from scratch"
    number = sum(p.numel() for p in trainable.model.parameters()) / 1e6
    locked = f", {job.model.lock} tower locked" if job.model.lock != "none" else ""
    print(f"encoder   {trainable.name}, {size} px, {number:,.1f} million weights, {begin}{locked}")
    if source.num_rows:
        print(
            f"pairs     about {source.num_rows * size * size * 3 / 1e6:,.0f} MB of pixels when all are read"
        )
        steps = counted(num_steps(t, num_pairs=source.num_rows), "step")
    else:
        steps = "an unknown number of steps"
    method = f"psd (reconstructed), {t.share_start:g} to {t.share_end:g} distilled"
    workers = counted(t.num_workers, "Ray Train worker") if t.num_workers else "in this process"
    print(
        f"training  {method if t.method == 'psd' else 'infonce'}, {counted(t.epochs, 'epoch')} of batches of "
        f"{t.batch_size}: {steps} at most, {workers}"
    )
    print(f"output    {shown(out)}")
    for note in source.notes:
        print(f"note      {note}")


def _print_result(job: PretrainJob, summary: dict[str, Any], run: tracking.Run) -> None:
    last = summary["last"]
    row = {
        "pairs": summary["pairs"]["read"],
        "quarantined": summary["pairs"]["quarantined"],
        "steps": summary["steps"],
        "last batch's loss": round(last["loss"], 3),
        "temperature": round(last["temperature"], 3),
        "pairs/s": round(last["pairs_per_second"]),
        "seconds": round(summary["timings"]["training"]),
    }
    print(f"\n{format_table([row])}\n")
    if summary["pairs"]["quarantined"]:
        print(f"bad      {shown(files.join(summary['pairs']['store'], 'quarantine.parquet'))}")
    print(f"model    {shown(summary['model'])}")
    where = "A-LOCAL-COPY" if "://" in summary["model"] else shown(summary["model"])
    use = SelftrainJob(encoder=EncoderConfig(encoder=job.model.encoder, pretrained=where))
    print(f"use it   {command_line('selftrain', use)}")
    print_mlflow(run)
