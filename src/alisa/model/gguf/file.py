"""A GGUF file: its metadata, its tensors, and their values block by block.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is a header with named values, a list of
tensors, and their blocks at aligned places. The file is mapped; a tensor is decoded a few blocks at a time, straight
into the dtype that is asked for, and its pages are given back at once: file and model are never in memory together.

The header is read here rather than by the `gguf` package, which takes seconds for a large vocabulary
(`benchmarks/loading.py`, docs/models.md).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alisa.errors import ModelError
from alisa.model.gguf.block_types import BLOCK_TYPES, OTHER_TYPES, BlockType
from alisa.model.pages import page_tensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_CHUNK_VALUES = 1 << 15
"""Values that are decoded at once, a multiple of the length of any block. So few stay in a core's own cache, and torch
keeps to one thread: with two, each operation would wait for both, tenfold where other programs are busy."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a type of metadata -> its code in `struct` and numpy."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the file, and what its bytes mean."""

    shape: tuple[int, ...]
    """In the order of torch: `[out, in]`."""
    block_type: BlockType
    start: int
    """First byte in the file."""
    num_bytes: int


class GgufFile:
    """One file, mapped; the header is read at once, tensors when they are asked for.

    Args:
        path: the file.

    Raises:
        ModelError: it is no GGUF file, is damaged or cut short, or holds tensors in a format that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            start = file.read(8)
            _check_start(path, start)
            # Private pages, which nobody writes to: torch wants memory that could be written.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            header = _HeaderReader(self._bytes, position=8)
            num_tensors, num_values = header.u64(), header.u64()
            self.metadata: dict[str, Any] = dict(header.named_value() for _ in range(num_values))
            """Named values: numbers, strings, lists of strings, numpy arrays of numbers."""
            infos = [header.tensor_info() for _ in range(num_tensors)]
        except (struct.error, ValueError, MemoryError, RecursionError) as error:
            raise ModelError(f"{path.name} is damaged: its header cannot be read; download it again.") from error
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or any(info.offset % 8 for info in infos):
            raise ModelError(f"{path.name} is damaged: its tensors are not aligned; download it again.")
        base = -(-header.position // alignment) * alignment
        self.tensors = _place(path, infos, base)
        """The tensors by their names in the file."""
        end = max((tensor.start + tensor.num_bytes for tensor in self.tensors.values()), default=0)
        if end > len(self._bytes):
            raise ModelError(
                f"{path.name} is cut short: {len(self._bytes)} of {end} bytes are there; download it again."
            )
        self._give_back(0, base)

    @property
    def dtype_name(self) -> str | None:
        """Dtype of most values as torch spells it (`float16`), or None when they are quantised."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            name = tensor.block_type.name
            counts[name] = counts.get(name, 0) + tensor.num_bytes // tensor.block_type.num_bytes
        most = max(counts, key=counts.__getitem__, default="")
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(most)

    def blocks(self, name: str) -> Tensor:
        """The bytes of a tensor in the file, UInt8[blocks, bytes of a block]; a view that nobody may write to."""
        tensor = self.tensors[name]
        if not tensor.num_bytes:
            return torch.empty(0, tensor.block_type.num_bytes, dtype=torch.uint8)
        flat = torch.frombuffer(self._bytes, dtype=torch.uint8, count=tensor.num_bytes, offset=tensor.start)
        return flat.view(-1, tensor.block_type.num_bytes)

    def read(self, name: str, dtype: torch.dtype, part: int | None = None) -> Tensor:
        """The tensor in a float dtype, in memory of its own; or one part of it along its first dimension."""
        block_type = self.tensors[name].block_type
        shape, blocks, start = self._stored(name, part)
        values = page_tensor(shape, dtype)
        flat = values.view(-1)
        step = _CHUNK_VALUES // block_type.num_values
        first = 0
        for chunk in blocks.split(step):
            decoded = block_type.decode(chunk).view(-1)
            flat[first : first + len(decoded)] = decoded
            first += len(decoded)
        self._give_back(start, blocks.nbytes)
        return values

    def read_blocks(self, name: str, part: int | None = None) -> Tensor:
        """The bytes of a matrix, or of one part, UInt8[out, blocks of a row, bytes of a block], a copy."""
        shape, blocks, start = self._stored(name, part)
        copied = page_tensor((shape[0], blocks.shape[0] // max(shape[0], 1), blocks.shape[1]), torch.uint8)
        copied.view(blocks.shape).copy_(blocks)
        self._give_back(start, blocks.nbytes)
        return copied

    def _stored(self, name: str, part: int | None) -> tuple[tuple[int, ...], Tensor, int]:
        """Shape, blocks and first byte of a tensor, or of one part of it."""
        tensor = self.tensors[name]
        shape, blocks, start = tensor.shape, self.blocks(name), tensor.start
        if part is None:
            return shape, blocks, start
        blocks = blocks.unflatten(0, (shape[0], -1))[part]
        return shape[1:], blocks, start + part * blocks.nbytes

    def _give_back(self, start: int, num_bytes: int) -> None:
        """Let the system take the pages of these bytes; they are in the file."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if num_bytes:
            self._bytes.madvise(mmap.MADV_DONTNEED, first, start + num_bytes - first)


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


class _HeaderReader:
    """Reads one thing after the other.

    Raises:
        struct.error: the bytes end.
        ValueError: they make no sense.
    """

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self.position = position

    def u64(self) -> int:
        """An unsigned whole number of 8 bytes."""
        (value,) = _U64.unpack_from(self._data, self.position)
        self.position += 8
        return value

    def u32(self) -> int:
        """An unsigned whole number of 4 bytes."""
        (value,) = _U32.unpack_from(self._data, self.position)
        self.position += 4
        return value

    def string(self) -> str:
        """A length and that many bytes of UTF-8."""
        start = self.position + 8
        end = start + self.u64()
        if end > len(self._data):
            raise ValueError("a string ends after the file")
        self.position = end
        return str(self._data[start:end], "utf-8")

    def named_value(self) -> tuple[str, Any]:
        """One entry of the metadata."""
        return self.string(), self._value(self.u32())

    def tensor_info(self) -> _TensorInfo:
        """One entry of the list of tensors."""
        name = self.string()
        sizes = [self.u64() for _ in range(self.u32())]
        # The fastest dimension comes first in the file.
        return _TensorInfo(name, tuple(reversed(sizes)), self.u32(), self.u64())

    def _value(self, kind: int) -> Any:  # noqa: ANN401 - a value of the format: number, string or array
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.u32(), self.u64())
        if kind not in _SCALARS:
            raise ValueError(f"metadata of type {kind}")
        code = f"<{_SCALARS[kind]}"
        (value,) = struct.unpack_from(code, self._data, self.position)
        self.position += struct.calcsize(code)
        return value

    def _array(self, kind: int, count: int) -> Any:  # noqa: ANN401
        if kind not in _SCALARS:
            return [self._value(kind) for _ in range(count)]
        values = np.frombuffer(self._data, np.dtype(_SCALARS[kind]).newbyteorder("<"), count, self.position).copy()
        self.position += values.nbytes
        return values


