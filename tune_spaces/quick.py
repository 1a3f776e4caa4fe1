"""A first sweep, in under two minutes on a laptop once features are there.

    make demo
    lpclip tune --space quick --trials 12 --limit 6000 --eval-limit 2000 \
        --features runs/demo/features --out runs/quick

Expect, with the embedded lite encoder (not CLIP), on the 2,000 test images: zero-shot 34.6%, without a sweep 60.4%,
chosen 62.6%, best trial 62.9%.
"""

from ray import tune

SPACE = {
    "temperature_factor": tune.loguniform(0.7, 1.8),
    "threshold": tune.quniform(0.0, 0.5, 0.1),
    "rounds": tune.randint(5, 21),
    "neighbours": tune.choice([10, 20, 30]),
}
