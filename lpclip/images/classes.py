"""Class names, and the way from a source's labels to them. Labels serve evaluation alone."""

from __future__ import annotations

import numpy as np

from lpclip.config import ClassConfig
from lpclip.encoders.prompts import ClassList, read_classes, readable


def resolve_classes(config: ClassConfig, *, label_names: tuple[str, ...] | None) -> ClassList:
    """The classes that `--classes` names, or those that the data itself names.

    Raises ValueError when neither does, or the names do not make a classifier.
    """
    if config.classes is not None:
        return read_classes(config.classes)
    if label_names is None:
        raise ValueError(
            "no class names: give --classes with a comma list or a text file (one name a line); only folders "
            "with a subfolder for each class and data with named labels bring their own"
        )
    return ClassList(names=label_names)


def map_labels(
    labels: np.ndarray, *, label_names: tuple[str, ...] | None, classes: ClassList, data: str
) -> np.ndarray:
    """Labels (N,) int32 of a source to class indices (N,) int64; -1 stays -1, for rows without a label.

    Named labels are matched by name, bare numbers are places in the class list. Raises ValueError when a
    label that occurs is none of the classes.
    """
    seen = np.unique(labels[labels >= 0])
    found = [label_names[i] for i in seen] if label_names else [str(i) for i in seen]
    keys = found
    if classes.labels is not None:
        places = {label: place for place, label in enumerate(classes.labels)}
    elif label_names is not None:
        places = {_key(name): place for place, name in enumerate(classes.names)}
        keys = [_key(name) for name in found]
    else:
        places = {str(place): place for place in range(len(classes.names))}
    missing = [name for name, key in zip(found, keys, strict=True) if key not in places]
    if missing:
        raise ValueError(
            f"{len(missing)} labels of {data} are not in the class list ({', '.join(missing[:5])}); the classes are "
            f"{', '.join(classes.names[:5])}{', ...' if len(classes.names) > 5 else ''}: name them alike, or map each "
            "label in a --classes file with lines label<TAB>name"
        )
    table = np.full(max(seen, default=0) + 2, -1, np.int64)
    table[seen] = [places[key] for key in keys]
    return table[labels]


def _key(name: str) -> str:
    return readable(name).casefold()
