"""--device: where images are encoded is asked for, waited for, and refused where it can never be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLAN = """
from lpclip.config import EncoderConfig
from lpclip.features.describe import describe_encoder
from lpclip.features.encode_stage import plan_actors
from lpclip.jobs.process import start_ray
start_ray()
for device in ("auto", "cpu", "gpu"):
    print(device, plan_actors(None, device), sep=": ")
if {refused}:
    describe_encoder(EncoderConfig(), device="gpu")
"""

# A cluster without GPUs, to which one is added after the job has said that it waits.
GROWS = """
import time
from concurrent.futures import ThreadPoolExecutor
import ray
from ray.cluster_utils import Cluster
import lpclip.features.describe as describing
from lpclip.config import EncoderConfig

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
describing.WAIT_SECONDS = 1
with ThreadPoolExecutor(1) as pool:
    found = pool.submit(describing.describe_encoder, EncoderConfig(precision="float32"), device="gpu")
    time.sleep(5)
    assert not found.done()
    # The main thread adds it: Ray's processes end with the thread that started them.
    cluster.add_node(num_cpus=1, num_gpus=1)
    info = found.result(timeout=120)
print("described", info.name, info.identity["dim"])
"""


def run(code: str, resources: dict[str, int] | None = None) -> subprocess.CompletedProcess[str]:
    given = {"RAY_OVERRIDE_RESOURCES": json.dumps(resources)} if resources else {}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_the_plan_follows_the_device() -> None:
    done = run(PLAN.format(refused=False), {"CPU": 8, "GPU": 2})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "auto: 2 encoder actors, 1 GPU each",
        "cpu: 1 encoder actor, 8 CPU threads each",
        "gpu: 2 encoder actors, 1 GPU each",
    ]


def test_a_gpu_that_can_never_come_is_refused_in_a_sentence() -> None:
    done = run(PLAN.format(refused=True), {"CPU": 4})
    assert done.stdout.splitlines() == [
        "auto: 1 encoder actor, 4 CPU threads each",
        "cpu: 1 encoder actor, 4 CPU threads each",
        "gpu: 1 encoder actor, 1 GPU each",
    ]
    assert (
        "UserError: --device gpu: Ray sees no GPU on this machine, and RAY_ADDRESS names no cluster"
        in done.stderr
    )


@pytest.mark.slow
def test_a_job_waits_for_a_cluster_to_grow_and_says_so(tmp_path: Path) -> None:
    done = run(GROWS)
    assert done.returncode == 0, done.stderr
    assert (
        "waiting for a GPU, for 1 s now: the cluster has none yet, and --device cpu needs none" in done.stderr
    )
    assert done.stdout.splitlines()[-1] == "described lite 1280"
