"""Class names, and how the labels of a source map to them. Only evaluation uses labels."""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpclip.config import ClassConfig, UserError, counted, readable
from lpclip.files import decode_text
from lpclip.images.columns import whole_number

SYNSET = re.compile(r"(n\d{8})\s+(?=\S)")
"""WordNet's id before a name."""
NUMBERED = re.compile(r"(\d+)[:.)]?[ \t]+(?=\S)")
"""A number before a name."""
NAME_HEADERS = (
    *("name", "names", "class", "classes", "class_name", "classname", "category"),
    *("label", "labels", "label_name", "display_name", "displayname", "description", "words"),
)
LABEL_HEADERS = (
    *("label", "label_name", "labelname", "label_id", "id", "index", "idx", "class", "class_id", "classid"),
    *("category_id", "mid", "synset", "wnid"),
)
"""Words over the columns of class files, which are no class."""


def resolve_classes(config: ClassConfig, *, label_names: tuple[str, ...] | None) -> ClassList:
    """The classes that `--classes` names, else those that the data names.

    Raises UserError when neither names any, when names of the data are numbers or a single one, and as ClassList does.
    """
    if config.classes is not None:
        return read_classes(config.classes)
    if label_names is None:
        raise UserError(
            "no class names: give --classes comma-separated names or a text file (one name a line); only "
            "folders with a subfolder for each class and data with named labels bring their own"
        )
    _refuse_no_names(label_names)
    return ClassList(names=label_names)


def _refuse_no_names(label_names: tuple[str, ...]) -> None:
    """Raise UserError where the data's labels, often folders, say nothing of what is to be seen."""
    examples = ", ".join(label_names[:3]) + (", ..." if len(label_names) > 3 else "")
    if len(label_names) == 1:
        raise UserError(
            f"the data has one label, {examples}, and a classifier needs at least two class names: give --classes, or "
            "name the folder whose subfolders are the classes"
        )
    # 0 to 9 may be digits to recognize; 2023 and 00012 are years and numbers of files.
    if all(name.isdecimal() for name in label_names) and any(len(name) > 1 for name in label_names):
        raise UserError(
            f"the data's labels are numbers ({examples}), which are no class names: give --classes comma-separated "
            "names, or a text file with lines label<TAB>name where the numbers stand for classes"
        )


def names_meet(label_names: tuple[str, ...], classes: ClassList) -> bool:
    """True when any label is the name of a class, or a file says which labels are."""
    return classes.labels is not None or not {*map(_key, classes.names)}.isdisjoint(map(_key, label_names))


def map_labels(
    labels: np.ndarray, *, label_names: tuple[str, ...] | None, classes: ClassList, data: str
) -> np.ndarray:
    """Class indices (N,) int64 of a source's labels (N,) int32; -1 stays -1, for rows without a label.

    Named labels are matched by name. Bare numbers are places in the class list, from 0; so are names that are all
    numbers, as strings in Parquet may be, if none of them is a class. Raises UserError when a label that occurs is not
    in the class list.
    """
    seen = np.unique(labels[labels >= 0])
    found = [label_names[i] for i in seen] if label_names else [str(i) for i in seen]
    keys = found
    are_numbers = label_names is None or _are_numbers(label_names, classes)
    if classes.labels is not None:
        places = {_composed(label): place for place, label in enumerate(classes.labels)}
        if label_names is None:
            places = {_as_number(label): place for label, place in places.items()} | places
        keys = [_composed(name) for name in found]
    elif are_numbers:
        keys = [_as_number(name) for name in found]
        places = {key: -1 for key in keys if key.startswith("-")}
        places |= {str(place): place for place in range(len(classes.names))}
    else:
        places = {_key(name): place for place, name in enumerate(classes.names)}
        keys = [_key(name) for name in found]
    missing = [name for name, key in zip(found, keys, strict=True) if key not in places]
    if missing:
        many = len(missing) > 1
        way = "name them alike, or map each label"
        if are_numbers and classes.labels is None:
            way = f"numbers count from 0, so these are 0 to {len(classes.names) - 1}; map other numbers"
        raise UserError(
            f"{counted(len(missing), 'label')} of {data} {'are' if many else 'is'} not in the class list "
            f"({', '.join(missing[:5])}); the classes are "
            f"{', '.join(classes.names[:5])}{', ...' if len(classes.names) > 5 else ''}: {way} in a --classes file "
            "with lines label<TAB>name"
        )
    indices, is_known = np.full(len(labels), -1, np.int64), labels >= 0
    indices[is_known] = np.array([places[key] for key in keys], np.int64)[
        np.searchsorted(seen, labels[is_known])
    ]
    return indices


