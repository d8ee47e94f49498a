"""Options of commands that work with many engines (docs/scaling.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from alisa.config import parse_bytes
from alisa.dist.cluster import ReplicaSize, living_nodes, size_replicas
from alisa.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Many engines on the machines of a Ray cluster (docs/scaling.md); pip install 'alisa[ray]'."""

    ray: Annotated[str | None, arg(metavar="local|auto|ADDRESS", help_behavior_hint="")] = None
    """Have engines on a Ray cluster: local, this machine alone; auto, the cluster that runs here; or its address.
    `alisa generate` then takes a directory for --output, on a disk that all machines share, and the same command goes
    on after whatever happened."""
    replicas: Annotated[int | Literal["auto"], arg(metavar="N|auto")] = "auto"
    """Engines, each with weights of its own; auto: one for each machine, or for each GPU."""
    replica_cpus: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: an equal part)")] = None
    """Processors, and threads, of each."""
    replica_memory: Annotated[str | None, arg(metavar="SIZE", help_behavior_hint="(default: by processors)")] = None
    """Memory of each; K and V get half of what its weights leave, unless --kv-device-memory says how much."""

    def __post_init__(self) -> None:
        at_least_one(
            {
                "replicas": 1 if self.replicas == "auto" else self.replicas,
                "replica_cpus": 1 if self.replica_cpus is None else self.replica_cpus,
            }
        )
        if self.replica_memory is not None:
            parse_bytes(self.replica_memory)

    def size(self, device: str) -> ReplicaSize:
        """How many replicas, and what each may use, on the cluster that this process is connected to.

        Args:
            device: as `EngineConfig.device`.

        Raises:
            InputError: there is no room for what is asked.
        """
        memory = None if self.replica_memory is None else parse_bytes(self.replica_memory)
        return size_replicas(
            living_nodes(), replicas=self.replicas, cpus=self.replica_cpus, memory_bytes=memory, device=device
        )


@dataclass(frozen=True, kw_only=True)
class FleetOptions(ClusterOptions):
    """Many engines on the machines of a Ray cluster (docs/scaling.md); pip install 'alisa[ray]'."""

    shard_size: Annotated[int, arg(metavar="N")] = 256
    """Prompts that travel together. Changes no token."""
    max_deaths: Annotated[int, arg(metavar="N")] = 2
    """A prompt is given up, with an error for a result, when this many engines have died while they worked on it and on
    nothing else."""

    def __post_init__(self) -> None:
        ClusterOptions.__post_init__(self)
        at_least_one({"shard_size": self.shard_size, "max_deaths": self.max_deaths})


@dataclass(frozen=True, kw_only=True)
class ServingOptions(ClusterOptions):
    """Many engines on the machines of a Ray cluster (docs/scaling.md); pip install 'alisa[ray]'."""

    min_replicas: Annotated[int, arg(metavar="N")] = 1
    """Engines that are there when nobody calls; up to --replicas are started while calls wait."""

    def __post_init__(self) -> None:
        ClusterOptions.__post_init__(self)
        at_least_one({"min_replicas": self.min_replicas})


def at_least_one(numbers: Mapping[str, int]) -> None:
    """Check that these options are.

    Raises:
        InputError: some are less.
    """
    wrong = [
        f"--{name.replace('_', '-')} is {value}, at least 1 is needed" for name, value in numbers.items() if value < 1
    ]
    if wrong:
        raise InputError("; ".join(wrong) + ".")
