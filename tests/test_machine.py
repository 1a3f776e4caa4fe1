"""Jobs wait for GPUs and CPUs that may come, and refuse in one sentence what this machine will never have."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

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


@pytest.mark.slow
def test_the_plan_follows_the_device() -> None:
    done = run(PLAN.format(refused=False), {"CPU": 8, "GPU": 2})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "auto: 2 encoder actors, 1 GPU each",
        "cpu: 1 encoder actor, 8 CPU threads each",
        "gpu: 2 encoder actors, 1 GPU each",
    ]


@pytest.mark.slow
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


def images(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def job(name: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *flags],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("selftrain", ()),
        ("pretrain", ("--encoder", "tiny-32", "--batch-size", "6", "--caption-templates", "simple")),
    ],
)
def test_more_workers_than_cpus_are_refused_before_the_work(
    tmp_path: Path, name: str, flags: tuple[str, ...]
) -> None:
    data, out = images(tmp_path / "images"), tmp_path / "out"
    resources = json.dumps({"CPU": 2})
    done = job(
        name,
        *("--data", str(data), "--out", str(out), "--num-workers", "3", *flags),
        RAY_OVERRIDE_RESOURCES=resources,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip() == "error: --num-workers 3: each takes a CPU, and this machine has 2 CPUs"
    assert not (out / "features").exists()


def test_a_cluster_that_is_gone_is_told_of_at_once(tmp_path: Path) -> None:
    data = images(tmp_path / "images")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begin = time.monotonic()
    done = job("encode", "--data", str(data), "--out", str(tmp_path / "out"), RAY_ADDRESS=address)
    assert time.monotonic() - begin < 60
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no Ray cluster answers at RAY_ADDRESS {address} (")
    assert done.stderr.strip().endswith("or unset RAY_ADDRESS to run on this machine")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_address_of_a_dashboard_is_no_cluster(tmp_path: Path) -> None:
    data, address = images(tmp_path / "images"), "http://127.0.0.1:8265"
    done = job("encode", "--data", str(data), "--out", str(tmp_path / "out"), RAY_ADDRESS=address)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: RAY_ADDRESS is {address}, where `ray job submit` sends jobs to")
