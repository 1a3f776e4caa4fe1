"""The images of a training that people should look at: places and numbers, no pictures. No label is needed.

Places index rows of the arrays that a function is given. This module imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("surest", "least sure", "most typical")
"""Kinds of images of a class. The most typical one is nearest to the mean feature of the class."""

LEAST_GROUPS, MOST_GROUPS = 8, 150
GROUP_ROWS = 80
"""Images of a group on the mean."""
LEAST_OF_A_GROUP = 10
STANDS_OUT = 1.5
"""Standard deviations below the median of all groups from which a group stands out."""
NEAR = 0.9
"""Cosine of centred features from which two images are nearly equal. Below it, other images look alike too."""
DIRECTIONS, FIRST_ROWS = 128, 5000
"""Principal directions in which groups and nearest images are looked for, and the rows that give them."""
BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """A classifier's labels of N images."""

    label: np.ndarray
    """(N,) int64 class indices."""
    confidence: np.ndarray
    """(N,) float32: the probability of the label."""

    def take(self, rows: np.ndarray) -> Labelling:
        """The labels of some rows."""
        return Labelling(label=self.label[rows], confidence=self.confidence[rows])


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two classes, as in "zero-shot said the first, the probe says the second", and the number of such images."""

    first: int
    second: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images that look alike, and that no class name seems to fit."""

    rows: np.ndarray
    """(n,) places, from the middle of the group outwards."""
    confidence: float
    """Zero-shot's mean confidence in the group."""
    nearest: tuple[int, ...]
    """The classes whose names are nearest to its mean feature."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Two images that are nearly equal."""

    first: int
    second: int
    cosine: float


