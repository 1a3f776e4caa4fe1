"""The CSV file of the labels that a person gives: columns id and label, written whole after every answer."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lpclip import files
from lpclip.config import UserError

NONE = "none of these"
"""The label of an image that shows none of the classes."""


def read_csv(path: str, *, columns: tuple[str, ...]) -> tuple[list[str], list[dict[str, str]]]:
    """The names of a CSV file's columns and its rows. Raises UserError when one of `columns` is not there."""
    text = files.decode_text(files.read_bytes(path), path=path)
    # Spreadsheets of some countries part columns by semicolons.
    first = text.partition("\n")[0]
    table = csv.DictReader(
        io.StringIO(text, newline=""), restval="", delimiter=max(",;\t", key=first.count), strict=True
    )
    try:
        names = [*(table.fieldnames or ())]
        missing = [name for name in columns if name not in names]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]}: its first line must name {', '.join(columns)}"
            )
        # Cells beyond the last named column are under None.
        return names, [{name: row[name] for name in names} for row in table]
    except csv.Error as error:
        raise UserError(
            f"{path} is no CSV file that can be read: line {table.reader.line_num}: {error}"
        ) from error


@dataclass(frozen=True)
class Corrections:
    """The labels in a file, which is read again before every change, so that those of other hands stay."""

    path: str
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def labels(self) -> dict[str, str]:
        """The label of each id, none where the file is not there yet."""
        return {row["id"]: row["label"] for row in self._read()[1] if row["label"]}

    def set(self, name: str, label: str) -> None:
        """Write the label of one id, in the row that the id has, else in a new one."""
        with self._lock:
            columns, rows = self._read()
            known = [row for row in rows if row["id"] == name]
            if not known:
                known = [dict.fromkeys(columns, "") | {"id": name}]
                rows += known
            for row in known:
                row["label"] = label
            self._write(columns, rows)

    def write(self, labels: Mapping[str, str]) -> None:
        """Write these labels by id, and nothing else."""
        self._write(["id", "label"], [{"id": name, "label": label} for name, label in labels.items()])

    def _write(self, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
        sink = io.StringIO(newline="")
        table = csv.DictWriter(sink, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        files.write_bytes(self.path, sink.getvalue().encode())

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not files.exists(self.path):
            return ["id", "label"], []
        return read_csv(self.path, columns=("id", "label"))
