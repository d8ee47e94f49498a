"""Bytes that a cache may take of each medium: what the configuration says, or a share of what is free."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from alisa.config import EngineConfig, parse_bytes
from alisa.errors import InputError
from alisa.machine import free_memory

DEFAULT_KV_SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Share of the memory that is free after loading the model which may be used for what grows with tokens when no cap is
given. On a CPU the rest is for activations and for everybody else on the machine; on a GPU nobody else is expected."""

FREE_DISK_SHARE = 0.8
"""Share of the free disk that the disk tier may take when no cap is given."""


def device_cap(config: EngineConfig, device: torch.device) -> int:
    """Bytes on the device for everything that grows with tokens; by default a share of what is free now."""
    if config.kv_device_memory is not None:
        return parse_bytes(config.kv_device_memory)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return int(free * DEFAULT_KV_SHARE[device.type])


def lower_caps(config: EngineConfig, device: torch.device, host_bytes: int | None = None) -> tuple[int, int]:
    """Bytes that the host tier and the disk tier may take; `host_bytes` instead of what the configuration says.

    Raises:
        InputError: the directory of the disk tier does not exist.
    """
    return host_cap(config, device) if host_bytes is None else host_bytes, disk_cap(config)


def host_cap(config: EngineConfig, device: torch.device) -> int:
    """Bytes of rows in main memory below a GPU; none where main memory is the device."""
    if device.type == "cpu":
        return 0
    if config.kv_host_memory is not None:
        return parse_bytes(config.kv_host_memory, least=0)
    return int(free_memory() * DEFAULT_KV_SHARE["cpu"])


def disk_directory(config: EngineConfig) -> Path:
    """Where the disk tier lies."""
    return config.kv_disk_path or Path(tempfile.gettempdir())


def disk_cap(config: EngineConfig) -> int:
    """Bytes that the disk tier may take; by default a share of what is free now.

    Raises:
        InputError: the directory does not exist.
    """
    if config.kv_disk_memory is not None:
        return parse_bytes(config.kv_disk_memory, least=0)
    directory = disk_directory(config)
    try:
        return int(shutil.disk_usage(directory).free * FREE_DISK_SHARE)
    except OSError as error:
        raise InputError(f"{directory} cannot hold the disk tier: {error.strerror}.") from error
