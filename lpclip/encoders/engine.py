"""OpenVINO computes image features on CPUs, faster than torch does. A network is converted from torch once.

This module does not import torch: a process that encodes with OpenVINO stays small and starts fast.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

# Images in one forward pass on a CPU. Kernels, and so roundings, may differ with the shape of a batch and with the
# number of threads that share it. So every pass has this shape and one thread, and threads share the passes instead:
# features are the same bits for any --batch-size and any number of CPUs, and lite is nearly twice as fast.
CPU_BATCH = 8


class Tower(Protocol):
    """An image tower on a CPU that runs some passes of one thread each at a time."""

    pass_size: int
    """Images in a pass: CPU_BATCH, unless the tower was loaded for passes of another size."""

    def __call__(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Features of each batch, in order: uint8 (pass_size, S, S, 3) to float32 (pass_size, d) of unit norm."""
        ...


@cache
def computes_bfloat16() -> bool:
    """Say whether this machine's CPU multiplies in bfloat16 (AVX512-BF16 or AMX). False where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return bool({"avx512_bf16", "amx_bf16"}.intersection(flags))


def runs(precision: str) -> bool:
    """Say whether OpenVINO is installed and computes in this precision here."""
    is_fast = precision == "float32" or (precision == "bfloat16" and computes_bfloat16())
    return is_fast and importlib.util.find_spec("openvino") is not None


class OpenVinoTower:
    """A `Tower` that OpenVINO runs, with `num_threads` passes of one thread each at a time."""

    def __init__(self, path: Path, *, precision: str, num_threads: int, pass_size: int = CPU_BATCH) -> None:
        """`path` is a network that `convert` wrote, `precision` float32 or bfloat16.

        A network that is bound to passes of CPU_BATCH keeps them.
        """
        import openvino

        core = openvino.Core()
        options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "NUM_STREAMS": num_threads,
            "INFERENCE_NUM_THREADS": num_threads,
            # Pinned threads would wait for a CPU on which an image is being decoded.
            "ENABLE_CPU_PINNING": False,
        }
        model = core.read_model(path)
        if pass_size != CPU_BATCH:
            try:
                model.reshape([pass_size, *list(model.inputs[0].shape)[1:]])
                is_free = model.outputs[0].shape[0] == pass_size
            except RuntimeError:  # the trace has the number of images in it
                is_free = False
            if not is_free:
                model, pass_size = core.read_model(path), CPU_BATCH
        self.pass_size = pass_size
        network = core.compile_model(model, "CPU", options)
        self._requests = [network.create_infer_request() for _ in range(num_threads)]

    def __call__(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """As `Tower`. The threads are OpenVINO's own: this one only hands out batches and collects features."""
        idle, busy = list(self._requests), deque[Any]()
        for batch in batches:
            if not idle:
                yield self._collect(idle, busy)
            request = idle.pop()
            request.start_async([batch])
            busy.append(request)
        while busy:
            yield self._collect(idle, busy)

    @staticmethod
    def _collect(idle: list[Any], busy: deque[Any]) -> np.ndarray:
        request = busy.popleft()
        request.wait()
        idle.append(request)
        found: np.ndarray = request.get_output_tensor().data.copy()
        return found


def convert(network: torch.nn.Module, path: Path, *, size: int) -> None:
    """Write a network, which takes uint8 (CPU_BATCH, size, size, 3) and is on the CPU in float32, for OpenVINO.

    Two files are written: `path`, which ends in .xml, and the weights beside it. Raises an exception of almost any kind
    when OpenVINO lacks an operation of the network.
    """
    import openvino
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.zeros(CPU_BATCH, size, size, 3, dtype=torch.uint8)
    # The fused attention of torch's own is one operation that OpenVINO does not know.
    had_fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # torch.export, which torch recommends, takes five times as long.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(network, example, check_trace=False)
            # openvino.convert_model does the same, and reports each use to its makers.
            frontend = FrontEndManager().load_by_framework("pytorch")
            # OpenVINO reads from it later, and does not keep it alive.
            decoder = TorchScriptPythonDecoder(traced)
            model = frontend.convert(frontend.load(decoder))
    finally:
        torch.backends.mha.set_fastpath_enabled(had_fastpath)
    model.reshape(list(example.shape))
    openvino.save_model(model, path, compress_to_fp16=False)
