"""The rounds: pseudo-label with the teacher, fit the student, let it teach; under Ray Train or in this process.

    teacher = zero-shot
    repeat                                                          # the numbers are those of docs/method.md, "A round"
        logits  = features . teacher + 2 evidence log(neighbours' mean target)      1
        targets = softmax(logits), times the prior's factors                        2
        targets = 0 where the largest is below the threshold                        3
        student = Gaussian classes from the targets' sums, or gradient steps        4, 5
        teacher = student                                                           6
    until fewer than 0.2% of the labels change, or `rounds` are done
    last student = Gaussian classes of base features and strong views               7

A round is one pass over a worker's rows. Rows stand in the order of a hash of their ids and are cut into fixed
chunks; chunks are dealt to workers in runs, their sums are taken in float64 and added over workers. So the
probe does not depend on the number of workers beyond float64's rounding. Labels are not even loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from lpclip.config import SelfTrainingConfig, UserError
from lpclip.method.few_labels import Correction, FewLabels
from lpclip.method.priors import Prior, prior_sums, update_factors
from lpclip.method.pseudo_labels import AllReduce, alone, soft_targets
from lpclip.method.recipe import RECIPE, Recipe
from lpclip.method.shard import Shard, Whitenings, fit_whitenings, product_sum
from lpclip.method.solvers import GaussianSolver, GradientSolver, Solver
from lpclip.method.state import Pass, SharedTargets, State, Tally, zero_shot_state


@dataclass(frozen=True)
class Rounds:
    """Self-training on a shard's rows, together with the other shards that `all_reduce` adds up with."""

    shard: Shard
    _: KW_ONLY
    head: Tensor
    """(K, d) float32 zero-shot weights in units of logits: text embeddings of unit norm over the temperature."""
    prior: Prior
    config: SelfTrainingConfig
    all_reduce: AllReduce = alone
    whitenings: Whitenings | None = None
    """The result of `fit_whitenings`, where it is known already. The gradient solver's students need none."""
    recipe: Recipe = RECIPE
    labels: FewLabels | None = None
    """Labels that people gave. They correct every teacher."""

    def run(
        self, start: State | None = None, *, shared: SharedTargets | None = None
    ) -> Iterator[tuple[State, Pass]]:
        """Yield each round's student with its metrics, and its own pass over the rows.

        With strong views a last round of the gaussian solver follows, beyond `config.rounds`. An interrupted run goes
        on from the state `start` of a round that is no last student; with neighbours, it needs the targets `shared` of
        the pass before that round's own. Raises UserError when no row is left to fit.
        """
        if self.whitenings is None and (self.config.solver == "gaussian" or self.labels is not None):
            whitenings = fit_whitenings(self.shard, all_reduce=self.all_reduce)
            yield from replace(self, whitenings=whitenings).run(start, shared=shared)
            return
        teacher = start or self._corrected(self._zero_shot())
        labelled = self._pass(teacher, shared=shared)
        solver, last_solver = self._solvers()
        while teacher.round < self.config.rounds and not self._settled(teacher):
            shared = labelled.targets
            teacher, labelled = self._graduate(solver, teacher, labelled)
            yield teacher, labelled
        if last_solver is None:
            return
        # One more student, of the same labels, sees the strong views as well: what they change lies within a class, so
        # that its boundaries turn away from it. Earlier, it would cost the rounds what they know of clean images.
        with_strong = self._pass(teacher, shared=shared, strong=True)  # step 7
        shared = None  # a worker's largest tensors after the features
        yield self._graduate(last_solver, teacher, labelled, with_strong=with_strong)

    def _pass(
        self,
        teacher: State,
        *,
        shared: SharedTargets | None,
        before: np.ndarray | None = None,
        strong: bool = False,
    ) -> Pass:
        """Label all rows with the teacher, helped by the targets `shared` that the pass before gave their neighbours.

        The sums are those of the base features, or of their mean with the `strong` views; then no targets are shared.
        Labels that differ from those `before` (n,) are counted.
        """
        shard, (num_classes, dim) = self.shard, teacher.weight.shape
        teacher, head = teacher.to(shard.device), self.head.to(shard.device)
        zeros, float64 = partial(torch.zeros, device=shard.device), torch.float64
        sums, counts = zeros(num_classes, dim, dtype=float64), zeros(num_classes, dtype=float64)
        prior, tally = zeros(2, num_classes, dtype=float64), zeros(len(Tally._fields), dtype=float64)
        labels, kept = zeros(len(shard.features), dtype=torch.int32), zeros(len(shard.features), dtype=bool)
        confidence = zeros(len(labels))
        earlier = None if before is None else torch.from_numpy(before).to(shard.device)
        own = None
        if shard.neighbours is not None and not strong:
            own = SharedTargets.zeros(shard.num_rows, num_classes, device=shard.device)
        for rows, features in shard.chunks(width=num_classes):
            zero_shot = shard.zero_shot_logits(rows, features, head=head)
            logits = features @ teacher.weight.T + teacher.bias + teacher.zero_shot_share * zero_shot
            logits += self._of_neighbours(rows, teacher=teacher, shared=shared)  # step 1
            posterior, targets = soft_targets(logits, teacher.factors)  # step 2
            first_row, is_of_a_class = shard.first_row + rows.start, None
            if self.labels is not None:
                targets, is_of_a_class = self.labels.put(targets, first_row=first_row)
            top, label = targets.max(dim=1)
            keep = top >= self.config.threshold  # step 3
            if is_of_a_class is not None:
                keep, targets = keep & is_of_a_class, targets * is_of_a_class[:, None]
            if own is not None:
                own.fill(first_row, targets)
            targets = targets * keep[:, None]
            seen = torch.stack(shard.views(rows, features, strong=True)).mean(dim=0) if strong else features
            sums += product_sum(targets, seen)
            counts += targets.sum(dim=0, dtype=float64)
            prior += prior_sums(posterior, teacher.factors)
            labels[rows], confidence[rows], kept[rows] = label.int(), top, keep
            flips = keep.new_zeros(1) if earlier is None else earlier[rows] != labels[rows]
            # In the order of Tally's fields.
            counted = (torch.ones_like(keep), keep, top, flips, zero_shot.argmax(dim=1) == label)
            tally += torch.stack([each.sum().double() for each in counted])
        found = Pass(
            sums=sums,
            counts=counts,
            prior=prior,
            tally=Tally(*tally.tolist()),
            labels=labels.cpu().numpy(),
            confidence=confidence.cpu().numpy(),
            kept=kept.cpu().numpy(),
            targets=own,
        )
        return found.over_shards(self.all_reduce)

    def _of_neighbours(self, rows: slice, *, teacher: State, shared: SharedTargets | None) -> Tensor:
        """The log of the neighbours' mean target (m, K) of a chunk, weighted; zeros (K,) without neighbours."""
        if shared is None or self.shard.neighbours is None:
            return torch.zeros_like(teacher.bias)
        places = self.shard.neighbours[rows].to(self.shard.device)
        around = shared.mean_of(places, num_classes=len(teacher.bias))
        weight = self.recipe.neighbour_weight * teacher.evidence
        return weight * torch.log(around + self.recipe.neighbour_floor)

    def _graduate(
        self, solver: Solver, teacher: State, labelled: Pass, *, with_strong: Pass | None = None
    ) -> tuple[State, Pass]:
        """Fit a student to the teacher's labels (to those of `with_strong`, if given) and let it label the rows."""
        if labelled.tally.kept == 0:
            raise UserError(
                f"no pseudo-label has a confidence of at least {self.config.threshold:g} (--threshold) in round "
                f"{teacher.round + 1}; lower the threshold or the temperature"
            )
        learnt = solver.fit(teacher, labelled if with_strong is None else with_strong)  # step 4 or 5
        student = State(
            round=teacher.round + 1,
            weight=learnt.weight,
            bias=learnt.bias,
            # Halfway in the logarithm: a full step from the last teacher's sums to this student's can oscillate.
            factors=(teacher.factors * update_factors(labelled.prior, prior=self.prior)).sqrt(),
            zero_shot_share=learnt.zero_shot_share,
            evidence=learnt.evidence,
        )
        student = self._corrected(student)
        student_pass = self._pass(student, shared=labelled.targets, before=labelled.labels)
        return replace(student, metrics=student_pass.metrics()), student_pass

    def _corrected(self, state: State) -> State:
        """The state with the step that the given labels add to it."""
        if self._correction is None:
            return state
        before = state.classifier(self.head)
        after = self._correction.apply(before)
        weight, bias = state.weight + after.weight - before.weight, state.bias + after.bias - before.bias
        return replace(state, weight=weight, bias=bias)

    @cached_property
    def _correction(self) -> Correction | None:
        if self.labels is None:
            return None
        assert self.whitenings is not None
        return Correction(self.labels, mean=self.whitenings.base.mean.cpu())

    def _settled(self, teacher: State) -> bool:
        return teacher.round > 0 and teacher.metrics["flip_rate"] < self.recipe.stop_flip_rate

    def _solvers(self) -> tuple[Solver, Solver | None]:
        """The solver of the rounds, and that of the last student beyond them, if there is one."""
        shard, recipe, all_reduce = self.shard, self.recipe, self.all_reduce
        if self.config.solver == "gradient":
            seed = self.config.seed
            return GradientSolver(
                shard=shard, head=self.head, seed=seed, recipe=recipe, all_reduce=all_reduce
            ), None
        whitenings = self.whitenings
        assert whitenings is not None
        base = GaussianSolver(
            shard=shard,
            head=self.head,
            whitening=whitenings.base,
            zero_shot_share=recipe.zero_shot_share,
            recipe=recipe,
            all_reduce=all_reduce,
        )
        if whitenings.last is None:
            return base, None
        last_share = recipe.last_zero_shot_share
        return base, replace(base, whitening=whitenings.last, zero_shot_share=last_share)

    def _zero_shot(self) -> State:
        """Zero-shot as the first teacher, its factors at their fixed point; later rounds make half a step each."""
        teacher = zero_shot_state(len(self.head), self.shard.features.shape[1])
        device, head = self.shard.device, self.head.to(self.shard.device)
        for _ in range(self.recipe.first_prior_steps if self.prior.strength else 0):
            factors, sums = teacher.factors.to(device), torch.zeros(2, len(head), device=device).double()
            for rows, features in self.shard.chunks():
                if self.shard.first_row + rows.start >= self.recipe.first_prior_rows:
                    break
                logits = self.shard.zero_shot_logits(rows, features, head=head)
                sums += prior_sums(torch.softmax(logits, dim=1), factors)
            factors = update_factors(self.all_reduce(sums.cpu()), prior=self.prior)
            teacher = replace(teacher, factors=factors)
        return teacher
