"""Tables of pixels to tables of features: the actor that holds the encoder, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from lpclip.config import Decode, Device, EncoderConfig, SourceConfig, UserError, counted
from lpclip.encoders.head import EncoderInfo, refuse_another
from lpclip.encoders.on_cpu import load_tower
from lpclip.encoders.passes import CpuPasses
from lpclip.features.decode_stage import JPEG_COLUMNS, pixel_array, rows_at_once
from lpclip.features.describe import uses_gpus
from lpclip.features.store import has_unit_norm
from lpclip.images.pixels import DECODING_VERSION, REDUCING_GAP, Preprocess, preprocess_identity
from lpclip.images.source import Source
from lpclip.images.views import STRONG_VERSION, WEAK, View, pixel_views

# The environment of processes in which torch encodes. glibc gives the large activations of every forward pass back to
# the kernel and takes them again, page by page: on CPUs that can cost more than the arithmetic. One heap that only
# grows costs a peak's worth of memory.
TORCH_ENV = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

NO_FEATURE = (
    "the encoder gives it no feature of unit norm, but a NaN or an infinite one: try --precision float32"
)


def store_identity(
    source: Source | None, info: EncoderInfo, views: tuple[View, ...], *, seed: int, decode: Decode = "cpu"
) -> dict[str, Any]:
    """Everything that changes a feature; without a source, everything that features of any source must have in common.

    The seed counts only where a view draws random numbers.
    """
    identity: dict[str, Any] = {
        "encoder": info.identity,
        "preprocessing": preprocess_identity(info.preprocess),
        "reducing_gap": REDUCING_GAP,
        "decoding": DECODING_VERSION,
        "views": [str(view) for view in views],
        "seed": seed if any(view.is_random for view in views) else None,
    }
    if info.engine != "torch":
        identity["engine"] = info.engine
    if decode != "cpu":
        identity["decoded_by"] = decode
    if any(view.is_strong for view in views):
        identity["strong_version"] = STRONG_VERSION
    if source is not None:
        identity["source"] = {**source.identity, "label_names": list(source.label_names or ()) or None}
    return identity


class EncodeStage:
    """The actor that holds the encoder: pixel columns to feature columns."""

    def __init__(
        self,
        config: EncoderConfig,
        info: EncoderInfo,
        views: tuple[View, ...],
        batch_size: int,
        num_threads: int | None,
        jpegs: SourceConfig | None = None,
    ) -> None:
        """`num_threads` on a CPU, or None on a GPU. `jpegs` are the limits where JPEGs are decoded here."""
        self.info, self.views = info, views
        self.rows = batch_rows(batch_size, views, info.preprocess) if num_threads is None else None
        self.refusal: UserError | None = None
        try:
            self.passes = self._passes(config, batch_size, num_threads, jpegs)
        except UserError as error:
            # Ray would start a failing actor again and again. It fails with its first table instead.
            self.refusal = error

    def _passes(
        self, config: EncoderConfig, batch_size: int, num_threads: int | None, jpegs: SourceConfig | None
    ) -> Any:
        if num_threads is not None:
            tower = load_tower(config, self.info, num_threads=num_threads)
            return CpuPasses(tower, dim=self.info.identity["dim"])

        import torch

        from lpclip.encoders.load import full_identity, load_again
        from lpclip.features.device_passes import DevicePasses

        # Ray may be told of GPUs that a machine does not have, to try out how work is placed.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = load_again(config, self.info.identity, device=device)
        refuse_another(full_identity(encoder), self.info.identity)
        decoder = None
        if jpegs is not None:
            from lpclip.features.device_decoding import DeviceDecoder

            decoder = DeviceDecoder(self.info.preprocess, limits=jpegs, device=device)
        return DevicePasses(encoder, batch_size=batch_size, device=device, decoder=decoder)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Features in place of pixels. On a GPU, some rows of the table at a time."""
        if self.refusal is not None:
            raise self.refusal
        step = self.rows or max(1, len(table))
        pieces = [table.slice(start, step) for start in range(0, len(table), step)]
        return pa.concat_tables([self._encode(piece) for piece in pieces or [table]])

    def _encode(self, table: pa.Table) -> pa.Table:
        is_good = table["error"].is_null().to_numpy()
        # A filter copies all pixels.
        good = table if is_good.all() else table.filter(table["error"].is_null())
        kept = table.select(
            [n for n in table.column_names if not n.startswith("pixels:") and n not in JPEG_COLUMNS]
        )
        pixels, broken = self._pixels(good)
        features = self.passes(pixels, self.views)
        sound = has_unit_norm(features).reshape(len(self.views), len(good)).all(axis=0)
        places = np.flatnonzero(is_good)
        bad = {places[row]: ("encode", NO_FEATURE) for row in np.flatnonzero(~sound)}
        bad |= {places[row]: ("decode", reason) for row, reason in broken.items()}
        if bad:
            kept = _refuse(kept, bad)
        for place, view in enumerate(self.views):
            found = np.zeros((len(table), self.info.identity["dim"]), np.float16)
            found[is_good] = features[place * len(good) : (place + 1) * len(good)]
            flat = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), self.info.identity["dim"])
            kept = kept.append_column(str(view), flat)
        return kept

    def _pixels(self, table: pa.Table) -> tuple[dict[View, Any], dict[int, str]]:
        """Pixels of each pixel view, and reasons for broken images, by row: those are known after the passes."""
        size = self.info.preprocess.size
        if "jpeg" not in table.column_names:
            return {v: pixel_array(table[f"pixels:{v}"], size=size) for v in pixel_views(self.views)}, {}

        from lpclip.features.device_decoding import Undecoded

        images = Undecoded.of(table, size=size)
        return {WEAK: images}, images.errors