def notes_on_names(names: Sequence[str]) -> tuple[str, ...]:
    """A note where all class names begin with a number or a WordNet id, or are one: prompts would hold these too."""
    if not names or not all(re.match(r"n\d{8}|\d+[\W_]", name) for name in names):
        return ()
    return (
        f"classes: the names begin with numbers, as {names[0]} does, and prompts hold these too: a --classes file with "
        "lines label<TAB>name gives other names",
    )


def notes_on_numbers(
    labels: np.ndarray, *, label_names: tuple[str, ...] | None, classes: ClassList, data: str
) -> tuple[str, ...]:
    """Notes where labels (N,) that are numbers seem to count from 1, and where they are numbers written as names.

    -1 is no label, and 0 does not occur where they seem to count from 1.
    """
    numbers = [int(label) for label in np.unique(labels[labels >= 0])]
    notes: tuple[str, ...] = ()
    if classes.labels is not None or (label_names and not _are_numbers(label_names, classes)):
        return ()
    if label_names:
        numbers = [int(_as_number(label_names[label])) for label in numbers]
        notes = (
            f"labels: the numbers in {data} are no class names but count the classes, from 0 ({classes.names[0]}) on",
        )
    if min((number for number in numbers if number >= 0), default=0) != 1:
        return notes
    return (
        *notes,
        f"labels: 0 does not occur in {data}, and numbers count from 0, so that 1 is {classes.names[1]}; if yours "
        "count from 1, a --classes file with lines label<TAB>name says so",
    )


def _are_numbers(label_names: Sequence[str], classes: ClassList) -> bool:
    """True when all names of labels are numbers, and none of them is the name of a class."""
    return not names_meet(tuple(label_names), classes) and all(
        whole_number(name) is not None for name in label_names
    )


def _as_number(label: str) -> str:
    """A label as a number is written: 1.0 and 001 are 1."""
    number = whole_number(label)
    return label if number is None else str(number)


def _key(name: str) -> str:
    return _composed(readable(name).casefold())


def _composed(text: str) -> str:
    """The text with letters and their accents as one character each: some systems write them apart."""
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Class names in the order of the head's rows, and the data's labels for them where those differ.

    Raises UserError for fewer than two classes, an empty name, and names or labels that occur twice.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise UserError(f"at least two class names are needed, got {len(self.names)}")
        for position, name in enumerate(self.names, start=1):
            if not readable(name):
                raise UserError(f"class name {position} of {len(self.names)} is empty")
        _refuse_duplicates("class name", [_key(name) for name in self.names])
        if self.labels is not None:
            assert len(self.labels) == len(self.names)
            _refuse_duplicates("label", [_composed(label) for label in self.labels])


