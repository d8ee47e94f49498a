"""What of its machine a replica may use: Ray counts processors and memory, and limits neither."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from alisa.config import EngineConfig, format_bytes
from alisa.errors import InputError


def with_whole_paths(config: EngineConfig) -> EngineConfig:
    """`config` with the same files whatever directory a process works in: those of Ray have one of their own.

    A model that is not here keeps its name: it may be on the other machines, or a hub's.
    """
    paths = {
        name: path.absolute()
        for name in ("budgets", "kv_disk_path", "schedule", "prefix_cache_disk")
        if (path := getattr(config, name)) is not None
    }
    if config.model is not None and (model := Path(config.model).expanduser()).exists():
        return replace(config, model=str(model.absolute()), **paths)
    return replace(config, **paths)


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """The part of a machine that is one replica's."""

    num_cpus: int
    """Threads of its steps."""
    num_gpus: int
    memory_bytes: int

    def use_threads(self) -> None:
        """Torch in this process keeps to the processors of the share."""
        # Here and not above: the driver never needs torch.
        import torch

        torch.set_num_threads(self.num_cpus)

    def capped(self, config: EngineConfig, weight_bytes: int) -> EngineConfig:
        """`config` with K and V in half of what the weights leave of the share, where no option says otherwise.

        Args:
            config: of the engine.
            weight_bytes: of the model, which is loaded.

        Raises:
            InputError: the weights leave nothing.
        """
        if config.kv_device_memory is not None or self.num_gpus:
            return config
        room = (self.memory_bytes - weight_bytes) // 2
        if room <= 0:
            raise InputError(
                f"The weights are {format_bytes(weight_bytes)}, and a replica has {format_bytes(self.memory_bytes)}; "
                "give it more --replica-memory, or ask for fewer --replicas."
            )
        return replace(config, kv_device_memory=room)
