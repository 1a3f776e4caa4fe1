"""The label-free baselines of the field on frozen features, from their papers' equations, and the supervised ceiling.

METHODS maps a name to a function from a Problem (unlabelled features, text heads, temperature) to a Solution (class
probabilities of any features; for transductive methods also those of the unlabelled rows). Every method has one
set of hyperparameters for all data, its paper's; a temperature of 0.01, CLIP's, is the encoder's own here. All
of these are reconstructions from published descriptions, not the authors' programs; none uses labels or chance
beyond a fixed seed. Features stay in float16 and are widened in blocks; no n x n matrix is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpclip.config import SelfTrainingConfig
from lpclip.method.priors import Prior
from lpclip.method.probe import Probe, zero_shot_probe
from lpclip.method.recipe import RECIPE
from lpclip.method.self_training import Rounds
from lpclip.method.shard import Shard
from lpclip.method.supervised import supervised_probe

BLOCK_ROWS = 4096
SEARCH_ROWS = 1024
# Probabilities below it count as 0: sharp softmaxes are full of denormal floats, which slow a matrix product
# many times over.
DUST = 1e-12
# Columns that `Problem.neighbours` needs: ZLaP looks at five, TransCLIP and StatA at three of them.
NUM_NEIGHBOURS = 5
# The probes of `fit_probe`: the middle of the strengths that the supervised ceiling tries.
STRENGTH = 10.0
FIT_STEPS = 100

LP_CLIP_RATE = 0.1

INMAP_ROWS = 20_000
INMAP_STEPS = 2000
INMAP_RATE = 10.0
INMAP_THRESHOLD = 0.6
# Settled: over so many steps the gradient's norm changed by less than this share.
INMAP_PATIENCE = 50
INMAP_TOLERANCE = 1e-3
SINKHORN_STEPS = 20

TRANSCLIP_NEIGHBOURS = 3
TRANSCLIP_STEPS = 10
TRANSCLIP_INNER_STEPS = 5
TRANSCLIP_PROTOTYPE_ROWS = 8
# Share of the mean variance that no variance falls below.
VARIANCE_FLOOR = 1e-3
# What a row's log density counts beside the log of its zero-shot probability, in both authors' programs.
DENSITY_WEIGHT = 1 / 50

ZLAP_ALPHA = 0.3
ZLAP_GAMMA = 5.0
# The series sum_t (alpha S)^t is cut where alpha^t falls below float32's precision.
ZLAP_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of a label-free method."""

    features: np.ndarray
    """(n, d) float16, unit norm: the unlabelled rows."""
    head: Tensor
    """(K, d) float32, unit norm: text embeddings, averaged over prompts."""
    single_head: Tensor
    """(K, d) float32, unit norm: text embeddings of the one prompt `a photo of a {}.`."""
    temperature: float
    """The encoder's softmax temperature, 0.01 for CLIP."""
    neighbours: Tensor | None = None
    """(n, at least 5) int64 from `cosine_neighbours`, nearest first; computed where needed without it."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The classifier that a method learnt."""

    logits: Callable[[np.ndarray | Tensor], Tensor]
    """(m, d) unit-norm features of any float dtype to (m, K) float32 logits, each row by itself."""
    transductive: Tensor | None = None
    """(n, K) float32 probabilities of the unlabelled rows themselves, where a method is made for those."""

    def predict(self, features: np.ndarray | Tensor) -> Tensor:
        """(m, d) unit-norm features of any float dtype to (m, K) float32 probabilities."""
        return torch.softmax(self.logits(features), dim=1)


def zero_shot_single(problem: Problem) -> Solution:
    """Zero-shot with one prompt (CLIP, ICML 2021)."""
    return Solution(logits=zero_shot_probe(problem.single_head, temperature=problem.temperature).logits)


def zero_shot(problem: Problem) -> Solution:
    """Zero-shot with the prompt ensemble (CLIP, ICML 2021): softmax(f . head / temperature)."""
    return Solution(logits=_zero_shot_probe(problem).logits)


def domain_centred(problem: Problem) -> Solution:
    """Zero-shot of features less the unlabelled rows' mean, normalised again."""
    mean, probe = _mean(problem), _zero_shot_probe(problem)

    def logits(features: np.ndarray | Tensor) -> Tensor:
        pieces = [F.normalize(f - mean, dim=1) for _, f in _blocks(features)]
        return torch.cat([probe.logits(piece) for piece in pieces])

    return Solution(logits=logits)


