"""The files of the rounds: what a training leaves behind, and what the same training goes on from.

OUT/rounds/identity.json                         what is trained, so that other work's rounds are never continued
OUT/rounds/neighbours-START-STOP.safetensors     the nearest neighbours of these rows
OUT/rounds/search.json                           how far the search for neighbours is
OUT/rounds/targets-001-START-STOP.safetensors    the largest targets of these rows in the round's own pass
OUT/rounds/round-001.safetensors                 weight, bias, factors
OUT/rounds/round-001.json                        metrics; written after everything else of the round: now it exists
OUT/rounds/labels-0.parquet                      the last round's pseudo-labels of worker 0
OUT/rounds/finished.json                         written last; then neighbours and targets are deleted

Workers write the rows that they hold, and read the rows of all. So the same work goes on with another number of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from lpclip import files
from lpclip.config import UserError
from lpclip.method.state import Pass, SharedTargets, State
from lpclip.training.tensors import read_tensors

# The last round is done again, and so needs the targets of the one before its teacher's.
KEPT_TARGETS = 3
NOTE_SECONDS, WRITE_SECONDS = 30.0, 60.0
"""How often a search says how far it is, and writes what it has found."""
LABELS = pa.schema(
    [("id", pa.string()), ("label", pa.int32()), ("confidence", pa.float32()), ("kept", pa.bool_())]
)


@dataclass(frozen=True)
class RoundFiles:
    """The folder of a training's rounds. What reads tensors raises UserError when a file is damaged."""

    folder: str

    # A training

    def claim(self, identity: dict[str, Any]) -> None:
        """Make the folder for a training. Raises UserError when it holds another one."""
        files.make_folder(self.folder)
        if not files.exists(mark := self._path("identity.json")):
            files.write_json(mark, identity)
        elif files.read_json(mark) != identity:
            raise UserError(f"{self.folder} holds the rounds of another training; choose another --out")

    def is_finished(self) -> bool:
        """Say whether the training has come to its end."""
        return files.exists(self._path("finished.json"))

    def finish(self, *, rounds: int, num_workers: int) -> None:
        """Mark a training as finished with so many rounds, and delete what it would have gone on from."""
        # A run that was interrupted may have gone further: rounding decides whether hardly a label changed.
        for name in self.names()[rounds:]:
            files.delete(self._path(name))
            files.delete(self._path(name.replace(".json", ".safetensors")))
        files.write_json(self._path("finished.json"), {"round": rounds, "num_workers": num_workers})
        self._delete("neighbours-")
        self._delete("targets-")

    def last_to_go_on_from(self, *, num_rows: int, with_neighbours: bool) -> int:
        """The number of the round that an interrupted training goes on after; 0 where it has to begin again.

        The last round that is there is done again: its labels were not kept, and it may be a last student.
        """
        number = max(0, len(self.names()) - 1)
        is_there = not with_neighbours or self._num_found(_targets(number - 1)) == num_rows
        return number if is_there else 0

    # Rounds

    def names(self) -> list[str]:
        """Names of the rounds' JSON files, oldest first."""
        names = files.list_names(self.folder)
        return [name for name in names if name.startswith("round-") and name.endswith(".json")]

    def metrics(self, name: str) -> dict[str, float]:
        """The metrics in a round's JSON file."""
        found: dict[str, float] = files.read_json(self._path(name))["metrics"]
        return found

    def states(self) -> list[State]:
        """The rounds that are there, oldest first."""
        states = []
        for name in self.names():
            text = files.read_json(self._path(name))
            tensors = self._read(name.replace(".json", ".safetensors"))
            weight, bias, factors = tensors["weight"], tensors["bias"], tensors["factors"]
            states.append(State(weight=weight, bias=bias, factors=factors, **text))
        return states

    def write_state(self, state: State) -> None:
        """Write a round, which exists from now on, and delete targets that are not needed any more."""
        name = f"round-{state.round:03d}"
        tensors = {key: value.contiguous() for key, value in state.to_tensors().items()}
        files.write_bytes(self._path(f"{name}.safetensors"), save_tensors(tensors))
        text = {
            "round": state.round,
            "zero_shot_share": state.zero_shot_share,
            "evidence": state.evidence,
            "metrics": state.metrics,
        }
        files.write_json(self._path(f"{name}.json"), text)
        self._delete(f"{_targets(state.round - KEPT_TARGETS)}-")

    def targets(self, number: int, *, num_rows: int) -> SharedTargets:
        """A round's targets of all rows."""
        return SharedTargets(**self._rows(_targets(number), num_rows=num_rows))

    def write_targets(self, number: int, targets: SharedTargets, *, rows: slice) -> None:
        """Write a worker's rows of a round's targets, before the round itself."""
        if rows.start < rows.stop:
            found = {"values": targets.values[rows], "classes": targets.classes[rows]}
            self._write_rows(_targets(number), found, first_row=rows.start)

    # Neighbours

    def num_neighbours(self) -> int:
        """The number of rows, from the first one on, whose neighbours are there."""
        return self._num_found("neighbours")

    def neighbours(self, num_rows: int) -> Tensor | None:
        """Neighbours (num_rows, k) int32 of the first rows, None of no rows."""
        return self._rows("neighbours", num_rows=num_rows)["places"] if num_rows else None

    def write_neighbours(self, places: Tensor, *, first_row: int) -> None:
        """Write the neighbours (m, k) of the rows from `first_row` on."""
        self._write_rows("neighbours", {"places": places}, first_row=first_row)

    def search(self) -> dict[str, int]:
        """How far a search for neighbours is: the rows that are done, and all; 0 and 0 where nothing is noted."""
        path = self._path("search.json")
        found: dict[str, int] = files.read_json(path) if files.exists(path) else {"done": 0, "of": 0}
        return found

    def note_search(self, done: int, *, num_rows: int) -> None:
        """Note how far a search is."""
        files.write_json(self._path("search.json"), {"done": done, "of": num_rows})

    # Labels

    def write_labels(self, worker: int, *, ids: np.ndarray, found: Pass) -> None:
        """Write a worker's pseudo-labels of its last pass."""
        columns = [
            pa.array(ids, pa.string()),
            pa.array(found.labels),
            pa.array(found.confidence),
            pa.array(found.kept),
        ]
        files.write_parquet(self._path(f"labels-{worker}.parquet"), pa.table(columns, schema=LABELS))

    def pseudo_labels(self) -> pa.Table:
        """The last round's pseudo-labels in row order: id, label, confidence, kept, round."""
        finished = files.read_json(self._path("finished.json"))
        tables = []
        for worker in range(finished["num_workers"]):
            path = self._path(f"labels-{worker}.parquet")
            with files.open_parquet(path, remedy=self._remedy) as found:
                tables.append(files.read_columns(found))
        table = pa.concat_tables(tables)
        return table.append_column("round", pa.array(np.full(len(table), finished["round"], np.int32)))

    # Rows of all workers

    def _write_rows(self, name: str, tensors: Mapping[str, Tensor], *, first_row: int) -> None:
        """Write rows, tensors (m, ...) by name, of which the first is at `first_row` among all rows."""
        found = {key: value.cpu().contiguous() for key, value in tensors.items()}
        (num_rows,) = {len(value) for value in found.values()}
        file = f"{name}-{first_row:010d}-{first_row + num_rows:010d}.safetensors"
        files.write_bytes(self._path(file), save_tensors(found))

    def _rows(self, name: str, *, num_rows: int) -> dict[str, Tensor]:
        """The first rows, by the tensors' names. Raises FileNotFoundError when some are gone."""
        read = [self._read(file) for file, stop in self._pieces(name) if stop <= num_rows]
        found = {key: torch.cat([piece[key] for piece in read]) for key in (read[0] if read else ())}
        if {len(value) for value in found.values()} != {num_rows}:
            raise FileNotFoundError(f"{self.folder} has lost rows of {name}")
        return found

    def _num_found(self, name: str) -> int:
        """The number of rows, from the first one on without a gap, that are there."""
        return max((stop for _, stop in self._pieces(name)), default=0)

    def _pieces(self, name: str) -> list[tuple[str, int]]:
        """Files of rows that follow each other from the first row on, and where each stops."""
        by_start: dict[int, tuple[str, int]] = {}
        for file in files.list_names(self.folder):
            words = file.removesuffix(".safetensors").rsplit("-", 2)
            if words[0] == name:
                by_start[int(words[1])] = file, int(words[2])
        found, stop = [], 0
        while stop in by_start:
            file, stop = by_start[stop]
            found.append((file, stop))
        return found

    def _delete(self, prefix: str) -> None:
        for name in files.list_names(self.folder):
            if name.startswith(prefix):
                files.delete(self._path(name))

    def _read(self, name: str) -> dict[str, Tensor]:
        return read_tensors(self._path(name), remedy=self._remedy)

    @property
    def _remedy(self) -> str:
        return f"remove the folder {self.folder}, its rounds run again"

    def _path(self, name: str) -> str:
        return files.join(self.folder, name)


def _targets(number: int) -> str:
    return f"targets-{number:03d}"


@dataclass
class Search:
    """A worker's search for neighbours: notes how far it is, and writes what it has found, now and then."""

    there: RoundFiles
    num_rows: int
    """Rows of all workers."""
    stop_row: int
    """Place of the row behind the worker's last one."""
    _found: list[Tensor] = field(default_factory=list)
    _first_row: int = 0
    _noted: float = -math.inf
    _written: float = field(default_factory=time.monotonic)

    def show(self, done: int) -> None:
        """Note the number of rows that are done."""
        if time.monotonic() >= self._noted + NOTE_SECONDS:
            self._noted = time.monotonic()
            self.there.note_search(done, num_rows=self.num_rows)

    def keep(self, first_row: int, places: Tensor) -> None:
        """Take the neighbours (m, k) of the rows from `first_row` on, which follow those before."""
        if not self._found:
            self._first_row = first_row
        self._found.append(places.cpu())
        is_last = first_row + len(places) == self.stop_row
        if is_last or time.monotonic() >= self._written + WRITE_SECONDS:
            self.there.write_neighbours(torch.cat(self._found), first_row=self._first_row)
            self._found, self._written = [], time.monotonic()
