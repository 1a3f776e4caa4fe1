"""The feature store: Parquet parts, and a manifest written last.

    STORE/
      identity.json        written first: what the features are made of
      part-*.parquet       id, label, texts of pairs, one fixed-size list<float16> column a view;
                           JPEGs of some of the rows, to look at
      quarantine.parquet   id, stage, error: every row that could not be encoded, with the reason
      manifest.json        written last: the store is complete when it and the parts that it names are there

This module reads complete stores; lpclip/features/store_writer.py writes them. The fingerprint covers everything that
changes a feature.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lpclip import files
from lpclip.config import UserError, digest
from lpclip.encoders.passes import mean_view
from lpclip.images.views import BASE_VIEWS

FORMAT = 3
# What fingerprints are made with, so that stores of format 1, which say less in their manifest, are found again.
FINGERPRINT_FORMAT = 1
CHECKSUMS = b"checksums"
"""Key in a part's metadata: its pages have checksums, which are verified whenever they are read."""
SOUND = b"2"
"""Its value where all features had unit norm when they were written; it was 1 before they were looked at."""
NORM_TOLERANCE = 0.01
THUMBNAIL = "thumbnail"
"""Column of JPEGs, null in most rows of a large store. Parts of earlier versions have none."""
MOST_THUMBNAILS = 20_000
# With fewer the move takes longer, with more the copy is larger.
COLUMNS_AT_ONCE = 64
_ENCODE_AGAIN = "run the command that made the store again, it encodes the images of this part alone"
_MEND_PART = f"remove this file and {_ENCODE_AGAIN}"


def fingerprint(identity: dict[str, Any]) -> str:
    """SHA-256 of everything that changes a feature: source, encoder, views and seed."""
    return digest({"format": FINGERPRINT_FORMAT, **identity})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of manifest.json. A pair store has no views, dim, seed or label names."""

    fingerprint: str
    identity: dict[str, Any]
    parts: tuple[str, ...]
    """File names, in the order of units and rows."""
    num_rows: int
    num_quarantined: int
    content_digest: str
    """Sum of the rows' digests: the same for any order of the rows and any cut into parts."""
    images_per_second: float | None
    """None when no image was encoded by the run that completed the store."""
    num_labelled: int | None
    """Rows with a label; None in a store that has parts of an earlier version, which do not tell."""

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the stored views."""
        return tuple(self.identity["views"])

    @property
    def dim(self) -> int:
        """Length of a feature."""
        return int(self.identity["encoder"]["dim"])

    @property
    def seed(self) -> int | None:
        """Seed of the views that draw random numbers, None when none does."""
        return self.identity["seed"]

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names that the labels index, None when there are none."""
        names = self.identity["source"]["label_names"]
        return tuple(names) if names else None

    @classmethod
    def read(cls, path: str) -> Manifest | None:
        """The manifest of the store at `path`, None when there is no complete store.

        Raises UserError when it is damaged or of an unknown format.
        """
        file = files.join(path, "manifest.json")
        try:
            found = files.read_json(file)
        except FileNotFoundError:
            return None
        except UserError as error:
            raise UserError(f"{error}; remove the store {path}, it is encoded again") from error
        number = found.pop("format", None) if isinstance(found, dict) else None
        if number not in (1, 2, FORMAT):
            raise UserError(f"{file} is not of format {FORMAT}: another version of lpclip made it")
        if number == 1:
            found["num_labelled"] = None
        # Formats 1 and 2 have no digest.
        is_whole = number != FORMAT or found.pop("digest", None) == digest(found)
        if (
            not is_whole
            or found.keys() != cls.__annotations__.keys()
            or found["fingerprint"] != fingerprint(found["identity"])
        ):
            raise UserError(f"{file} does not fit its own fingerprint: it was changed or damaged")
        return cls(**{**found, "parts": tuple(found["parts"])})

    def write(self, path: str) -> None:
        """Write manifest.json, which makes the store at `path` complete."""
        known = json.loads(json.dumps(vars(self)))
        text = {"format": FORMAT, **known, "digest": digest(known)}
        files.write_json(files.join(path, "manifest.json"), text)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features in memory, in the order of `row_order(ids)`."""

    ids: np.ndarray
    """(N,) object, each a str: numpy's own strings are all as long as the longest."""
    labels: np.ndarray
    """(N,) int32, -1 where the source has none or they were not loaded."""
    base: np.ndarray
    """(N, d) float16, unit norm: the mean of the base views."""
    strong: dict[str, np.ndarray]
    """Further views by name, each (N, d) float16, unit norm."""
    first_row: int = 0
    """Place of the first of these rows among all rows of the store."""
    num_rows: int = 0
    """Rows of the store."""
    origin: dict[str, Any] = field(default_factory=dict)
    """The making of the features, as probes keep it: the encoder's identity, views, the store's fingerprint."""