def naive_hard_labels(problem: Problem) -> Solution:
    """A linear probe fitted to the argmax labels of zero-shot (pseudo-labels, ICML workshop 2013), each row alike."""
    start = _zero_shot_probe(problem)
    labels = start.logits(problem.features).argmax(dim=1)
    targets = F.one_hot(labels, len(problem.head)).float()
    return Solution(logits=fit_probe(problem.features, targets, start=start).logits)


def lp_clip(problem: Problem) -> Solution:
    """LP-CLIP (arXiv 2309.10361), reconstructed: confidence-weighted cross-entropy on the teacher's labels, in rounds.

    The student sees the features that the teacher sees: a Problem has no strong views. What lpclip's gradient solver
    adds is left out: class prior, neighbours, class shares in the loss, a lower learning rate, zero-shot's share.
    """
    shard = Shard(features=problem.features, num_rows=len(problem.features))
    head = problem.head / problem.temperature
    config = SelfTrainingConfig(solver="gradient", rounds=4, prior="none")
    prior = Prior(strength=0.0)
    recipe = replace(RECIPE, gradient_rate=LP_CLIP_RATE, gradient_balance=0.0, text_rows=0.0)
    *_, (state, _) = Rounds(shard, head=head, config=config, prior=prior, recipe=recipe).run()
    return Solution(logits=state.classifier(head).logits)


def inmap(problem: Problem) -> Solution:
    """InMaP (NeurIPS 2023): class proxies W of unit norm, fitted to zero-shot labels that Sinkhorn has balanced.

    Targets P: softmax(f . head / t), 20 Sinkhorn iterations toward equal classes, rows above 0.6 made one-hot.
    Full-batch gradient descent on CE(P, softmax(f . W / 4t)) from W = head, columns normalised after each of the
    2,000 steps; the rate starts at 10 and halves whenever the gradient's norm grows. Targets come from all rows,
    steps see at most 20,000, evenly spaced; they end early once the gradient's norm has settled (to 0.1% over 50
    steps; not at 0, as its part along the normalised columns stays). Probabilities are those of the
    student's temperature, 4t.
    """
    student = 4 * problem.temperature
    targets = sinkhorn(_zero_shot_probe(problem).probabilities(problem.features), num_steps=SINKHORN_STEPS)
    sure = targets.amax(dim=1) > INMAP_THRESHOLD
    hard = F.one_hot(targets.argmax(dim=1), targets.shape[1]).float()
    rows = np.unique(np.linspace(0, len(targets) - 1, min(len(targets), INMAP_ROWS)).round().astype(np.int64))
    targets = torch.where(sure[:, None], hard, targets)[rows]
    x = torch.from_numpy(problem.features[rows]).float()
    wanted = targets.T @ x
    weight, rate = problem.head, INMAP_RATE
    norms = [torch.inf]
    for _ in range(INMAP_STEPS):
        posterior = F.threshold(torch.softmax(x @ weight.T / student, dim=1), DUST, 0.0)
        gradient = posterior.T @ x - wanted
        norms.append(float(gradient.norm()))
        rate = rate / 2 if norms[-1] > norms[-2] else rate
        weight = F.normalize(weight - rate / (len(x) * student) * gradient, dim=1)
        recent = norms[-INMAP_PATIENCE:]
        if len(norms) > INMAP_PATIENCE and max(recent) - min(recent) < INMAP_TOLERANCE * recent[-1]:
            break
    return Solution(logits=zero_shot_probe(weight, temperature=student).logits)


def logit_centring(problem: Problem) -> Solution:
    """Class-wise logit centring: each class's mean logit over the unlabelled rows is taken off."""
    probe = _zero_shot_probe(problem)
    bias = -(probe.weight @ _mean(problem))
    return Solution(logits=Probe(weight=probe.weight, bias=bias).logits)


def statistical_anchor(problem: Problem) -> Solution:
    """StatA (CVPR 2025): TransCLIP with Gaussian classes held to text anchors N(t_k, S'), each worth one row.

    S' is the diagonal variance of the rows about the text embeddings t_k, weighted by zero-shot's posterior. With
    v_k the mean of class k under the assignments z, of unit norm, n_k its number of rows by argmax and
    b_k = n_k / (n_k + 1), the mean and diagonal variance of class k are
        mu_k = b_k v_k + (1 - b_k) t_k, of unit norm,
        S_k = b_k sum_i z_ik (f_i - mu_k)^2 / sum_i z_ik + (1 - b_k) (S' + (t_k - mu_k)^2).
    Starts from t_k and S'. The density has det S_k, which the authors' program leaves out: without, classes that have
    no rows take many. `logits` are those of a linear probe fitted to the assignments (`fit_probe`).
    """
    text = problem.head
    anchor = _moments(problem, _zero_shot_probe(problem).probabilities(problem.features)).scatter(text)
    anchor = anchor.sum(dim=0) / len(problem.features)

    def fit(z: Tensor) -> tuple[Tensor, Tensor]:
        found, rows = _moments(problem, z), torch.bincount(z.argmax(dim=1), minlength=len(text))[:, None]
        trust = rows / (rows + 1)
        means = F.normalize(trust * F.normalize(found.first, dim=1) + (1 - trust) * text, dim=1)
        own = found.scatter(means) / found.mass.clamp_min(1e-12)
        return means, trust * own + (1 - trust) * (anchor + (text - means) ** 2)

    return _distilled(problem, _assignments(problem, means=text, variance=anchor, fit=fit))


