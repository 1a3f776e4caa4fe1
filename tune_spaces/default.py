"""Parameters worth searching on any data, for 64 trials.

lpclip tune --space default --data photos/ --classes cat,dog
"""

from ray import tune

SPACE = {
    # Times the encoder's own temperature: above 1 the first labels are softer.
    "temperature_factor": tune.loguniform(0.5, 2.0),
    # Labels that are less sure than this are left out of the fit.
    "threshold": tune.quniform(0.0, 0.6, 0.01),
    # At most: rounds end by themselves when labels hardly change.
    "rounds": tune.randint(3, 21),
    # That have a say in each label.
    "neighbours": tune.choice([0, 5, 10, 20, 30]),
}
