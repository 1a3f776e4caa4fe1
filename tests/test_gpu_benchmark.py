"""benchmarks/gpu.py runs on any machine, small where there is no GPU, and writes its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.slow


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_rows_are_written_part_by_part(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = run("--parts", "machine", "rounds", "--json", str(path), "--folder", str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert [row["part"] for row in rows] == ["machine", "machine", "rounds", "rounds"]
    assert rows[1]["float32_tflops"] > 0
    assert rows[3]["times_least"] == pytest.approx(rows[3]["seconds"] / rows[3]["least_seconds"])
    assert ("There is no GPU here" in done.stdout) == (not torch.cuda.is_available())


def test_a_part_that_is_not_there_is_refused() -> None:
    done = run("--parts", "forwards")
    assert done.returncode == 2
    assert "forwards" in done.stderr
