"""Heads in another basis, native, as a function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from alisa.kernels.checks import check_turn
from alisa.kernels.native import library
from alisa.spec import PADDING


class CpuTurn:
    """See `HeadTurn`.

    Args:
        matrices: Float32[G, D, D].
        shifts: Float32[G, D].
        isa: one of `isa_names()`; by default the fastest.
        num_threads: threads to use; by default as many as torch uses at the time of the call.
    """

    __slots__ = ("_isa", "_matrices", "_run", "_shifts", "_team")

    def __init__(
        self, matrices: Tensor, shifts: Tensor, *, isa: str | None = None, num_threads: int | None = None
    ) -> None:
        missing = -matrices.shape[-1] % PADDING
        self._run = library.native().turn
        self._matrices = pad(matrices, (0, missing)).contiguous()
        self._shifts = pad(shifts, (0, missing)).contiguous()
        self._isa = isa or library.isa_names()[0]
        self._team = library.Team(num_threads)

    def __call__(self, heads: Tensor) -> Tensor:
        """See `HeadTurn`."""
        num_kv_heads, head_dim, _ = self._matrices.shape
        check_turn(heads, num_kv_heads, head_dim)
        *leading, num_heads, _ = heads.shape
        # K and V of a token lie in one run, of which each is a part.
        tokens = library.dense_tokens(heads.reshape(-1, num_heads, head_dim))
        out = torch.empty(*leading, num_heads, head_dim, dtype=heads.dtype)
        self._run(
            isa=self._isa,
            threads=self._team.threads(),
            heads=tokens.data_ptr(),
            out=out.data_ptr(),
            dtype=library.VALUE_CODES[heads.dtype],
            stride=tokens.stride(0) * tokens.element_size(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            matrices=self._matrices.data_ptr(),
            shifts=self._shifts.data_ptr(),
            num_tokens=len(tokens),
        )
        return out