def transclip(problem: Problem) -> Solution:
    """TransCLIP-ZS (NeurIPS 2024): Gaussian classes of one diagonal covariance, neighbours and a text prior.

    Assignments z_i are as in `_assignments`; mu_k is their mean of unit norm, and S their variance about it. Starts
    from the mean of each class's 8 most confident rows, weighted by their posterior, and S = 1/d. `logits` are those of
    a linear probe fitted to the assignments (`fit_probe`).
    """
    z = _zero_shot_probe(problem).probabilities(problem.features)
    sure, rows = (part.T for part in z.topk(min(TRANSCLIP_PROTOTYPE_ROWS, len(z)), dim=0))
    near = torch.from_numpy(problem.features)[rows].float()
    means = F.normalize(torch.einsum("kj,kjd->kd", sure, near), dim=1)

    def fit(z: Tensor) -> tuple[Tensor, Tensor]:
        found = _moments(problem, z)
        means = F.normalize(found.first, dim=1)
        return means, found.scatter(means).sum(dim=0) / len(z)

    variance = torch.full_like(means[0], 1 / means.shape[1])
    return _distilled(problem, _assignments(problem, means=means, variance=variance, fit=fit))


def zlap(problem: Problem) -> Solution:
    """ZLaP (CVPR 2024), inductive: label propagation on a graph of images and class names, k = 5.

    Edges: an image to its 5 nearest other images, weight max(0, cosine), and to its 5 nearest class names, weight
    max(0, cosine)^5; A = G + G', S = D^(-1/2) A D^(-1/2). Z = (I - 0.3 S)^(-1) restricted to the K class nodes is
    summed as a series. A new image, itself in no edge of the graph, scores class k with sum_j w_j Z_jk over its own
    5 + 5 nearest nodes: what the linear system solved for the image would give, as S is symmetric.
    """
    num_classes, num_rows = len(problem.head), len(problem.features)
    similarity, places = _graph(problem, count=NUM_NEIGHBOURS)
    text_similarity, classes = _class_edges(problem.features, problem.head)
    # Nodes 0 .. K - 1 are the classes.
    ends = torch.cat([places + num_classes, classes], dim=1)
    starts = (torch.arange(num_rows) + num_classes)[:, None].expand_as(ends)
    edges = torch.stack([starts.flatten(), ends.flatten()])
    weights = torch.cat([similarity, text_similarity], dim=1).flatten()
    size = num_classes + num_rows
    degrees = torch.zeros(2, size).scatter_add_(1, edges, weights.expand(2, -1)).sum(dim=0)
    roots = degrees.clamp_min(1e-12).rsqrt()
    weights = weights * roots[edges[0]] * roots[edges[1]]
    both = torch.cat([edges, edges.flip(0)], dim=1)
    smoothing = torch.sparse_coo_tensor(
        both, weights.repeat(2), (size, size), check_invariants=False
    ).coalesce()
    seeds = torch.eye(size, num_classes)
    spread = seeds
    for _ in range(ZLAP_STEPS):
        spread = seeds + ZLAP_ALPHA * torch.sparse.mm(smoothing, spread)

    def logits(features: np.ndarray | Tensor) -> Tensor:
        similarity, places = cosine_neighbours(features, among=problem.features, count=NUM_NEIGHBOURS)
        text_similarity, classes = _class_edges(features, problem.head)
        scores = _gather(spread[:num_classes], weights=text_similarity, places=classes)
        scores += _gather(spread[num_classes:], weights=similarity, places=places)
        # No edge, no evidence: a row with nothing but negative cosines is uniform.
        return scores.clamp_min(1e-12).log()

    return Solution(logits=logits)


