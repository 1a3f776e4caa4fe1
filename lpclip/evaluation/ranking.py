"""Image-text retrieval: at which rank an encoder finds the texts of an image, and the images of a text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lpclip.evaluation.bootstrap import bootstrap_blocks
from lpclip.evaluation.results import Direction, Recall, Retrieval

RECALLS = (1, 5, 10)
# This many scores are held at once: 64 MB.
MAX_SCORES = 1 << 24


def retrieval_metrics(
    images: np.ndarray,
    texts: np.ndarray,
    *,
    image_index: np.ndarray,
    text_index: np.ndarray,
    max_scores: int = MAX_SCORES,
    advance: Callable[[int], object] = lambda count: None,
) -> Retrieval:
    """Recall at 1, 5 and 10, with 95% intervals, and the median rank in both directions.

    Images (N, d) and texts (M, d) are unit-norm features, float16 or float32. Pair p is the image image_index[p] and
    the text text_index[p], both (P,) int64; an image may have several texts and a text several images, and each is
    in one pair at least. In image_to_text the images are the queries and all texts the candidates, in text_to_image
    the other way round. Recall at k is the share of queries whose rank, as `ranks` defines it, is k at most.
    `advance` is called with the number of queries that were ranked since its last call. Raises ValueError as `ranks`
    does.
    """

    def measure(
        queries: np.ndarray,
        candidates: np.ndarray,
        own: tuple[np.ndarray, np.ndarray],
        drawn_with: np.ndarray,
    ) -> Direction:
        place = ranks(
            queries,
            candidates,
            query_index=own[0],
            candidate_index=own[1],
            max_scores=max_scores,
            advance=advance,
        )
        hits = np.stack([place <= k for k in RECALLS], axis=1)
        intervals = recall_intervals(hits, drawn_with=drawn_with, num_images=len(images)).T.tolist()
        shares = zip(RECALLS, hits.mean(axis=0).tolist(), intervals, strict=True)
        return Direction(
            recalls=tuple(Recall(at, value, (low, high)) for at, value, (low, high) in shares),
            median_rank=float(np.median(place)),
        )

    # Texts of one image say much the same, so they are drawn together; a text of several images, with the first.
    order = np.argsort(text_index, kind="stable")
    first = image_index[order][np.searchsorted(text_index[order], np.arange(len(texts)))]
    return Retrieval(
        image_to_text=measure(images, texts, (image_index, text_index), np.arange(len(images))),
        text_to_image=measure(texts, images, (text_index, image_index), first),
    )


def recall_intervals(
    hits: np.ndarray, *, drawn_with: np.ndarray, num_images: int, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """The 95% percentile bootstrap intervals (2, R) of the means of hits (Q, R) bool, the first row the lower ends.

    Images are resampled: each of the Q queries is drawn as often as the image drawn_with (Q,) int64 of it.
    """
    columns = np.column_stack([hits, np.ones(len(hits))])
    sums = np.stack([np.bincount(drawn_with, column, minlength=num_images) for column in columns.T], axis=1)
    blocks = bootstrap_blocks(num_images, resamples=resamples, seed=seed)
    drawn = torch.cat([counts @ torch.from_numpy(sums).float() for counts in blocks]).double().numpy()
    # Images without a query of their own may be all that is drawn.
    drawn = drawn[drawn[:, -1] > 0]
    return np.percentile(drawn[:, :-1] / drawn[:, -1:], [2.5, 97.5], axis=0)


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    *,
    query_index: np.ndarray,
    candidate_index: np.ndarray,
    max_scores: int = MAX_SCORES,
    advance: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """The rank (N,) float64 of each of the queries (N, d): that of the best of its own among candidates (M, d).

    Query query_index[p] owns candidate candidate_index[p], both (P,) int64; the other candidates are foreign to it.
    Scores are inner products in float32. A rank is 1 + the number of foreign candidates that score higher than the
    best own one + half the number of those that score the same: its mean over all orders of ties.
    About `max_scores` scores are held at once, those of one query at least; `advance` is called with the number of
    queries that were ranked since its last call. Raises ValueError for features that are NaN or infinite.
    """
    q, c = (torch.from_numpy(np.asarray(features, np.float32)) for features in (queries, candidates))
    # A NaN scores neither higher nor the same: all ranks would be 1.
    if not (q.isfinite().all() and c.isfinite().all()):
        raise ValueError("features that are NaN or infinite have no ranks: the encoder's weights are damaged")
    assert len(np.unique(query_index)) == len(q), "each query owns a candidate"
    order = np.argsort(query_index, kind="stable")
    owner, own = query_index[order], torch.from_numpy(candidate_index[order])
    step = max(1, max_scores // len(c))
    found = np.empty(len(q))
    for start in range(0, len(q), step):
        scores = q[start : start + step] @ c.T
        pairs = slice(*np.searchsorted(owner, [start, start + step]))
        rows, columns = torch.from_numpy(owner[pairs] - start), own[pairs]
        best = torch.full((len(scores),), -torch.inf).scatter_reduce(0, rows, scores[rows, columns], "amax")
        scores[rows, columns] = -torch.inf  # what is left to compare with is foreign
        higher, same = (scores > best[:, None]).sum(dim=1), (scores == best[:, None]).sum(dim=1)
        found[start : start + step] = (1 + higher + same.double() / 2).numpy()
        advance(len(scores))
    return found
