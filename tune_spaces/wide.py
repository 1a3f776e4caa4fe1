"""Everything that the recipe exposes, far beyond what works: 128 trials or more.

    lpclip tune --space wide --data photos/ --classes cat,dog --trials 128 \
        --scheduler asha

Expect trials anywhere between far below zero-shot and a little above what the default space finds, and a choice further
from the best one: docs/tuning.md says by how much.
"""

from ray import tune

SPACE = {
    "temperature_factor": tune.loguniform(0.2, 5.0),
    "threshold": tune.quniform(0.0, 0.9, 0.01),
    "rounds": tune.randint(1, 41),
    # Not left to the recipe's own choice: this is where most is lost and won.
    "prior": tune.choice(["uniform", "weak", "none"]),
    "neighbours": tune.choice([0, 3, 5, 10, 20, 30, 60]),
}
