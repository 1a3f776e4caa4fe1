"""Labels that people gave some of the images, from the CSV file that `--labels` names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpclip import files
from lpclip.config import UserError, counted, did_you_mean, digest, readable
from lpclip.features.store import Features, Store
from lpclip.jobs.corrections import NONE, Corrections, read_csv
from lpclip.method.few_labels import NONE_OF_THESE, FewLabels


@dataclass(frozen=True, kw_only=True)
class GivenLabels:
    """Labels by image, as indices of all class names."""

    path: str
    class_names: tuple[str, ...]
    by_id: dict[str, int]
    """Class indices, or NONE_OF_THESE."""
    num_empty: int
    """Rows of the file without a label."""

    @property
    def digest(self) -> str:
        """The identity of the labels. It does not depend on the file or on its order."""
        return digest({name: self._text(label) for name, label in self.by_id.items()})

    def keep(self, out: str) -> None:
        """Write OUT/corrections.csv, unless it is there: a further round of questions goes on with these labels."""
        corrections = Corrections(files.join(out, "corrections.csv"))
        if not files.exists(corrections.path):
            corrections.write({name: self._text(label) for name, label in self.by_id.items()})

    def among(self, present: np.ndarray | None) -> dict[str, int]:
        """The labels by image, as indices of the names at these places (K',); None is for all names."""
        if present is None:
            return self.by_id
        place_of = {int(place): index for index, place in enumerate(present)}
        return {name: place_of.get(label, label) for name, label in self.by_id.items()}

    def check_present(self, present: np.ndarray | None) -> None:
        """Raise UserError for a label whose class `--present` leaves out."""
        for label in self.by_id.values():
            if present is not None and label >= 0 and label not in present:
                raise UserError(
                    f"{self.path} has images of {self.class_names[label]!r}, which --present leaves out: add the name "
                    "there, or leave --present out"
                )

    def check_images(self, store: Store, *, data: str) -> None:
        """Raise UserError for an id that none of the encoded images has."""
        missing = sorted(self.by_id.keys() - set(store.ids().tolist()))
        if not missing:
            return
        bad = set(store.quarantined_ids()).intersection(missing)
        if bad:
            raise UserError(
                f"{self.path} has a label for {min(bad)}, which is an image of {data} that could not be read: remove "
                f"its row ({counted(len(bad), 'row')} of that kind)"
            )
        hint = did_you_mean(missing[0], store.ids()[:20_000].tolist())
        if len(missing) == len(self.by_id):
            hint = "; these seem to be labels of other images"
        raise UserError(
            f"{self.path}: {counted(len(missing), 'id')} of {len(self.by_id)} "
            f"{'is' if len(missing) == 1 else 'are'} not among the images of {data}, the first is {missing[0]!r}{hint}"
        )

    def few(self, features: Features) -> FewLabels:
        """The labels with the features (N, d) of their images."""
        labels = np.full(len(features.ids), -1, np.int64)
        for row, name in enumerate(features.ids.tolist()):
            labels[row] = self.by_id.get(name, -1)
        found = FewLabels.of_rows(labels, features.base)
        assert found is not None, "check_images has found them"
        return found

    def told(self) -> str:
        """The number of labels, in a line for the plan."""
        none = sum(label == NONE_OF_THESE for label in self.by_id.values())
        classes = len({label for label in self.by_id.values() if label >= 0})
        text = f"{counted(len(self.by_id) - none, 'image')} of {classes} classes"
        if none:
            text += f", {counted(none, 'image')} of none"
        if self.num_empty:
            text += f"; {counted(self.num_empty, 'row')} without a label"
        return f"{text} ({self.path})"

    def summary(self) -> dict[str, Any]:
        """For OUT/summary.json."""
        counts = Counter(self._text(label) for label in self.by_id.values())
        return {"images": len(self.by_id), "digest": self.digest, "by_class": dict(sorted(counts.items()))}

    def _text(self, label: int) -> str:
        return NONE if label == NONE_OF_THESE else self.class_names[label]


def read_given_labels(path: str | None, class_names: tuple[str, ...]) -> GivenLabels | None:
    """The labels of the file that `--labels` names, None without one.

    Raises UserError when the file cannot be read, has no label, one that is no class, or two of one image.
    """
    if path is None:
        return None
    try:
        _, rows = read_csv(path, columns=("id", "label"))
    except OSError as error:
        raise UserError(f"--labels {path} cannot be read: {error.strerror or error}") from error
    num_empty = 0
    exact = {name: place for place, name in enumerate(class_names)}
    loose = _loose_names(class_names)
    found: dict[str, int] = {}
    for row in rows:
        name, label = row["id"], row["label"].strip()
        if not label:
            num_empty += 1
            continue
        index = exact.get(label, loose.get(readable(label).casefold()))
        if index is None:
            hint = did_you_mean(label, class_names) or f"; the classes are {', '.join(class_names[:8])}" + (
                ", ..." if len(class_names) > 8 else ""
            )
            raise UserError(f"{path}: the label {label!r} of {name!r} is no class and not {NONE!r}{hint}")
        if found.setdefault(name, index) != index:
            raise UserError(f"{path} has two labels for {name!r}: keep one of them")
    if not found:
        raise UserError(f"{path} has no label: fill in the column `label`, or leave --labels out")
    return GivenLabels(path=path, class_names=class_names, by_id=found, num_empty=num_empty)


def _loose_names(class_names: tuple[str, ...]) -> dict[str, int]:
    """The class index of each name in small letters that only one class has, and NONE."""
    names = [readable(name).casefold() for name in class_names]
    counts = Counter(names)
    return {NONE: NONE_OF_THESE} | {name: place for place, name in enumerate(names) if counts[name] == 1}


def left_out(y: np.ndarray, x: np.ndarray, given: FewLabels | None) -> np.ndarray:
    """The labels (M,) to evaluate on, -1 also for images whose label the training was given.

    `x` (M, d) are their features: an image under another name has the same, bit by bit.
    """
    if given is None:
        return y
    known = {row.tobytes() for row in given.features.numpy().astype(x.dtype)}
    is_known = np.fromiter((row.tobytes() in known for row in x), bool, count=len(x))
    return np.where(is_known, -1, y)
