"""What a table of lpclip's pipeline costs Ray Data's scheduling thread, and how many tasks decode at a time.

    python benchmarks/scheduling.py                                       # units of a task: 1, then 28
    python benchmarks/scheduling.py --gpus 16 --units 28 --parts 4000
    python benchmarks/scheduling.py --gpus 8 --units 1 --parts 120 --sleep 300 --processes 120    # 17 GB of memory

The stages are lpclip's own: decode tasks, encoder actors, commits. CPUs and GPUs are numbers that Ray is told. A unit
has few rows of small images, and the encoder answers with the same feature for all: the thread sees neither rows nor
pixels. A block holds as many units as one does of 224 pixels in one view.

"thread" is the processor time of the thread that plans all tasks, by the kernel's clock, between two fifths and nine
tenths of the parts. Its loop turns up to ten times a second, and a turn costs something however many tasks it serves.
So a unit costs less the faster units come: give --processes 1 and more to see how much. "driver" has all threads of the
process, which share Python's lock.

With --sleep each unit takes so long to read, and "decoding" is the largest number of units that were read at a time.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import tyro
from PIL import Image

from lpclip.config import EncoderConfig, SourceConfig
from lpclip.encoders.head import EncoderInfo
from lpclip.features import find_or_encode, pipeline
from lpclip.features.find_or_encode import Encoding
from lpclip.images.pixels import Preprocess
from lpclip.images.source import ROWS, Reader, Row, Source
from lpclip.images.views import parse_views
from lpclip.jobs.cli import OPTIONS
from lpclip.jobs.process import start_ray
from lpclip.report.tables import format_table

UNIT_ROWS, SIZE, DIM = 16, 64, 1024
UNIT_BYTES = UNIT_ROWS * SIZE * SIZE * 3
"""More than what travels without Ray's shared memory."""
UNITS_A_BLOCK = 3.48
"""Units of 256 images of 224 pixels in 128 MiB."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the thread that plans all tasks."""

    gpus: int = 4
    """Logical GPUs, each with an encoder."""
    cpus: int = 16
    """Logical CPUs for each GPU."""
    units: tuple[int, ...] = (1, 28)
    """Units of a task, one after the other."""
    parts: int = 2000
    """Units in all."""
    processes: int = 3
    """Decode tasks that run at a time. The others wait in Ray, and the thread cannot tell."""
    sleep: float = 0.0
    """Seconds that a unit takes to read."""


@dataclass(frozen=True, kw_only=True)
class SameReader(Reader):
    """Units of the same small image."""

    image: bytes
    sleep: float
    spans: str

    def rows(self, unit: str) -> Iterator[Row]:
        """The unit's images."""
        return iter([Row(f"{unit}/{row}", self.image) for row in range(UNIT_ROWS)])

    def tables(self, unit: str) -> Iterator[pa.Table]:
        """The unit's table, after a while."""
        begin = time.time()
        time.sleep(self.sleep)
        if self.sleep:
            Path(self.spans, unit).write_text(json.dumps([begin, time.time()]))
        columns = zip(*(row[:4] for row in self.rows(unit)), strict=True)
        yield pa.table([pa.array(c, f.type) for c, f in zip(columns, ROWS, strict=True)], schema=ROWS)


class EncodeStage:
    """An encoder without work: a feature of unit norm for each image."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, table: pa.Table) -> pa.Table:
        """Pixels to features."""
        feature = np.zeros((len(table), DIM), np.float16)
        feature[:, 0] = 1
        kept = table.select([name for name in table.column_names if not name.startswith("pixels:")])
        return kept.append_column("weak", pa.FixedSizeListArray.from_arrays(feature.reshape(-1), DIM))


class Clock(threading.Thread):
    """Looks at the parts that are there, and at the processor time."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.looks: list[tuple[float, ...]] = []

    def run(self) -> None:
        """Look until the store is removed."""
        while self.store.parent.exists():
            self.look()
            time.sleep(0.5)

    def look(self) -> None:
        """Note parts, and seconds: of the wall, of the scheduling thread, of the process."""
        threads = [t for t in threading.enumerate() if t.name.startswith("StreamingExecutor")]
        if not threads:
            return
        try:
            text = Path(f"/proc/self/task/{threads[-1].native_id}/schedstat").read_text()
            parts = sum(name.startswith("part-") for name in os.listdir(self.store))
        except OSError:  # the pipeline has just ended
            return
        seconds = (time.monotonic(), int(text.split()[0]) / 1e9, time.process_time())
        self.looks.append((parts, *seconds))


