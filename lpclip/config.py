"""Configuration: frozen dataclasses, one for each stage, and the only source of the command-line flags.

A field is a flag (`max_bad_fraction` is `--max-bad-fraction`), its default is the flag's default and the
string under it is the flag's help. Comma-separated lists are plain strings here and are taken apart where they are
used. A dataclass's `check` refuses values that are out of range or do not go together; `check(job)` calls all of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(ValueError):
    """Something that the user can mend: a wrong flag, a path that is not there, a file that is damaged.

    Its message is one sentence that says what is wrong and what to do. The commands print that sentence alone.
    Every other exception is a fault of the program and keeps its traceback.
    """


class StoreAwayError(UserError):
    """A remote store did not answer for minutes, or answered that it is busy. No file is to blame for that."""


# Label-free criteria that choose between trainings: lpclip/method/criteria.py.
Criterion = Literal["structure", "class_ami", "neighbours"]


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """`, did you mean ...?` with the known name that is nearest to a text, empty when none is near."""
    near = difflib.get_close_matches(text, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def counted(count: int, noun: str) -> str:
    """A number with its noun, as in `1 image` and `2,000 images`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def readable(name: str) -> str:
    """A class name as it reads in a prompt: `aquarium_fish` becomes "aquarium fish"."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def _refuse(config: Any, name: str, rule: str) -> None:
    raise UserError(f"--{name.replace('_', '-')} must be {rule}, not {getattr(config, name)}")


# Where an empty text has a meaning: no such column, no scheme but the list's own.
_MAY_BE_EMPTY = ("id_column", "image_column", "label_column", "text_column", "schemes")
MAX_SEED = 2**32 - 1


def _refuse_empty(config: Any) -> None:
    """Refuse empty texts: from a shell variable that is not set, a path would be the current folder."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        texts = value if isinstance(value, tuple) else (value,)
        is_empty = value == () != item.default or any(isinstance(t, str) and not t.strip() for t in texts)
        if is_empty and item.name not in _MAY_BE_EMPTY:
            raise UserError(
                f"--{item.name.replace('_', '-')} is empty: give it a value or leave the flag out (a shell variable "
                "may not be set)"
            )


def _check_seed(config: Any) -> None:
    if not 0 <= config.seed <= MAX_SEED:
        _refuse(config, "seed", f"between 0 and {MAX_SEED}")


def _check_port(config: Any) -> None:
    if not 0 < config.port < 2**16:
        _refuse(config, "port", f"between 1 and {2**16 - 1}")


