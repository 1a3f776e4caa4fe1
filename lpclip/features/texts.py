"""Texts of image-text pairs: read from a pair store, and encoded where the GPUs are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from lpclip.config import EncoderConfig
from lpclip.encoders.head import EncoderInfo, refuse_another
from lpclip.encoders.load import full_identity, load_again
from lpclip.features.describe import has_gpus
from lpclip.features.store import Store, row_order
from lpclip.progress import Progress

TEXTS_AT_ONCE = 256


def read_pairs(store: Store) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The M different texts of a store of pairs, and its pairs as indices (P,) int64 of images and of texts.

    Images are numbered in row order.
    """
    table = pa.concat_tables(store.tables(["id", "texts"]))
    order = row_order(np.array(table["id"].to_pylist(), dtype=object))
    lists = table["texts"].combine_chunks().take(pa.array(order))
    texts = lists.flatten().dictionary_encode()
    images = pc.list_parent_indices(lists).to_numpy()
    return texts.dictionary.to_pylist(), images, texts.indices.to_numpy().astype(np.int64)


def encode_texts(
    texts: list[str], *, info: EncoderInfo, encoder: EncoderConfig, name: str = "texts"
) -> np.ndarray:
    """Features (M, d) float32, unit norm, of M texts, computed where GPUs are.

    Raises UserError when the encoder is not the one that `info` describes.
    """
    if has_gpus():
        task: Any = ray.remote(num_cpus=1, num_gpus=1, max_retries=1)(_text_batches)
        batches: Iterator[np.ndarray] = map(ray.get, task.remote(texts, info, encoder))
    else:
        batches = _text_batches(texts, info, encoder, device="cpu")
    progress = Progress(f"encoding texts of {name}", total=len(texts), unit="texts")
    found = np.empty((len(texts), info.identity["dim"]), np.float32)
    for batch in batches:
        found[progress.done : progress.done + len(batch)] = batch
        progress.advance(len(batch))
    progress.close()
    return found


def _text_batches(
    texts: list[str], info: EncoderInfo, config: EncoderConfig, *, device: str | None = None
) -> Iterator[np.ndarray]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_again(config, info.identity, device=device)
    refuse_another(full_identity(encoder), info.identity)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        yield encoder.encode_text(texts[start : start + TEXTS_AT_ONCE]).cpu().numpy()
