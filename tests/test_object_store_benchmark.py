"""No step over a store on S3 takes more requests than it must: they are what a remote store costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "object_store.py"


@pytest.mark.slow
def test_a_part_takes_one_request_to_write_two_to_read_and_none_to_know() -> None:
    # More parts than a listing shows at a time.
    command = [sys.executable, str(PROGRAM), "--parts", "1200", "--rows", "2", "--dim", "4", "--delay", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()]
    requests = {line[0].strip(): int(line[2].replace(",", "")) for line in lines if line[-1][0].isdigit()}
    assert requests["write the parts"] == 1200
    assert requests["ids, labels and features"] == requests["ids and labels, without features"] == 2400
    assert requests["open"] == requests["finish, parts known"] == 4
