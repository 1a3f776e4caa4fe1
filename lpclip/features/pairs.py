"""The pair store: images at the size of a model's input, with their texts, to be read in any order.

    STORE/
      pixels-*.u8        (rows, S, S, 3) uint8, of the images of the part of that name
      part-*.parquet     id, label, texts; written after its pixels
      identity.json, quarantine.parquet, manifest.json        as in a feature store: lpclip/features/store.py

Training wants another order in each epoch, the same for any number of workers: the order of a stream from many readers
is neither. So images are decoded once, and rows are read where they lie, here or in a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from lpclip import files
from lpclip.config import UserError
from lpclip.features.commit_stage import commit
from lpclip.features.decode_stage import pixel_array
from lpclip.features.pipeline import decode_units, fill_store
from lpclip.features.store import Store, row_order
from lpclip.features.store_writer import Part, StoreWriter
from lpclip.images.pixels import DECODING_VERSION, REDUCING_GAP, Pixels, Preprocess, preprocess_identity
from lpclip.images.source import Source
from lpclip.images.views import WEAK

FORMAT = 2
OPEN_FILES = 128
READERS = 8


def pairs_identity(source: Source, preprocess: Preprocess) -> dict[str, Any]:
    """Everything that changes a row of the store. Mean and deviation do not: they are applied later."""
    found = preprocess_identity(preprocess)
    return {
        "pairs": FORMAT,
        "pixels": {key: found[key] for key in found if key not in ("mean", "std")},
        "reducing_gap": REDUCING_GAP,
        "decoding": DECODING_VERSION,
        "source": source.identity,
    }


def prepare_pairs(source: Source, *, preprocess: Preprocess, path: str) -> Store:
    """Decode a source of pairs into the store at `path`, going on from what is there. Returns the store.

    Raises UserError when too many pairs are bad, or the folder is another store's.
    """

    writer = StoreWriter(path, pairs_identity(source, preprocess))

    def stages(todo: list[int], name: str) -> ray.data.Dataset:
        decoded = decode_units(source, todo, views=(WEAK,), preprocess=preprocess, seed=0, num_consumers=1)
        pixels = partial(_write_pixels, path=path, size=preprocess.size)
        write = partial(commit, writer=writer, columns=("id", "label", "texts"), beside=pixels)
        return decoded.map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=0)

    return fill_store(source, writer=writer, what="reading", stages=stages)


def _write_pixels(part: Part, rows: pa.Table, *, path: str, size: int) -> None:
    pixels = pixel_array(rows[f"pixels:{WEAK}"], size=size)
    files.write_bytes(files.join(path, _pixels_name(part.name)), pixels.tobytes())


def _pixels_name(part: str) -> str:
    return part.replace("part-", "pixels-").replace(".parquet", ".u8")


class PairStore:
    """A complete store's pairs by row, in the order of `row_order(ids)`.

    `texts` and `pixels` may be called from several threads.
    """

    def __init__(self, path: str) -> None:
        store = Store.open(path)
        self.size: int = store.manifest.identity["pixels"]["size"]
        self._row_bytes = self.size * self.size * 3
        ids: list[str] = []
        self._texts: list[pa.Array] = []
        self._files = [files.join(path, _pixels_name(name)) for name in store.manifest.parts]
        places = []
        for number, table in enumerate(store.tables(["id", "texts"])):
            ids += table["id"].to_pylist()
            chunks = table["texts"].chunks
            self._texts.append(pa.concat_arrays(chunks) if chunks else pa.array([], pa.list_(pa.string())))
            places.append(np.stack([np.full(len(table), number), np.arange(len(table))], axis=1))
        order = row_order(np.array(ids, dtype=object))
        self._places = np.concatenate([np.empty((0, 2), np.int64), *places])[order]
        self._open = lru_cache(OPEN_FILES)(_open)
        self._threads = ThreadPoolExecutor(READERS)

    def __len__(self) -> int:
        return len(self._places)

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[list[str]]:
        """The texts of each of these rows, one at least."""
        return [self._texts[part][place].as_py() for part, place in self._places[rows].tolist()]

    def pixels(self, rows: Sequence[int] | np.ndarray) -> Pixels:
        """The images of these rows, (B, S, S, 3) uint8. Raises UserError when the store is damaged."""
        places = self._places[rows].tolist()
        found = b"".join(self._threads.map(self._read, places))
        return np.frombuffer(bytearray(found), np.uint8).reshape(-1, self.size, self.size, 3)

    def _read(self, place: list[int]) -> bytes:
        part, row = place
        data = self._open(self._files[part]).read_at(self._row_bytes, row * self._row_bytes)
        if len(data) != self._row_bytes:
            raise UserError(f"{self._files[part]} is damaged: remove its folder, the images are read again")
        return data


def _open(path: str) -> pa.NativeFile | files.RemoteFile:
    try:
        return files.open_input(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is lost: remove its folder, the images are read again") from error
