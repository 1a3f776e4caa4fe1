"""Images to use, before they are features: a source that may have to be encoded, or a store that is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lpclip import files
from lpclip.config import SourceConfig, UserError, counted
from lpclip.features.store import Store
from lpclip.images.open import open_source
from lpclip.images.source import Source

ID_WIDTH = 40
"""Most characters of an id in a plan."""


@dataclass(frozen=True)
class Data:
    """Images to use: a source that may have to be encoded, or a complete store that is given as it is."""

    origin: Source | Store

    @property
    def source(self) -> Source | None:
        """The source, None for a given store."""
        return self.origin if isinstance(self.origin, Source) else None

    @property
    def name(self) -> str:
        """A short name, safe in file names."""
        return self.origin.name if isinstance(self.origin, Source) else files.split(self.origin.path)[1]

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names that the labels index; None when there are no labels or they are bare numbers."""
        return (
            self.origin.label_names if isinstance(self.origin, Source) else self.origin.manifest.label_names
        )

    @cached_property
    def has_labels(self) -> bool:
        """Say whether there are labels; those of a store are read for it."""
        return self.origin.has_labels if isinstance(self.origin, Source) else self.origin.has_labels()

    @property
    def identity(self) -> dict[str, Any] | str:
        """Everything that changes the images of a source; the path of a given store."""
        return self.origin.identity if isinstance(self.origin, Source) else self.origin.path

    def noted(self, *notes: str) -> Data:
        """The same images, with further notes for the plan; a given store has none."""
        if not notes or not isinstance(self.origin, Source):
            return self
        return Data(replace(self.origin, notes=(*self.origin.notes, *notes)))

    def examples(self) -> str:
        """First, middle and last image with their labels, for the plan; empty where only reading tells them."""
        if not isinstance(self.origin, Source):
            return ""
        labels = {
            name: "no label" if label is None else label for name, label in self.origin.examples(3).items()
        }
        return ", ".join(
            f"{_short(name)} ({label})" if self.has_labels else _short(name) for name, label in labels.items()
        )

    def describe(self) -> str:
        """One line for the plan."""
        if not isinstance(self.origin, Source):
            return f"{self.name} (feature store)"
        rows = self.origin.num_rows
        count = counted(rows, "image") if rows is not None else "an unknown number of images"
        count_names = len(self.origin.label_names or ())
        names = f" ({counted(count_names, 'name')})" if count_names else ""
        kind = f"labels from {self.origin.labels_from}{names}" if self.has_labels else "no labels"
        if self.origin.has_texts:
            kind = "with texts"
        return f"{self.name}: {count} ({self.origin.kind}, {kind})"


def _short(name: str) -> str:
    """An id on the terminal: the end of a long one, without the query of a URI, which may hold a signature."""
    name = name.partition("?")[0] if "://" in name else name
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= ID_WIDTH else f"...{name[-ID_WIDTH:]}"


def open_data(
    data: str | Sequence[str], *, config: SourceConfig, split: str, limit: int | None = None
) -> Data:
    """The images, or the feature store, that `data` names. Raises UserError when it is neither."""
    values = [data] if isinstance(data, str) else data
    for value in values:
        if files.exists(files.join(value, "manifest.json")):
            if limit is not None:
                raise UserError(
                    f"{value} is a feature store: --limit works on images, before they are encoded"
                )
            if len(values) > 1:
                raise UserError(f"{value} is a feature store: it can only be named alone")
            return Data(Store.open(value))
        if files.exists(files.join(value, "identity.json")):
            raise UserError(
                f"{value} is a feature store that is not complete; run the job that made it again, it goes on there"
            )
    return Data(open_source(data, config=config, split=split, limit=limit))