def frequent_pairs(first: np.ndarray, second: np.ndarray, *, num_classes: int) -> list[Pair]:
    """The pairs of different classes that two labellings (N,) give the same images, most frequent first."""
    rows = first != second
    codes, counts = np.unique(first[rows].astype(np.int64) * num_classes + second[rows], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        Pair(first=int(code // num_classes), second=int(code % num_classes), count=int(count))
        for code, count in zip(codes[order], counts[order], strict=True)
    ]


def examples_of_classes(
    features: np.ndarray, labels: Labelling, *, num_classes: int, each: int
) -> dict[int, dict[str, list[int]]]:
    """Places of up to `each` images of each of KINDS, by class, of features (n, d); no image is shown twice."""
    order = np.argsort(labels.label, kind="stable")
    ends = np.searchsorted(labels.label[order], np.arange(num_classes + 1))
    found = {}
    for number in range(num_classes):
        rows = order[ends[number] : ends[number + 1]]
        if not len(rows):
            continue
        mean = features[rows].astype(np.float32).mean(axis=0)
        confidence, likeness = labels.confidence[rows], features[rows].astype(np.float32) @ mean
        kinds: dict[str, list[int]] = {}
        shown: set[int] = set()
        # A small class is shared out, so that no kind takes all of its images.
        for kind, scores in zip(KINDS, (-confidence, confidence, -likeness), strict=True):
            best = (int(row) for row in rows[np.argsort(scores, kind="stable")] if int(row) not in shown)
            kinds[kind] = [row for row, _ in zip(best, range(min(each, -(-len(rows) // 3))), strict=False)]
            shown |= set(kinds[kind])
        found[number] = kinds
    return found


def centred(features: np.ndarray) -> np.ndarray:
    """Features (n, d) from their mean, of unit norm: (n, d) float32.

    Encoders differ in how alike they find any two images, and that is in the mean.
    """
    rows = features.astype(np.float32)
    if len(rows):
        rows -= rows.mean(axis=0)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return rows


def principal(rows: np.ndarray) -> np.ndarray:
    """Centred features (n, d) in at most DIRECTIONS principal directions of the first ones: (n, k) float32."""
    first = rows[:FIRST_ROWS]
    _, directions = np.linalg.eigh(first.T @ first)
    return np.asarray(rows @ directions[:, ::-1][:, :DIRECTIONS], np.float32)


def misfits(
    rows: np.ndarray, features: np.ndarray, names: np.ndarray, *, confidence: np.ndarray, most: int
) -> list[Group]:
    """The k-means groups of images whose features (n, d) are least like the class name that they are most like.

    `rows` (n, k) are their principal directions, `names` (K, d) the embeddings of the class names, `confidence` (n,) is
    zero-shot's. A group is there only where it stands out from all groups.
    """
    from sklearn.cluster import MiniBatchKMeans  # takes a second, which a job's plan need not wait for

    count = min(MOST_GROUPS, len(rows) // GROUP_ROWS)
    if count < LEAST_GROUPS:
        return []
    likeness = np.concatenate(
        [
            (features[start : start + BLOCK].astype(np.float32) @ names.T).max(axis=1)
            for start in range(0, len(features), BLOCK)
        ]
    )
    means = MiniBatchKMeans(count, random_state=0, n_init=1, batch_size=4096, max_iter=30).fit(rows)
    numbers = [n for n in range(count) if (means.labels_ == n).sum() >= LEAST_OF_A_GROUP]
    groups = [np.flatnonzero(means.labels_ == number) for number in numbers]
    levels = np.array([likeness[group].mean() for group in groups])
    # The median and its deviation: groups that stand out would hide in their own spread.
    middle = np.median(levels)
    spread = 1.4826 * np.median(np.abs(levels - middle))
    found = []
    for place in np.argsort(levels, kind="stable")[:most]:
        if levels[place] >= middle - STANDS_OUT * spread:
            break
        group, centre = groups[place], means.cluster_centers_[numbers[place]]
        outwards = np.argsort(((rows[group] - centre) ** 2).sum(axis=1), kind="stable")
        to_names = names @ features[group].astype(np.float32).mean(axis=0)
        nearest = tuple(int(name) for name in np.argsort(-to_names, kind="stable")[:3])
        mean = float(confidence[group].mean())
        found.append(Group(rows=group[outwards], confidence=mean, nearest=nearest))
    return found


def num_repeated(features: np.ndarray) -> int:
    """The number of images whose features (N, d) are, bit by bit, those of an earlier image."""
    return len(features) - len({hash(row.tobytes()) for row in features})


def near_duplicates(rows: np.ndarray, features: np.ndarray) -> list[Likeness]:
    """Each image with the one that is nearest to it, where their cosine is at least NEAR; most alike first.

    `features` (n, d) are centred, and the nearest one is looked for in their principal directions `rows` (n, k).
    """
    half_squares = (rows**2).sum(axis=1) / 2
    found: dict[tuple[int, int], float] = {}
    for start in range(0, len(rows) if len(rows) > 1 else 0, BLOCK):
        block = rows[start : start + BLOCK]
        here = np.arange(start, start + len(block))
        # The nearest one has the largest: the distance's square is the block's own square less twice this.
        closeness = block @ rows.T
        closeness -= half_squares
        closeness[np.arange(len(block)), here] = -np.inf
        nearest = closeness.argmax(axis=1)
        cosine = np.einsum("nd,nd->n", features[here], features[nearest])
        for place in np.flatnonzero(cosine >= NEAR):
            first, second = sorted((int(here[place]), int(nearest[place])))
            found[first, second] = min(1.0, float(cosine[place]))
    pairs = [Likeness(first=first, second=second, cosine=cosine) for (first, second), cosine in found.items()]
    return sorted(pairs, key=lambda pair: (-pair.cosine, pair.first))


def reasons(rows: Sequence[dict[str, str]], *, most: int) -> list[tuple[str, str, int, list[str]]]:
    """Stage, reason, number and first ids of quarantined images, most frequent reason first."""
    counts = Counter((row["stage"], row["error"]) for row in rows)
    frequent = counts.most_common(most)
    ids: dict[tuple[str, str], list[str]] = {key: [] for key, _ in frequent}
    for row in rows:
        names = ids.get((row["stage"], row["error"]))
        if names is not None and len(names) < 3:
            names.append(row["id"])
    return [(stage, error, count, ids[stage, error]) for (stage, error), count in frequent]
