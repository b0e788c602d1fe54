"""How the workers of a group find each other: at a store that listens where the node does, and nowhere else.

Ray Train's own way lets torch's store listen on every address of the machine, to whoever knocks; what workers then tell
each other through it is trusted. Here rank 0 listens at its node's address alone, which on a private or a local cluster
is the loopback.
"""

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_listening: list[socket.socket] = []
"""Of rank 0, from when it says where it listens until the store takes it over."""


@dataclass
class NodeTorchConfig(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """Torch's process group, by a store at the node's own address."""

    @property
    def backend_cls(self) -> type["_Backend"]:
        """What makes the group on the workers."""
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        import ray

        worker_group.execute(_set_torch_distributed_env_vars)
        address = worker_group.execute_single(0, _listen)
        size, told = len(worker_group), (backend_config.backend, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(n, _join, address, n, size, *told) for n in range(size)])


def _listen() -> tuple[str, int]:
    """Listen, on rank 0, at the node's address; return it."""
    import ray

    host = ray.util.get_node_ip_address()
    server = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    _listening[:] = [server]
    return host, server.getsockname()[1]


def _join(address: tuple[str, int], rank: int, size: int, backend: str, seconds: int) -> None:
    wait = timedelta(seconds=seconds)
    taken = _listening.pop().detach() if rank == 0 else None
    store = TCPStore(*address, size, is_master=rank == 0, timeout=wait, master_listen_fd=taken)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
