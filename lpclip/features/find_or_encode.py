"""Data as features: find the feature stores that fit, or encode what is missing."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from lpclip import files
from lpclip.config import EncodeConfig, EncoderConfig, SourceConfig
from lpclip.encoders.head import EncoderInfo, Head
from lpclip.errors import UserError
from lpclip.features.encode_stage import encode, plan_actors, store_identity
from lpclip.features.pipeline import check_quarantine
from lpclip.features.store import Features, Store, fingerprint, mean_view
from lpclip.images.open import open_source
from lpclip.images.source import Source
from lpclip.images.views import STRONG_VERSION, WEAK, View, parse_views


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
        kind = "labelled" if self.has_labels else "unlabelled"
        if self.source.has_texts:
            kind = "with texts"
        return f"{self.name}: {count} images ({self.source.kind}, {kind})"


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A complete feature store and how it was come by."""

    store: Store
    seconds: float
    reused: bool
    rate: float | None
    """Images a second, None when nothing was encoded."""


def open_data(data: str, *, config: SourceConfig, split: str, limit: int | None = None) -> Data:
    """The images, or the feature store, that `data` names. Raises UserError when it is neither."""
    if files.exists(files.join(data, "manifest.json")):
        store = Store.open(data)
        if limit is not None:
            raise UserError(f"{data} is a feature store: --limit works on images, before they are encoded")
        return Data(
            name=files.split(data)[1],
            label_names=store.manifest.label_names,
            has_labels=store.has_labels(),
            path=data,
        )
    if files.exists(files.join(data, "identity.json")):
        raise UserError(
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

    Raises UserError when a given store was made by another encoder or preprocessing, or too many images are bad.
    """
    begin = time.monotonic()
    if data.source is None:
        assert data.path is not None
        wanted = store_identity(None, info, parse_views(config.views), seed=seed)
        given = Store.open(data.path)
        given.require(wanted)
        print(f"features of {data.name}: {given.manifest.num_rows:,} images, as given", flush=True)
        return Encoded(store=given, seconds=0.0, reused=True, rate=None)
    identity = store_identity(data.source, info, parse_views(config.views), seed=seed)
    path = files.join(files.absolute(folder), f"{data.name}-{fingerprint(identity)[:12]}")
    store = Store.find(path)
    if store is not None:
        check_quarantine(data.source, store)
        print(f"features of {data.name}: found in {path}", flush=True)
        return Encoded(store=store, seconds=time.monotonic() - begin, reused=True, rate=None)
    print(f"features of {data.name}: encoding to {path}, {plan_actors(config.num_actors)}", flush=True)
    store = encode(
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
    return Encoded(store=store, seconds=seconds, reused=False, rate=store.manifest.images_per_second)


class Views:
    """Views of one set of images, spread over complete stores; a view is read when it is asked for.

    `ids` (N,) str and `labels` (N,) int32, -1 for none, are in row order. `stores` is what the views lie in.
    Raises UserError when the stores do not hold the same images.
    """

    def __init__(self, encoded: dict[View, Encoded]) -> None:
        self.stores = list({item.store.path: item for item in encoded.values()}.values())
        self._stores = {view: item.store for view, item in encoded.items()}
        first, *others = (item.store for item in self.stores)
        self.ids, self.labels = first.ids_and_labels()
        for other in others:
            if not np.array_equal(other.ids(), self.ids):
                raise UserError(
                    f"{first.path} and {other.path} do not hold the same images; remove one of them, it is "
                    "encoded again"
                )

    @property
    def latest(self) -> Encoded:
        """The store that was encoded now, or the first of those that were found."""
        return next((item for item in self.stores if not item.reused), self.stores[0])

    def mean(self, *views: View) -> np.ndarray:
        """Unit-norm mean of some views, (N, d) float16."""
        stores = {self._stores[view] for view in views}
        if len(stores) == 1:
            return stores.pop().mean(*map(str, views))
        return mean_view([self._stores[view].mean(str(view)) for view in views])


def encode_views(
    data: Data,
    *,
    views: tuple[View, ...],
    info: EncoderInfo,
    encoder: EncoderConfig,
    config: EncodeConfig,
    seed: int,
    folder: str,
) -> Views:
    """All these views of the data: those that stores under `folder` hold, the missing ones encoded in one pass.

    `config.views` plays no part. Raises UserError when a given store lacks a view, and as `encode_data` does.
    """
    found = _find_views(data, views=views, info=info, seed=seed, folder=folder)
    missing = tuple(view for view in views if view not in found)
    if data.source is None and missing:
        raise UserError(
            f"{data.path} is a feature store without the view {missing[0]}: name the images, or encode them with "
            f"--views {','.join(map(str, views))}"
        )
    if missing:
        options = replace(config, views=",".join(map(str, dict.fromkeys((WEAK, *missing)))))
        now = encode_data(data, info=info, encoder=encoder, config=options, seed=seed, folder=folder)
        found |= dict.fromkeys(missing, now)
    else:
        where = data.path or folder
        print(f"features of {data.name}: {len(views)} views found in {where}", flush=True)
    return Views({view: found[view] for view in views})


def _find_views(
    data: Data, *, views: tuple[View, ...], info: EncoderInfo, seed: int, folder: str
) -> dict[View, Encoded]:
    """The complete stores of this data under the folder that hold one of these views, by view."""
    wanted = store_identity(data.source, info, (), seed=seed)
    if data.source is None:
        assert data.path is not None
        given = Store.open(data.path)
        given.require({key: wanted[key] for key in ("encoder", "preprocessing")})
        stores = [given]
    else:
        names = [name for name in files.list_folders(folder) if name.startswith(f"{data.name}-")]
        there = (Store.find(files.join(files.absolute(folder), name)) for name in names)
        stores = [store for store in there if store is not None]
    found: dict[View, Encoded] = {}
    for store in stores:
        identity = store.manifest.identity
        if any(identity.get(key) != wanted[key] for key in wanted if key not in ("views", "seed")):
            continue
        encoded = Encoded(store=store, seconds=0.0, reused=True, rate=None)
        for view in views:
            is_old = view.is_strong and identity.get("strong_version") != STRONG_VERSION
            is_other = view.is_random and store.manifest.seed != seed
            if str(view) in store.manifest.views and not is_old and not is_other:
                found.setdefault(view, encoded)
    if data.source is not None:
        for encoded in found.values():
            check_quarantine(data.source, encoded.store)
    return found


def load_labelled(encoded: Encoded) -> tuple[Features, np.ndarray]:
    """All base features of a store in row order, and their raw labels (N,) int32."""
    found = encoded.store.features(views=())
    return found, found.labels
