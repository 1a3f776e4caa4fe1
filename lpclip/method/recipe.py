"""The constants of the rounds: one set for all data, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from lpclip.config import SelfTrainingConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Constants of the rounds. No flag changes them; docs/method.md has the measurements behind them."""

    stop_flip_rate: float = 0.002
    """The rounds end when a smaller share of the labels changes."""
    confidence: float = 0.8
    """Mean confidence that each Gaussian student is scaled to, before the evidence. It stays the same from round to
    round: with one that grows, accuracy declines after its best round."""
    scale_rows: int = 8192
    """Rows on which that scale is found: enough for a mean, few enough to bisect on."""
    text_rows: float = 10.0
    """The images for which a class's text counts: a class mean of n images comes to n / (n + text_rows) from these,
    and the mean of this share over the images is the evidence. The student's logits are weighed by it."""
    zero_shot_share: float = 0.3
    """Share of the zero-shot logits that is added to a Gaussian student's own with full evidence; without, all."""
    last_zero_shot_share: float = 0.6
    """The same for the last student, which will meet images unlike the unlabelled ones: the text weights know more
    about these. It was chosen on a natural shift, from photographs to cartoons."""
    neighbour_weight: float = 2.0
    """Weight of the log of the neighbours' mean target in a row's logits, times the evidence."""
    neighbour_floor: float = 1e-3
    """Added to that mean target, so that a class that no neighbour has stays possible."""
    min_neighbours: int = 3
    max_neighbours: int = 30
    max_neighbour_rows: int = 10_000_000
    """Above so many rows no neighbours are used: each worker holds targets of all rows, which are 130 bytes a row."""
    first_prior_steps: int = 10
    """Steps of the prior's factors for the zero-shot teacher. Each later round makes half a step."""
    first_prior_rows: int = 131_072
    """Rows that these steps use: enough for the shares of thousands of classes, without ten passes over a million."""
    gradient_epochs: int = 5
    gradient_batch: int = 512
    gradient_rate: float = 0.03
    """Epochs, rows in a batch, and learning rate of the gradient solver."""
    gradient_balance: float = 1.0
    """Weight of the log of the labels' class shares in that solver's loss; 0 leaves it out."""

    def neighbour_count(self, config: SelfTrainingConfig, *, num_rows: int, num_classes: int) -> int:
        """Neighbours of each row: as configured, or half as many as a class has images, 3 to 30, if affordable."""
        count = config.neighbours
        if count is None and num_rows > self.max_neighbour_rows:
            count = 0
        elif count is None:
            count = min(self.max_neighbours, max(self.min_neighbours, num_rows // (2 * num_classes)))
        return max(0, min(count, num_rows - 1))


RECIPE = Recipe()
