"""Configuration: frozen dataclasses, one for each stage, and the only source of the command-line flags.

A field is a flag (`max_bad_fraction` is `--max-bad-fraction`), its default is the flag's default and the
string under it is the flag's help. Comma lists are plain strings here, taken apart where they are used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

# Label-free criteria that choose between trainings: lpclip/method/criteria.py.
Criterion = Literal["structure", "class_ami", "neighbours", "views", "folds", "consensus"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How images are read, whatever their source."""

    id_column: str | None = None
    """Column with the row's unique name; by default `id` where it exists, else file name and row number."""
    image_column: str | None = None
    """Column with image bytes, URIs or bytes/path structs; by default image, img, jpg, bytes, uri, url or path."""
    label_column: str | None = None
    """Column with labels, read for evaluation only; by default label, labels or cls where it exists."""
    max_bad_fraction: float = 0.5
    """Stop when more than this share of the images cannot be read."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are quarantined before they are decoded."""
    max_bytes: int = 100_000_000
    """Encoded images larger than this are quarantined before they are decoded."""
    schemes: str = "https"
    """Schemes by comma of the URIs in manifests and Parquet that are followed, such as https,http,s3. Always followed:
    what lies where the manifest does, and any local path named by a local one."""
    read_timeout: float = 30.0
    """Seconds that an image may take to come over http(s); it is tried three times, then quarantined."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SourceConfig):
    """How images are read together with their texts."""

    text_column: str | None = None
    """Column with an image's text or list of texts; by default text, texts, caption, captions or txt. Folders and tars
    have them in a .txt file beside each image, one a line."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which frozen encoder, and how it runs."""

    encoder: str = "lite"
    """`lite` (embedded, not CLIP), an open_clip model name such as ViT-B-32, or hf-hub:OWNER/NAME."""
    pretrained: str | None = None
    """open_clip's tag of the weights (laion2b_s34b_b79k, openai, ...) or a local checkpoint file."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' dtype; auto takes bfloat16 where the device computes in it, else float32."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How images become features."""

    views: str = "weak,mirror,strong"
    """Views of each image, by comma: weak (always first) and mirror, whose mean is the image's feature; strong,
    strong2, ..., and corruption:severity, which students are fitted to as well. Any but weak has VIEW+mirror."""
    batch_size: int = 64
    """Images in one forward pass on a GPU. On CPUs a pass always takes 8."""
    num_actors: int | None = None
    """Encoder actors; by default one for each GPU, or one for every eight CPUs."""
    features: str | None = None
    """Folder that holds the feature stores, to share them between runs; OUT/features by default."""


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """The classes, in words."""

    classes: str | None = None
    """Class names by comma, or a text file with one a line (`label<TAB>name` maps a label to its name)."""
    templates: str = "default"
    """Prompt templates: default, simple, openai (80), or a text file with one a line, {} for the class name."""


