"""Inputs that jobs share: the images, classes and image-text pairs that they name, as features and class indices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lpclip import files
from lpclip.config import (
    EncoderConfig,
    EvaluateJob,
    PairsConfig,
    PredictJob,
    SelftrainJob,
    TuneJob,
    UserError,
    did_you_mean,
    to_dict,
)
from lpclip.encoders.again import config_again, noted_again
from lpclip.encoders.head import EncoderInfo, Head
from lpclip.encoders.prompts import templates
from lpclip.evaluation.judge import accuracy
from lpclip.features.data import Data, open_data
from lpclip.features.describe import describe_encoder, uses_gpus
from lpclip.features.find_or_encode import Encoding
from lpclip.features.store import Features, Store
from lpclip.features.stored_views import Encoded
from lpclip.features.zero_shot_labels import ZeroShotLabels
from lpclip.images.captions import with_captions
from lpclip.images.classes import (
    ClassList,
    map_labels,
    names_meet,
    notes_on_names,
    notes_on_numbers,
    read_classes,
    resolve_classes,
)
from lpclip.images.columns import Texts
from lpclip.images.folders import without_labels
from lpclip.images.named import CLASSES
from lpclip.images.open import open_source
from lpclip.images.source import Source
from lpclip.images.views import base_views, parse_views
from lpclip.jobs.console import print_zero_shot
from lpclip.jobs.given_labels import GivenLabels, left_out, read_given_labels
from lpclip.jobs.runtime import Stopwatch
from lpclip.method.few_labels import FewLabels
from lpclip.method.presence import named_classes
from lpclip.method.probe import Probe, zero_shot_probe


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Images to learn from and to evaluate on, before they are encoded."""

    data: Data
    test: Data | None
    """None when the evaluation is on `data` itself, as far as it has labels."""
    classes: ClassList
    present: np.ndarray | None
    """Places (K',) of the class names that have images, as `--present` says; None where it says nothing of that."""
    given: GivenLabels | None = None
    """The labels that `--labels` names."""