def _at_least(config: Any, lowest: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not lowest <= value < math.inf:
            _refuse(config, name, f"at least {lowest}")


def _above_zero(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            _refuse(config, name, "above 0")


def _below_one(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            _refuse(config, name, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Reading images from any source."""

    id_column: str | None = None
    """Column with the unique name of each row. By default it is `id` if there is one, else file name and row
    number."""
    image_column: str | None = None
    """Column with image bytes, URIs or bytes/path structs. By default it is the first of image, img, jpg, bytes,
    uri, url, path, filepath and file_name that exists."""
    label_column: str | None = None
    """Column with labels. Self-training does not read them: they are for evaluation, for --supervised, and for the
    captions of `lpclip pretrain`. By default it is the first of label, labels and cls that exists. In a manifest,
    comma-separated names are the classes, of which each row has a 1 in one. An empty name says that there are no
    labels, in folders and tars too."""
    max_bad_fraction: float = 0.5
    """The job stops if more than this share of the images cannot be read."""
    strict: bool = False
    """End with an error, after everything is written, if any image could not be used."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are quarantined before they are decoded."""
    max_bytes: int = 100_000_000
    """Encoded images larger than this are quarantined before they are decoded."""
    schemes: str = "https"
    """Comma-separated schemes, such as https,http,s3: URIs of other schemes in manifests and Parquet files are
    refused. Files beside the manifest, and local paths in a local manifest, need no scheme here."""
    read_timeout: float = 30.0
    """Seconds that the download of an image over http(s) may take. After three attempts the image is quarantined."""

    def check(self) -> None:
        """Raise UserError for values out of range."""
        if not 0 <= self.max_bad_fraction <= 1:
            _refuse(self, "max_bad_fraction", "between 0 and 1")
        _at_least(self, 1, "max_pixels", "max_bytes")
        _above_zero(self, "read_timeout")


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SourceConfig):
    """Reading images together with their texts."""

    text_column: str | None = None
    """Column with the text, or the list of texts, of each image. By default it is the first of text, texts,
    caption, captions, txt and title that exists. In folders and tars a .txt file beside each image holds its texts, one
    per line."""


Engine = Literal["auto", "openvino", "torch"]
Device = Literal["auto", "cpu", "gpu"]
Decode = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The frozen encoder, and the precision it runs in."""

    encoder: str = "lite"
    """Encoder of images and texts: `lite` (embedded, not CLIP), an open_clip model name such as ViT-B-32, or
    hf-hub:OWNER/NAME."""
    pretrained: str | None = None
    """Weights of the encoder: an open_clip tag (laion2b_s34b_b79k, openai, ...) or a local checkpoint file."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights. auto is bfloat16 on devices that compute in it, else float32."""
    engine: Engine = "auto"
    """Library that computes image features on CPUs. auto is openvino where it can run the model, else torch. GPUs
    always use torch."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Turning images into features."""

    views: str = "weak,mirror,strong"
    """Comma-separated views of each image. The mean of weak (always the first view) and mirror is the feature of
    the image. Students are also fitted to the other views: strong, strong2, ..., and corruption:severity.
    VIEW+mirror is the mirrored form of any view but weak."""
    batch_size: int = 256
    """Images in one forward pass on a GPU. On CPUs a pass always takes 8."""
    num_actors: int | None = None
    """Number of encoder actors (processes). The default is one for each GPU, or one for every eight CPUs."""
    device: Device = "auto"
    """Where images are encoded. auto is on GPUs if the cluster has any, else on CPUs. gpu asks for GPUs and waits
    until an autoscaler has started one."""
    decode: Decode = "cpu"
    """Where JPEGs are decoded, for the views weak and mirror. gpu is faster where CPUs cannot feed the GPUs. Its
    features differ a little, so no store has those of both."""
    features: str | None = None
    """Folder of the feature stores; runs that name the same folder share them. The default is OUT/features."""

    def check(self) -> None:
        """Raise UserError for values out of range, or that do not go together."""
        _at_least(self, 1, "batch_size", "num_actors")
        if self.decode == "gpu" and self.device == "cpu":
            raise UserError("--decode gpu needs a GPU, and --device cpu takes none: leave one of them out")
        views = {view.strip() for view in self.views.split(",")}
        if self.decode == "gpu" and not views <= {"weak", "mirror"}:
            raise UserError(
                "--decode gpu is for the views weak and mirror, all others are made on CPUs: add --views weak,mirror, "
                f"for {self.views}, or leave --decode out"
            )


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """Names of the classes, and the prompts that they are put into."""

    classes: str | None = None
    """Comma-separated class names, or a text file with one name per line. A line `label<TAB>name` maps the label
    in the data to a class name. By default the names come with the data."""
    templates: str = "default"
    """Prompt templates: default, simple, openai (80 templates), or a text file with one template per line, in
    which {} stands for the class name."""


@dataclass(frozen=True, kw_only=True)
class SelfTrainingConfig:
    """The rounds of self-training."""

    solver: Literal["gaussian", "gradient"] = "gaussian"
    """Solver that fits the probe in each round. gaussian computes it in closed form from class means and one
    covariance; gradient trains it step by step, with LP-CLIP's loss (reconstructed)."""
    rounds: int = 20
    """Maximum number of rounds. They end earlier once fewer than 0.2% of the labels change."""
    temperature: float | None = None
    """Softmax temperature of the teacher. The default is the temperature of the encoder itself."""
    threshold: float = 0.0
    """Pseudo-labels with a confidence below this are left out of the fit."""
    prior: str = "auto"
    """Class shares that the pseudo-labels are pulled toward: uniform (equal shares), weak (equal shares at strength
    0.3), none, or a text file with one weight, or `name<TAB>weight`, per line. auto tries them on a sample and
    takes uniform if rounds in random halves of the features' directions repeat its labels, else weak, or none if labels
    are far from equal shares even with weak."""
    present: str = "auto"
    """Class names that the rounds use: all, or those that have images, comma-separated or in a text file as for
    --classes. auto leaves out names that have no images, as far as zero-shot and trial rounds can tell, if at least two
    fifths of the names are without (only with --prior auto; trials of a sweep use all). The probe still knows the names
    left out, and takes one for an image that is much like it."""
    neighbours: int | None = None
    """Number of nearest neighbours whose labels influence each pseudo-label; 0 turns this off. The default is half
    the mean number of images per class, between 3 and 30, and 0 above ten million images."""
    num_workers: int = 0
    """Number of Ray Train workers that run the rounds. 0 runs the same code in this process."""
    seed: int = 0
    """Seed of the strong views and of the batches of the gradient solver."""

    def check(self) -> None:
        """Raise UserError for values out of range."""
        _above_zero(self, "temperature")
        _at_least(self, 1, "rounds")
        _below_one(self, "threshold")
        _at_least(self, 0, "neighbours", "num_workers")
        _check_seed(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dual encoder that is trained, and its first weights."""

    encoder: str = "tiny-32"
    """Model to train: an open_clip model name, a JSON file with an open_clip model configuration, or tiny-32, a
    small model for 32 px images and CPUs."""
    pretrained: str | None = None
    """Weights to begin with: an open_clip tag or a local checkpoint file. By default training begins from scratch."""
    lock: Literal["none", "image", "text"] = "none"
    """Tower whose weights are not trained."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Contrastive training."""

    method: Literal["psd", "infonce"] = "psd"
    """Loss. psd is progressive self-distillation (reconstructed), made for noisy pairs; infonce is the loss of
    CLIP."""
    epochs: int = 10
    """Number of passes over the pairs."""
    batch_size: int = 256
    """Pairs in a batch, counted over all workers. The loss contrasts each pair with all others of its batch."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW at the end of the warm-up; it then falls to 0 along a cosine. For pretrained weights,
    about 1e-5 is a good choice."""
    warmup: float = 0.05
    """Share of all steps during which the learning rate rises."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    share_start: float = 0.0
    """Share of each batch that psd distils in the first step, when the model knows little yet. The paper uses 0.2."""
    share_end: float = 0.5
    """Share of each batch that psd distils in the last step; it grows along a cosine. The paper uses 0.8."""
    targets: Literal["images", "swapped", "own"] = "images"
    """Source of the soft targets of psd. images takes the similarities among the images; swapped gives each direction
    (image to text, text to image) the other one's similarities, as in the paper; own gives it its own."""
    teacher_sharpness: float = 3.0
    """Sharpness of the targets of psd, relative to the similarities of the model itself: 1 is equally sharp."""
    label_smoothing: float = 0.0
    """Label smoothing of the infonce loss: this share of each target is divided equally among the batch."""
    mirror: bool = False
    """Mirror half of the images. This harms if the texts mention left and right."""
    accumulate: int = 1
    """Number of parts in which each worker computes its share of a batch. Above 1, a step needs less memory and runs
    the forward pass twice; its result is the same."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the computation; the weights are float32 in any case. auto is bfloat16 on GPUs, else
    float32."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints. A training that was stopped resumes from the last one."""
    num_workers: int = 0
    """Number of Ray Train workers, each with a GPU if the cluster has any. 0 trains in this process."""
    seed: int = 0
    """Seed of the first weights, the order of the pairs, the crops and the choice of distilled pairs."""

    def check(self) -> None:
        """Raise UserError for values that are out of range or do not go together."""
        _at_least(self, 1, "epochs", "batch_size", "accumulate")
        _at_least(self, 0, "num_workers", "checkpoint_minutes", "weight_decay")
        _check_seed(self)
        _above_zero(self, "learning_rate", "teacher_sharpness")
        _below_one(self, "label_smoothing", "warmup")
        if self.method == "psd" and self.batch_size < 2:
            raise UserError("--batch-size 1 has no other pair to learn from")
        workers = max(1, self.num_workers)
        if self.batch_size % (self.accumulate * workers):
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared by {counted(workers, 'worker')} in "
                f"{counted(self.accumulate, 'part')} each: choose a multiple of them"
            )
        if not 0 <= self.share_start <= self.share_end <= 1:
            raise UserError(
                f"--share-start {self.share_start:g} and --share-end {self.share_end:g} must lie between 0 and 1, in "
                "this order"
            )
        if self.label_smoothing and self.method == "psd":
            raise UserError("--label-smoothing is for --method infonce: psd's targets are soft already")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The names under which MLflow keeps the run."""

    experiment: str = "lpclip"
    """MLflow experiment of the run. Runs go to the server in MLFLOW_TRACKING_URI, or else to the SQLite file
    mlflow.db in this folder. A job of `ray job submit` keeps mlflow.db beside its output folder."""
    run_name: str | None = None
    """Name of the MLflow run. The default is the name of the output folder."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as a flat dict, nested stages merged, in declaration order. Their names must be disjoint."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        part = to_dict(value) if dataclasses.is_dataclass(value) else {item.name: value}
        assert not flat.keys() & part.keys(), sorted(flat.keys() & part.keys())
        flat |= part
    return flat


def check(config: Any) -> None:
    """Refuse empty texts, and call `check` of a configuration and of all that are nested in it.

    Raises UserError for the first mistake.
    """
    _refuse_empty(config)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check(value)
    if hasattr(config, "check"):
        config.check()


def flags(config: Any) -> list[str]:
    """The command line of a job: all flags that differ from the defaults of its dataclass or have no default."""
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


def config_identity(config: SelfTrainingConfig) -> dict[str, object]:
    """The part of the configuration that decides the result: everything but the number of workers."""
    return {key: value for key, value in to_dict(config).items() if key != "num_workers"}


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Encode images once into a feature store."""

    data: tuple[str, ...] = ("fashion-mnist",)
    """Images to encode: a folder, Parquet, a WebDataset tar, a CSV/JSONL manifest, or one of fashion-mnist,
    cifar10, cifar100 (a suffix :train or :test names the part). Several values of one kind, also patterns in quotes,
    are read as one."""
    out: str = "runs/encode"
    """Output folder."""
    limit: int | None = None
    """Use only this many images. A hash of the ids chooses them."""
    source: SourceConfig = field(default_factory=SourceConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    names: ClassConfig = field(default_factory=ClassConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    """Seed of the strong views."""

    def check(self) -> None:
        """Raise UserError for values out of range."""
        _at_least(self, 1, "limit")
        _check_seed(self)


@dataclass(frozen=True, kw_only=True)
class SelftrainJob:
    """Train a linear probe on unlabelled images, from a CLIP model's own pseudo-labels."""

    data: tuple[str, ...] = ("fashion-mnist",)
    """Unlabelled images: a folder, Parquet, a WebDataset tar, a CSV/JSONL manifest, a feature store, or one of
    fashion-mnist, cifar10, cifar100. Several values of one kind, also patterns in quotes, are read as one.
    Self-training reads no labels, even if the data has them."""
    eval_data: tuple[str, ...] = ()
    """Labelled images to evaluate on, as for --data. The default for a named data set is its test part."""
    out: str = "runs/selftrain"
    """Output folder."""
    limit: int | None = None
    """Use only this many of the unlabelled images. A hash of the ids chooses them."""
    eval_limit: int | None = None
    """Use only this many of the images that are evaluated on."""
    labels: str | None = None
    """CSV file with the columns id and label of a few images, as `lpclip review` writes it. The labels correct what the
    rounds learn; `none of these` is the label of an image of no class."""
    supervised: bool = False
    """Also fit a supervised probe on the true labels of --data and save it to OUT/supervised. It shows how much is
    possible with labels."""
    source: SourceConfig = field(default_factory=SourceConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    names: ClassConfig = field(default_factory=ClassConfig)
    training: SelfTrainingConfig = field(default_factory=SelfTrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> None:
        """Raise UserError for values out of range."""
        _at_least(self, 1, "limit", "eval_limit")


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """Train a dual encoder on image-text pairs, for the other commands to use."""

    data: tuple[str, ...] = ("fashion-mnist",)
    """Images with texts: a folder with a .txt file beside each image, Parquet, a WebDataset tar or a CSV/JSONL
    manifest; also several of one kind. Labelled images, such as fashion-mnist, cifar10, cifar100, get texts from
    --caption-templates."""
    out: str = "runs/pretrain"
    """Output folder. OUT/model holds the model that other commands take."""
    limit: int | None = None
    """Use only this many pairs. A hash of the ids chooses them."""
    caption_templates: str | None = None
    """Templates that turn the label of an image into its texts, for images without texts: default, simple, openai,
    or a text file with one template per line, in which {} stands for the label. Named data sets take simple by
    default."""
    pairs: str | None = None
    """Folder of the stores of decoded pairs; runs that name the same folder share them. The default is OUT/pairs."""
    source: PairsConfig = field(default_factory=PairsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: PretrainConfig = field(default_factory=PretrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> None:
        """Raise UserError for values out of range."""
        _at_least(self, 1, "limit")


@dataclass(frozen=True, kw_only=True)
class TuneJob:
    """Search the parameters of self-training without labels, on features that are encoded once."""

    space: str = "default"
    """The parameters to search: default, quick, wide, or a Python file whose SPACE maps names of the training's
    flags to Ray Tune's search-space objects."""
    data: tuple[str, ...] = ("fashion-mnist",)
    """Unlabelled images: a folder, Parquet, a WebDataset tar, a CSV/JSONL manifest, a feature store, or one of
    fashion-mnist, cifar10, cifar100. Several values of one kind, also patterns in quotes, are read as one. Labels
    choose nothing, even if the data has them."""
    eval_data: tuple[str, ...] = ()
    """Labelled images, as for --data, on which the accuracy of the trials is reported. The default for a named data
    set is its test part."""
    out: str = "runs/tune"
    """Output folder."""
    trials: int = 64
    """Number of trials. A space with fewer combinations gives fewer trials."""
    criterion: Criterion = "structure"
    """Criterion that chooses the winner without labels. docs/tuning.md compares them."""
    search: Literal["random", "optuna"] = "random"
    """Way of drawing the trials. random draws all of them before the first one runs; optuna (TPE) learns from the
    criterion of finished trials."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops trials early if their criterion lags behind; a stopped trial cannot win. none stops no trial."""
    concurrent: int | None = None
    """Number of trials that run at the same time, each on one CPU. The default is the number of CPUs."""
    resume: bool = False
    """Refuse to begin a new sweep: OUT must hold one. A sweep in OUT is resumed in any case, with or without this
    flag."""
    limit: int | None = None
    """Use only this many of the unlabelled images. A hash of the ids chooses them."""
    eval_limit: int | None = None
    """Use only this many of the images that are evaluated on."""
    labels: str | None = None
    """CSV file with the columns id and label of a few images, as `lpclip review` writes it. The labels correct what the
    rounds learn; `none of these` is the label of an image of no class."""
    register: str | None = None
    """Name under which the winner is entered in the model registry of MLflow. The default is lpclip-DATA."""
    source: SourceConfig = field(default_factory=SourceConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    names: ClassConfig = field(default_factory=ClassConfig)
    training: SelfTrainingConfig = field(default_factory=SelfTrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> None:
        """Raise UserError for values out of range."""
        _at_least(self, 1, "trials", "concurrent", "limit", "eval_limit")


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Measure probes and zero-shot: accuracy, calibration, corruptions, natural shifts, foreign images; and how
    well an encoder finds the texts of images, and the images of texts."""

    probe: tuple[str, ...] = ()
    """FOLDER or NAME=FOLDER of saved probes, all of one encoder: OUT/probe and OUT/supervised of lpclip selftrain. A
    FOLDER may also be hf-hub:OWNER/NAME."""
    data: tuple[str, ...] = ()
    """Labelled images that the probes are measured on: a folder, Parquet, a WebDataset tar, a manifest, a named
    data set (its test part) or a feature store. Several values of one kind, also patterns in quotes, are read as
    one."""
    retrieval: tuple[str, ...] = ()
    """PATH or NAME=PATH of image-text pairs, in any form that lpclip pretrain --data takes. The encoder finds the
    texts of images and the images of texts."""
    encoder: str | None = None
    """Encoder for --retrieval without --probe: lite, an open_clip model name or hf-hub:OWNER/NAME. With --probe,
    the encoder is the one of the probes."""
    out: str = "runs/evaluate"
    """Output folder."""
    limit: int | None = None
    """Use only this many images of each set. A hash of the ids chooses them."""
    corruptions: str = "none"
    """Corruptions applied to the images of --data: none, all (the 15 of ImageNet-C), or comma-separated names."""
    severities: str = "1,3,5"
    """Comma-separated severities of the corruptions, each from 1 to 5."""
    corrupted: tuple[str, ...] = ()
    """NAME=PATH of published corrupted sets, which are read as they are: the folders of ImageNet-C or the arrays
    of CIFAR-10-C."""
    shift: tuple[str, ...] = ()
    """NAME=PATH of labelled images of the same classes from other origins. For the names imagenet-v2,
    imagenet-sketch, imagenet-r and objectnet the effective robustness is reported as well, if all their classes are
    there."""
    ood: tuple[str, ...] = ()
    """NAME=PATH of images of other classes, about which a classifier should not be sure."""
    classes: str | None = None
    """Text file with lines `label<TAB>name`, for data whose labels differ from the class names of the probe."""
    caption_templates: str | None = None
    """Templates that turn labels into the texts of --retrieval: default, simple, openai, or a text file with one
    template per line, in which {} stands for the label. Named data sets take simple by default."""
    pretrained: str | None = None
    """Weights of --encoder: an open_clip tag or a local checkpoint file. With --probe, it is the new place of the
    local checkpoint of their encoder, if the file has moved since training."""
    engine: Engine = EncoderConfig.engine
    """Library that computes image features on CPUs: auto, openvino or torch, as for lpclip selftrain."""
    batch_size: int = EncodeConfig.batch_size
    """Images in one forward pass on a GPU. On CPUs a pass always takes 8."""
    num_actors: int | None = None
    """Number of encoder actors (processes). The default is one for each GPU, or one for every eight CPUs."""
    device: Device = EncodeConfig.device
    """Where images are encoded: auto, cpu or gpu, as for lpclip selftrain."""
    features: str | None = None
    """Folder of the feature stores; evaluations that name the same folder share them. The default is OUT/features."""
    seed: int = 0
    """Seed of the corruptions and of the bootstrap."""
    source: PairsConfig = field(default_factory=PairsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> None:
        """Raise UserError for values that are out of range or do not go together."""
        _at_least(self, 1, "limit", "batch_size", "num_actors")
        _check_seed(self)
        if self.probe and self.encoder is not None:
            raise UserError(
                "--encoder is for --retrieval without --probe: with --probe, the encoder is the one of the probes"
            )
        if self.data and not self.probe:
            raise UserError("--data has the images that probes are measured on: it needs --probe")
        if not self.data and not self.retrieval:
            raise UserError(
                "there is nothing to measure: give --probe and --data, or --retrieval, or all of them"
            )
        if self.retrieval and not self.probe and self.encoder is None:
            raise UserError("--retrieval needs an encoder: give --encoder, or --probe to take its own")
        measured = ("corruptions", "corrupted", "shift", "ood", "classes")
        needs = {
            "--probe and --data": () if self.data else measured,
            "--retrieval": () if self.retrieval else ("caption_templates", "text_column"),
        }
        given, default = to_dict(self), to_dict(EvaluateJob())
        for needed, names in needs.items():
            for name in names:
                if given.get(name) != default[name]:
                    raise UserError(f"--{name.replace('_', '-')} needs {needed}")


@dataclass(frozen=True, kw_only=True)
class PredictJob:
    """Label images with a saved probe."""

    probe: str
    """Folder of a saved probe, such as OUT/probe of lpclip selftrain, or hf-hub:OWNER/NAME."""
    data: tuple[str, ...]
    """Images to label: a folder, Parquet, a WebDataset tar, a CSV/JSONL manifest, a named data set (its test part) or
    a feature store. Several values of one kind, also patterns in quotes, are read as one."""
    out: str
    """Parquet file to write, with the columns id, label, probability, top_labels and top_probabilities. Images that
    cannot be read are listed beside it, for labels.parquet in labels.quarantine.parquet."""
    top_k: int = 5
    """Number of most probable labels to keep for each image."""
    probabilities: bool = False
    """Add a column with the probabilities of all classes, in the order of the probe's classes. Their names are in
    the metadata of the file's schema, under class_names."""
    export_folder: str | None = None
    """Local folder in which each image gets a place at CLASS/NAME, by its label. Image files of this machine are
    linked, all others copied."""
    min_probability: float = 0.0
    """Images whose label is less probable than this get no place in --export-folder."""
    limit: int | None = None
    """Use only this many images. A hash of the ids chooses them."""
    pretrained: str | None = None
    """New place of the local checkpoint of the encoder, if the file has moved since training."""
    engine: Engine = EncoderConfig.engine
    """Library that computes image features on CPUs: auto, openvino or torch, as for lpclip selftrain."""
    batch_size: int = EncodeConfig.batch_size
    """Images in one forward pass on a GPU. On CPUs a pass always takes 8."""
    device: Device = EncodeConfig.device
    """Where images are encoded: auto, cpu or gpu, as for lpclip selftrain."""
    decode: Decode = EncodeConfig.decode
    """Where JPEGs are decoded: cpu or gpu, as for lpclip selftrain."""
    features: str | None = None
    """Folder of feature stores, in which features are found and kept. By default they are deleted at the end."""
    source: SourceConfig = field(default_factory=SourceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> None:
        """Raise UserError for values out of range, or an output that is no Parquet file."""
        _at_least(self, 1, "top_k", "limit", "batch_size")
        _below_one(self, "min_probability")
        if self.min_probability and self.export_folder is None:
            raise UserError("--min-probability is for --export-folder, which is not there")
        EncodeConfig(views="weak", device=self.device, decode=self.decode).check()
        if "://" not in self.out and not self.out.endswith(".parquet"):
            raise UserError(f"--out {self.out}: a Parquet file is written, so its name must end in .parquet")


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Write a saved probe in a form that other programs read."""

    probe: str
    """Folder of a saved probe, such as OUT/probe of lpclip selftrain, or hf-hub:OWNER/NAME."""
    out: str
    """Path to write. A name that ends in .onnx is an ONNX graph from pixels to probabilities, one in .safetensors a
    classifier for open_clip's zero-shot evaluation, and any other name a folder for the Hugging Face Hub."""
    pretrained: str | None = None
    """With an ONNX graph: new place of the local checkpoint of the encoder, if the file has moved since training."""
    float16: bool = False
    """With an ONNX graph, also write one of half the size beside it, model.float16.onnx for model.onnx, whose weights
    are stored as float16."""

    def check(self) -> None:
        """Raise UserError for flags that do not go together."""
        if self.float16 and self.form != "onnx":
            raise UserError(f"--float16 is for an ONNX graph, and --out {self.out} does not end in .onnx")

    @property
    def form(self) -> Literal["onnx", "open_clip", "folder"]:
        """The form that the name of `out` asks for."""
        path = self.out.partition("?")[0].lower()
        if path.endswith(".onnx"):
            return "onnx"
        return "open_clip" if path.endswith(".safetensors") else "folder"


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """Answer requests over HTTP with a saved probe."""

    probe: str
    """Folder of a saved probe, such as OUT/probe of lpclip selftrain, or hf-hub:OWNER/NAME."""
    host: str = "127.0.0.1"
    """Address to listen at. By default other machines do not reach it; 0.0.0.0 is every address of this one. Anyone
    who reaches it may use it."""
    port: int = 8000
    """Port to listen at."""
    replicas: int | None = None
    """Number of copies of the encoder, which share the requests. The default is one for each GPU, or one with all
    CPUs. Several may share a GPU: each decodes on a CPU of its own."""
    top_k: int = 5
    """Number of most probable labels in an answer, unless a request asks for another."""
    max_bytes: int = 20_000_000
    """Requests with a larger body are refused before all of it is in memory."""
    max_pixels: int = 50_000_000
    """Images with more pixels than this are refused before they are decoded."""
    max_images: int = 16
    """Largest number of images in a request."""
    max_waiting: int = 256
    """Largest number of images that wait for an encoder. A request beyond it gets status 503."""
    body_timeout: float = 30.0
    """Seconds that the body of a request may take to arrive."""
    batch_size: int = 32
    """Largest number of images, of all requests together, that are encoded at once."""
    pretrained: str | None = None
    """New place of the local checkpoint of the encoder, if the file has moved since training."""
    engine: Engine = EncoderConfig.engine
    """Library that computes image features on CPUs: auto, openvino or torch, as for lpclip selftrain."""
    device: Device = EncodeConfig.device
    """Where images are encoded: auto, cpu or gpu, as for lpclip selftrain."""

    def check(self) -> None:
        """Raise UserError for values out of range."""
        _check_port(self)
        _at_least(self, 1, "replicas", "top_k", "max_bytes", "max_pixels", "max_images", "batch_size")
        if self.max_waiting < self.max_images:
            raise UserError(
                f"--max-waiting {self.max_waiting} has no room for a request of --max-images {self.max_images}"
            )
        _above_zero(self, "body_timeout")


@dataclass(frozen=True, kw_only=True)
class UiJob:
    """Show the runs in MLflow's pages, in the browser of this machine."""

    database: str | None = None
    """SQLite file with the runs. The default is MLFLOW_TRACKING_URI, or else mlflow.db in this folder."""
    port: int = 5000
    """Port of the pages on 127.0.0.1, which other machines do not reach."""

    def check(self) -> None:
        """Raise UserError for a port that is none."""
        _check_port(self)


@dataclass(frozen=True, kw_only=True)
class SuggestJob:
    """Choose the images whose true label would help most: OUT/suggested.csv to fill in, and a page that shows them."""

    run: str
    """Output folder of lpclip selftrain."""
    count: int = 50
    """Number of images to ask for. Those that OUT/corrections.csv has labels of are not asked for again."""
    seed: int = 0
    """Seed of the clusters that the images stand for."""

    def check(self) -> None:
        """Raise UserError for values out of range."""
        _at_least(self, 1, "count")
        _check_seed(self)


@dataclass(frozen=True, kw_only=True)
class ReviewJob:
    """Ask for labels in the browser: a page for this machine shows the images of OUT/suggested.csv one by one."""

    run: str
    """Output folder of lpclip selftrain."""
    labels: str | None = None
    """CSV file that gets the answers, with the columns id and label; its other rows stay. The default is
    OUT/corrections.csv."""
    port: int = 8080
    """Port of the page on 127.0.0.1, which other machines do not reach. 0 takes any that is free."""

    def check(self) -> None:
        """Raise UserError for a port that is none."""
        if self.port:
            _check_port(self)
