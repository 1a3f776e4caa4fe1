"""A finished run of lpclip selftrain, as the commands that look back at it open it."""

from __future__ import annotations

import dataclasses
import re
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
        if not files.exists(store):
            raise UserError(
                f"the features of the run are not at {store}: put the folder back if it was moved, or run the command "
                "of the run again"
            )
        return cls(
            out=out, summary=summary, probe=load_probe(files.join(out, "probe")), store=Store.open(store)
        )

    def corrections(self) -> Corrections:
        """The labels that were given to images of this run."""
        return Corrections(files.join(self.out, "corrections.csv"))

    def again(self, *, labels: str) -> str:
        """The command that trains again with a file of labels, on the same features, in a folder of its own."""
        config = self.summary["config"]
        base = re.sub(r"-corrected(-\d+)?$", "", shown(self.out))
        number, place = 1, f"{base}-corrected"
        while files.exists(place):
            number += 1
            place = f"{base}-corrected-{number}"
        features = config.get("features") or shown(files.join(self.out, "features"))
        known = {**config, "labels": shown(labels), "features": features, "out": place, "run_name": None}
        return command_line("selftrain", configured(SelftrainJob, known))


def configured(kind: type[Any], config: dict[str, Any]) -> Any:
    """A configuration from what a summary has of it; a flag that it lacks has its default."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        nested: Any = item.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            values[item.name] = configured(nested, config)
        elif item.name in config:
            value = config[item.name]
            values[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