def pipeline_of(*, units: int) -> None:
    """Put the encoder without work, blocks of few bytes and this many units a task into lpclip's pipeline."""
    map_batches: Any = ray.data.Dataset.map_batches

    def with_slots(dataset: Any, function: Any, **how: Any) -> Any:
        slots = {"resources": {"slot": 1}} if how["num_cpus"] == 1 else {}
        return map_batches(dataset, function, **{**how, **slots})

    setattr(ray.data.Dataset, "map_batches", with_slots)  # noqa: B010
    setattr(find_or_encode, "EncodeStage", EncodeStage)  # noqa: B010
    setattr(find_or_encode, "units_at_once", lambda *_, **__: units)  # noqa: B010
    block = int(UNITS_A_BLOCK * UNIT_BYTES)
    setattr(pipeline, "PIXEL_BYTES", block)  # noqa: B010
    ray.data.DataContext.get_current().target_max_block_size = block


def measure(options: Options, *, units: int) -> dict[str, Any]:
    """Run the pipeline once."""
    there = {"CPU": options.gpus * options.cpus, "GPU": options.gpus, "slot": options.processes}
    os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({**there, "memory": 1 << 45})
    start_ray()
    pipeline_of(units=units)
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), "red").save(buffer, "PNG")
    preprocess = Preprocess(size=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    info = EncoderInfo(name="none", identity={"dim": DIM}, preprocess=preprocess, logit_scale=1.0, head=None)
    with tempfile.TemporaryDirectory() as folder:
        spans = Path(folder, "spans")
        spans.mkdir()
        source = Source(
            name="same",
            kind="folder",
            root="",
            reader=SameReader(image=buffer.getvalue(), sleep=options.sleep, spans=str(spans)),
            num_rows=options.parts * UNIT_ROWS,
            units=tuple(map(str, range(options.parts))),
            labels_from=None,
            label_names=None,
            identity={},
            config=SourceConfig(),
        )
        encoding = Encoding(info=info, encoder=EncoderConfig(), folder=folder, batch_size=UNIT_ROWS)
        clock = Clock(Path(folder, "store"))
        clock.start()
        store = encoding.encode(source, views=parse_views("weak"), path=f"{folder}/store")
        times = [json.loads(file.read_text()) for file in spans.iterdir()]
    ray.shutdown()
    row = {"units a task": units, "parts": f"{len(store.manifest.parts):,}"}
    return row | costs(np.array(clock.looks), options.parts) | ({"decoding": most(times)} if times else {})


def costs(looks: np.ndarray, parts: int) -> dict[str, str]:
    """Processor time by looks in the middle of the run."""
    middle = looks[(looks[:, 0] >= 0.4 * parts) & (looks[:, 0] <= 0.9 * parts)]
    if len(middle) < 2:
        return {}
    done, wall, thread, process = middle[-1] - middle[0]
    return {
        "units/s": f"{done / wall:.0f}",
        "thread": f"{thread / wall:.1%}",
        "thread, ms a unit": f"{1e3 * thread / done:.2f}",
        "driver, ms a unit": f"{1e3 * process / done:.2f}",
    }


def most(spans: list[list[float]]) -> int:
    """The largest number of spans of time that share an instant."""
    return max(sum(begin <= instant < end for begin, end in spans) for instant, _ in spans)


def main(options: Options) -> None:
    """Measure each number of units a task."""
    print(format_table([measure(options, units=units) for units in options.units]))


if __name__ == "__main__":
    main(tyro.cli(Options, config=OPTIONS))