class Store:
    """A complete store, opened once. Arrays come in row order, whatever the order of the parts: see `row_order`.

    Methods that read raise UserError when a part is lost or damaged.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._order: np.ndarray | None = None
        # In the order of the parts.
        self._ids: np.ndarray | None = None
        self._labels: np.ndarray | None = None

    @classmethod
    def open(cls, path: str) -> Store:
        """The store at `path`. Raises UserError when it is not complete, damaged or of an unknown format."""
        manifest = Manifest.read(path)
        if manifest is None:
            raise UserError(
                f"{path} is not a complete feature store: it has no manifest.json; encode it again"
            )
        for name in _lost_parts(path, manifest):
            raise UserError(f"the feature store {path} has lost {name}: {_ENCODE_AGAIN}")
        return cls(path, manifest)

    @classmethod
    def find(cls, path: str) -> Store | None:
        """The store at `path`, None when there is no complete one: parts may be lost, a writer goes on from the others.

        Raises UserError when the manifest is damaged.
        """
        manifest = Manifest.read(path)
        return None if manifest is None or _lost_parts(path, manifest) else cls(path, manifest)

    def quarantined(self) -> dict[str, int]:
        """The number of rows that could not be encoded, by the stage that failed: read, decode or encode."""
        return Counter(row["stage"] for row in self.quarantine("stage"))

    def quarantine(self, *columns: str) -> list[dict[str, str]]:
        """Id, stage and error of every row that could not be encoded, or these of the three columns."""
        if not self.manifest.num_quarantined:
            return []
        with files.open_parquet(files.join(self.path, "quarantine.parquet"), remedy=_ENCODE_AGAIN) as part:
            return files.read_columns(part, list(columns) or None).to_pylist()

    def quarantined_ids(self) -> list[str]:
        """The ids of the rows that could not be encoded."""
        if not self.manifest.num_quarantined:
            return []
        with files.open_parquet(files.join(self.path, "quarantine.parquet"), remedy=_ENCODE_AGAIN) as part:
            found: list[str] = files.read_columns(part, ["id"])["id"].to_pylist()
        return found

    def require(self, identity: dict[str, Any]) -> None:
        """Raise UserError unless the store has this identity, as far as `identity` goes."""
        refuse_other(self.path, {key: self.manifest.identity.get(key) for key in identity}, identity)

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """These columns of each part, in the manifest's order; some parts are read ahead where the store is remote."""

        def read(name: str) -> pa.Table:
            with open_part(self.path, name) as part:
                table = files.read_columns(part, columns)
                if part.metadata.metadata.get(CHECKSUMS) != SOUND:
                    _refuse_damage(table, files.join(self.path, name))
            return table

        return files.each(read, self.manifest.parts, folder=self.path)

    def ids(self) -> np.ndarray:
        """Ids (N,) object, each a str."""
        order = self._row_order()
        assert self._ids is not None
        return self._ids[order]

    def ids_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids (N,) object, each a str, and labels (N,) int32, -1 for none, read in one pass."""
        deque(self._pass([], with_labels=True), maxlen=0)
        assert self._labels is not None
        return self.ids(), self._labels[self._row_order()]

    def has_labels(self) -> bool:
        """Say whether any row is labelled."""
        if self.manifest.num_labelled is not None:
            return self.manifest.num_labelled > 0
        most = (pc.max(table["label"]).as_py() for table in self.tables(["label"]))
        return any(label is not None and label >= 0 for label in most)

    def mean(self, *views: str) -> np.ndarray:
        """Unit-norm mean of these views, (N, d) float16; of one view, the view itself."""
        return self._load({"mean": views}, with_labels=False)["mean"]

    def thumbnails(self) -> dict[str, bytes]:
        """JPEGs by id of the first MOST_THUMBNAILS images that have one, in row order. They may be damaged."""
        found: dict[str, bytes] = {}
        for table in self.tables(["id", THUMBNAIL]):
            if THUMBNAIL in table.column_names:
                shown = table.filter(table[THUMBNAIL].is_valid())
                found |= zip(shown["id"].to_pylist(), shown[THUMBNAIL].to_pylist(), strict=True)
            if len(found) > 2 * MOST_THUMBNAILS:
                found = _first(found)
        return _first(found)

    def share(self, worker: int, *, num_workers: int) -> Store:
        """One worker's share of the parts, as a store; its manifest still counts all rows."""
        parts = self.manifest.parts[worker::num_workers]
        return Store(self.path, replace(self.manifest, parts=parts))

    def features(self, *, views: tuple[str, ...] | None = None, with_labels: bool = True) -> Features:
        """All features, in one pass. `views` names the further views to load, by default all of them."""
        stored = self.manifest.views
        strong = tuple(v for v in stored if v not in BASE_VIEWS) if views is None else views
        base = tuple(v for v in stored if v in BASE_VIEWS)
        loaded = self._load({"base": base} | {v: (v,) for v in strong}, with_labels=with_labels)
        ids = self.ids()
        none = np.full(len(ids), -1, np.int32)
        return Features(
            ids=ids,
            labels=self.ids_and_labels()[1] if with_labels else none,
            base=loaded.pop("base"),
            strong=loaded,
            num_rows=len(ids),
            origin={
                "identity": self.manifest.identity["encoder"],
                "views": ",".join(self.manifest.views),
                "features": self.manifest.fingerprint,
            },
        )

    def _load(self, means: dict[str, tuple[str, ...]], *, with_labels: bool) -> dict[str, np.ndarray]:
        """Means of some views, each (N, d) float16 in row order, by the keys of `means`."""
        dim, stop = self.manifest.dim, 0
        # A share of a store has fewer rows than its manifest says: what nothing is written to takes no memory.
        arrays = {key: np.empty((self.manifest.num_rows, dim), np.float16) for key in means}
        for table in self._pass(
            [view for views in means.values() for view in views], with_labels=with_labels
        ):
            start, stop = stop, stop + len(table)
            for key, views in means.items():
                arrays[key][start:stop] = mean_view([matrix(table, view, dim) for view in views])
        order = self._row_order()
        return {key: permuted(array[:stop], order) for key, array in arrays.items()}

    def _pass(self, columns: list[str], *, with_labels: bool) -> Iterator[pa.Table]:
        """These columns of each part. Ids, and labels where they are wanted, are read on the way and kept."""
        missing = ["id"] * (self._ids is None) + ["label"] * (with_labels and self._labels is None)
        ids: list[str] = []
        labels = [np.empty(0, np.int32)]
        for table in self.tables([*missing, *columns]) if missing or columns else ():
            if "id" in missing:
                ids += table["id"].to_pylist()
            if "label" in missing:
                labels.append(table["label"].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False))
            yield table
        if "id" in missing:
            self._ids = np.array(ids, dtype=object)
            self._order = row_order(self._ids)
        if "label" in missing:
            self._labels = np.concatenate(labels)

    def _row_order(self) -> np.ndarray:
        if self._order is None:
            deque(self._pass([], with_labels=False), maxlen=0)
        assert self._order is not None
        return self._order