class Held:
    """A store's base features, in memory until they are let go, and read again when they are asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._features: Features | None = None

    def get(self) -> Features:
        """The features, in row order."""
        if self._features is None:
            self._features = self._store.features(views=())
        return self._features

    def let_go(self) -> None:
        """Give the memory back. Arrays that others hold stay."""
        self._features = None


@dataclass(frozen=True, kw_only=True)
class EncodedInputs:
    """The inputs of a job as features."""

    encoded: Encoded
    tested: Encoded | None
    held: Held
    """The features of the unlabelled images."""
    tested_x: np.ndarray | None
    """(M, d) float16 of the images to evaluate on; None where these are the unlabelled ones."""
    raw_labels: np.ndarray
    """(N,) int32 of the unlabelled images as the data tells them, for a supervised ceiling alone."""
    y: np.ndarray
    """(M,) int64 class indices, -1 where there is no label, and for images whose label the training was given."""
    probe_encoder: dict[str, Any]
    """Everything a probe needs to compute the same features again."""
    few: FewLabels | None = None
    """The given labels with the features of their images, as indices of all names."""

    @property
    def features(self) -> Features:
        """Base features of the unlabelled images, in row order."""
        return self.held.get()

    @property
    def x(self) -> np.ndarray:
        """(M, d) float16, what is evaluated on."""
        return self.features.base if self.tested_x is None else self.tested_x


def open_inputs(job: SelftrainJob | TuneJob) -> Inputs:
    """The images and class names of a job. Raises UserError when they cannot be had or do not fit each other."""
    data = open_data(job.data, config=job.source, split="train", limit=job.limit)
    classes = resolve_classes(job.names, label_names=data.label_names)
    test = _open_test(job)
    supervised = isinstance(job, SelftrainJob) and job.supervised
    if not supervised:
        data = _without_foreign_folders(data, classes)
    if test is not None:
        test = with_checked_labels(test, classes)
    if test is None or supervised:
        data = with_checked_labels(data, classes)
    data = data.noted(*notes_on_names(classes.names))
    present = _named_present(job.training.present, classes.names)
    given = read_given_labels(job.labels, classes.names)
    if given is not None:
        given.check_present(present)
    return Inputs(data=data, test=test, classes=classes, present=present, given=given)


def _named_present(spec: str, class_names: tuple[str, ...]) -> np.ndarray | None:
    """Places (K',) of the class names that `--present` names; None for `auto`, `all`, and where it names all.

    Raises UserError when it names what is no class, or fewer than two.
    """
    if spec in ("auto", "all"):
        return None
    try:
        names = read_classes(spec).names
    except UserError as error:
        raise UserError(f"--present {spec}: {error}{did_you_mean(spec, ('auto', 'all'))}") from error
    return named_classes(names, class_names)


def open_pairs(
    data: str | tuple[str, ...],
    *,
    config: PairsConfig,
    caption_templates: str | None,
    split: str,
    limit: int | None,
) -> Source:
    """The source of image-text pairs that `data` names; texts are made of labels where templates are given.

    Named data sets have simple templates without any. Raises UserError when there are no texts.
    """
    spec = caption_templates
    values = (data,) if isinstance(data, str) else data
    if spec is None and all(name.partition(":")[0] in CLASSES and not files.exists(name) for name in values):
        spec = "simple"
    if spec is None:
        texts = Texts(column=config.text_column)
        return open_source(data, config=config, split=split, limit=limit, texts=texts)
    source = open_source(data, config=config, split=split, limit=limit)
    return with_captions(source, templates=templates(spec))


def encode_inputs(
    job: SelftrainJob | TuneJob,
    inputs: Inputs,
    *,
    info: EncoderInfo,
    head: Head,
    out: str,
    watch: Stopwatch,
) -> EncodedInputs:
    """Find or make the features, those to evaluate on first, and tell zero-shot's accuracy as soon as it is known.

    Raises UserError when too many images are bad or a label is no class.
    """
    data, test, classes = inputs.data, inputs.test, inputs.classes
    encoding = Encoding(
        info=info,
        encoder=job.encoder,
        folder=job.encode.features or files.join(out, "features"),
        seed=job.training.seed,
        batch_size=job.encode.batch_size,
        num_actors=job.encode.num_actors,
        device=job.encode.device,
        decode=job.encode.decode,
    )
    tested = tested_x = None
    if test is not None:
        # Students alone need the other views.
        base = base_views(job.encode.views)
        found = encoding.views_of(test, base)
        x = tested_x = found.mean(*base)
        tested = found.latest
        y = class_indices(found.labels, data=test, classes=classes)
        _tell_zero_shot(head, x, y, data=test.name)
        watch.lap("encode_eval")
    labels = ZeroShotLabels(head=head, folder=files.join(out, f"zero_shot-{head.identity[:12]}"))
    encoded = encoding.store_of(data, views=parse_views(job.encode.views), zero_shot=labels)
    held = Held(encoded.store)
    features = held.get()
    raw = features.labels
    if test is None:
        x, y = features.base, class_indices(raw, data=data, classes=classes)
        _tell_zero_shot(head, x, y, data=data.name)
    few = None
    if inputs.given is not None:
        inputs.given.check_images(encoded.store, data=data.name)
        few = inputs.given.few(features)
    watch.lap("encode")
    return EncodedInputs(
        encoded=encoded,
        tested=tested,
        held=held,
        tested_x=tested_x,
        raw_labels=raw,
        y=left_out(y, x, few),
        few=few,
        probe_encoder={
            "config": to_dict(job.encoder),
            "identity": info.identity,
            "views": job.encode.views,
            "templates": list(templates(job.names.templates)),
            "logit_scale": info.logit_scale,
            "features": encoded.store.manifest.fingerprint,
        },
    )


def _tell_zero_shot(head: Head, x: np.ndarray, y: np.ndarray, *, data: str) -> None:
    zero_shot = zero_shot_probe(torch.tensor(head.weight), temperature=head.temperature)
    print_zero_shot(accuracy(zero_shot, x, y), images=int((y >= 0).sum()), data=data)


def evaluation_encoding(job: EvaluateJob, *, info: EncoderInfo, encoder: EncoderConfig, out: str) -> Encoding:
    """The way to the features that an evaluation needs."""
    return Encoding(
        info=info,
        encoder=encoder,
        folder=job.features or files.join(out, "features"),
        seed=job.seed,
        batch_size=job.batch_size,
        num_actors=job.num_actors,
        device=job.device,
    )


def evaluated_on(inputs: Inputs, known: EncodedInputs) -> dict[str, Any]:
    """Name, number of labelled images, and whether training saw them, for summaries.

    `shared` counts those that are among the unlabelled images too, under any file name: equal images have equal
    features. The setting is transductive if these are half of them or more, and None without labels.
    """
    labelled = known.x[known.y >= 0]
    shared = len(labelled) if known.tested is None else num_shared(known.features.base, labelled)
    setting = "transductive" if 2 * shared >= len(labelled) else "inductive"
    return {
        "data": (inputs.test or inputs.data).name,
        "images": len(labelled),
        "setting": setting if len(labelled) else None,
        "shared": shared,
    }


def num_shared(features: np.ndarray, others: np.ndarray) -> int:
    """The number of rows of `others` (M, d) that are, bit by bit, rows of `features` (N, d) as well."""
    hashes = [hash(row.tobytes()) for row in others]
    both = set(hashes).intersection(hash(row.tobytes()) for row in features)
    return sum(found in both for found in hashes)


def _open_test(job: SelftrainJob | TuneJob) -> Data | None:
    named = job.eval_data
    if not named and all(name in CLASSES and not files.exists(name) for name in job.data):
        named = job.data
    if not named:
        return None
    test = open_data(named, config=job.source, split="test", limit=job.eval_limit)
    if not test.has_labels and test.source is None:
        raise UserError(f"--eval-data {named[0]} has no labels: there is nothing to evaluate on")
    return test


def _without_foreign_folders(data: Data, classes: ClassList) -> Data:
    """The images without labels where their folders are years, cameras or the like: none has the name of a class."""
    source, names = data.source, data.label_names
    if source is None or source.kind != "folder" or not names or names_meet(names, classes):
        return data
    folders = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    note = (
        f"labels: none, as none of the folders in {data.name} ({folders}) has the name of a class; if they are labels, "
        "a --classes file with lines label<TAB>name says so, and if the classes lie deeper, name the folder above them"
    )
    return Data(without_labels(source, note=note))


def with_checked_labels(data: Data, classes: ClassList) -> Data:
    """The images whose labels will be read, with a note where these seem to count from 1.

    Labels that are not known before the reading stay unchecked. Raises UserError for a label that is no class.
    """
    if data.source is None or data.source.labels_there is None:
        return data
    there = np.array(data.source.labels_there, dtype=np.int64)
    map_labels(there, label_names=data.label_names, classes=classes, data=data.name)
    return data.noted(*notes_on_numbers(there, label_names=data.label_names, classes=classes, data=data.name))


def class_indices(labels: np.ndarray, *, data: Data, classes: ClassList) -> np.ndarray:
    """Class indices (N,) int64 of the labels (N,) int32 as `data` tells them; -1 stays -1.

    The note that the plan could not have, as the labels were not known, is printed. Raises UserError as map_labels
    does.
    """
    found = map_labels(labels, label_names=data.label_names, classes=classes, data=data.name)
    if data.source is None or data.source.labels_there is None:
        for note in notes_on_numbers(labels, label_names=data.label_names, classes=classes, data=data.name):
            print(note, flush=True)
    return found


def describe_probes_encoder(
    probe: Probe, *, job: EvaluateJob | PredictJob, with_head: bool
) -> tuple[EncoderConfig, EncoderInfo]:
    """The encoder that a probe was trained with; the job says where its checkpoint lies now, if it has moved.

    With the zero-shot head of the probe's classes, if asked. Raises UserError when the encoder has changed.
    """
    encoder = config_again(
        probe.encoder, pretrained=job.pretrained, engine=job.engine, on_gpu=uses_gpus(job.device)
    )
    names = probe.class_names if with_head else ()
    templates = tuple(probe.encoder["templates"]) if with_head else ()
    info = describe_encoder(encoder, class_names=names, templates=templates, device=job.device)
    return encoder, replace(info, notes=(*info.notes, *noted_again(probe.encoder, info)))
