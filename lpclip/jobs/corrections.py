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
    """The names of a CSV file's columns and its rows.

    Raises UserError when one of `columns` is not there, or twice, or a row has more cells than there are columns.
    """
    text = files.decode_text(files.read_bytes(path), path=path)
    # Spreadsheets of some countries part columns by semicolons.
    first = text.partition("\n")[0]
    table = csv.DictReader(
        io.StringIO(text, newline=""), restval="", delimiter=max(",;\t", key=first.count), strict=True
    )
    try:
        told = [name.strip() for name in table.fieldnames or ()]
        names = [name.lower() if name.lower() in columns else name for name in told]
        table.fieldnames = names
        for name in columns:
            if names.count(name) != 1:
                found = ", ".join(told) if text.strip() else "nothing: it is empty"
                raise UserError(
                    f"{path} has {'two columns' if name in names else 'no column'} {name}: its first line must name "
                    f"{' and '.join(columns)}, each once, and names {found}"
                )
        rows = []
        for row in table:
            # Cells beyond the last named column are under None.
            if any(row.get(None) or ()):
                raise UserError(
                    f"{path}, line {table.reader.line_num}, has more cells than the first line names columns: put a "
                    "text with commas into quotes"
                )
            rows.append({name: row[name] for name in names})
        return names, rows
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
