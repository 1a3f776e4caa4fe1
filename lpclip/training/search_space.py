"""Search spaces: a Python file's SPACE, checked against the training's parameters before anything runs."""

from __future__ import annotations

import ast
import math
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Float, Integer, Quantized
from ray.tune.search.variant_generator import generate_variants

import lpclip
from lpclip.config import SelfTrainingConfig, UserError, did_you_mean, digest
from lpclip.files import not_utf_8

# The spaces that are shipped, by the names that --space takes.
SHIPPED = ("default", "quick", "wide")
# In units of the encoder's own temperature, so that one space fits every encoder.
FACTOR = "temperature_factor"
# Not the seed either: it is also that of the strong views, which are encoded once. Trials use the same class names.
OTHERS = ("num_workers", "seed", "present")
SEARCHABLE = (FACTOR, *(item.name for item in fields(SelfTrainingConfig) if item.name not in OTHERS))
# Draws without a new trial in them after which the space is taken to have no more.
MAX_EMPTY_DRAWS = 20

Parameters = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """A search space: `searched` maps a parameter to its search-space object, `fixed` to the value of all trials."""

    searched: dict[str, Any]
    fixed: Parameters
    identity: str
    """Digest of the file's code: comments and layout play no part."""

    @property
    def undrawable(self) -> list[str]:
        """Parameters that search algorithms cannot draw: grids, and functions of the space's own."""
        return [name for name, value in self.searched.items() if _is_grid(value) or not self.values(name)]

    def values(self, name: str) -> list[Any]:
        """A parameter's ends, or all its values where these are listed; empty where a function makes them."""
        if name in self.fixed:
            return [self.fixed[name]]
        return _extremes(name, self.searched[name]) if name in self.searched else []


def space_file(space: str) -> Path:
    """The file of a shipped space (`default`, `quick`, `wide`), or of any other path as it stands.

    The shipped spaces lie in tune_spaces/, which an installation has inside the package and a clone beside it.
    """
    if space not in SHIPPED:
        return Path(space).expanduser()
    package = Path(lpclip.__file__).parent
    installed = package / "tune_spaces" / f"{space}.py"
    return installed if installed.is_file() else package.parent / "tune_spaces" / f"{space}.py"


def read_space(path: str) -> SearchSpace:
    """The SPACE of a shipped space or of a Python file, which is run.

    Raises UserError when there is none, or none that can be searched.
    """
    try:
        file = space_file(path)
        code = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf_8(f"--space {path}") from error
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--space {path} cannot be read ({getattr(error, 'strerror', None) or error}): give a Python file, or one "
            f"of {', '.join(SHIPPED)}{did_you_mean(path, SHIPPED)}"
        ) from error
    try:
        tree = ast.parse(code)
        found = runpy.run_path(str(file)).get("SPACE")
    # The user can mend whatever the user's file raises, so it must not look like a fault of lpclip.
    except (Exception, SystemExit) as error:
        raise UserError(f"--space {path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"--space {path} has no SPACE, a dict from parameters to ray.tune's search spaces")
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    space = SearchSpace(
        searched={name: value for name, value in found.items() if _is_searched(value)},
        fixed={name: value for name, value in found.items() if not _is_searched(value)},
        identity=digest(ast.dump(tree)),
    )
    unknown = sorted(str(name) for name in found if name not in SEARCHABLE)
    if unknown:
        raise UserError(
            f"--space {path} names {', '.join(unknown)}, which the training does not have; "
            f"it has {', '.join(SEARCHABLE)}"
        )
    if not space.searched:
        raise UserError(
            f"--space {path} is empty: SPACE gives no parameter anything to search, as tune.choice([...]) does"
        )
    if FACTOR in found and "temperature" in found:
        raise UserError(f"--space {path} has both temperature and {FACTOR}: they are one parameter")
    return space


def check_space(space: SearchSpace, *, base: SelfTrainingConfig, own_temperature: float) -> None:
    """UserError, with the parameter's name, when a value that the space can give is out of range."""
    for name in (*space.fixed, *space.searched):
        for value in space.values(name):
            trial_config({**space.fixed, name: value}, base=base, own_temperature=own_temperature)


def trial_config(
    parameters: Parameters, *, base: SelfTrainingConfig, own_temperature: float
) -> SelfTrainingConfig:
    """The training of a trial: the base with the trial's parameters. Raises UserError for one out of range."""
    values = plain(parameters)
    for name, value in values.items():
        hint = float if name == FACTOR else HINTS[name]
        if not _fits(value, hint):
            options = f": it has {', '.join(get_args(hint))}" if get_origin(hint) is Literal else ""
            raise UserError(
                f"the search space gives {name} the value {value!r}, which it cannot have{options}"
            )
    if FACTOR in values:
        if not 0 < values[FACTOR] < math.inf:
            raise UserError(f"the search space gives {FACTOR} the value {values[FACTOR]}: it must be above 0")
        values["temperature"] = own_temperature * values.pop(FACTOR)
    elif values.get("temperature", base.temperature) is None:
        values["temperature"] = own_temperature
    config = replace(base, **values)
    try:
        config.check()
    except UserError as error:
        raise UserError(f"the search space asks for what the training refuses: {error}") from error
    return config


def draw_trials(space: SearchSpace, *, count: int, seed: int) -> list[Parameters]:
    """At most `count` different trials, the first ones the same for every count; fewer where the space has no more."""
    random = np.random.RandomState(seed % 2**32)
    found: dict[str, Parameters] = {}
    empty = 0
    while len(found) < count and empty < MAX_EMPTY_DRAWS:
        before = len(found)
        try:
            for _, variant in generate_variants({**space.fixed, **space.searched}, random_state=random):
                parameters = plain(variant)
                found.setdefault(digest(parameters), parameters)
        # A function of the space's own (tune.sample_from) may raise anything, or give what is no value.
        except Exception as error:
            text = re.sub(r": <.* object at 0x\w+>", "", str(error))
            cause = f" ({error.__context__})" if error.__context__ else ""
            raise UserError(f"the search space cannot be drawn from: {text}{cause}") from error
        empty = empty + 1 if len(found) == before else 0
    return list(found.values())[:count]


def plain(parameters: Mapping[str, Any]) -> Parameters:
    """Parameters with Python's own numbers, which JSON takes."""
    return {k: v.tolist() if isinstance(v, (np.generic, np.ndarray)) else v for k, v in parameters.items()}


HINTS = get_type_hints(SelfTrainingConfig)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _is_grid(value: Any) -> bool:
    return isinstance(value, dict) and "grid_search" in value


def _is_searched(value: Any) -> bool:
    return isinstance(value, Domain) or _is_grid(value)


def _extremes(name: str, value: Any) -> list[Any]:
    """All values of a listed domain, the first and last of a range. Raises UserError for one without any."""
    if _is_grid(value) or isinstance(value, Categorical):
        listed = value["grid_search"] if _is_grid(value) else value.categories
        if not isinstance(listed, (Sequence, np.ndarray)) or isinstance(listed, str):
            raise UserError(f"the search space of {name} must be a list of values, not {listed!r}")
        found = list(listed)
    elif isinstance(value, (Float, Integer)):
        low, high = value.lower, value.upper
        # Steps reach the upper end; otherwise it is never drawn, and a half-open range such as the threshold's may
        # end there.
        if not isinstance(value.get_sampler(), Quantized):
            high = float(np.nextafter(high, low)) if isinstance(value, Float) else high - 1
        found = [low, high] if low <= high else []
    else:
        return []
    if not found:
        raise UserError(f"the search space of {name} is empty")
    return found
