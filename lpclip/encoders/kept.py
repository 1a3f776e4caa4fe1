"""Encoders described and converted once, and kept in the cache folder, so that later jobs start without torch.

    CACHE/encoders/KEY/encoder.json      what `EncoderInfo` says of it
    CACHE/encoders/KEY/network.xml .bin  its image tower for OpenVINO, with its weights in float32
    CACHE/encoders/KEY/heads/KEY.npy     zero-shot weights of class names

The key follows from everything that the files depend on: the checkpoint's bytes, the versions of the packages.
A folder appears when it is complete, and its networks are checked against their hashes whenever they are opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lpclip.config import EncoderConfig, digest
from lpclip.encoders.engine import OpenVinoTower
from lpclip.encoders.head import EncoderInfo
from lpclip.files import cache_folder
from lpclip.images.pixels import Preprocess

log = logging.getLogger(__name__)

# Raised with any change of what the files hold.
VERSION = 1
PACKAGES = ("torch", "open_clip_torch", "timm", "transformers", "openvino")
NETWORK = ("network.xml", "network.bin")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """An encoder in the cache."""

    folder: Path
    info: EncoderInfo
    """Without a head."""

    def head(self, names: Sequence[str], templates: Sequence[str]) -> np.ndarray | None:
        """Zero-shot weights (K, d) float32 of K class names, None when they are not kept."""
        path = self._head_path(names, templates)
        try:
            head = np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            return None
        fits = head.shape == (len(names), self.info.identity["dim"]) and head.dtype == np.float32
        return head if fits and np.allclose((head**2).sum(1), 1, atol=1e-4) else None

    def keep_head(self, head: np.ndarray, names: Sequence[str], templates: Sequence[str]) -> None:
        """Keep zero-shot weights, whole or, where the folder cannot be written, not at all."""
        path = self._head_path(names, templates)
        part = path.with_name(f"{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            with part.open("wb") as file:
                np.save(file, head)
            part.replace(path)
        except OSError as error:
            # The next job computes them again.
            with contextlib.suppress(OSError):
                part.unlink()
            log.warning("zero-shot weights could not be kept for the next run: %s", error)

    def tower(self, *, num_threads: int, pass_size: int) -> OpenVinoTower:
        """The image tower."""
        return OpenVinoTower(
            self.folder / NETWORK[0],
            precision=self.info.identity["precision"],
            num_threads=num_threads,
            pass_size=pass_size,
        )

    def _head_path(self, names: Sequence[str], templates: Sequence[str]) -> Path:
        return self.folder / "heads" / f"{digest([list(names), list(templates)])}.npy"


def find(config: EncoderConfig, *, precision: str) -> Kept | None:
    """The encoder that `config` names, None when it is not kept or its files are damaged."""
    folder = _folder(config)
    try:
        known = json.loads((folder / "encoder.json").read_text())
    except (OSError, ValueError):
        return None
    if known["files"] != _hashes(folder):
        return None
    info = known["info"]
    return Kept(
        folder=folder,
        info=EncoderInfo(
            name=info["name"],
            identity={**info["identity"], "precision": precision},
            preprocess=Preprocess(**{key: _tuples(value) for key, value in info["preprocess"].items()}),
            logit_scale=info["logit_scale"],
            head=None,
            notes=tuple(info["notes"]),
            engine=info["engine"],
        ),
    )


def keep(config: EncoderConfig, info: EncoderInfo, *, convert: Callable[[Path], None]) -> None:
    """Keep what an encoder is, and its network, which `convert` writes to the given path.

    Raises OSError when the cache folder cannot be written, and what `convert` raises.
    """
    folder = _folder(config)
    part = folder.with_name(f"{uuid.uuid4().hex}.part")
    part.mkdir(parents=True)
    try:
        convert(part / NETWORK[0])
        known = {"info": asdict(replace(info, head=None)), "files": _hashes(part)}
        (part / "encoder.json").write_text(json.dumps(known, indent=2))
        try:
            part.rename(folder)
        except OSError:
            # Another job may have been faster, and may be reading its files.
            found = find(config, precision=info.identity["precision"])
            if found is None or found.info.identity != info.identity:
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _folder(config: EncoderConfig) -> Path:
    return cache_folder() / "encoders" / digest([VERSION, _versions(), _origin(config)])


def _origin(config: EncoderConfig) -> list[Any]:
    """All that decides an encoder's name, weights and preprocessing."""
    known: list[Any] = [config.encoder, config.pretrained]
    if config.encoder.endswith(".json"):
        known.append(_hash(Path(config.encoder).expanduser()))
    if config.encoder.startswith("hf-hub:"):
        import huggingface_hub

        from lpclip.encoders.hub import repository_of

        name = repository_of(config.encoder, what="an encoder")
        found = huggingface_hub.try_to_load_from_cache(name, "open_clip_config.json")
        # The folder of what was downloaded is called like the commit.
        known.append(Path(found).parent.name if isinstance(found, str) else None)
    if config.pretrained is not None:
        # A file beside a checkpoint, or its path, decides how images are preprocessed.
        path = Path(config.pretrained).absolute()
        known += [str(path), _hash(path), _hash(path.parent / "open_clip_config.json")]
    return known


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _hashes(folder: Path) -> dict[str, str | None]:
    return {name: _hash(folder / name) for name in NETWORK}


def _hash(path: Path) -> str | None:
    """SHA-256 of a file's bytes, None when it is not there."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
