"""The examples of docs/deployment.md name this project's jobs, flags and versions."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
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
    assert f"\nray=={version} " in (ROOT / "requirements.lock").read_text()


def test_the_image_is_of_this_version_and_installs_as_make_does() -> None:
    image, make = ((ROOT / name).read_text() for name in ("Dockerfile", "Makefile"))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"org.opencontainers.image.version={version} " in image
    # What is left of the lock without PyTorch, and the pins of its CPU build.
    for command in (r"sed -E '(.*)'", r"sed -nE '(.*)'"):
        (there,), (here,) = re.findall(command, image), re.findall(command, make)
        assert there == here.replace("$$", "$")


def test_the_cluster_is_one_that_ray_takes() -> None:
    cluster = yaml.safe_load((ROOT / "docs" / "cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    assert cluster["available_node_types"]["gpu"]["min_workers"] >= 1
