"""Reads single tensors out of a safetensors file with plain file reads.

The format is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range) and the data
(https://huggingface.co/docs/safetensors). The library's own reader maps the whole file, and mapped pages stay in the
process's resident memory until the file is closed: a one-file checkpoint would be held twice while it is packed.
Reading each tensor into its own buffer holds one, and lets a short or damaged file be named before any work is done.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from alisa.errors import ModelError
from alisa.model.pages import page_tensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_HEADER_LIMIT_BYTES = 100_000_000
"""What the format itself allows; a larger number means that the file is something else."""


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One `.safetensors` file, opened by its header; tensors are read when asked for.

    Raises:
        ModelError: the file is no safetensors file, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = _read_header(path)

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the file."""
        return list(self._entries)

    def dtype_name(self, name: str) -> str:
        """Dtype of a tensor as torch spells it (`bfloat16`), or the format's own code when torch has no such float."""
        code = self._entries[name].dtype
        return str(_DTYPES[code]).removeprefix("torch.") if code in _DTYPES else code

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._entries[name].shape

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The tensor in its stored dtype, in memory of its own; or one part of it along its first dimension.

        Raises:
            ModelError: its dtype is not a float dtype (quantised checkpoints), or the file ends early.
        """
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise ModelError(
                f"{self.path.name}: {name} is stored as {entry.dtype}; only {', '.join(_DTYPES)} checkpoints can be "
                "read, so take the unquantised repository of this model."
            )
        return self._read(entry, _DTYPES[entry.dtype], part)

    def read_bytes(self, name: str, part: int) -> Tensor:
        """One part of a tensor of codes along its first dimension, UInt8, in memory of its own.

        Raises:
            ModelError: it holds something else, or the file ends early.
        """
        entry = self._entries[name]
        if entry.dtype != "U8" or entry.end - entry.start != math.prod(entry.shape):
            raise ModelError(f"{self.path.name}: {name} is stored as {entry.dtype} instead of U8; download it again.")
        return self._read(entry, torch.uint8, part)

    def _read(self, entry: _Entry, dtype: torch.dtype, part: int | None) -> Tensor:
        tensor = page_tensor(entry.shape if part is None else entry.shape[1:], dtype)
        if tensor.numel():
            target = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start + (part or 0) * tensor.nbytes)
                _read_fully(file, target, self.path)
        return tensor


def _read_fully(file: FileIO, target: memoryview, path: Path) -> None:
    """Fill `target` from an unbuffered file, which may return less than asked (Linux: 2 GiB at a time)."""
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise _truncated(path, len(target), done)
        done += count


def _truncated(path: Path, expected_bytes: int, actual_bytes: int) -> ModelError:
    return ModelError(
        f"{path.name} is cut short: {actual_bytes} of {expected_bytes} bytes are there; download it again."
    )


def _read_header(path: Path) -> dict[str, _Entry]:
    """Check the file's frame and return its entries with absolute byte ranges."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or not 2 <= header_bytes <= _HEADER_LIMIT_BYTES:
            raise _no_safetensors(path, "it does not begin with a header")
        if 8 + header_bytes > file_bytes:
            raise _truncated(path, 8 + header_bytes, file_bytes)
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        base = 8 + header_bytes
        entries = {
            name: _Entry(
                dtype=str(item["dtype"]),
                shape=tuple(int(size) for size in item["shape"]),
                start=base + int(item["data_offsets"][0]),
                end=base + int(item["data_offsets"][1]),
            )
            for name, item in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _no_safetensors(path, "its header is damaged") from error
    expected_bytes = max((entry.end for entry in entries.values()), default=0)
    if expected_bytes > file_bytes:
        raise _truncated(path, expected_bytes, file_bytes)
    for name, entry in entries.items():
        dtype = _DTYPES.get(entry.dtype)
        if entry.start < base or (dtype and entry.end - entry.start != math.prod(entry.shape) * dtype.itemsize):
            raise _no_safetensors(path, f"the byte range of {name} does not fit its shape")
    return entries


def _no_safetensors(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path.name} is not a usable safetensors file: {reason}; download it again.")