@dataclass(frozen=True, kw_only=True)
class SelfTrainingConfig:
    """The rounds."""

    solver: Literal["gaussian", "gradient"] = "gaussian"
    """gaussian: closed form from class means and one covariance; gradient: LP-CLIP (reconstructed)."""
    rounds: int = 20
    """Self-training rounds at most; they end earlier when fewer than 0.2% of the labels change."""
    temperature: float | None = None
    """The teacher's softmax temperature; the encoder's own by default."""
    threshold: float = 0.0
    """Pseudo-labels with a confidence under this are left out of the fit."""
    prior: str = "auto"
    """Class shares that labels are drawn to: uniform, weak (a third of that pull), none, or a text file with one
    weight a line (or `name<TAB>weight`). auto: uniform where half the features bear it out, else weak."""
    neighbours: int | None = None
    """Nearest neighbours that have a say in each label (gaussian solver); by default half as many as a class has
    images, 3 to 30, and none above 100,000 images. 0 uses none."""
    num_workers: int = 0
    """Ray Train workers for the rounds; 0 runs the same code in this process."""
    seed: int = 0
    """Seed of the strong views and of the gradient solver's batches."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which dual encoder is trained, and from what."""

    encoder: str = "tiny-32"
    """open_clip's model name, a JSON file with a model's configuration as open_clip has them, or tiny-32: a small
    one for 32 px images and CPUs."""
    pretrained: str | None = None
    """Begin with open_clip's weights of this tag, or those in a local checkpoint; by default from scratch."""
    lock: Literal["none", "image", "text"] = "none"
    """The tower that stays as it is."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Contrastive training."""

    method: Literal["psd", "infonce"] = "psd"
    """psd: progressive self-distillation (reconstructed), for pairs that are noisy; infonce: CLIP's own loss."""
    epochs: int = 10
    """Passes over the pairs."""
    batch_size: int = 256
    """Pairs in a batch, over all workers: each is told from all others of it."""
    learning_rate: float = 1e-3
    """AdamW's, at the end of the warm-up; it falls to 0 on a cosine. From pretrained weights take 1e-5 or so."""
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """AdamW's."""
    share_start: float = 0.0
    """Share of each batch that psd distils at first, when there is little to distil yet; published: 0.2."""
    share_end: float = 0.5
    """Share of each batch that psd distils at last; it grows on a cosine. Published: 0.8."""
    targets: Literal["images", "swapped", "own"] = "images"
    """What psd's targets are made of. images: texts of similar images; swapped: the two directions swapped, as
    published; own: each direction's own alignments."""
    teacher_sharpness: float = 3.0
    """Factor of the model's own scale in psd's targets: over 1 they are sharper than its own alignments."""
    label_smoothing: float = 0.0
    """infonce's, spread over the batch."""
    mirror: bool = False
    """Mirror half of the images: wrong where texts tell left from right."""
    accumulate: int = 1
    """Parts in which each worker computes its share of a batch: less memory, a second forward pass, the same step."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; weights are float32. auto takes bfloat16 on GPUs."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints, from which a training that was stopped goes on."""
    num_workers: int = 0
    """Ray Train workers, each with a GPU where there are some; 0 trains in this process."""
    seed: int = 0
    """Seed of the first weights, the order of the pairs, crops and distilled shares."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the runs."""

    experiment: str = "lpclip"
    """MLflow experiment. The server is MLFLOW_TRACKING_URI, or a SQLite file mlflow.db in this folder."""
    run_name: str | None = None
    """Name of the MLflow run; the output folder's name by default."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as a flat dict, nested stages merged, in declaration order."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        flat.update(to_dict(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def flags(config: Any) -> list[str]:
    """The command line of a job: whatever differs from the defaults of its dataclass, and all that has none."""
    words = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            words += flags(value)
        elif value != item.default:
            name = f"--{item.name.replace('_', '-')}"
            texts = [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
            if value is True:
                words.append(name)
            elif len(texts) == 1 and texts[0].startswith("-"):  # or it would pass for a flag
                words.append(f"{name}={texts[0]}")
            else:
                words += [name, *texts]
    return words


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Encode images once into a feature store."""

    data: str = "fashion-mnist"
    """Folder, Parquet, WebDataset tar, CSV/JSONL manifest, or fashion-mnist, cifar10, cifar100 (+ :train, :test)."""
    out: str = "runs/encode"
    """Output folder."""
    limit: int | None = None
    """Use only this many images, chosen by a hash of their ids."""
    source: SourceConfig = field(default_factory=SourceConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    names: ClassConfig = field(default_factory=ClassConfig)
    seed: int = 0
    """Seed of the strong views."""


@dataclass(frozen=True, kw_only=True)
class SelftrainJob:
    """Train a linear probe on unlabelled images, from a CLIP model's own pseudo-labels."""

    data: str = "fashion-mnist"
    """Unlabelled images: folder, Parquet, WebDataset tar, CSV/JSONL manifest, a feature store, or
    fashion-mnist, cifar10, cifar100. Labels, where they exist, are never read in training."""
    eval_data: str | None = None
    """Labelled images to evaluate on; a named data set's own test split by default."""
    out: str = "runs/selftrain"
    """Output folder."""
    limit: int | None = None
    """Use only this many of the unlabelled images, chosen by a hash of their ids."""
    eval_limit: int | None = None
    """Use only this many of the images to evaluate on."""
    supervised: bool = False
    """Also fit a supervised probe on the true labels of --data: the ceiling, saved to OUT/supervised."""
    source: SourceConfig = field(default_factory=SourceConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    names: ClassConfig = field(default_factory=ClassConfig)
    training: SelfTrainingConfig = field(default_factory=SelfTrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """Train a dual encoder on image-text pairs, and hand it to the other jobs."""

    data: str = "fashion-mnist"
    """Images with texts: folder with a .txt beside each image, Parquet, WebDataset tar or CSV/JSONL manifest; or
    fashion-mnist, cifar10, cifar100 and other labelled images with --caption-templates."""
    out: str = "runs/pretrain"
    """Output folder; OUT/model has what other jobs take."""
    limit: int | None = None
    """Use only this many pairs, chosen by a hash of their ids."""
    caption_templates: str | None = None
    """Make texts of the names of labels, for images without texts: default, simple, openai, or a text file with one
    a line, {} for the name. Named data sets have simple without it."""
    pairs: str | None = None
    """Folder that holds the stores of decoded pairs, to share them between runs; OUT/pairs by default."""
    source: PairsConfig = field(default_factory=PairsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: PretrainConfig = field(default_factory=PretrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True, kw_only=True)
class TuneJob:
    """Search the training's parameters without labels, on features that are encoded once."""

    space: str = "default"
    """The parameters to search: default, quick, wide, or a Python file whose SPACE maps names of the training's flags
    to Ray Tune's search-space objects."""
    data: str = "fashion-mnist"
    """Unlabelled images: folder, Parquet, WebDataset tar, CSV/JSONL manifest, a feature store, or
    fashion-mnist, cifar10, cifar100. Labels, where they exist, choose nothing."""
    eval_data: str | None = None
    """Labelled images to show the trials' accuracy on; a named data set's own test split by default."""
    out: str = "runs/tune"
    """Output folder."""
    trials: int = 64
    """Trials; fewer when the space has fewer."""
    criterion: Criterion = "structure"
    """What chooses the winner, without labels: docs/tuning.md tells them apart."""
    search: Literal["random", "optuna"] = "random"
    """random draws all trials beforehand; optuna's TPE learns from the criterion of finished trials."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops trials early whose criterion lags behind; what it stops cannot win."""
    concurrent: int | None = None
    """Trials at a time, a CPU each; by default as many as there are CPUs."""
    resume: bool = False
    """Go on with the sweep in OUT, which must be there (without it, one that is there goes on as well)."""
    limit: int | None = None
    """Use only this many of the unlabelled images, chosen by a hash of their ids."""
    eval_limit: int | None = None
    """Use only this many of the images to evaluate on."""
    register: str | None = None
    """Name of the winner in MLflow's model registry; lpclip-DATA by default."""
    source: SourceConfig = field(default_factory=SourceConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    names: ClassConfig = field(default_factory=ClassConfig)
    training: SelfTrainingConfig = field(default_factory=SelfTrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Measure probes beside zero-shot: accuracy, calibration, corruptions, natural shifts, foreign images; and how well
    an encoder finds the texts of images, and images of texts."""

    probe: tuple[str, ...] = ()
    """Folders of saved probes of one encoder (OUT/probe, OUT/supervised of selftrain.py), or NAME=FOLDER."""
    data: str | None = None
    """Labelled images: folder, Parquet, WebDataset tar, manifest, named data set (its test part) or feature store."""
    retrieval: tuple[str, ...] = ()
    """NAME=PATH or PATH of image-text pairs, to find texts of images and images of texts: as pretrain.py's --data."""
    encoder: str | None = None
    """The encoder of --retrieval without --probe: lite, an open_clip model name or hf-hub:OWNER/NAME."""
    out: str = "runs/evaluate"
    """Output folder."""
    limit: int | None = None
    """Use only this many images of each set, chosen by a hash of their ids."""
    corruptions: str = "none"
    """Corruptions to put on --data's images: none, all (ImageNet-C's 15), or names by comma."""
    severities: str = "1,3,5"
    """Severities of the corruptions, 1 to 5, by comma."""
    corrupted: tuple[str, ...] = ()
    """NAME=PATH of published corrupted sets, read as they are: ImageNet-C's folders or CIFAR-10-C's arrays."""
    shift: tuple[str, ...] = ()
    """NAME=PATH of labelled sets of the same classes from elsewhere. The names imagenet-v2, imagenet-sketch,
    imagenet-r and objectnet stand for those sets: their effective robustness is told too."""
    ood: tuple[str, ...] = ()
    """NAME=PATH of images of other classes, which a classifier should not be sure about."""
    classes: str | None = None
    """Text file with lines `label<TAB>name`, where the data calls the probe's classes otherwise."""
    caption_templates: str | None = None
    """Make --retrieval's texts of the names of labels: default, simple, openai, or a text file with one a line, {} for
    the name. Named data sets have simple without it."""
    pretrained: str | None = None
    """Where the probes' encoder's local checkpoint lies now, if it has moved since training; or the weights of
    --encoder: open_clip's tag or a local checkpoint."""
    batch_size: int = 64
    """Images in one forward pass on a GPU. On CPUs a pass always takes 8."""
    num_actors: int | None = None
    """Encoder actors; by default one for each GPU, or one for every eight CPUs."""
    features: str | None = None
    """Folder that holds the feature stores, to share them between evaluations; OUT/features by default."""
    seed: int = 0
    """Seed of the corruptions and of the bootstrap."""
    source: PairsConfig = field(default_factory=PairsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True, kw_only=True)
class PredictJob:
    """Label images with a saved probe."""

    probe: str
    """Folder of a saved probe (OUT/probe of selftrain.py)."""
    data: str
    """Images: folder, Parquet, WebDataset tar, CSV/JSONL manifest, named data set or feature store."""
    out: str
    """Parquet file to write: id, label, probability, top-k."""
    top_k: int = 5
    """How many labels to keep for each image."""
    limit: int | None = None
    """Use only this many images, chosen by a hash of their ids."""
    pretrained: str | None = None
    """Where the encoder's local checkpoint lies now, if it has moved since training."""
    batch_size: int = 64
    """Images in one forward pass on a GPU. On CPUs a pass always takes 8."""
    features: str | None = None
    """Folder of feature stores to find and to leave features in; by default they are removed at the end."""
    source: SourceConfig = field(default_factory=SourceConfig)
