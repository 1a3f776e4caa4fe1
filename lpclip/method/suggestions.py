"""The images whose true label would help most: some of every region, more where the probe is unsure.

The features are cut into as many clusters as labels are wanted, in their leading principal components, and every image
counts by how unsure the probe is of it: 1 less the difference of its two largest probabilities. The image nearest to a
cluster's mean stands for it. So many labels go to the regions that are hard, and none is spent twice on the same look;
an outlier stands for nothing and is not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

COMPONENTS = 64
ROWS_FOR_COMPONENTS = 5_000
STEPS = 30
# No image counts for less than this, so that clusters reach the sure images too.
FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Suggestions:
    """Images to ask for, the most helpful first."""

    places: np.ndarray
    """(m,) int64 rows, all different."""
    stands_for: np.ndarray
    """(m,) int64: the images of each one's cluster."""
    unsure: np.ndarray
    """(m,) float64: how unsure the probe is of the cluster's images on the mean, 0 to 1."""


def suggest(features: np.ndarray, probabilities: np.ndarray, *, count: int, seed: int) -> Suggestions:
    """Choose at most `count` of the images with features (N, d) and the probe's probabilities (N, K)."""
    rows = _leading(features.astype(np.float32))
    unsure = how_unsure(probabilities)
    weights = np.maximum(FLOOR, unsure)
    count = min(count, len(np.unique(features, axis=0)))
    found = KMeans(count, n_init=1, max_iter=STEPS, random_state=seed).fit(rows, sample_weight=weights)
    distance = ((rows - found.cluster_centers_[found.labels_]) ** 2).sum(axis=1)
    places, sizes, means = [], [], []
    for cluster in range(count):
        members = np.flatnonzero(found.labels_ == cluster)
        if len(members):
            places.append(members[distance[members].argmin()])
            sizes.append(len(members))
            means.append(unsure[members].mean())
    order = np.argsort(-np.array(sizes) * np.array(means), kind="stable")
    return Suggestions(
        places=np.array(places)[order], stands_for=np.array(sizes)[order], unsure=np.array(means)[order]
    )


def how_unsure(probabilities: np.ndarray) -> np.ndarray:
    """(N,) float64: 1 less the difference of the two largest of probabilities (N, K)."""
    largest = np.partition(probabilities.astype(np.float64), -2, axis=1)[:, -2:]
    return 1 - (largest[:, 1] - largest[:, 0])


def _leading(features: np.ndarray) -> np.ndarray:
    """Features (N, d) in their leading principal components (N, c)."""
    centred = features - features.mean(axis=0)
    _, _, directions = np.linalg.svd(centred[:ROWS_FOR_COMPONENTS], full_matrices=False)
    found: np.ndarray = centred @ directions[:COMPONENTS].T
    return found
