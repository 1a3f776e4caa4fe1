"""The benchmark of the method's constants: what it changes, and that it puts everything back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sensitivity
from sensitivity import GRADIENT_CONSTANTS, PLACES, RECIPE_CONSTANTS, Options

from lpclip.method import presence
from lpclip.method.priors import PRIORS
from lpclip.method.recipe import RECIPE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("value", "halved", "doubled"),
    [(10.0, 5, 20), (5.0, 2, 10), (2.5, 1.25, 5), (0.5, 1 / 3, 2 / 3), (1.0, 1, 2)],
)
def test_shares_change_their_odds_and_counts_stay_whole(value: float, halved: float, doubled: float) -> None:
    assert [sensitivity.scaled(value, factor=f) for f in (0.5, 2.0)] == pytest.approx([halved, doubled])


@pytest.mark.parametrize("constant", [*RECIPE_CONSTANTS, *GRADIENT_CONSTANTS, *PLACES])
def test_every_constant_is_one_of_the_method(constant: str) -> None:
    usual = sensitivity.current(constant)
    with sensitivity.changed_to(constant, 0.25):
        assert sensitivity.current(constant) == 0.25
    assert sensitivity.current(constant) == usual


def test_the_method_sees_the_change() -> None:
    with sensitivity.changed_to("WEAK_STRENGTH", 0.25), sensitivity.changed_to("SURE", 0.5):
        assert PRIORS["weak"].strength == 0.25
        assert presence.SURE == 0.5
    with sensitivity.changed_to("text_rows", 20.0):
        assert RECIPE.text_rows == 20
    assert PRIORS["weak"].strength == 0.3


def test_each_constant_has_a_row_and_each_training_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 60)
    means = np.eye(4, 16)
    features, texts = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (means[labels] + 0.3 * rng.normal(size=(240, 16)), means + 0.1 * rng.normal(size=(4, 16)))
    )
    path = tmp_path / "planted.npz"
    np.savez(path, features=features.astype(np.float32), labels=labels, texts=texts.astype(np.float32))
    out = tmp_path / "rows.json"
    constants = ("text_rows", "zero_shot_share")
    sensitivity.main(Options(features=(str(path),), constants=constants, settings=("all",), json=str(out)))
    rows = json.loads(out.read_text())
    found = [(row["constant"], row["factor"]) for row in rows]
    assert found == [("as it is", 1), *((name, factor) for name in constants for factor in (0.5, 2))]
    assert all(row["accuracy"] > 90 for row in rows)
    shown = capsys.readouterr().out
    assert "planted  all" in shown
    assert "text_rows" in shown.splitlines()[-2]
    assert "zero_shot_share" in shown.splitlines()[-1]