def row_order(ids: np.ndarray) -> np.ndarray:
    """Permutation that sorts ids (N,), each a str, by their hash: file order and names often carry the class."""
    keys = row_keys(ids)
    order = np.argsort(keys, kind="stable")
    # Comparing ids costs seconds a million, and two of a million hashes are hardly ever the same.
    return np.lexsort((ids, keys)) if (np.diff(keys[order]) == 0).any() else order


def _first(images: dict[str, bytes]) -> dict[str, bytes]:
    """The first MOST_THUMBNAILS of these images by id, in row order."""
    ids = np.array(list(images), dtype=object)
    return {name: images[name] for name in ids[row_order(ids)[:MOST_THUMBNAILS]].tolist()}


def row_keys(ids: np.ndarray) -> np.ndarray:
    """Hashes (N,) uint64 of ids, each a str."""
    keys = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids.tolist())
    return np.frombuffer(keys, ">u8").astype(np.uint64)


def refuse_other(path: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError, with what differs, unless the store at `path` was made with the wanted identity."""
    if fingerprint(found) == fingerprint(wanted):
        return
    changed = [k for k in wanted if found.get(k) != wanted[k]]
    raise UserError(
        f"the feature store {path} was made with another {' and another '.join(changed) or 'format'}; "
        "features of different origin are never mixed: name another folder, or remove this one"
    )


@contextlib.contextmanager
def open_part(path: str, name: str) -> Iterator[pq.ParquetFile]:
    """A part of the store at `path`, to be read in the block. Raises UserError when it is lost or damaged."""
    try:
        with files.open_parquet(files.join(path, name), remedy=_MEND_PART) as part:
            yield part
    except FileNotFoundError as error:
        raise UserError(f"the feature store {path} has lost {name}: {_ENCODE_AGAIN}") from error


def _lost_parts(path: str, manifest: Manifest) -> list[str]:
    there = set(files.list_names(path))
    return [name for name in manifest.parts if name not in there]


def _refuse_damage(table: pa.Table, path: str) -> None:
    """Raise UserError for features that are none: nobody looked when parts of earlier versions were written."""
    for name in table.column_names:
        if not pa.types.is_fixed_size_list(table[name].type):
            continue
        if not has_unit_norm(matrix(table, name, table[name].type.list_size)).all():
            raise UserError(f"{path} is damaged (a feature is not of unit norm): {_MEND_PART}")


def has_unit_norm(features: np.ndarray) -> np.ndarray:
    """Say of each of the features (N, d) float16 whether it is a direction: (N,) bool, False for a NaN too."""
    rows = features.astype(np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    # Float16 keeps the norm within 0.001.
    return np.asarray(np.abs(norms - 1) < NORM_TOLERANCE)


def permuted(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows (N, d) in another order, moved in place a few columns at a time: a copy of all would double the memory."""
    for start in range(0, rows.shape[1], COLUMNS_AT_ONCE):
        rows[:, start : start + COLUMNS_AT_ONCE] = rows[order, start : start + COLUMNS_AT_ONCE]
    return rows


def matrix(table: pa.Table, view: str, dim: int) -> np.ndarray:
    """A view's column as (N, d) float16."""
    chunks = [c.flatten().to_numpy(zero_copy_only=False) for c in table[view].chunks]
    return np.concatenate(chunks).reshape(-1, dim) if chunks else np.empty((0, dim), np.float16)
