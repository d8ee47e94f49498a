"""The memory that rows lie in."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from alisa.config import format_bytes
from alisa.errors import CapacityError
from alisa.machine import memory_limit


def allocate_pool(num_layers: int, num_rows: int, row_bytes: int, device: torch.device) -> Tensor:
    """Room for rows `[L, R, row_bytes]`, UInt8.

    On a CPU the operating system hands out pages as rows are written, so a generous cap costs nothing until it is used.

    Raises:
        CapacityError: the machine, or the process's container, has less memory than that.
    """
    num_bytes = num_layers * num_rows * row_bytes
    if device.type == "cpu":
        most = memory_limit() or psutil.virtual_memory().total
        if num_bytes > most:
            raise _too_large(num_bytes, f"this machine has {format_bytes(most)} of memory")
    try:
        return torch.empty(num_layers, num_rows, row_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError, and what its CPU allocator raises
        raise _too_large(num_bytes, f"the system gives no more than it has left on {device}") from error


def _too_large(num_bytes: int, limit: str) -> CapacityError:
    return CapacityError(f"A KV pool of {format_bytes(num_bytes)} is asked for and {limit}; lower --kv-device-memory.")
