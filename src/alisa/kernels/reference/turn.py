"""Heads in another basis, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


class PlainTurn:
    """See `HeadTurn`.

    On a CPU channel after channel is added to all tokens, slowly, as the native kernel does it: a matrix product would
    sum in another order for another number of tokens.

    Args:
        matrices: Float32[G, D, D].
        shifts: Float32[G, D].
    """

    __slots__ = ("_matrices", "_shifts")

    def __init__(self, matrices: Tensor, shifts: Tensor) -> None:
        self._matrices = matrices
        self._shifts = shifts

    def __call__(self, heads: Tensor) -> Tensor:
        """See `HeadTurn`."""
        groups = heads.float().unflatten(-2, (len(self._matrices), -1))  # [..., G, H/G, D]
        if heads.device.type == "cpu":
            turned = -self._shifts[:, None]
            for channel in range(groups.shape[-1]):
                turned = torch.addcmul(turned, groups[..., channel, None], self._matrices[:, None, channel])
        else:
            turned = torch.einsum("...ghd,gde->...ghe", groups, self._matrices) - self._shifts[:, None]
        return turned.flatten(-3, -2).to(heads.dtype)