def batch_rows(batch_size: int, views: tuple[View, ...], preprocess: Preprocess) -> int:
    """Images that an encoder on a GPU is given at a time."""
    return min(batch_size, rows_at_once(pixel_views(views), preprocess))


def _refuse(table: pa.Table, bad: dict[int, tuple[str, str]]) -> pa.Table:
    """Quarantine rows, by stage and reason: of a feature, one NaN would spoil every sum over the images."""
    for place, name in enumerate(("stage", "error")):
        values = table[name].to_pylist()
        for row, texts in bad.items():
            values[row] = texts[place]
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
    return table


@dataclass(frozen=True, kw_only=True)
class ActorPlan:
    """The pipeline's share of the machine."""

    num_actors: int
    cpus_per_actor: float | None
    """None leaves it to Ray."""
    gpus_per_actor: float
    num_threads: int | None
    """Threads of an actor on a CPU; None on a GPU."""

    def __str__(self) -> str:
        place = (
            "1 GPU each" if self.gpus_per_actor else f"{counted(self.num_threads or 0, 'CPU thread')} each"
        )
        return f"{counted(self.num_actors, 'encoder actor')}, {place}"


def plan_actors(num_actors: int | None, device: Device = "auto") -> ActorPlan:
    """One actor for each GPU, else one for every eight CPUs of a node. Half of a node's CPUs stay for decoding.

    If actors held every CPU, no CPU would be left to decode, and the pipeline would wait forever. So all of them fit
    into half of the smallest node, even if the other nodes are lost, and hold nothing of a node with a single CPU.
    """
    if uses_gpus(device):
        found = ray.cluster_resources()
        # An autoscaler may start the first GPU later.
        count = num_actors or max(1, int(found.get("GPU", 0)))
        # Ray keeps a CPU for an actor with a GPU, so that it does not wait behind decoders. Few CPUs are better shared.
        cpus = None if found.get("CPU", 0) >= 4 * count else 0
        return ActorPlan(num_actors=count, cpus_per_actor=cpus, gpus_per_actor=1, num_threads=None)
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    nodes = [cpus for cpus in nodes if cpus >= 1]
    count = num_actors or sum(max(1, int(cpus) // 8) for cpus in nodes)
    share = min(nodes) / max(1, -(-count // len(nodes)))
    part = 0.45 * min(nodes) / count if min(nodes) >= 2 else 0.0
    # Never a whole CPU: stages with the same request would be fused into one process.
    part = 0.9 if part == 1 else part
    return ActorPlan(num_actors=count, cpus_per_actor=part, gpus_per_actor=0, num_threads=max(1, int(share)))
