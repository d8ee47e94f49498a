"""The tensors of a GGUF file under the names of a Hugging Face checkpoint, in its order of rows."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from alisa.model.gguf.architectures.architecture import Architecture, Restore
from alisa.model.gguf.file import GgufFile
from alisa.model.names import Shape
from alisa.spec import ModelSpec

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


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
        self._stored: dict[str, tuple[str, Restore | None]] = {}
        for name in file.tensors:
            if name not in leave:
                hub_name, restore = _translate(name, architecture)
                self._stored[hub_name] = (name, restore)

    @property
    def names(self) -> list[str]:
        """Names on the hub of all tensors; one that the architecture does not know keeps its own."""
        return list(self._stored)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor in the file."""
        return self._file.tensors[self._stored[name][0]].shape

    def file_name(self, name: str) -> str:
        """The name of the file."""
        return self.place.name

    def read(self, name: str) -> Tensor:
        """The tensor, decoded."""
        stored, restore = self._stored[name]
        shape = self._file.tensors[stored].shape
        tensor = self._file.read(stored, self._dtype if len(shape) > 1 else torch.float32)
        return tensor if restore is None else restore(tensor, self._spec)


def _translate(name: str, architecture: Architecture) -> tuple[str, Restore | None]:
    """The name on the hub, and what must be done to the tensor."""
    stem, _, kind = name.rpartition(".")
    layer = _LAYER_NAME.fullmatch(stem)
    if layer is None:
        hub_stem = architecture.model_stems.get(stem)
        return (name if hub_stem is None else f"{hub_stem}.{kind}"), architecture.restore.get(stem)
    number, stem = layer.groups()
    hub_stem = architecture.layer_stems.get(stem)
    return (name if hub_stem is None else f"{hub_stem.format(layer=number)}.{kind}"), architecture.restore.get(stem)
