"""Forward passes over uint8 images, arranged for the device that the encoder is on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lpclip.encoders.encoder import Encoder
from lpclip.images.views import View

# Images in one forward pass on a CPU. Kernels, and so roundings, may differ with the shape of a batch and with the
# number of threads that share it. So every pass has this shape and one thread, and threads share the passes instead:
# features are the same bits for any --batch-size and any number of CPUs, and lite is nearly twice as fast.
CPU_BATCH = 8


class Passes(Protocol):
    """A way to run an encoder over many images."""

    def __call__(self, pixels: Mapping[View, np.ndarray], views: Sequence[View]) -> np.ndarray:
        """Features (len(views) x N, d) float16, one view after the other.

        `pixels` has uint8 (N, S, S, 3) for each view's `pixels`, which are flipped first where the view is mirrored.
        """
        ...


class CpuPasses:
    """Small passes of one thread each, shared by several threads."""

    def __init__(self, encoder: Encoder, *, num_threads: int) -> None:
        torch.set_num_threads(1)
        self.encoder = encoder
        self.threads = ThreadPoolExecutor(num_threads)

    def __call__(self, pixels: Mapping[View, np.ndarray], views: Sequence[View]) -> np.ndarray:
        """As `Passes`. Batches run on from view to view."""
        count, size = len(pixels[views[0].pixels]), self.encoder.preprocess.size
        total = len(views) * count
        out = np.empty((total, self.encoder.dim), np.float16)

        def encode_batch(start: int) -> None:
            batch = np.zeros((CPU_BATCH, size, size, 3), np.uint8)
            stop = min(start + CPU_BATCH, total)
            place = start
            while place < stop:
                number, row = divmod(place, count)
                view = views[number]
                run = pixels[view.pixels][row : row + stop - place]
                batch[place - start :][: len(run)] = run[:, :, ::-1] if view.mirrored else run
                place += len(run)
            found = self.encoder.encode_image(torch.from_numpy(batch))
            out[start:stop] = found[: stop - start].to(torch.float16).numpy()

        for _ in self.threads.map(encode_batch, range(0, total, CPU_BATCH)):
            pass
        return out


class DevicePasses:
    """Passes of `batch_size` images on the encoder's device.

    Pixels are sent once, however many views are made of them, and mirrored there. Nothing waits for the device but the
    features' way back at the end. So two threads that call this keep it busy: one prepares while the other waits.
    """

    def __init__(self, encoder: Encoder, *, batch_size: int, device: torch.device) -> None:
        self.encoder, self.batch_size, self.device = encoder, batch_size, device
        self.own = threading.local()

    @torch.inference_mode()
    def __call__(self, pixels: Mapping[View, np.ndarray], views: Sequence[View]) -> np.ndarray:
        """As `Passes`. Batches run on from view to view, and all have one shape."""
        if not len(pixels[views[0].pixels]):
            return np.empty((0, self.encoder.dim), np.float16)
        with self._stream():
            sent = {view: self._send(images) for view, images in pixels.items()}
            rows = torch.cat([sent[v.pixels].flip(2) if v.mirrored else sent[v.pixels] for v in views])
            total = len(rows)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, -total % self.batch_size))
            found = torch.cat([self.encoder.encode_image(batch) for batch in rows.split(self.batch_size)])
            # This is the only wait.
            return found[:total].to(torch.float16).cpu().numpy()

    def _send(self, images: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(images)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _stream(self) -> AbstractContextManager[object]:
        """A stream of the thread's own, so that one thread's copies run beside another's passes."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self.own, "stream"):
            self.own.stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self.own.stream)