METHODS: dict[str, Callable[[Problem], Solution]] = {
    "zero-shot (one prompt)": zero_shot_single,
    "zero-shot": zero_shot,
    "domain-centred zero-shot": domain_centred,
    "naive hard labels": naive_hard_labels,
    "LP-CLIP (reconstructed)": lp_clip,
    "InMaP": inmap,
    "logit centring": logit_centring,
    "StatA": statistical_anchor,
    "TransCLIP": transclip,
    "ZLaP": zlap,
}


def supervised(problem: Problem, labels: np.ndarray) -> Solution:
    """The ceiling: logistic regression on the rows' true labels (n,), -1 for none; regularised on a held-out fifth.

    Raises ValueError with fewer than two classes or ten labelled rows.
    """
    probe = supervised_probe(problem.features, labels, like=_zero_shot_probe(problem))
    return Solution(logits=lambda features: probe.logits(features) / probe.temperature)


def cosine_neighbours(
    queries: np.ndarray | Tensor, *, among: np.ndarray, count: int, same: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines (m, count), 0 where negative, and places (m, count) among (N, d) of the nearest rows, nearest first.

    With `same` the queries are the rows of `among`, and a row is not its own neighbour. There are never more
    neighbours than other rows. Twice as many are found in bfloat16, then ranked by their exact cosines.
    """
    count = min(count, len(among) - same)
    coarse = torch.from_numpy(among).bfloat16()
    found = []
    for block, rows in _blocks(queries, size=SEARCH_ROWS):
        similarity = rows.bfloat16() @ coarse.T
        if same:
            place = torch.arange(block.start, block.stop)
            similarity[place - block.start, place] = -torch.inf
        places = similarity.topk(min(2 * count, len(among) - same), dim=1).indices
        near = torch.from_numpy(among)[places].float()
        exact, order = torch.einsum("nd,njd->nj", rows, near).sort(dim=1, descending=True, stable=True)
        found.append((exact[:, :count].clamp_min(0), places.gather(1, order[:, :count])))
    return torch.cat([s for s, _ in found]), torch.cat([p for _, p in found])


def sinkhorn(posterior: Tensor, *, num_steps: int) -> Tensor:
    """Posteriors (n, K) scaled by turns to equal column sums and to rows that sum to 1."""
    p = posterior
    for _ in range(num_steps):
        p = p / p.sum(dim=0).clamp_min(1e-30)
        p = p / p.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return p


def fit_probe(features: np.ndarray, targets: Tensor, *, start: Probe) -> Probe:
    """A linear probe fitted to soft targets (n, K): multinomial logistic regression by full-batch L-BFGS.

    Minimises sum_i CE(t_i, softmax(f_i . W + b)) + |W - W0|^2 / 2C with C = 10 from the weights W0 of `start`, in at
    most 100 steps. Pulled to W0, not to 0: with fewer rows than dimensions the rest of the text's knowledge stays.
    """
    parameters = torch.cat([start.weight, start.bias[:, None]], dim=1).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=FIT_STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        weight, bias = parameters.detach()[:, :-1], parameters.detach()[:, -1]
        moved = (weight - start.weight).double()
        loss = moved.square().sum() / (2 * STRENGTH)
        gradient = F.pad(moved / STRENGTH, (0, 1))
        for block, f in _blocks(features):
            logs = torch.log_softmax(f @ weight.T + bias, dim=1)
            residual = F.threshold(logs.exp(), DUST, 0.0) - targets[block]
            loss -= (targets[block] * logs).double().sum()
            gradient += torch.cat([residual.T @ f, residual.sum(dim=0)[:, None]], dim=1).double()
        parameters.grad = (gradient / len(features)).float()
        return loss / len(features)

    optimiser.step(closure)
    fitted = parameters.detach()
    return Probe(weight=fitted[:, :-1].contiguous(), bias=fitted[:, -1].contiguous())


def _zero_shot_probe(problem: Problem) -> Probe:
    return zero_shot_probe(problem.head, temperature=problem.temperature)


def _blocks(features: np.ndarray | Tensor, *, size: int = BLOCK_ROWS) -> Iterator[tuple[slice, Tensor]]:
    """Row slices and their features (m, d) as float32."""
    rows = torch.as_tensor(features)
    for start in range(0, len(rows), size):
        block = slice(start, min(start + size, len(rows)))
        yield block, rows[block].float()


def _mean(problem: Problem) -> Tensor:
    total = sum(rows.double().sum(dim=0) for _, rows in _blocks(problem.features))
    return (torch.as_tensor(total) / len(problem.features)).float()


def _graph(problem: Problem, *, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and places (n, count) of the unlabelled rows' nearest neighbours."""
    if problem.neighbours is None:
        return cosine_neighbours(problem.features, among=problem.features, count=count, same=True)
    places = problem.neighbours[:, :count]
    everything = torch.from_numpy(problem.features)
    cosines = [
        torch.einsum("nd,njd->nj", rows, everything[places[block]].float())
        for block, rows in _blocks(problem.features, size=SEARCH_ROWS)
    ]
    return torch.cat(cosines).clamp_min(0), places


def _class_edges(features: np.ndarray | Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Weights max(0, cosine)^gamma and places (m, at most 5) of the class names nearest to features (m, d)."""
    found = [(rows @ head.T).topk(min(NUM_NEIGHBOURS, len(head)), dim=1) for _, rows in _blocks(features)]
    weights = torch.cat([similarity for similarity, _ in found]).clamp_min(0) ** ZLAP_GAMMA
    return weights, torch.cat([places for _, places in found])


def _gather(values: Tensor, *, weights: Tensor, places: Tensor) -> Tensor:
    """sum_j w_ij values_(places_ij), (m, K), from values (N, K), weights and places (m, k)."""
    # A neighbour at a time: all at once would hold k times as much.
    total = torch.zeros(len(places), values.shape[1])
    for weight, place in zip(weights.T, places.T, strict=True):
        total += weight[:, None] * values[place]
    return total


def _assignments(
    problem: Problem,
    *,
    means: Tensor,
    variance: Tensor,
    fit: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Assignments (n, K) of TransCLIP: 10 rounds of fitting Gaussian classes and of assigning the rows to them.

    From `means` (K, d) and diagonal variances (K, d) or (d,), which `fit` gives for assignments. Rows are assigned
    in 5 steps of z_i ~ y_i N(f_i; mu_k, S_k)^(1/50) exp(sum_j (w_ij + w_ji) z_j / 6), with y zero-shot's posterior and
    w_ij the cosine of row i and its neighbour j, of 3, before the first round too.
    """
    similarity, places = _graph(problem, count=TRANSCLIP_NEIGHBOURS)
    starts = torch.arange(len(places))[:, None].expand_as(places)
    edges = torch.stack([starts.flatten(), places.flatten()])
    weights = similarity.flatten().repeat(2) / (2 * TRANSCLIP_NEIGHBOURS)
    both, size = torch.cat([edges, edges.flip(0)], dim=1), (len(places), len(places))
    graph = torch.sparse_coo_tensor(both, weights, size, check_invariants=False).coalesce()
    zero_shot = torch.log_softmax(_zero_shot_probe(problem).logits(problem.features), dim=1)
    z = zero_shot.exp()
    for step in range(TRANSCLIP_STEPS + 1):
        if step > 0:
            means, variance = fit(z)
        scores = zero_shot + DENSITY_WEIGHT * _log_densities(problem, means=means, variance=variance)
        for _ in range(TRANSCLIP_INNER_STEPS):
            z = F.threshold(torch.softmax(scores + torch.sparse.mm(graph, z), dim=1), DUST, 0.0)
    return z


def _log_densities(problem: Problem, *, means: Tensor, variance: Tensor) -> Tensor:
    """-sum_d ((f_id - mu_kd)^2 / S_kd + log S_kd) / 2, (n, K), with `means` (K, d) and `variance` (K, d) or (d,)."""
    # A dimension without any variance has no density.
    precision = (1 / variance.clamp_min(VARIANCE_FLOOR * float(variance.mean()))).float().expand_as(means)
    pull, offset = (precision * means).float(), (precision * means**2 - precision.log()).sum(dim=1).float()
    return torch.cat([f @ pull.T - (f**2 @ precision.T + offset) / 2 for _, f in _blocks(problem.features)])


@dataclass(frozen=True, kw_only=True)
class _Moments:
    """Sums over rows of z (K, 1), z f and z f^2 (K, d), float64."""

    mass: Tensor
    first: Tensor
    second: Tensor

    def scatter(self, means: Tensor) -> Tensor:
        """sum_i z_ik (f_i - mu_k)^2 about means (K, d), (K, d) float64."""
        return (self.second - 2 * means * self.first + means.double() ** 2 * self.mass).clamp_min(0)


def _moments(problem: Problem, z: Tensor) -> _Moments:
    mass = z.double().sum(dim=0)[:, None]
    first, second = torch.zeros(2, *problem.head.shape, dtype=torch.float64)
    for block, f in _blocks(problem.features):
        first += (z[block].T @ f).double()
        second += (z[block].T @ f**2).double()
    return _Moments(mass=mass, first=first, second=second)


def _distilled(problem: Problem, z: Tensor) -> Solution:
    probe = fit_probe(problem.features, z, start=_zero_shot_probe(problem))
    return Solution(logits=probe.logits, transductive=z)