def read_classes(spec: str) -> ClassList:
    """Class names, comma-separated or from a text file with lines of `name` or of `label<TAB>name`.

    The tab may be a blank where all labels are WordNet's ids, as in ImageNet's LOC_synset_mapping.txt, or numbers from
    0 or 1 on, and a comma in a .csv. A first line that says what the columns are is no class, nor is a line that begins
    with # and a blank. A .json is a list of names, or an object with the name of each label. Raises UserError when the
    file cannot be read or mixes the two forms, and as ClassList does.
    """
    if not names_a_file(spec):
        return ClassList(names=tuple(name.strip() for name in spec.split(",")) if spec.strip() else ())
    rows = _class_rows(spec)
    rows = rows[_has_header(rows, is_csv=spec.lower().endswith(".csv")) :]
    widths = {len(row) for row in rows}
    if widths == {2}:
        labels, names = zip(*rows, strict=True)
        return ClassList(names=tuple(map(str.strip, names)), labels=tuple(map(str.strip, labels)))
    if widths - {1}:
        tab = "," if spec.lower().endswith(".csv") else "<TAB>"
        raise UserError(f"{spec}: every line must be a class name, or every line label{tab}name")
    return ClassList(names=tuple(row[0].strip() for row in rows))


def _class_rows(path: str) -> list[Sequence[str]]:
    """A class file's lines, each a name, or a label and a name."""
    lines = read_lines(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        return _json_rows("\n".join(lines), path=path)
    lines = [line for line in lines if not re.match(r"#(\s|$)", line)]
    if suffix in (".yaml", ".yml", ".xml", ".toml"):
        raise UserError(f"{path}: class names are read from text, .csv and .json: write one name a line")
    if suffix == ".csv" and not any("\t" in line for line in lines):
        mark = "," if any("," in line for line in lines) or not all(";" in line for line in lines) else ";"
        return [row or [""] for row in csv.reader(lines, delimiter=mark, skipinitialspace=True)]
    if all(map(SYNSET.match, lines)):
        lines = [SYNSET.sub(r"\1\t", line) for line in lines]
    elif _are_numbered(lines):
        lines = [NUMBERED.sub(r"\1\t", line, count=1) for line in lines]
    return [line.split("\t") for line in lines]


def _are_numbered(lines: Sequence[str]) -> bool:
    """True when the lines are numbered from 0 or 1 on: `101 dalmatians` alone is a name."""
    found = [NUMBERED.match(line) for line in lines]
    numbers = [int(match[1][:18]) for match in found if match]
    return len(lines) > 1 and numbers in (list(range(len(lines))), list(range(1, len(lines) + 1)))


def _has_header(rows: Sequence[Sequence[str]], *, is_csv: bool) -> bool:
    """True when the first of these rows says what the columns are; a single column has that in a .csv alone."""
    words = [word.strip().lower().replace(" ", "_") for word in rows[0]] if rows else []
    if len(words) == 1:
        return is_csv and words[0] in NAME_HEADERS
    return len(words) == 2 and words[0] in LABEL_HEADERS and words[1] in NAME_HEADERS


def _json_rows(text: str, *, path: str) -> list[Sequence[str]]:
    try:
        # An object becomes a tuple of pairs, of which none is lost where one label has two names.
        found = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the JSON cannot be read ({error})") from error
    rows: list[Sequence[str]] = []
    if isinstance(found, tuple):
        rows = list(found)
    elif isinstance(found, list):
        rows = [(name,) for name in found]
    if not rows or not all(isinstance(cell, str) for row in rows for cell in row):
        raise UserError(
            f"{path}: expected is a JSON list of class names, or an object with the name of each label"
        )
    return rows


def names_a_file(spec: str) -> bool:
    """True when `spec` names a file. Raises UserError when it looks like a file that does not exist."""
    if "," not in spec and (Path(spec).suffix in (".txt", ".tsv", ".csv", ".json") or os.sep in spec):
        if not Path(spec).is_file():
            raise UserError(f"no such file: {spec}")
        return True
    return len(spec) < 256 and Path(spec).is_file()


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 text file, without empty ones at its end. Raises UserError when it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} as text: {error}") from error
    return decode_text(data, path=path).rstrip().splitlines()


def _refuse_duplicates(kind: str, values: Sequence[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise UserError(f"{kind} {value!r} occurs twice")
        seen.add(value)
