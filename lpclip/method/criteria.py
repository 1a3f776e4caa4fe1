"""Label-free criteria, which choose between trained classifiers.

No criterion may depend on how sure a classifier is, because the temperature that is to be chosen decides that. So all
of them look at the predicted classes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score

from lpclip.config import Criterion, UserError, counted
from lpclip.method.agreement import agreement
from lpclip.method.linear import Linear

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
# Criteria look at this many rows, the first in row order: a fair sample.
SAMPLE_ROWS = 6_000
# Images cluster in their leading principal components; the rest is mostly noise, and time.
COMPONENTS = 128
# There are as many clusters as classes, and more, as a class may have several looks.
CLUSTERS_PER_CLASS = (1, 2, 5)
# k-means ends differently from every start: the mean over two is steadier.
STARTS = 2
MIN_ROWS_PER_CLUSTER = 20
NEIGHBOURS = 10
# A classifier whose names zero-shot finds less probable than this, of what it finds its own, is worth nothing: the
# images' structure cannot tell whether groups have the right names, or are groups of what no name means.
NAMES_FLOOR = 0.6


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """A sample of the unlabelled images, with the structure that criteria compare predictions with."""

    features: np.ndarray
    """(n, d) float16."""
    clusters: np.ndarray
    """(m, n) int32, m clusterings."""
    neighbours: np.ndarray
    """(n, k) int32, of each row the nearest others by cosine of their centred features."""
    zero_shot: np.ndarray | None = None
    """(n, K) float32, zero-shot's probabilities; None judges no names."""


def make_yardstick(
    features: np.ndarray, *, num_classes: int, seed: int, zero_shot: Linear | None = None
) -> Yardstick:
    """The sample on which classifiers are judged, from features (N, d) in row order.

    `zero_shot` is the head over the encoder's temperature; without it `structure` judges no names.

    Raises UserError with fewer than two rows.
    """
    rows = features[:SAMPLE_ROWS]
    if len(rows) < 2:
        raise UserError(f"too few to choose between trials: {counted(len(rows), 'image')}")
    seen = torch.from_numpy(rows).float()
    centred = seen - seen.mean(dim=0)
    size = min(COMPONENTS, *centred.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, _, directions = torch.pca_lowrank(centred, q=size, center=False, niter=3)
    components = (centred @ directions).numpy()
    counts = {max(2, min(per * num_classes, len(rows) // MIN_ROWS_PER_CLUSTER)) for per in CLUSTERS_PER_CLASS}
    clusters = [
        KMeans(count, n_init=1, random_state=(STARTS * seed + start) % 2**32, max_iter=50)
        .fit(components)
        .labels_
        for count in sorted(counts)
        for start in range(STARTS)
    ]
    unit = torch.nn.functional.normalize(centred, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    # No more than half of a class: the others would be strangers.
    count = min(NEIGHBOURS, max(1, len(rows) // (2 * num_classes)))
    near = similarity.topk(count, dim=1).indices
    return Yardstick(
        features=rows,
        clusters=np.stack(clusters).astype(np.int32),
        neighbours=near.numpy().astype(np.int32),
        zero_shot=None if zero_shot is None else torch.softmax(zero_shot.logits(rows), dim=1).numpy(),
    )


def measure(yardstick: Yardstick, candidate: Linear, *, criterion: Criterion) -> float:
    """The value of a classifier by a criterion, higher being better."""
    predicted, num_classes = candidate.predict(yardstick.features), len(candidate.bias)
    if criterion == "class_ami":
        return class_ami(predicted, clusters=yardstick.clusters)
    if criterion == "neighbours":
        return neighbour_kappa(predicted, neighbours=yardstick.neighbours, num_classes=num_classes)
    if yardstick.zero_shot is not None and contradicts_names(predicted, zero_shot=yardstick.zero_shot):
        return 0.0
    # Two witnesses of the images' own structure, at a large scale and at a small one: each is wrong at times.
    large = class_ami(predicted, clusters=yardstick.clusters)
    small = neighbour_kappa(predicted, neighbours=yardstick.neighbours, num_classes=num_classes)
    return max(0.0, large) * max(0.0, small)


def class_ami(predicted: np.ndarray, *, clusters: np.ndarray) -> float:
    """ClassAMI: the mean adjusted mutual information between predictions (n,) and clusterings (m, n).

    k-means clusters know nothing of class names: a good classifier's classes are the images' own groups (Musgrave et
    al., "Benchmarking Validation Methods for Unsupervised Domain Adaptation", 2022).
    """
    if len(np.unique(predicted)) < 2:
        # Nothing is told apart, which scikit-learn calls perfect where nothing can be.
        return 0.0
    return float(np.mean([adjusted_mutual_info_score(found, predicted) for found in clusters]))


def neighbour_kappa(predicted: np.ndarray, *, neighbours: np.ndarray, num_classes: int) -> float:
    """Kappa between the predictions (n,) of rows and of their nearest neighbours (n, k)."""
    others = predicted[neighbours]
    own = np.repeat(predicted, others.shape[1])
    return agreement(own, others.ravel(), num_classes=num_classes).kappa


def name_kappa(predicted: np.ndarray, *, zero_shot: np.ndarray) -> float:
    """Zero-shot's mean probability of the predicted names (n,), beyond what names of these shares have by chance.

    `zero_shot` are its probabilities (n, K). 0 is chance, 1 says that zero-shot is sure of all of them. A name that
    zero-shot holds for nearly as probable as its own first choice costs next to nothing.
    """
    shares = np.bincount(predicted, minlength=zero_shot.shape[1]) / len(predicted)
    chance = float(shares @ zero_shot.mean(axis=0))
    found = float(zero_shot[np.arange(len(predicted)), predicted].mean())
    return (found - chance) / max(1 - chance, 1e-9)


def contradicts_names(predicted: np.ndarray, *, zero_shot: np.ndarray) -> bool:
    """Say whether predictions (n,) have names that zero-shot, with probabilities (n, K), all but excludes."""
    own = name_kappa(zero_shot.argmax(axis=1), zero_shot=zero_shot)
    return name_kappa(predicted, zero_shot=zero_shot) < NAMES_FLOOR * own
