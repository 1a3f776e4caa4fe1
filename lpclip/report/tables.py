"""Rows of results as columns of text, for the terminal and for the page."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A number written as text, with whatever follows it (an interval, a unit, a mark); or a dash for none.
NUMBER = re.compile(r"[-+−±<>≤≥~≈]?\s*(\d|$)")


@dataclass(frozen=True)
class Column:
    """A column as it is shown: its name, a text for each row, and whether these are numbers."""

    name: str
    cells: tuple[str, ...]
    numeric: bool


def columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """One column for each key in order of appearance, formatted as `table` says."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [_column(name, [row.get(name) for row in rows]) for name in names]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text, one column for each key in order of appearance.

    Texts are aligned left, numbers right, also those written as text ("72.4 ± 0.3"). A column whose name ends
    in % shows a fraction in per cent; other floats have three decimals. None, and a key that a row lacks, is a
    dash.
    """
    lines: list[list[str]] = [[] for _ in range(len(rows) + 2)]
    for column in columns(rows):
        width = max(map(len, (column.name, *column.cells)))
        for line, cell in zip(lines, (column.name, "-" * width, *column.cells), strict=True):
            line.append(cell.rjust(width) if column.numeric else cell.ljust(width))
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _column(name: str, values: Sequence[Any]) -> Column:
    numeric = all(NUMBER.match(value) for value in values if isinstance(value, str))
    return Column(name, tuple(_cell(value, name) for value in values), numeric)


def _cell(value: Any, name: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, (bool, str)):
        return str(value)
    if name.endswith("%"):
        return f"{100 * value:.1f}"
    return f"{value:,}" if isinstance(value, numbers.Integral) else f"{value:.3f}"
