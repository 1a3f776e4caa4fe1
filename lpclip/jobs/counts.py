"""The line that counts the images of a source, and the end of a job with --strict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lpclip import files
from lpclip.config import SourceConfig, UserError, counted
from lpclip.features.data import Data
from lpclip.features.store import Manifest, Store

STAGES = {"read": "unreadable", "decode": "undecodable", "encode": "without a feature"}
"""Words for a quarantined image, by the stage that failed."""


def count_line(data: Data, store: Store) -> str:
    """One line: how many images were found, left out, read, quarantined, encoded and labelled, as far as that is known.

    Found is what was left out and what was read; read is what was quarantined and what was encoded.
    """
    encoded, quarantined = store.manifest.num_rows, store.manifest.num_quarantined
    read = encoded + quarantined
    parts = [f"{read:,} read"]
    if data.source is not None and data.source.left_out is not None:
        left_out = data.source.left_out
        parts = [f"{read + sum(left_out.values()):,} found", *_with_reasons("left out", left_out), *parts]
    parts += _with_reasons("quarantined", _by_stage(store)) or [f"{quarantined:,} quarantined"]
    parts.append(f"{encoded:,} encoded")
    if store.manifest.num_labelled is not None:
        parts.append(f"{store.manifest.num_labelled:,} of them with a label")
    return f"{data.name}: {', '.join(parts)}"


def check_strict(source: SourceConfig, *, stores: Iterable[str | None]) -> None:
    """Raise UserError with --strict when the store at one of these paths has quarantined images."""
    if source.strict:
        found = {path: Manifest.read(path) for path in stores if path is not None}
        refuse_listed(
            {files.join(path, "quarantine.parquet"): m.num_quarantined for path, m in found.items() if m}
        )


def refuse_listed(lists: Mapping[str, int]) -> None:
    """Raise UserError when one of these lists names images that were quarantined."""
    total = sum(lists.values())
    if total:
        paths = ", ".join(path for path, count in lists.items() if count)
        raise UserError(
            f"--strict: {counted(total, 'image')} in quarantine, as listed in {paths}; everything is written"
        )


def _by_stage(store: Store) -> dict[str, int]:
    try:
        return {STAGES.get(stage, stage): count for stage, count in store.quarantined().items()}
    except (FileNotFoundError, UserError):
        return {}  # The manifest has the number all the same.


def _with_reasons(what: str, counts: Mapping[str, int]) -> list[str]:
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in most_first)
    return [f"{sum(counts.values()):,} {what} ({reasons})"] if reasons else []
