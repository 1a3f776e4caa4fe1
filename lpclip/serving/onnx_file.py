"""A probe with its encoder's image tower as one ONNX graph, from pixels to probabilities.

The graph does what `lpclip.serving.classifier.Classifier` does after the pixels are there, in float32. ONNX and its
runtime are not installed with lpclip: the extra `onnx` has them.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import lpclip
from lpclip import files
from lpclip.config import UserError
from lpclip.encoders.again import config_again, noted_again
from lpclip.encoders.encoder import Encoder
from lpclip.encoders.load import full_identity
from lpclip.encoders.zero_shot import load_noting
from lpclip.images.pixels import REDUCING_GAP
from lpclip.images.views import base_views
from lpclip.method.probe import Probe

if TYPE_CHECKING:
    import onnx

OPSET = 17
"""Version of the operations: onnxruntime has run it since 1.12 (2022)."""

BATCHES = (1, 3)
"""Numbers of images in the batches that a written graph is compared in."""

MAX_DIFFERENCE = {"float32": 1e-3, "float16": 2e-2}
"""Largest difference of a probability from the original's, by how weights are stored, that is taken for rounding.

Features are rounded to float16, so the last bit of a float32 can decide a step of 1 in 2,048 of a feature.
"""

FEW = 1024
"""Tensors of fewer numbers stay as they are in a file with weights in float16."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written, and the largest difference of its probabilities from the original's."""

    path: str
    num_bytes: int
    difference: float


class ProbeNetwork(nn.Module):
    """uint8 (N, S, S, 3) to probabilities (N, K) and unit-norm features (N, d), both float32, as `Classifier` does."""

    def __init__(self, network: nn.Module, probe: Probe) -> None:
        super().__init__()
        self.network, self.temperature = network, probe.temperature
        self.mirrored = [view.mirrored for view in base_views(probe.encoder["views"])]
        self.register_buffer("weight", probe.weight.T.contiguous())
        self.register_buffer("bias", probe.bias)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([pixels.flip(2) if mirrored else pixels for mirrored in self.mirrored])
        # Stores hold float16, so a probe was trained on features that were rounded to it.
        features = self.network(rows).half().float()
        if len(self.mirrored) > 1:
            mean = features.reshape(len(self.mirrored), -1, features.shape[1]).sum(0)
            features = (mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-6)).half().float()
        logits = features @ self.weight + self.bias
        return torch.softmax(logits / self.temperature, dim=1), features


def write_onnx(
    probe: Probe, out: str, *, digest: str, pretrained: str | None = None, float16: bool = False
) -> tuple[list[Exported], list[str]]:
    """Write the graph to `out`, which ends in .onnx, and with `float16` a second file of half the size beside it.

    `digest` is the probe's, `pretrained` is where its encoder's checkpoint lies now, if it has moved. Returns what was
    written, and notes. Raises UserError when onnx or onnxruntime is not installed, the encoder cannot be had, does not
    fit into a file, or cannot be converted, and when the graph has other probabilities than the original.
    """
    _refuse_missing()
    encoder, notes = load_float32(probe, pretrained=pretrained)
    network = ProbeNetwork(encoder.image_network(), probe)
    graph = _traced(network, encoder)
    about = {
        "class_names": list(probe.class_names),
        "preprocess": preprocess_steps(encoder),
        "encoder": full_identity(encoder),
        "views": [str(view) for view in base_views(probe.encoder["views"])],
        "probe": digest,
        "lpclip": lpclip.__version__,
    }
    made = {"float32": out}
    if float16:
        made["float16"] = float16_name(out)
    written = []
    for kind, path in made.items():
        if kind == "float16":
            _store_as_float16(graph)
        _name(graph, {**about, "weights": kind})
        data = graph.SerializeToString()
        difference = _difference(data, network, size=encoder.preprocess.size)
        if not difference <= MAX_DIFFERENCE[kind]:
            raise UserError(
                f"{path} is not written: onnxruntime gives probabilities that differ by {difference:.2g} from the "
                "original's; `lpclip predict` runs this probe"
            )
        files.write_bytes(path, data)
        written.append(Exported(path=path, num_bytes=len(data), difference=difference))
    return written, notes


