"""A probe as a folder in the layout of the Hugging Face Hub, which is uploaded as it is."""

from __future__ import annotations

import os
from typing import Any

import lpclip
from lpclip import files
from lpclip.config import UserError
from lpclip.encoders.hub import PROBE_FILES
from lpclip.method.probe import Probe
from lpclip.serving.model_card import is_local, model_card

NAMES = {*PROBE_FILES, "config.json", "README.md"}


def write_hub_folder(probe: Probe, folder: str, out: str, *, digest: str) -> list[str]:
    """Write the probe in `folder`, with a model card, to the folder `out`; `digest` is the probe's. Returns notes.

    The probe's own files are copied as they are. Raises UserError when `out` holds other files.
    """
    if os.path.realpath(files.absolute(folder)) == os.path.realpath(files.absolute(out)):
        raise UserError(
            f"--out {out} is the probe's own folder: name a new folder, or NAME.onnx or NAME.safetensors"
        )
    there = {*files.list_names(out), *files.list_folders(out)}
    others = sorted(name for name in there - NAMES if not name.startswith("."))  # Git's files are left alone
    if others:
        raise UserError(
            f"--out {out} holds other files, such as {others[0]}: name a new folder, or NAME.onnx or NAME.safetensors"
        )
    name = files.split(files.absolute(folder))[1]
    card = model_card(probe, name=name, run=_run(folder, probe), digest=digest)
    kept = {name: files.read_bytes(files.join(folder, name)) for name in PROBE_FILES}
    files.make_folder(out)
    files.write_json(files.join(out, "config.json"), _config(probe, digest=digest))
    files.write_bytes(files.join(out, "README.md"), card.encode())
    # probe.json last: with it, the folder is whole.
    for file, data in reversed(kept.items()):
        files.write_bytes(files.join(out, file), data)
    if paths := _paths(probe):
        return [f"probe.json, which is copied as it is, holds paths of this machine: {', '.join(paths)}"]
    return []


def _paths(probe: Probe) -> list[str]:
    """The paths of local files that the probe's own file names."""
    config, training = probe.encoder["config"], probe.summary.get("training", {})
    found = [config["encoder"]] if config["encoder"].endswith(".json") else []
    found += [config["pretrained"]] if is_local(probe.encoder) else []
    return found + [training[flag] for flag in ("prior", "present") if "/" in training.get(flag, "")]


def _config(probe: Probe, *, digest: str) -> dict[str, Any]:
    identity = probe.encoder["identity"]
    return {
        "library_name": "lpclip",
        "lpclip_version": lpclip.__version__,
        "encoder": identity["name"],
        "pretrained": identity.get("pretrained"),
        "encoder_weights": identity["weights"],
        "views": probe.encoder["views"],
        "probe": digest,
        "id2label": {str(place): name for place, name in enumerate(probe.class_names)},
        "label2id": {name: place for place, name in enumerate(probe.class_names)},
    }


def _run(folder: str, probe: Probe) -> dict[str, Any] | None:
    """The summary of the run that made the probe, from beside its folder; None where there is none, or another's."""
    above, _ = files.split(files.absolute(folder))
    path = files.join(above, "summary.json")
    if not files.exists(path):
        return None
    summary = files.read_json(path)
    is_its_own = isinstance(summary, dict) and summary.get("encoder") == probe.encoder["identity"]
    return summary if is_its_own and summary.get("classes") == list(probe.class_names) else None
