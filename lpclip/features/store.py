"""The feature store: Parquet parts, and a manifest written last.

    STORE/
      identity.json        written first: what the features are made of
      part-*.parquet       id, label, texts of pairs, one fixed-size list<float16> column a view
      quarantine.parquet   id, stage, error: every row that could not be encoded, with the reason
      manifest.json        written last: its existence means the store is complete

A part holds a run of one unit of work's rows and is named after it: part-UNIT-START-STOP.parquet, with `-last`
behind STOP when the unit ends there. It is written whole or not at all and carries its quarantined rows in its
metadata, so a store that was interrupted goes on from the units that are there, and the names alone tell which.
The fingerprint covers whatever changes a feature.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lpclip import files
from lpclip.config import digest
from lpclip.errors import UserError
from lpclip.images.views import BASE_VIEWS

FORMAT = 1
DIGEST_MODULUS = 1 << 128
QUARANTINE = pa.schema([("id", pa.string()), ("stage", pa.string()), ("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features in memory, in the order of `row_order(ids)`."""

    ids: np.ndarray
    """(N,) str."""
    labels: np.ndarray
    """(N,) int32, -1 where the source has none."""
    base: np.ndarray
    """(N, d) float16, unit norm: the mean of the base views."""
    strong: dict[str, np.ndarray]
    """Further views by name, each (N, d) float16, unit norm."""
    first_row: int = 0
    """Place of the first of these rows among all rows of the store."""
    num_rows: int = 0
    """Rows of the store."""


def fingerprint(identity: dict[str, Any]) -> str:
    """SHA-256 of whatever changes a feature: source, encoder, views and seed."""
    return digest({"format": FORMAT, **identity})


def row_order(ids: np.ndarray) -> np.ndarray:
    """Permutation that sorts ids by a hash of theirs: file order and names often carry the class."""
    keys = np.array([hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids.tolist()], dtype="S8")
    return np.lexsort((ids, keys.view(">u8") if len(keys) else keys))


@dataclass(frozen=True, kw_only=True, order=True)
class Part:
    """A run of a unit's rows, quarantined ones included: `start` to before `stop`."""

    unit: int
    start: int
    stop: int
    last: bool

    @property
    def name(self) -> str:
        """The part's file name."""
        end = "-last" if self.last else ""
        return f"part-{self.unit:06d}-{self.start:06d}-{self.stop:06d}{end}.parquet"


_PART_NAME = re.compile(r"part-(\d+)-(\d+)-(\d+)(-last)?\.parquet")
_HALF_PART = re.compile(_PART_NAME.pattern + r"\.\w+\.tmp")


def list_parts(path: str) -> list[Part]:
    """The parts in a folder, in the order of units and rows."""
    found = (_PART_NAME.fullmatch(name) for name in files.list_names(path))
    return sorted(
        Part(unit=int(m[1]), start=int(m[2]), stop=int(m[3]), last=m[4] is not None) for m in found if m
    )


def _is_whole(parts: list[Part]) -> bool:
    ends = [0, *(part.stop for part in parts)]
    return [part.start for part in parts] == ends[:-1] and parts[-1].last


def open_store(path: str, identity: dict[str, Any]) -> dict[int, int]:
    """Begin a store, or go on with an interrupted one. Returns the units that are done and their row counts.

    Parts of unfinished units are removed: the unit is encoded again as a whole, perhaps cut otherwise. So are
    parts that a killed process had begun to write.
    Raises UserError when the folder holds a store of another fingerprint, or cannot be written.
    """
    files.make_folder(path)
    if files.exists(files.join(path, "identity.json")):
        _require(path, files.read_json(files.join(path, "identity.json")), identity)
    elif list_parts(path):
        raise UserError(
            f"{path} holds parts without identity.json: it is no feature store; use another folder"
        )
    else:
        files.write_json(files.join(path, "identity.json"), identity)
    for name in files.list_names(path):
        if _HALF_PART.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):  # a lost run's last task may end it yet
                files.delete(files.join(path, name))
    done = {}
    for unit, group in itertools.groupby(list_parts(path), key=lambda part: part.unit):
        parts = list(group)
        if _is_whole(parts):
            done[unit] = parts[-1].stop
        else:
            for part in parts:
                files.delete(files.join(path, part.name))
    return done


def _require(path: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if fingerprint(found) == fingerprint(wanted):
        return
    changed = [k for k in wanted if found.get(k) != wanted[k]]
    raise UserError(
        f"the feature store {path} was made with another {' and another '.join(changed) or 'format'}; "
        "features of different origin are never mixed: name another folder, or remove this one"
    )


def write_part(
    path: str, part: Part, *, rows: pa.Table, quarantine: list[dict[str, str]], content_digest: int
) -> None:
    """Commit a part: its encoded rows, its quarantined rows and the digest of their ids and image bytes."""
    meta = {b"quarantine": json.dumps(quarantine).encode(), b"digest": b"%x" % content_digest}
    sink = io.BytesIO()
    # Random mantissas do not compress: an attempt would spend time to win nothing.
    pq.write_table(rows.replace_schema_metadata(meta), sink, compression="none", use_dictionary=["label"])
    files.write_bytes(files.join(path, part.name), sink.getbuffer())


def write_quarantine(path: str) -> list[dict[str, str]]:
    """Gather the quarantined rows of all parts in quarantine.parquet. Returns them."""
    found: list[dict[str, str]] = []
    for part in list_parts(path):
        found += json.loads(_open_part(path, part.name).metadata.metadata[b"quarantine"])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found, schema=QUARANTINE), sink)
    files.write_bytes(files.join(path, "quarantine.parquet"), sink.getbuffer())
    return found


