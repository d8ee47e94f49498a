"""The machines of a Ray cluster, and how large a part of one a replica takes."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from alisa.config import format_bytes
from alisa.dist.extra import load_ray
from alisa.dist.share import ReplicaShare
from alisa.errors import InputError
from alisa.machine import num_cpus

_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray that this command starts: shards travel through it, a few hundred kilobytes each."""
KNOCK_S = 10.0
"""How long a cluster may take to answer."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine, as Ray counts it."""

    node_id: str
    num_cpus: int
    num_gpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ReplicaSize:
    """How many engines, and what each may use."""

    num_replicas: int
    share: ReplicaShare


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """In the block this process is a driver of a cluster; then it has left, and its actors are gone.

    Args:
        address: of the cluster; `auto`: the one that runs here; `local`: one of this machine alone, made for the block.

    Raises:
        InputError: Ray is not installed, or there is no cluster.
    """
    ray = load_ray()
    try:
        _connect(ray, address)
        yield
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:  # noqa: ANN401 - a module
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == "local":
            ray.init(
                "local",
                num_cpus=max(1, int(num_cpus())),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        else:
            _knock(address)
            ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"--ray {address}: there is no cluster to be reached ({reason}). `ray start --head` starts one, "
            "RAY_AUTH_MODE=token in the environment is for one that asks for a token, --ray local uses this machine "
            "alone."
        ) from error


def _knock(address: str) -> None:
    """Somebody listens at HOST:PORT; Ray itself would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def living_nodes() -> tuple[Node, ...]:
    """The machines that are there now."""
    return tuple(
        Node(
            node["NodeID"],
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
            int(node["Resources"].get("memory", 0)),
        )
        for node in load_ray().nodes()
        if node["Alive"]
    )


def size_replicas(
    nodes: Sequence[Node],
    *,
    replicas: int | Literal["auto"],
    cpus: int | None,
    memory_bytes: int | None,
    device: str,
) -> ReplicaSize:
    """What each replica gets.

    A CPU reads its memory with all of its processors, so by default a machine has one replica with all of them; where
    there are GPUs each has a replica.

    Args:
        nodes: of the cluster.
        replicas: how many; `auto`: as many as there is room for.
        cpus: of each; None: an equal part of the machines.
        memory_bytes: of each; None: its part of a machine by `cpus`.
        device: as `EngineConfig.device`.

    Raises:
        InputError: there is no room for them.
    """
    gpu = device == "cuda" or (device == "auto" and any(node.num_gpus for node in nodes))
    usable = [node for node in nodes if (node.num_gpus if gpu else node.num_cpus) > 0]
    kind = "GPU" if gpu else "CPU"
    if not usable:
        raise InputError(f"No machine of the cluster offers a {kind} to Ray.")
    if cpus is None:
        cpus = _equal_part(usable, None if replicas == "auto" else replicas, gpu)
    if memory_bytes is None:
        memory_bytes = min(int(node.memory_bytes * min(1.0, cpus / max(1, node.num_cpus))) for node in usable)
    room = sum(_room(node, cpus, memory_bytes, gpu) for node in usable)
    wanted = room if replicas == "auto" else replicas
    if room < max(1, wanted):
        raise InputError(
            f"{max(1, wanted)} replica(s) of {cpus} CPUs{' and a GPU' if gpu else ''} and {format_bytes(memory_bytes)} "
            f"are asked for, and the cluster has room for {room}; ask for fewer --replicas, --replica-cpus or "
            "--replica-memory."
        )
    return ReplicaSize(wanted, ReplicaShare(cpus, int(gpu), memory_bytes))


def _equal_part(nodes: Sequence[Node], replicas: int | None, gpu: bool) -> int:
    """Processors of a replica where nobody says."""
    if gpu:
        return max(1, min(node.num_cpus // node.num_gpus for node in nodes))
    smallest = min(node.num_cpus for node in nodes)
    if replicas is None:
        return smallest
    fits = (size for size in range(smallest, 0, -1) if sum(node.num_cpus // size for node in nodes) >= replicas)
    return next(fits, 1)


def _room(node: Node, cpus: int, memory_bytes: int, gpu: bool) -> int:
    most = [node.num_cpus // cpus, node.memory_bytes // memory_bytes if memory_bytes else math.inf]
    return int(min([*most, node.num_gpus] if gpu else most))
