"""Linear probes on CLIP, trained without labels on CLIP's own pseudo-labels.

The names below are the public API (docs/api.md). Each is imported when it is first used: `import lpclip` alone loads
neither torch nor Ray.
"""

from __future__ import annotations

import importlib
import os

# Threads of OpenMP, which torch computes with, spin while they wait for each other. Where something else uses the CPU
# too, that takes many times as long as the arithmetic. It counts if torch is imported later, and in Ray's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TYPE_CHECKING = False  # type checkers take it for True; typing's own would be half of the time of this import
if TYPE_CHECKING:
    from lpclip.config import SelfTrainingConfig as SelfTrainingConfig
    from lpclip.config import UserError as UserError
    from lpclip.encoders.head import Head as Head
    from lpclip.encoders.zero_shot import zero_shot_head as zero_shot_head
    from lpclip.evaluation.judge import evaluate as evaluate
    from lpclip.features.store import Store as Store
    from lpclip.method.estimator import SelfTrainedProbe as SelfTrainedProbe
    from lpclip.method.fit import SelfTraining as SelfTraining
    from lpclip.method.fit import fit as fit
    from lpclip.method.fit import self_train as self_train
    from lpclip.method.probe import Probe as Probe
    from lpclip.serving.classifier import Answer as Answer
    from lpclip.serving.classifier import Classifier as Classifier

__version__ = "0.1.0"

_HOMES = {
    "Answer": "lpclip.serving.classifier",
    "Classifier": "lpclip.serving.classifier",
    "Head": "lpclip.encoders.head",
    "Probe": "lpclip.method.probe",
    "SelfTrainedProbe": "lpclip.method.estimator",
    "SelfTraining": "lpclip.method.fit",
    "SelfTrainingConfig": "lpclip.config",
    "Store": "lpclip.features.store",
    "UserError": "lpclip.config",
    "evaluate": "lpclip.evaluation.judge",
    "fit": "lpclip.method.fit",
    "self_train": "lpclip.method.fit",
    "zero_shot_head": "lpclip.encoders.zero_shot",
}
__all__ = ["__version__", *_HOMES]


if not TYPE_CHECKING:  # or type checkers would let any name pass

    def __getattr__(name: str) -> object:
        """Import a public name from its module (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module 'lpclip' has no attribute {name!r}")
        found = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    """Module names and the public names that are not imported yet."""
    return sorted({*globals(), *_HOMES})
