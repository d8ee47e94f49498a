"""Reads single tensors out of a `.bin` checkpoint (a pickled state dict), with code execution switched off.

Older repositories (OPT) have nothing else. The file is mapped, not loaded; since mapped pages count as resident memory
until the mapping goes, the file is opened anew after every `_REOPEN_BYTES` read, which costs one small unpickling.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from alisa.errors import ModelError
from alisa.model.pages import page_tensor

_REOPEN_BYTES = 64 * 1024 * 1024


class TorchFile:
    """One `.bin` file; tensors are read when asked for.

    Raises:
        ModelError: the file is damaged, or holds more than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0
        self._tensors = self._open()

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the file."""
        return list(self._tensors)

    def dtype_name(self, name: str) -> str:
        """Dtype of a tensor as torch spells it (`float16`)."""
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, part: int | None = None) -> Tensor:
        """A copy of the tensor in its stored dtype, or of one part of it along its first dimension.

        Raises:
            ModelError: its dtype is not a float dtype.
        """
        tensor = self._tensors[name]
        if not tensor.is_floating_point():
            raise ModelError(
                f"{self.path.name}: {name} is stored as {self.dtype_name(name)}; only float checkpoints can be read, "
                "so take the unquantised repository of this model."
            )
        if part is not None:
            tensor = tensor[part]
        copy = page_tensor(tuple(tensor.shape), tensor.dtype).copy_(tensor)
        self._read_bytes += copy.nbytes
        if self._read_bytes > _REOPEN_BYTES:
            del tensor
            self._tensors = {}
            self._tensors = self._open()
            self._read_bytes = 0
        return copy

    def _open(self) -> dict[str, Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=_is_zip(self.path))
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{self.path.name} holds more than weights and is not opened, because a pickle can run code; take a "
                "repository with safetensors files."
            ) from error
        except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
            raise ModelError(
                f"{self.path.name} cannot be read ({_first_sentence(error)}); it is damaged or cut short, "
                "download it again."
            ) from error
        if not isinstance(state, dict):
            raise ModelError(f"{self.path.name} holds a {type(state).__name__} instead of named tensors.")
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _is_zip(path: Path) -> bool:
    """Whether the file is in torch's format since 1.6; files before that cannot be mapped and are read whole."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _first_sentence(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].split(". ")[0][:120] or type(error).__name__