def load_float32(probe: Probe, *, pretrained: str | None) -> tuple[Encoder, list[str]]:
    """A probe's encoder on the CPU in float32, and notes on it. Raises UserError when it has changed."""
    config = config_again(probe.encoder, pretrained=pretrained, on_gpu=False)
    encoder, info = load_noting(replace(config, precision="float32"), device="cpu")
    noted_again(probe.encoder, info)
    trained, notes = probe.encoder["identity"]["precision"], [*info.notes]
    if trained != "float32":
        notes.append(
            f"the probe was trained on features in {trained}, and the graph computes float32: a few labels may differ"
        )
    return encoder, notes


def preprocess_steps(encoder: Encoder) -> dict[str, Any]:
    """What happens to an image before the graph. The mean and the deviation are in it."""
    preprocess = encoder.preprocess
    kept = {key: value for key, value in asdict(preprocess).items() if key not in ("mean", "std")}
    return {**kept, "draft": REDUCING_GAP * preprocess.size, "mean_and_std": "in the graph"}


def _refuse_missing() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"writing ONNX needs onnx and onnxruntime ({error}): pip install onnx onnxruntime"
        ) from error


def _traced(network: ProbeNetwork, encoder: Encoder) -> onnx.ModelProto:
    import onnx

    size = encoder.preprocess.size
    file: Any = io.BytesIO()  # the exporter's types know paths alone
    # More than one image, or the exporter would take the number for a constant.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    # torch's own fused attention is no operation of ONNX.
    had_fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    names = ["pixels", "probabilities", "features"]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # The exporter that torch recommends needs another package.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network.eval(),
                (example,),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=names[:1],
                output_names=names[1:],
                dynamic_axes={name: {0: "images"} for name in names},
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        line = (str(error).strip().splitlines() or [""])[0][:200]
        if "2GiB" in line:
            line = (
                "its image tower in float32 does not fit into 2 GiB, which is all that a file of ONNX holds"
            )
        raise UserError(f"{encoder.name} cannot be written as ONNX: {line}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(had_fastpath)
    return onnx.load_from_string(file.getvalue())


def float16_name(out: str) -> str:
    """Where the file with weights in float16 lies: model.float16.onnx beside model.onnx."""
    base, options = files.split_options(out)
    return f"{base[: -len('.onnx')]}.float16.onnx{options}"


def _store_as_float16(graph: onnx.ModelProto) -> None:
    """Store large weights as float16, each with a node that makes float32 of it again, so that any runtime takes them.

    A weight that float16 does not hold (above 65,504) stays as it is.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims, dtype=int) < FEW:
            continue
        with np.errstate(over="ignore"):
            small = numpy_helper.to_array(tensor).astype(np.float16)
        if np.isfinite(small).all():
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(small, f"{name}.float16"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _name(graph: onnx.ModelProto, about: dict[str, Any]) -> None:
    """Set the metadata: texts as they are, everything else as JSON."""
    from onnx import checker, helper

    graph.producer_name, graph.producer_version = "lpclip", lpclip.__version__
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    helper.set_model_props(graph, texts)
    checker.check_model(graph)


def _difference(data: bytes, network: ProbeNetwork, *, size: int) -> float:
    """The largest difference of a probability that onnxruntime gives from the original's, for random pixels."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in BATCHES:
        shape = (count, size, size, 3)
        pixels = np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)
        found, _ = session.run(["probabilities", "features"], {"pixels": pixels})
        with torch.inference_mode():
            wanted, _ = network(torch.from_numpy(pixels))
        worst = max(worst, float(np.abs(found - wanted.numpy()).max()))
    return worst
