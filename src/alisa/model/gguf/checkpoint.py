"""The tensors of a GGUF file under the names of a Hugging Face checkpoint, in its order of rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.errors import ModelError
from alisa.model.coded import CodedRows
from alisa.model.gguf.architectures.architecture import Architecture, Restore
from alisa.model.gguf.file import GgufFile
from alisa.model.names import Shape
from alisa.spec import ModelSpec

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


class _Place(NamedTuple):
    """Where one of the tensors of a checkpoint is."""

    name: str
    """In the file."""
    restore: Restore | None
    """What must be done to it."""
    part: int | None = None
    """Of a tensor that holds those of all experts: which one."""


class GgufCheckpoint:
    """Stored tensors (`alisa.model.weights.StoredTensors`) out of a GGUF file.

    Args:
        file: the file.
        architecture: says which tensor is which, and what must be undone.
        spec: the model, as the metadata describe it.
        dtype: matrices are decoded to it; norms and biases stay as they are stored.
        leave: tensors of the file that are no weights.
    """

    def __init__(
        self,
        file: GgufFile,
        architecture: Architecture,
        spec: ModelSpec,
        dtype: torch.dtype,
        leave: frozenset[str] = frozenset(),
    ) -> None:
        self.place: Path = file.path
        self.description = "its metadata"
        self._file = file
        self._spec = spec
        self._dtype = dtype
        self._stored: dict[str, _Place] = {}
        for name, tensor in file.tensors.items():
            if name in leave:
                continue
            hub_name, restore = _translate(name, architecture)
            if "{expert}" in hub_name:
                parts = range(tensor.shape[0])
                self._stored |= {hub_name.format(expert=part): _Place(name, restore, part) for part in parts}
            else:
                self._stored[hub_name] = _Place(name, restore)

    @property
    def names(self) -> list[str]:
        """Names on the hub of all tensors; one that the architecture does not know keeps its own."""
        return list(self._stored)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor in the file."""
        place = self._stored[name]
        shape = self._file.tensors[place.name].shape
        return shape if place.part is None else shape[1:]

    def file_name(self, name: str) -> str:
        """The name of the file."""
        return self.place.name

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The tensor, decoded. The parts of those of all experts have names of their own here.

        Raises:
            ModelError: it has not the rows that the metadata speak of.
        """
        assert part is None, "a tensor of a GGUF file is taken apart by its name"
        place = self._stored[name]
        tensor = self._file.read(place.name, self._dtype if len(self.shape(name)) > 1 else torch.float32, place.part)
        return self._restored(place, tensor)

    def read_codes(self, name: str, part: int | None = None) -> CodedRows | None:
        """A matrix whose blocks are levels of 4 bits in ranges, as they are; None: it is none."""
        assert part is None, "a tensor of a GGUF file is taken apart by its name"
        place, shape = self._stored[name], self.shape(name)
        spans = self._file.tensors[place.name].block_type.spans
        if spans is None or len(shape) != 2:
            return None
        rows = CodedRows(self._file.read_blocks(place.name, place.part), spans, shape[1])
        return rows if place.restore is None else rows.moved(self._restored(place, torch.arange(shape[0])))

    def _restored(self, place: _Place, tensor: Tensor) -> Tensor:
        """The tensor as its family has it.

        Raises:
            ModelError: it has not the rows that the metadata speak of.
        """
        if place.restore is None:
            return tensor
        try:
            return place.restore(tensor, self._spec)
        except RuntimeError as error:
            raise ModelError(
                f"{self.file_name(place.name)}: {place.name} {list(tensor.shape)} cannot be what its metadata "
                "describe; download it again."
            ) from error


def _translate(name: str, architecture: Architecture) -> tuple[str, Restore | None]:
    """The name on the hub, and what must be done to the tensor."""
    stem, _, kind = name.rpartition(".")
    layer = _LAYER_NAME.fullmatch(stem)
    if layer is None:
        hub_stem = architecture.model_stems.get(stem)
        return (name if hub_stem is None else f"{hub_stem}.{kind}"), architecture.restore.get(stem)
    number, stem = layer.groups()
    hub_stem = architecture.layer_stems.get(stem)
    return (name if hub_stem is None else f"{hub_stem.replace('{layer}', number)}.{kind}"), architecture.restore.get(
        stem
    )
