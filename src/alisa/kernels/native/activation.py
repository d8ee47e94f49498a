"""The activation of an MLP with its gate, native, as a function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.native import library

KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
"""The numbers of `Activation` in native/activation_task.h."""


class CpuActivation:
    """`act(x)`, or `act(x[..., :F]) * x[..., F:]`, in one pass; an element's result depends on nothing but the element.

    Args:
        kind: one of `KINDS`.
        gated: whether the last dimension holds what is activated and then what it is multiplied with.
        isa: one of `isa_names()`; by default the fastest.
        num_threads: threads to use; by default as many as torch uses at the time of the call.
    """

    __slots__ = ("_gated", "_isa", "_kind", "_run", "_team")

    def __init__(self, kind: str, *, gated: bool, isa: str | None = None, num_threads: int | None = None) -> None:
        self._run = library.native().activate
        self._kind = KINDS[kind]
        self._gated = gated
        self._isa = isa or library.isa_names()[0]
        self._team = library.Team(num_threads)

    def __call__(self, x: Tensor) -> Tensor:
        """X `[..., F]` or, gated, `[..., 2 F]`, contiguous, a float dtype -> `[..., F]`; x may be overwritten."""
        assert x.is_contiguous(), "a product just made"
        *tokens, width = x.shape
        width = width // 2 if self._gated else width
        out = torch.empty((*tokens, width), dtype=x.dtype) if self._gated else x
        self._run(
            isa=self._isa,
            threads=self._team.threads(),
            kind=self._kind,
            dtype=library.VALUE_CODES[x.dtype],
            x=x.data_ptr(),
            out=out.data_ptr(),
            width=width,
            gated=self._gated,
            num_tokens=out.numel() // width,
        )
        return out
