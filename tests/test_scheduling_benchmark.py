"""Tasks of several units: each unit is there once, in a part of its own, with Ray's own scheduling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "scheduling.py"


@pytest.mark.slow
def test_units_that_travel_together_are_parts_of_their_own() -> None:
    command = [sys.executable, str(PROGRAM), "--gpus", "1", "--cpus", "4", "--units", "1", "6"]
    done = subprocess.run([*command, "--parts", "20"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert [row for row in rows if row[0].isdigit()] == [["1", "20"], ["6", "20"]]
