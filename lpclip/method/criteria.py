"""Choosing between trained probes without labels.

No criterion may depend on how sure a probe is, because the temperature that is to be chosen decides that: all look at
the predicted classes alone, except `consensus`, which first brings every probe to one mean confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score

from lpclip.config import Criterion
from lpclip.errors import UserError
from lpclip.method.calibration import temperature_at
from lpclip.method.gaussian import gaussian_probe, make_whitening, row_moments
from lpclip.method.linear import Linear

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
# Criteria that a probe has by itself. The others compare all candidates, so that no trial can report them.
ALONE: tuple[Criterion, ...] = ("structure", "class_ami", "neighbours", "views", "folds")
# Rows that criteria look at: the first in row order, a fair sample.
SAMPLE_ROWS = 6_000
# Images cluster in their leading principal components; the rest is mostly noise, and time.
COMPONENTS = 128
# Clusters for each class: as many as classes, and more, as a class may have several looks.
CLUSTERS_PER_CLASS = (1, 2, 5)
# k-means ends differently from every start: the mean over two is steadier.
STARTS = 2
MIN_ROWS_PER_CLUSTER = 20
NEIGHBOURS = 10
FOLDS = 5
# For `consensus` and nothing else.
CONFIDENCE = 0.7


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """A sample of the unlabelled images, with all of it that criteria compare predictions to."""

    features: np.ndarray
    """(n, d) float16."""
    strong: np.ndarray | None
    """(n, d) float16, a strong view of each, if there is one."""
    components: np.ndarray
    """(n, c) float32, c at most COMPONENTS: principal components, each with its own variance."""
    clusters: np.ndarray
    """(m, n) int32, m clusterings."""
    neighbours: np.ndarray
    """(n, k) int32, of each row the nearest others by cosine of their centred features."""


def make_yardstick(
    features: np.ndarray, *, strong: np.ndarray | None, num_classes: int, seed: int
) -> Yardstick:
    """From features (N, d) in row order, and a strong view of them, the sample that candidates are judged on.

    Raises UserError with fewer than two rows.
    """
    rows = features[:SAMPLE_ROWS]
    if len(rows) < 2:
        raise UserError(f"{len(rows)} images are too few to choose between trials")
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
        strong=None if strong is None else strong[:SAMPLE_ROWS],
        components=components,
        clusters=np.stack(clusters).astype(np.int32),
        neighbours=near.numpy().astype(np.int32),
    )


def measure(yardstick: Yardstick, candidate: Linear, *, criterion: Criterion) -> float | None:
    """What a candidate is worth by one of the criteria `ALONE`, higher being better; None where it has no answer."""
    assert criterion in ALONE, criterion
    predicted, num_classes = candidate.predict(yardstick.features), len(candidate.bias)
    if criterion == "structure":
        # Two witnesses of the images' own structure, at a large scale and at a small one: each is wrong at times.
        large = class_ami(predicted, clusters=yardstick.clusters)
        small = neighbour_kappa(predicted, neighbours=yardstick.neighbours, num_classes=num_classes)
        return max(0.0, large) * max(0.0, small)
    if criterion == "class_ami":
        return class_ami(predicted, clusters=yardstick.clusters)
    if criterion == "neighbours":
        return neighbour_kappa(predicted, neighbours=yardstick.neighbours, num_classes=num_classes)
    if criterion == "views":
        if yardstick.strong is None:
            return None
        return kappa(predicted, candidate.predict(yardstick.strong), num_classes=num_classes)
    return folds(predicted, components=yardstick.components, num_classes=num_classes)


def measure_all(
    yardstick: Yardstick, candidates: Sequence[Linear], *, criterion: Criterion
) -> list[float | None]:
    """What each candidate is worth by a criterion, among all candidates."""
    if criterion == "consensus":
        return list(consensus(yardstick, candidates))
    return [measure(yardstick, candidate, criterion=criterion) for candidate in candidates]


def class_ami(predicted: np.ndarray, *, clusters: np.ndarray) -> float:
    """ClassAMI: adjusted mutual information between predictions (n,) and clusterings (m, n), on the mean.

    Of k-means clusters, which know nothing of class names: a good classifier's classes are the images' own groups
    (Musgrave et al., "Benchmarking Validation Methods for Unsupervised Domain Adaptation", 2022).
    """
    if (
        len(np.unique(predicted)) < 2
    ):  # nothing is told apart, which scikit-learn calls perfect where nothing can be
        return 0.0
    return float(np.mean([adjusted_mutual_info_score(found, predicted) for found in clusters]))


def kappa(first: np.ndarray, second: np.ndarray, *, num_classes: int) -> float:
    """Agreement of two labellings (n,) beyond what their class shares give by chance (Cohen, 1960)."""
    shares = [np.bincount(labels, minlength=num_classes) / len(labels) for labels in (first, second)]
    chance = float(shares[0] @ shares[1])
    return (float((first == second).mean()) - chance) / max(1 - chance, 1e-9)


def neighbour_kappa(predicted: np.ndarray, *, neighbours: np.ndarray, num_classes: int) -> float:
    """Kappa between the predictions (n,) of rows and of their nearest neighbours (n, k)."""
    others = predicted[neighbours]
    return kappa(np.repeat(predicted, others.shape[1]), others.ravel(), num_classes=num_classes)


def folds(predicted: np.ndarray, *, components: np.ndarray, num_classes: int) -> float:
    """Kappa between predictions (n,) and what Gaussian classes make of them that were fitted to other rows.

    On principal components (n, c): predictions that follow the images' structure can be told from a part of them
    (the generalisation score of TURTLE, Gadetsky et al., 2024, with a closed-form probe).
    """
    z = torch.from_numpy(components)
    again = np.empty_like(predicted)
    for fold in range(FOLDS):
        held = np.arange(len(predicted)) % FOLDS == fold
        rest = torch.from_numpy(~held)
        targets = torch.nn.functional.one_hot(torch.from_numpy(predicted[~held]), num_classes).double()
        whitening = make_whitening(row_moments(z[rest]))
        sums, counts = targets.T @ z[rest].double(), targets.sum(dim=0)
        logits = gaussian_probe(sums, counts, whitening=whitening).logits(z[~rest])
        # A class without rows has a mean all the same.
        again[held] = logits.masked_fill(counts == 0, -torch.inf).argmax(dim=1).numpy()
    return kappa(predicted, again, num_classes=num_classes)


def consensus(yardstick: Yardstick, candidates: Sequence[Linear]) -> list[float]:
    """Agreement of each candidate with the average of all, each at the same mean confidence (EnsV: Hu et al., 2024)."""
    mean = torch.zeros(len(yardstick.features), len(candidates[0].bias))
    predictions = [candidate.predict(yardstick.features) for candidate in candidates]
    for candidate in candidates:
        logits = candidate.logits(yardstick.features)
        mean += torch.softmax(logits / temperature_at(logits, confidence=CONFIDENCE), dim=1)
    voted = mean.argmax(dim=1).numpy()
    return [float((predicted == voted).mean()) for predicted in predictions]
