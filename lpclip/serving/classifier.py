"""A probe with its encoder in one process: from encoded images to labels, without Ray and without a feature store."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lpclip.config import Device, EncoderConfig, Engine, SourceConfig, UserError
from lpclip.encoders.again import config_again, noted_again
from lpclip.encoders.engine import CPU_BATCH
from lpclip.encoders.head import EncoderInfo
from lpclip.encoders.hub import local_probe
from lpclip.encoders.on_cpu import describe_on_cpu, load_tower
from lpclip.encoders.passes import CpuPasses, mean_view
from lpclip.images.fetch import reason
from lpclip.images.pixels import decode_image
from lpclip.images.render import weak_view
from lpclip.images.views import WEAK, View, base_views
from lpclip.method.probe import Probe, load_probe

IMAGES_AT_ONCE = 64
"""Images whose pixels are in memory at a time."""

Encode = Callable[[Mapping[View, np.ndarray], Sequence[View]], np.ndarray]
"""As `lpclip.encoders.passes.Passes`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a classifier says of an image: labels, or why there are none."""

    labels: tuple[str, ...] = ()
    """The most probable ones, the most probable first."""
    probabilities: tuple[float, ...] = ()
    error: str | None = None
    """Why the image has no labels: one line."""


class Classifier:
    """A probe with its encoder. It gives the labels and, to float rounding, the probabilities of `lpclip predict`.

    Threads may share one: while one decodes, another encodes.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        info: EncoderInfo,
        encode: Encode,
        limits: SourceConfig,
        notes: Sequence[str] = (),
    ) -> None:
        self.probe, self.info, self.limits = probe, info, limits
        self.notes = tuple(notes)
        """What is to be known of the encoder on this machine."""
        self._encode, self._views = encode, base_views(probe.encoder["views"])
        self._decoding, self._encoding = threading.Lock(), threading.Lock()

    @classmethod
    def load(
        cls,
        folder: str,
        *,
        pretrained: str | None = None,
        engine: Engine = "auto",
        device: Device = "auto",
        num_threads: int | None = None,
        pass_size: int = CPU_BATCH,
        limits: SourceConfig | None = None,
    ) -> Classifier:
        """The probe in `folder`, with its encoder on this machine's GPU or on `num_threads` CPUs, by default all.

        `folder` may also be hf-hub:OWNER/NAME. `pretrained` is where the encoder's checkpoint lies now, if it has
        moved; a configuration of its own lies beside it. `limits` are those on sizes. `pass_size` is the number of
        images in a pass on a CPU, to which the last images are filled up: with 1, few images are answered soonest.
        Raises UserError when the probe or its encoder cannot be had.
        """
        probe = load_probe(local_probe(folder))
        on_gpu = takes_gpu(device)
        config = config_again(probe.encoder, pretrained=pretrained, engine=engine, on_gpu=on_gpu)
        info, encode = (
            _on_gpu if on_gpu else partial(_on_cpus, num_threads=num_threads, pass_size=pass_size)
        )(config)
        notes = [*info.notes, *noted_again(probe.encoder, info)]
        return cls(probe, info=info, encode=encode, limits=limits or SourceConfig(), notes=notes)

    def __call__(self, images: Sequence[bytes | Exception], *, top_k: int = 5) -> list[Answer]:
        """An answer for each encoded image, in order. In place of an image, the error that kept it from being read."""
        found: list[Answer] = []
        for start in range(0, len(images), IMAGES_AT_ONCE):
            found += self._answer(images[start : start + IMAGES_AT_ONCE], top_k=top_k)
        return found

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, S, S, 3), preprocessed as the encoder takes them, to unit-norm features (N, d) float16."""
        with self._encoding:
            flat = self._encode({WEAK: pixels}, self._views)
        return mean_view(np.split(flat, len(self._views)))

    def _answer(self, images: Sequence[bytes | Exception], *, top_k: int) -> list[Answer]:
        with self._decoding:  # Pillow's limits are the process's
            decoded = [self._pixels(image) for image in images]
        good = [pixels for pixels in decoded if isinstance(pixels, np.ndarray)]
        if good:
            features = self.features(np.stack(good))
            rows = iter(zip(*self.probe.top(features, top_k), np.isfinite(features).all(axis=1), strict=True))
        found = []
        for pixels in decoded:
            if isinstance(pixels, Exception):
                found.append(Answer(error=reason(pixels)))
                continue
            places, probabilities, is_sound = next(rows)
            if not is_sound:
                found.append(Answer(error="the encoder gives it a NaN or an infinite feature"))
                continue
            labels = tuple(self.probe.class_names[place] for place in places)
            found.append(Answer(labels=labels, probabilities=tuple(map(float, probabilities))))
        return found

    def _pixels(self, image: bytes | Exception) -> np.ndarray | Exception:
        if isinstance(image, Exception):
            return image
        limits, preprocess = self.limits, self.info.preprocess
        try:
            decoded = decode_image(
                image, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes, size=preprocess.size
            )
        except UserError as error:
            return error
        return weak_view(decoded, preprocess)


def takes_gpu(device: Device) -> bool:
    """Say whether a GPU of this machine encodes. Raises UserError when one is asked for and torch sees none."""
    if device == "cpu":
        return False
    import torch

    if not torch.cuda.is_available() and device == "gpu":
        raise UserError("--device gpu: torch sees no GPU on this machine")
    return torch.cuda.is_available()


def _on_cpus(config: EncoderConfig, *, num_threads: int | None, pass_size: int) -> tuple[EncoderInfo, Encode]:
    info = describe_on_cpu(config, (), ())
    threads = num_threads or len(os.sched_getaffinity(0))
    tower = load_tower(config, info, num_threads=threads, pass_size=pass_size)
    return info, CpuPasses(tower, dim=info.identity["dim"])


def _on_gpu(config: EncoderConfig, *, device: str = "cuda") -> tuple[EncoderInfo, Encode]:
    import torch

    from lpclip.encoders.zero_shot import load_noting

    encoder, info = load_noting(config, device=device)

    def encode(pixels: Mapping[View, np.ndarray], views: Sequence[View]) -> np.ndarray:
        sent = torch.from_numpy(pixels[WEAK]).to(device)
        rows = torch.cat([sent.flip(2) if view.mirrored else sent for view in views])
        return encoder.encode_image(rows).to(torch.float16).cpu().numpy()

    return info, encode