def _check_start(path: Path, start: bytes) -> None:
    """Refuse what is not a little-endian GGUF file of a version that is known."""
    if start[:4] != _MAGIC:
        # Repositories that were cloned without large file storage hold a few lines of text in place of the file.
        pointer = start.startswith(b"version ")
        what = "a pointer to a file that was not fetched (git lfs pull gets it)" if pointer else "not a GGUF file"
        raise ModelError(f"{path.name} is {what}; download it again.")
    version = int.from_bytes(start[4:], "little")
    if version not in _VERSIONS:
        known = " and ".join(map(str, _VERSIONS))
        big_endian = int.from_bytes(start[4:], "big") in _VERSIONS
        what = "is in big-endian order" if big_endian else f"has version {version} of the format"
        raise ModelError(f"{path.name} {what}; little-endian files of version {known} are read, convert it anew.")


def _place(path: Path, infos: list[_TensorInfo], base: int) -> dict[str, StoredTensor]:
    """The tensors with their places in the file; all of a format that is read here."""
    unknown = [info for info in infos if info.type_number not in BLOCK_TYPES]
    if unknown:
        names = sorted({OTHER_TYPES.get(info.type_number, f"type {info.type_number}") for info in unknown})
        known = ", ".join(block_type.name for block_type in BLOCK_TYPES.values())
        raise ModelError(
            f"{path.name} holds {len(unknown)} tensors as {', '.join(names)} ({unknown[0].name} first); {known} are "
            "read, so take another quantisation of this model."
        )
    tensors: dict[str, StoredTensor] = {}
    for info in infos:
        block_type = BLOCK_TYPES[info.type_number]
        num_values = int(np.prod(info.shape, dtype=object))
        row = info.shape[-1] if info.shape else 1
        if row % block_type.num_values:
            raise ModelError(
                f"{path.name} is damaged: {info.name} has rows of {row} values in blocks of {block_type.num_values}; "
                "download it again."
            )
        num_bytes = num_values // block_type.num_values * block_type.num_bytes
        tensors[info.name] = StoredTensor(info.shape, block_type, base + info.offset, num_bytes)
    return tensors
