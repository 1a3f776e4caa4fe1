"""The examples of docs/deployment.md name this project's jobs, flags and versions."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from lpclip.config import SelftrainJob
from lpclip.jobs.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docs" / "rayjob.yaml").read_text())


def test_the_rayjob_runs_a_job_of_this_project_with_flags_it_knows(
    rayjob: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    python, script, *flags = shlex.split(rayjob["spec"]["entrypoint"])
    assert python == "python"
    workdir = re.search(r"^WORKDIR (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert workdir
    assert (ROOT / Path(script).relative_to(workdir[1])).name == "selftrain.py"
    assert (ROOT / Path(script).relative_to(workdir[1])).is_file()
    seen: list[SelftrainJob] = []
    monkeypatch.setattr(sys, "argv", [script, *flags])
    main(seen.append, SelftrainJob)
    (job,) = seen
    (workers,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert job.out.startswith("s3://")
    assert job.encode.num_actors == workers["maxReplicas"]
    assert workers["minReplicas"] >= 1


def test_the_rayjob_has_the_images_ray(rayjob: dict[str, Any]) -> None:
    version = rayjob["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ARG RAY={version}\n" in (ROOT / "Dockerfile").read_text()
    assert f"\nray=={version}\n" in (ROOT / "requirements.lock").read_text()


def test_the_cluster_is_one_that_ray_takes() -> None:
    cluster = yaml.safe_load((ROOT / "docs" / "cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    assert cluster["available_node_types"]["gpu"]["min_workers"] >= 1
