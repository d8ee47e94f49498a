"""Experts that GPT-OSS publishes in MXFP4: one tensor in two, its codes and its scales, read as the floats they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alisa.errors import ModelError
from alisa.model.mxfp4 import NUM_VALUES, decode_mxfp4
from alisa.model.pages import page_tensor
from alisa.model.safetensors_file import SafetensorsFile

_CODES, _SCALES = "_blocks", "_scales"
_CHUNK_VALUES = 1 << 15
"""Values that are decoded at once: so few stay in a core's own cache."""


class PackedTensor:
    """A tensor of all experts, `[experts, in, out]` as 16 bits of it are stored, whose rows `[out, in]` are in MXFP4.

    Args:
        name: without the endings of the two: `{name}_blocks` UInt8[experts, out, blocks, 16], a byte for two values
            next to each other, and `{name}_scales` UInt8[experts, out, blocks].
        codes: the file of the first.
        scales: the file of the second.

    Raises:
        ModelError: the two do not fit each other.
    """

    def __init__(self, name: str, codes: SafetensorsFile, scales: SafetensorsFile) -> None:
        self.path = codes.path
        self.halves = (name + _CODES, name + _SCALES)
        """Names of the two."""
        self._codes = codes
        self._scales = scales
        shape, scales_shape = codes.shape(name + _CODES), scales.shape(name + _SCALES)
        if len(shape) != 4 or shape[3] != NUM_VALUES // 2 or scales_shape != shape[:3]:
            raise ModelError(
                f"{codes.path.name}: {name}{_CODES} {list(shape)} and {name}{_SCALES} {list(scales_shape)} are no "
                "tensor in MXFP4; download the repository again."
            )
        self._shape = (shape[0], shape[2] * NUM_VALUES, shape[1])

    def dtype_name(self, name: str) -> str:
        """Every number of this format is one of bfloat16."""
        return "bfloat16"

    def shape(self, name: str) -> tuple[int, ...]:
        """As that of the tensor in 16 bits."""
        return self._shape

    def read(self, name: str, part: int | None = None) -> Tensor:
        """BFloat16[in, out] of one expert, a view of `[out, in]`."""
        assert part is not None, "experts are read one by one"
        codes, scales = self._codes.read_bytes(name + _CODES, part), self._scales.read_bytes(name + _SCALES, part)
        _, num_in, num_out = self._shape
        rows = page_tensor((num_out, num_in), torch.bfloat16)
        step = max(1, _CHUNK_VALUES // num_in)
        for first in range(0, num_out, step):
            found = codes[first : first + step].reshape(-1, NUM_VALUES // 2)
            values = torch.stack((found & 15, found >> 4), dim=2).flatten(1)
            decoded = decode_mxfp4(values, scales[first : first + step].reshape(-1, 1))
            rows[first : first + step] = decoded.view(-1, num_in)
        return rows.t()


def packed_tensors(files: Mapping[str, SafetensorsFile]) -> dict[str, PackedTensor]:
    """Those that lie in two tensors, by the name that they have as one.

    Raises:
        ModelError: the two do not fit each other.
    """
    stems = [name.removesuffix(_CODES) for name in files if name.endswith(_CODES)]
    return {
        stem: PackedTensor(stem, files[stem + _CODES], files[stem + _SCALES])
        for stem in stems
        if stem + _SCALES in files
    }
