"""Process groups of Ray Train's workers, which find each other at the addresses by which Ray knows their machines."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

SIOCGIFADDR = 0x8915


@dataclass
class ProcessGroup(TorchConfig):
    """Ray's own configuration, for machines whose names say nothing of where they are.

    By itself gloo listens where the machine's name leads. That is often 127.0.0.1 or 127.0.1.1, where no other machine
    finds it.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_listen_where_ray_does)
        super().on_start(worker_group, backend_config)


def _listen_where_ray_does() -> None:
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address. None if there is none; Linux alone tells."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            # Not every interface has an address.
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("40s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
