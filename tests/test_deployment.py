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
from ray._common.utils import import_attr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from lpclip.config import SelftrainJob, ServeJob, UserError, check
from lpclip.jobs.cli import main
from lpclip.serving import application
from lpclip.serving.door import APPLICATION, middlewares

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


def test_the_rayservice_serves_an_application_of_this_project_with_the_door_before_it() -> None:
    service = yaml.safe_load((ROOT / "docs" / "serve.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (told,) = config.applications
    assert (told.name, import_attr(told.import_path)) == (APPLICATION, application.build)
    job = ServeJob(**told.args)
    check(job)
    cluster = service["spec"]["rayClusterConfig"]
    assert f"\nray=={cluster['rayVersion']} " in (ROOT / "requirements.lock").read_text()
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert job.replicas == workers["replicas"] == workers["maxReplicas"]
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": application.DOOR_VARIABLE, "value": application.DOOR} in container["env"]
    assert import_attr(application.DOOR) is middlewares
    assert {"containerPort": config.http_options.port, "name": "serve"} in head["template"]["spec"][
        "containers"
    ][0]["ports"]


def test_an_application_refuses_arguments_that_it_does_not_know() -> None:
    with pytest.raises(UserError, match="args has prob; it may have probe, host"):
        application.build({"prob": "s3://bucket/probe"})


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
