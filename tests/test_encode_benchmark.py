"""The encoding benchmark's own arithmetic, and that each of its arms measures what it names."""

from __future__ import annotations

import io
from dataclasses import replace

import encoding
import numpy as np
import pytest
import torch
from encoding import Block, Outcome, Setting
from PIL import Image

from lpclip.config import EncoderConfig
from lpclip.encoders.load import load_encoder

pytestmark = pytest.mark.slow
LITE = EncoderConfig()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Nine small images in batches of four."""
    data = encoding.make_images("small", 9, folder=str(tmp_path_factory.mktemp("benchmark")))
    return Setting(data=data, num_images=9, encoder=LITE, views="weak,strong", batch_size=4)


def test_generated_images_are_the_same_every_time_and_differ_from_each_other():
    for kind, size, image_format in (("small", (32, 32), "PNG"), ("photo", (500, 375), "JPEG")):
        first = encoding.generate(kind, 0)
        assert first == encoding.generate(kind, 0) != encoding.generate(kind, 1)
        image = Image.open(io.BytesIO(first))
        assert (image.size, image.format) == (size, image_format)


def test_what_was_decoded_ahead_is_charged_to_the_steady_rate():
    def block(rows: int, start: float, end: float, cpu: float = 0.0) -> Block:
        return Block(rows=rows, start=start, end=end, cpu=cpu)

    blocks = {
        "decode": [block(10, 0, 1, 4), block(10, 1, 2, 4), block(10, 4, 8, 4)],
        "encode": [block(10, 5, 6), block(10, 6, 7), block(10, 8, 9)],
        "commit": [block(1, 6, 7), block(1, 7, 8), block(1, 9, 10)],
    }
    # From 5 to 10, and on two cores two blocks' 4 CPU seconds each and a quarter of the third's.
    assert encoding.steady_rate(blocks, cores=2) == pytest.approx(30 / (5 + (4 + 4 + 1) / 2))
    late = {**blocks, "decode": [replace(b, start=5.0, end=6.0) for b in blocks["decode"]]}
    assert encoding.steady_rate(late, cores=2) == pytest.approx(30 / 5)


def test_ratios_are_of_one_turn_and_the_bound_is_of_all_cores():
    turns = [
        {
            "decode": Outcome(rate=200.0, decode=0.005),
            "bare": Outcome(rate=speed, encode=0.015),
            "loop, 0 workers": Outcome(rate=speed / 4),
            "loop, 2 workers": Outcome(rate=speed / 2),
            "pipeline": Outcome(rate=speed * 0.6),
        }
        for speed in (100.0, 10.0, 50.0)
    ]
    assert encoding.ratio(turns, "pipeline", "bare") == pytest.approx(0.6)
    assert encoding.best_loop(turns) == "loop, 2 workers"
    found = encoding.bounds(turns, cores=2)
    assert found["bound"] == pytest.approx(100)
    assert found["share"] == pytest.approx(0.3)
    assert found["paired_bound"] == pytest.approx(37.5)
    assert found["paired_share"] == pytest.approx(0.8)


def test_growth_is_told_from_the_line_through_the_first_two():
    def run(images: int, seconds: float) -> list[Outcome]:
        return [Outcome(rate=1, from_start=images / seconds, peak_mb=100 + images)]

    rows = encoding.growth_rows({100: run(100, 11), 400: run(400, 14), 1600: run(1600, 39)})
    assert [row["from linear %"] for row in rows[:2]] == [None, None]
    assert rows[2]["from linear %"] == pytest.approx(39 / 26 - 1)
    assert rows[1]["peak to first %"] == pytest.approx(1.5)


def test_a_meter_sees_what_the_processes_below_another_use():
    with encoding.worker({}) as measure:
        found = measure(spend, Setting(data="", num_images=1, encoder=LITE, views="weak", batch_size=1))
    assert found.other is not None
    assert found.other >= 0.5
    assert found.peak_mb is not None
    assert found.peak_mb >= 200


def spend(setting: Setting) -> Outcome:
    """A second of one core and 200 MB, in a process below the worker."""
    import subprocess
    import sys

    code = (
        "import time; kept = b'x' * (200 << 20)\nwhile time.process_time() < 1: pass\n"
        "import sys; time.sleep(0.5 if kept else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    return Outcome(rate=1.0, from_start=1.0)


def test_a_loop_decodes_what_the_pipeline_decodes_and_times_it(setting: Setting):
    encoder = load_encoder(LITE)
    pixels, seconds = encoding.Loop(setting, encoder)[3]
    assert pixels.shape == (2, 160, 160, 3)
    assert pixels.dtype == torch.uint8
    assert not torch.equal(pixels[0], pixels[1])
    assert seconds > 0
    found = encoding.run_loop(setting, 0)
    assert found.from_start is not None
    assert min(found.rate, found.from_start, found.decode or 0, found.encode or 0) > 0


def test_features_of_one_precision_agree(setting: Setting):
    encoder = load_encoder(replace(LITE, precision="float32"))
    images = [encoding.generate("small", i) for i in range(5)]
    head = torch.nn.functional.normalize(torch.from_numpy(np.eye(3, 1280, dtype=np.float32)), dim=1)
    found = encoding.compare_precision(encoder, encoder, images, head=head, batch_size=2)
    assert found["images"] == 5
    assert found["min cosine"] == pytest.approx(1, abs=1e-5)
    assert found["equal predictions %"] == 1
