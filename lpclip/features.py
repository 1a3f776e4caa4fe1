"""Data as features: find the feature store that fits, or encode one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpclip import files, store
from lpclip.config import EncodeConfig, EncoderConfig, SourceConfig
from lpclip.encode import check_manifest, encode, plan_actors, store_identity
from lpclip.images import Source, open_source
from lpclip.views import parse_views
from lpclip.zero_shot import EncoderInfo, Head


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images to use: a source that may have to be encoded, or a feature store that is given as it is."""

    name: str
    label_names: tuple[str, ...] | None
    has_labels: bool
    source: Source | None = None
    path: str | None = None

    def describe(self) -> str:
        """One line for the plan."""
        if self.source is None:
            return f"{self.name} (feature store)"
        count = f"{self.source.num_rows:,}" if self.source.num_rows is not None else "an unknown number of"
        labels = "labelled" if self.has_labels else "unlabelled"
        return f"{self.name}: {count} images ({self.source.kind}, {labels})"


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A complete feature store and how it was come by."""

    path: str
    manifest: dict[str, Any]
    seconds: float
    reused: bool
    rate: float | None
    """Images a second, None when nothing was encoded."""


def open_data(data: str, *, config: SourceConfig, split: str, limit: int | None = None) -> Data:
    """The images, or the feature store, that `data` names. Raises ValueError when it is neither."""
    if files.exists(files.join(data, "manifest.json")):
        manifest = store.read_manifest(data)
        assert manifest is not None
        if limit is not None:
            raise ValueError(f"{data} is a feature store: --limit works on images, before they are encoded")
        names = manifest["identity"]["source"]["label_names"]
        labels = store.read_ids(data)[1]
        return Data(
            name=data.rstrip("/").rsplit("/", 1)[-1],
            label_names=tuple(names) if names else None,
            has_labels=bool((labels >= 0).any()),
            path=data,
        )
    if files.exists(files.join(data, "identity.json")):
        raise ValueError(
            f"{data} is a feature store that is not complete; run the job that made it again, it goes on there"
        )
    source = open_source(data, config=config, split=split, limit=limit)
    return Data(name=source.name, label_names=source.label_names, has_labels=source.has_labels, source=source)


def encode_data(
    data: Data,
    *,
    info: EncoderInfo,
    encoder: EncoderConfig,
    config: EncodeConfig,
    seed: int,
    folder: str,
    head: Head | None = None,
    scores_path: str = "",
) -> Encoded:
    """The feature store of the data under `folder`: found there by its fingerprint, or encoded.

    Raises ValueError when a given store was made by another encoder or preprocessing, or too many images are bad.
    """
    begin = time.monotonic()
    if data.source is None:
        assert data.path is not None
        wanted = store_identity(None, info, parse_views(config.views), seed=seed)
        store.check_store(data.path, wanted)
        manifest = store.read_manifest(data.path)
        assert manifest is not None
        print(f"features of {data.name}: {manifest['num_rows']:,} images, as given", flush=True)
        return Encoded(path=data.path, manifest=manifest, seconds=0.0, reused=True, rate=None)
    identity = store_identity(data.source, info, parse_views(config.views), seed=seed)
    path = files.join(folder, f"{data.name}-{store.fingerprint(identity)[:12]}")
    manifest = store.read_manifest(path)
    if manifest is not None:
        check_manifest(data.source, path, manifest)
        print(f"features of {data.name}: found in {path}", flush=True)
        return Encoded(path=path, manifest=manifest, seconds=time.monotonic() - begin, reused=True, rate=None)
    print(f"features of {data.name}: encoding to {path}, {plan_actors(config.num_actors)}", flush=True)
    manifest = encode(
        data.source,
        info=info,
        encoder=encoder,
        config=config,
        seed=seed,
        path=path,
        head=head,
        scores_path=scores_path,
    )
    seconds = time.monotonic() - begin
    return Encoded(
        path=path, manifest=manifest, seconds=seconds, reused=False, rate=manifest["images_per_second"]
    )


def load_labelled(encoded: Encoded) -> tuple[store.Features, np.ndarray]:
    """All base features of a store in row order, and their raw labels (N,) int32."""
    found = store.load(encoded.path, views=())
    return found, found.labels
