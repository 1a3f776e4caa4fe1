"""GPUs are fed: with logical CPUs and GPUs, slow decoding and tables of real size, enough tasks decode at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from safetensors.torch import save_file

WIDTH = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "patch_size": 112, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}

# One good image a unit; the others are quarantined, and their pixels, all zeros, travel all the same.
CODE = """
import io, json, sys, time
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import ray
from PIL import Image
from lpclip.config import EncoderConfig, SourceConfig
from lpclip.features.describe import describe_encoder
from lpclip.features.find_or_encode import Encoding
from lpclip.images.source import UNIT_ROWS, Reader, Row, Source
from lpclip.images.views import parse_views
from lpclip.jobs.process import start_ray

folder, model, num_units = sys.argv[1], sys.argv[2], int(sys.argv[3])

@dataclass(frozen=True, kw_only=True)
class SlowReader(Reader):
    folder: str

    def rows(self, unit):
        begin = time.time()
        time.sleep(2)
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
        yield Row(f"{unit}/good", buffer.getvalue())
        for number in range(1, UNIT_ROWS):
            yield Row(f"{unit}/{number}", None, None, "not here")
        Path(self.folder, f"{unit}.json").write_text(json.dumps([begin, time.time()]))

source = Source(
    name="slow", kind="folder", root="", reader=SlowReader(folder=folder), num_rows=num_units * UNIT_ROWS,
    units=tuple(map(str, range(num_units))), labels_from=None, label_names=None, identity={},
    config=SourceConfig(max_bad_fraction=0.999),
)
start_ray()
config = EncoderConfig(encoder=model, pretrained=model.replace("json", "safetensors"), precision="float32")
info = describe_encoder(config)
encoding = Encoding(info=info, encoder=config, folder=folder, batch_size=8)
encoding.encode(source, views=parse_views("weak,mirror,strong"), path=f"{folder}/store")
"""


def most_at_once(spans: list[tuple[float, float]]) -> int:
    """The largest number of spans of time that share an instant."""
    events = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


@pytest.mark.slow
@pytest.mark.parametrize(("cpus", "gpus", "units", "expected"), [(16, 1, 32, 12)])
def test_decoding_runs_on_all_cpus_that_encoding_does_not_need(
    tmp_path: Path, cpus: int, gpus: int, units: int, expected: int
) -> None:
    model = tmp_path / "flat.json"
    model.write_text(json.dumps(WIDTH))
    open_clip.add_model_config(model)
    weights = {
        name: tensor.contiguous() for name, tensor in open_clip.create_model("flat").state_dict().items()
    }
    save_file(weights, tmp_path / "flat.safetensors")
    resources = json.dumps({"CPU": cpus, "GPU": gpus})
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), str(model), str(units)],
        env={**os.environ, "RAY_OVERRIDE_RESOURCES": resources},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spans = [json.loads((tmp_path / f"{unit}.json").read_text()) for unit in range(units)]
    assert most_at_once(spans) >= expected
