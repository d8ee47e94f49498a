"""Where weights come from: one method, so that a checkpoint and random numbers build a decoder the same way."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from alisa.model.coded import CodedWeight
from alisa.model.names import Shape


class WeightSource(Protocol):
    """Gives the tensors of one model by our names (`alisa.model.names`)."""

    def read(self, name: str, shape: Shape) -> Tensor:
        """The named tensor: of this shape, any float dtype, contiguous, owned by the caller (no view into more memory).

        Raises:
            ModelError: it is missing, damaged or of another shape.
        """
        ...

    def read_codes(self, name: str, shape: Shape) -> CodedWeight | None:
        """The named matrix in the 4 bits that its file has, owned by the caller; None: it has no such pieces.

        Raises:
            ModelError: as above.
        """
        ...


class RandomSource:
    """Random weights of a sensible size, for benchmarks of shapes whose checkpoints are not at hand.

    Uniform numbers scaled by the fan-in keep activations finite through any depth. Tensors are made in the final dtype
    on the final device, so nothing is held twice.

    Args:
        dtype: of the tensors.
        device: of the tensors.
        seed: same seed, same weights on the same device.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def read(self, name: str, shape: Shape) -> Tensor:
        """A new random tensor; norms are the identity, biases 0."""
        if len(shape) == 1:
            value = 1.0 if name.endswith("norm.weight") else 0.0
            return torch.full(shape, value, dtype=self._dtype, device=self._device)
        bound = (3.0 / shape[-1]) ** 0.5
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        return tensor.uniform_(-bound, bound, generator=self._generator)

    def read_codes(self, name: str, shape: Shape) -> CodedWeight | None:
        """None: random weights are floats."""
        return None