def finish_store(
    path: str, identity: dict[str, Any], *, num_units: int, rate: float | None
) -> dict[str, Any]:
    """Check that every unit is there, gather the quarantine and write the manifest. Returns it."""
    parts = list_parts(path)
    whole = {unit for unit, group in itertools.groupby(parts, key=lambda p: p.unit) if _is_whole(list(group))}
    assert whole == set(range(num_units)), f"{num_units - len(whole)} units are missing in {path}"
    rows, total = 0, 0
    for part in parts:
        meta = _open_part(path, part.name).metadata
        rows += meta.num_rows
        total = (total + int(meta.metadata[b"digest"], 16)) % DIGEST_MODULUS
    quarantined = write_quarantine(path)
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "parts": [part.name for part in parts],
        "num_rows": rows,
        "num_quarantined": len(quarantined),
        # Sum of the rows' digests: the same whatever the order of the rows and the cut into parts.
        "content_digest": f"{total:032x}",
        "images_per_second": rate,
    }
    files.write_json(files.join(path, "manifest.json"), manifest)
    return manifest


def read_manifest(path: str) -> dict[str, Any] | None:
    """The manifest of a complete store, None where there is none.

    Raises UserError when it is damaged or of an unknown format.
    """
    try:
        manifest = files.read_json(files.join(path, "manifest.json"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{error}; remove the store {path}, it is encoded again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{files.join(path, 'manifest.json')} is not of format {FORMAT}: another version of lpclip made it"
        )
    if manifest["fingerprint"] != fingerprint(manifest["identity"]):
        raise UserError(
            f"{files.join(path, 'manifest.json')} does not fit its own fingerprint: it was changed or damaged"
        )
    return manifest


def check_store(path: str, identity: dict[str, Any]) -> None:
    """UserError unless the complete store at `path` has this identity, as far as `identity` says."""
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path} is not a complete feature store: it has no manifest.json; encode it again")
    found = manifest["identity"]
    _require(path, {k: found.get(k) for k in identity}, identity)


def _open_part(path: str, name: str) -> pq.ParquetFile:
    filesystem, inner = files.resolve(files.join(path, name))
    try:
        return pq.ParquetFile(filesystem.open_input_file(inner))
    except FileNotFoundError as error:
        raise UserError(
            f"the feature store {path} has lost {name}; remove the store, it is encoded again"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{files.join(path, name)} is damaged ({error}); remove the store, it is encoded again"
        ) from error


def read_parts(path: str, columns: list[str]) -> Iterator[pa.Table]:
    """The parts of a complete store, in the manifest's order."""
    manifest = read_manifest(path)
    assert manifest is not None, path
    for name in manifest["parts"]:
        yield _open_part(path, name).read(columns=columns)


def read_ids(path: str, *, with_labels: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N,) str and labels (N,) int32 of a complete store, as they lie in the parts; -1 where none is read."""
    ids: list[str] = []
    labels = [np.empty(0, np.int32)]
    for table in read_parts(path, ["id", "label"] if with_labels else ["id"]):
        ids += table["id"].to_pylist()
        if not with_labels:
            labels.append(np.full(len(table), -1, np.int32))
            continue
        labels.append(table["label"].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False))
    return np.array(ids, dtype=np.str_), np.concatenate(labels)


def load(
    path: str,
    *,
    part: int = 0,
    num_parts: int = 1,
    views: tuple[str, ...] | None = None,
    chunk: int = 1,
    with_labels: bool = True,
) -> Features:
    """Features of a complete store in row order, or one of `num_parts` runs of that order.

    Runs are of whole chunks. Only the run is held in memory. `views` names the further views to load; all by
    default.
    """
    manifest = read_manifest(path)
    assert manifest is not None, path
    stored = tuple(manifest["identity"]["views"])
    strong = tuple(v for v in stored if v not in BASE_VIEWS) if views is None else views
    base = tuple(v for v in stored if v in BASE_VIEWS)
    ids, labels = read_ids(path, with_labels=with_labels)
    num_chunks = -(-len(ids) // chunk)
    first, stop = (min(len(ids), chunk * (num_chunks * p // num_parts)) for p in (part, part + 1))
    cut = row_order(ids)[first:stop]
    slot = np.full(len(ids), -1)
    slot[cut] = np.arange(len(cut))
    dim = manifest["identity"]["encoder"]["dim"]
    arrays = {v: np.empty((len(cut), dim), np.float16) for v in ("base", *strong)}
    start = 0
    for table in read_parts(path, [*base, *strong]):
        mine = slot[start : start + len(table)]
        start += len(table)
        rows = {v: matrix(table, v, dim)[mine >= 0] for v in (*base, *strong)}
        arrays["base"][mine[mine >= 0]] = mean_view([rows[v] for v in base])
        for view in strong:
            arrays[view][mine[mine >= 0]] = rows[view]
    return Features(
        ids=ids[cut],
        labels=labels[cut],
        base=arrays["base"],
        strong={v: arrays[v] for v in strong},
        first_row=first,
        num_rows=len(ids),
    )


def mean_view(views: list[np.ndarray]) -> np.ndarray:
    """Unit-norm float16 mean of unit-norm views, each (N, d) float16."""
    if len(views) == 1:
        return views[0]
    mean = np.sum([v.astype(np.float32) for v in views], axis=0)
    return (mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-6)).astype(np.float16)


def matrix(table: pa.Table, view: str, dim: int) -> np.ndarray:
    chunks = [c.flatten().to_numpy(zero_copy_only=False) for c in table[view].chunks]
    return np.concatenate(chunks).reshape(-1, dim) if chunks else np.empty((0, dim), np.float16)
