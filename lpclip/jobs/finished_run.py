"""A finished run of lpclip selftrain, as the commands that look back at it open it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lpclip import files
from lpclip.config import SelftrainJob, UserError
from lpclip.features.store import Store
from lpclip.jobs.console import command_line, shown
from lpclip.jobs.corrections import Corrections
from lpclip.method.probe import Probe, load_probe


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The folder of a run, its summary, its probe and the features of its images."""

    out: str
    summary: dict[str, Any]
    probe: Probe
    store: Store

    @classmethod
    def open(cls, path: str) -> FinishedRun:
        """The run in a folder. Raises UserError when there is none, or a part of it is lost."""
        out = files.absolute(path)
        try:
            summary: dict[str, Any] = files.read_json(files.join(out, "summary.json"))
            store, config = summary["features"]["train"], summary["config"]
        except (FileNotFoundError, KeyError, TypeError):
            store = config = None
        if not store or not config:
            raise UserError(
                f"{out} holds no finished run of lpclip selftrain: --run takes the folder that its --out names"
            )
        moved = files.join(out, "features", files.split(store)[1])
        if not files.exists(files.join(store, "manifest.json")) and files.exists(moved):
            store = moved
        return cls(out=out, summary=summary, probe=load_probe(files.join(out, "probe")), store=Store.open(store))
