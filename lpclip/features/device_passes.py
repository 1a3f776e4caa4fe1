"""Forward passes over uint8 images, or over JPEGs, on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from lpclip.encoders.encoder import Encoder
from lpclip.features.device_decoding import DeviceDecoder, Undecoded
from lpclip.images.views import View


class DevicePasses:
    """Passes of `batch_size` images on the encoder's device.

    Pixels are sent once, however many views are made of them, and mirrored there. Nothing waits for the device but the
    features' way back at the end. So two threads that call this keep it busy: one prepares while the other waits.
    """

    def __init__(
        self, encoder: Encoder, *, batch_size: int, device: torch.device, decoder: DeviceDecoder | None = None
    ) -> None:
        """`decoder` is needed for JPEGs."""
        self.encoder, self.batch_size, self.device = encoder, batch_size, device
        self.decoder = decoder
        self.own = threading.local()

    @torch.inference_mode()
    def __call__(self, pixels: Mapping[View, np.ndarray | Undecoded], views: Sequence[View]) -> np.ndarray:
        """As `Passes`; what is not decoded is decoded here. Batches run on from view to view, all of one shape."""
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

    def _send(self, images: np.ndarray | Undecoded) -> Tensor:
        if isinstance(images, Undecoded):
            assert self.decoder is not None
            return self.decoder(images)
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
