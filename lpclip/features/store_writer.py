"""A store while it is written: parts that are there whole or not at all, and work that goes on after a loss.

A part holds a run of one unit of work's rows and is named after it: part-UNIT-START-STOP.parquet, with `-last`
behind STOP when the unit ends there. It carries its quarantined rows in its metadata, so an interrupted store goes on
from the units that are there, and the names alone say which these are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lpclip import files, locks
from lpclip.config import UserError, counted
from lpclip.features.store import CHECKSUMS, SOUND, Manifest, Store, fingerprint, open_part, refuse_other

DIGEST_MODULUS = 1 << 128
QUARANTINE = pa.schema([("id", pa.string()), ("stage", pa.string()), ("error", pa.string())])


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


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a manifest says of a part. The process that writes the part reports it, so nobody has to open the part."""

    num_rows: int
    num_labelled: int | None
    """None in a part of an earlier version."""
    digest: int
    quarantine: list[dict[str, str]]


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


def find_or_make(path: str, *, name: str, make: Callable[[], Store]) -> tuple[Store, bool]:
    """The complete store at `path`, and whether it was made now. One job makes it, and others that want it wait.

    A line tells of that, at once and every minute, with the store's `name`. Where the job fails or dies, one of the
    others goes on.
    """

    def tell(who: str) -> None:
        parts = counted(len(list_parts(path)), "part")
        print(
            f"{name}: waiting for another job, which makes them in {path}, {parts} so far ({who})", flush=True
        )

    if store := Store.find(path):
        return store, False
    with locks.hold(path, wait=tell):
        # It may have been made meanwhile.
        if store := Store.find(path):
            return store, False
        return make(), True


@dataclass(frozen=True)
class StoreWriter:
    """A store of this identity that is being written at `path`: `begin`, then parts by any process, then `finish`."""

    path: str
    identity: dict[str, Any]

    def begin(self) -> dict[int, int]:
        """Begin the store, or go on with an interrupted one. Returns the units that are done and their row counts.

        Parts of unfinished units are removed, because such a unit is encoded again as a whole and may be cut at other
        rows. Parts that a killed process had begun to write are removed as well.
        Raises UserError when the folder holds a store of another fingerprint, or cannot be written.
        """
        path, known = self.path, files.join(self.path, "identity.json")
        files.make_folder(path)
        if files.exists(known):
            refuse_other(path, files.read_json(known), self.identity)
        elif list_parts(path):
            raise UserError(
                f"{path} holds parts without identity.json: it is no feature store; use another folder"
            )
        else:
            files.write_json(known, self.identity)
        for name in files.list_names(path):
            if _HALF_PART.fullmatch(name):
                # The last task of a lost run may still finish the file.
                with contextlib.suppress(FileNotFoundError):
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

    def write_part(
        self, part: Part, *, rows: pa.Table, quarantine: list[dict[str, str]], content_digest: int
    ) -> Facts:
        """Commit a part: its encoded rows, its quarantined rows and the digest of their ids and image bytes.

        Features must be of unit norm: nobody looks again. Returns what `finish` wants to know of the part.
        """
        labels = rows["label"] if "label" in rows.column_names else pa.nulls(len(rows), pa.int32())
        labelled = pc.sum(pc.greater_equal(labels, 0)).as_py() or 0
        meta = {
            b"quarantine": json.dumps(quarantine).encode(),
            b"digest": b"%x" % content_digest,
            b"labelled": b"%d" % labelled,
            CHECKSUMS: SOUND,
        }
        # Random mantissas do not compress: an attempt would cost time and gain nothing.
        files.write_parquet(
            files.join(self.path, part.name),
            rows.replace_schema_metadata(meta),
            compression="none",
            dictionary=["label"],
        )
        return Facts(num_rows=len(rows), num_labelled=labelled, digest=content_digest, quarantine=quarantine)

    def finish(
        self, *, num_units: int, rate: float | None, known: Mapping[str, Facts] | None = None
    ) -> Store:
        """Check that every unit is there, gather the quarantine and write the manifest. Returns the complete store.

        `rate` is in images a second. `known` has what is known of parts by name; other parts are opened.
        Raises UserError when a unit is missing, or not whole.
        """
        parts = list_parts(self.path)
        whole = {
            unit for unit, group in itertools.groupby(parts, key=lambda p: p.unit) if _is_whole([*group])
        }
        if missing := set(range(num_units)) - whole:
            raise UserError(
                f"{counted(len(missing), 'unit')} {'is' if len(missing) == 1 else 'are'} missing in {self.path}: "
                "another process has written or removed parts; the same command encodes what is missing"
            )
        assert len(whole) == num_units, f"{self.path} has units that its source has not"
        facts = list(read_facts(self.path, parts, known=known or {}))
        labelled = [item.num_labelled for item in facts if item.num_labelled is not None]
        quarantine = [row for item in facts for row in item.quarantine]
        _write_quarantine(files.join(self.path, "quarantine.parquet"), quarantine)
        manifest = Manifest(
            fingerprint=fingerprint(self.identity),
            identity=self.identity,
            parts=tuple(part.name for part in parts),
            num_rows=sum(item.num_rows for item in facts),
            num_quarantined=len(quarantine),
            content_digest=f"{sum(item.digest for item in facts) % DIGEST_MODULUS:032x}",
            images_per_second=rate,
            num_labelled=sum(labelled) if len(labelled) == len(facts) else None,
        )
        manifest.write(self.path)
        return Store(self.path, manifest)


def read_facts(path: str, parts: Sequence[Part], *, known: Mapping[str, Facts]) -> Iterator[Facts]:
    """The facts of these parts of the store at `path`, in their order. Parts that are not `known` are opened."""

    def read(part: Part) -> Facts:
        if part.name in known:
            return known[part.name]
        with open_part(path, part.name) as opened:
            meta = opened.metadata
        texts = meta.metadata
        return Facts(
            num_rows=meta.num_rows,
            num_labelled=int(texts[b"labelled"]) if b"labelled" in texts else None,
            digest=int(texts[b"digest"], 16),
            quarantine=json.loads(texts[b"quarantine"]),
        )

    return files.each(read, parts, folder=path)


def write_quarantine(path: str) -> list[dict[str, str]]:
    """Gather the quarantined rows of all parts in quarantine.parquet. Returns them."""
    found = [row for facts in read_facts(path, list_parts(path), known={}) for row in facts.quarantine]
    _write_quarantine(files.join(path, "quarantine.parquet"), found)
    return found


def _write_quarantine(path: str, rows: list[dict[str, str]]) -> None:
    files.write_parquet(path, pa.Table.from_pylist(rows, schema=QUARANTINE))
