"""From images to features: find the feature stores that fit, or encode what is missing with a Ray Data pipeline.

    unit ──► read + decode (CPU tasks) ──► encode (one actor a GPU) ──► commit a part (CPU task) ──► progress

A decode task hands on uint8 pixels at the encoder's input size; encoded bytes never leave it. The driver sees
counts only. Requested CPUs differ from stage to stage so that Ray keeps the stages apart.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray

from lpclip import files
from lpclip.config import Decode, Device, EncodeConfig, EncoderConfig, UserError, counted
from lpclip.encoders.head import EncoderInfo
from lpclip.features.commit_stage import commit
from lpclip.features.data import Data
from lpclip.features.encode_stage import (
    TORCH_ENV,
    ActorPlan,
    EncodeStage,
    batch_rows,
    plan_actors,
    store_identity,
)
from lpclip.features.pipeline import check_quarantine, decode_units, fill_store, units_at_once
from lpclip.features.pulse import Pulse
from lpclip.features.stalls import CPU_LIMITS, LIMITS
from lpclip.features.store import THUMBNAIL, Store, fingerprint
from lpclip.features.store_writer import StoreWriter, find_or_make
from lpclip.features.stored_views import Encoded, Views
from lpclip.features.thumbnails import Sample
from lpclip.features.zero_shot_labels import ZeroShotLabels
from lpclip.images.source import Source
from lpclip.images.views import STRONG_VERSION, WEAK, View, pixel_views

ROUNDING = ("engine", "decoded_by")
"""Parts of an identity that change features by rounding alone: a store that is given may have others."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The way from images to features: an encoder, the folder of the stores, and the work that runs at a time."""

    info: EncoderInfo
    encoder: EncoderConfig
    folder: str
    """Stores are looked for and made in this folder."""
    seed: int = 0
    """Seed of the views that draw random numbers."""
    batch_size: int = EncodeConfig.batch_size
    num_actors: int | None = None
    """Encoder actors; by default one for each GPU, or one for every eight CPUs."""
    device: Device = "auto"
    """Where images are encoded."""
    decode: Decode = "cpu"
    """Where JPEGs are decoded."""
    tell: Callable[[Pulse], object] | None = None
    """Called in another thread, every minute while images are encoded and at the end."""

    def plan(self) -> ActorPlan:
        """The encoder actors, as the cluster is now."""
        return plan_actors(self.num_actors, self.device)

    def identity(self, source: Source | None, views: tuple[View, ...]) -> dict[str, Any]:
        """Everything that changes features of these views."""
        return store_identity(source, self.info, views, seed=self.seed, decode=self.decode)

    def store_of(
        self, data: Data, *, views: tuple[View, ...], zero_shot: ZeroShotLabels | None = None
    ) -> Encoded:
        """The store of the data with exactly these views: given, found in the folder by its fingerprint, or encoded.

        Zero-shot pseudo-labels are written of images that are encoded now.
        Raises UserError when a given store was made by another encoder or preprocessing, or too many images are bad.
        """
        begin = time.monotonic()
        identity = self.identity(data.source, views)
        if isinstance(data.origin, Store):
            # Engines, and what decodes JPEGs, give the same features up to rounding.
            data.origin.require({key: identity[key] for key in identity if key not in ROUNDING})
            rows = data.origin.manifest.num_rows
            print(f"features of {data.name}: {counted(rows, 'image')}, as given", flush=True)
            return Encoded(store=data.origin, seconds=0.0, reused=True, rate=None)
        path = files.join(files.absolute(self.folder), f"{data.name}-{fingerprint(identity)[:12]}")
        source, name = data.origin, f"features of {data.name}"

        def make() -> Store:
            print(f"{name}: encoding to {path}, {self.plan()}", flush=True)
            return self.encode(source, views=views, path=path, zero_shot=zero_shot)

        store, is_new = find_or_make(path, name=name, make=make)
        if not is_new:
            check_quarantine(source, store)
            print(f"{name}: found in {path}", flush=True)
        rate = store.manifest.images_per_second if is_new else None
        return Encoded(store=store, seconds=time.monotonic() - begin, reused=not is_new, rate=rate)

    def one_store_of(self, data: Data, views: tuple[View, ...]) -> Encoded:
        """One store of the data that has all these views: given, found in the folder, or encoded.

        Raises UserError when a given store lacks a view, and as `store_of` does.
        """
        found = self._find_views(data, views)
        _refuse_missing(data, found, views)
        names = set(map(str, views))
        whole = next((e for e in found.values() if names <= set(e.store.manifest.views)), None)
        if whole is None:
            return self.store_of(data, views=views)
        print(f"features of {data.name}: found in {whole.store.path}", flush=True)
        return whole

    def views_of(self, data: Data, views: tuple[View, ...]) -> Views:
        """All these views of the data: those that stores in the folder hold, the missing ones encoded in one pass.

        Raises UserError when a given store lacks a view, and as `store_of` does.
        """
        found = self._find_views(data, views)
        _refuse_missing(data, found, views)
        missing = tuple(view for view in views if view not in found)
        if missing:
            now = self.store_of(data, views=tuple(dict.fromkeys((WEAK, *missing))))
            found |= dict.fromkeys(missing, now)
        else:
            where = data.origin.path if isinstance(data.origin, Store) else self.folder
            print(f"features of {data.name}: {counted(len(views), 'view')} found in {where}", flush=True)
        return Views({view: found[view] for view in views})

    def _find_views(self, data: Data, views: tuple[View, ...]) -> dict[View, Encoded]:
        """The complete stores of this data that hold one of these views, by view."""
        wanted = self.identity(data.source, ())
        if isinstance(data.origin, Store):
            data.origin.require({key: wanted[key] for key in ("encoder", "preprocessing")})
            stores = [data.origin]
            wanted = {key: wanted[key] for key in wanted if key not in ROUNDING}
        else:
            names = [name for name in files.list_folders(self.folder) if name.startswith(f"{data.name}-")]
            there = (Store.find(files.join(files.absolute(self.folder), name)) for name in names)
            # A store with more views, encoded since, must not take the place of the one that was found before.
            stores = sorted(filter(None, there), key=lambda store: len(store.manifest.views))
        found: dict[View, Encoded] = {}
        for store in stores:
            identity = store.manifest.identity
            if any(identity.get(key) != wanted[key] for key in wanted if key not in ("views", "seed")):
                continue
            if data.source is not None and identity.get("decoded_by", "cpu") != self.decode:
                continue
            encoded = Encoded(store=store, seconds=0.0, reused=True, rate=None)
            for view in views:
                is_old = view.is_strong and identity.get("strong_version") != STRONG_VERSION
                is_other = view.is_random and store.manifest.seed != self.seed
                if str(view) in store.manifest.views and not is_old and not is_other:
                    found.setdefault(view, encoded)
        if data.source is not None:
            for encoded in found.values():
                check_quarantine(data.source, encoded.store)
        return found

    def encode(
        self, source: Source, *, views: tuple[View, ...], path: str, zero_shot: ZeroShotLabels | None = None
    ) -> Store:
        """Encode a source into the feature store at `path`, going on from what is there. Returns the store.

        Raises UserError when too many images are bad, or the folder is another store's.
        """
        writer = StoreWriter(path, self.identity(source, views))
        if zero_shot is not None:
            files.make_folder(zero_shot.folder)
        if self.decode == "gpu" and not self.plan().gpus_per_actor:
            raise UserError("--decode gpu needs a GPU, and there is none: leave it out, then CPUs decode")
        columns = ("id", "label", "texts", *map(str, views), THUMBNAIL)
        beside = zero_shot.write if zero_shot is not None else None
        commit_parts = partial(commit, writer=writer, columns=columns, beside=beside)

        def stages(todo: list[int], name: str) -> ray.data.Dataset:
            encoded = self._encoded(source, todo, views=views, name=name)
            # A commit asks for no share of a CPU: decoding would take it again and again, and commits would wait.
            return encoded.map_batches(commit_parts, batch_size=None, batch_format="pyarrow", num_cpus=0)

        limits = LIMITS if self.plan().gpus_per_actor else CPU_LIMITS
        return fill_store(
            source, writer=writer, what="encoding", stages=stages, limits=limits, tell=self.tell
        )

    def _encoded(
        self, source: Source, todo: list[int], *, views: tuple[View, ...], name: str
    ) -> ray.data.Dataset:
        """The units of `todo`, decoded and encoded on the cluster as it is now. Actors have names with this prefix."""
        info, plan = self.info, self.plan()
        group = units_at_once(
            len(todo),
            num_gpus=plan.num_actors if plan.gpus_per_actor else 0,
            num_cpus=ray.cluster_resources().get("CPU", 0),
        )
        decoded = decode_units(
            source,
            todo,
            views=pixel_views(views),
            preprocess=info.preprocess,
            seed=self.seed,
            num_consumers=plan.num_actors,
            leave_jpegs=self.decode == "gpu",
            sample=Sample.of(source) if WEAK in views else None,
            # A unit of which nobody knows the number of rows is a tar, and large by itself.
            at_once=group if source.num_rows is not None else 1,
        )
        # Ray Data insists on a number of rows where GPUs are asked for. It puts tables together to reach it.
        rows = group * batch_rows(self.batch_size, views, info.preprocess)
        at_once: dict[str, Any] = {}
        if plan.gpus_per_actor:
            # While a thread waits for the GPU, another prepares the next table.
            at_once = {"max_concurrent_calls_per_actor": 2, "enable_true_multi_threading": True}
        return decoded.map_batches(
            EncodeStage,
            batch_size=rows if plan.gpus_per_actor else None,
            batch_format="pyarrow",
            fn_constructor_args=(
                self.encoder,
                replace(info, head=None),
                views,
                self.batch_size,
                plan.num_threads,
                source.config if self.decode == "gpu" else None,
            ),
            compute=ray.data.ActorPoolStrategy(size=min(plan.num_actors, len(todo)), **at_once),
            num_cpus=plan.cpus_per_actor,
            num_gpus=plan.gpus_per_actor,
            max_restarts=0,
            max_task_retries=0,
            # A process with an environment of its own starts later.
            runtime_env={"env_vars": TORCH_ENV} if info.engine == "torch" else None,
            ray_remote_args_fn=lambda: {"name": f"{name}-{uuid.uuid4().hex}"},
        )


def _refuse_missing(data: Data, found: Container[View], views: tuple[View, ...]) -> None:
    """Refuse a given store that lacks one of the views: it cannot be encoded."""
    missing = next((view for view in views if view not in found), None)
    if isinstance(data.origin, Store) and missing is not None:
        raise UserError(
            f"{data.origin.path} is a feature store without the view {missing}: name the images, or encode "
            f"them with --views {','.join(map(str, views))}"
        )
