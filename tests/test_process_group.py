"""Workers on several machines find each other: they listen at the addresses by which Ray knows the machines."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from ray.util.state import get_actor
from ray.util.state.exception import RayStateApiException

from lpclip.training.process_group import ProcessGroup, interface_of


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None  # an address for documentation


def worker(arguments: dict[str, Any]) -> None:
    total = torch.ones(1)
    dist.all_reduce(total)
    connections = importlib.import_module("psutil").Process().net_connections("tcp")
    places = {c.laddr.ip for c in connections if c.status == "LISTEN"}
    own = ray.util.get_node_ip_address()
    name = os.environ["GLOO_SOCKET_IFNAME"]
    rank, asked = dist.get_rank(), os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]
    Path(arguments["folder"], str(rank)).write_text(
        f"{total.item():.0f} {name} {own in places} {own} {asked}"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_workers_listen_where_ray_knows_their_machine(tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    TorchTrainer(
        worker,
        train_loop_config={"folder": str(tmp_path)},
        torch_config=ProcessGroup(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="listen", storage_path=str(tmp_path / "ray")),
    ).fit()
    own = ray.util.get_node_ip_address()
    for rank in "01":
        assert (tmp_path / rank).read_text() == f"2 {interface_of(own)} True {own} 0.2"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_private_rays_processes_ask_no_dashboard_and_wait_for_none() -> None:
    @ray.remote(num_cpus=0)
    def ask() -> str:
        with pytest.raises(RayStateApiException, match="http://127.0.0.1:1"):
            get_actor("0" * 32, timeout=10)
        return os.environ["RAY_API_SERVER_ADDRESS"]

    assert ray.get(ask.remote()) == "http://127.0.0.1:1"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
