"""Products with the weights of linear layers, native, as functions of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alisa.kernels.base import Panels
from alisa.kernels.checks import check_panels
from alisa.kernels.native import library

if TYPE_CHECKING:
    from alisa.kernels._native import Matrix

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
"""The numbers of `WeightFormat` in native/csrc/model/matrix.h."""


def model_isa_names() -> tuple[str, ...]:
    """Instruction sets that this build and this CPU have in common, fastest first; empty without the library."""
    return tuple(library.native().model_isa_names()) if library.available() else ()


def make_matrix(panels: Panels, bias: Tensor | None) -> Matrix:
    """A weight and its bias Float32[out] as the native code sees them: both must live as long as it is used."""
    check_panels(panels, bias)
    return library.native().Matrix(
        format=FORMATS[panels.format],
        codes=panels.codes.data_ptr(),
        scales=0 if panels.scales is None else panels.scales.data_ptr(),
        ranges=0 if panels.ranges is None else panels.ranges.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        num_in=panels.num_in,
        num_out=panels.num_out,
        parts=panels.parts,
    )


class CpuProducts:
    """The native products, with their working memory.

    Args:
        isa: one of `model_isa_names()`; by default the fastest.
        num_threads: threads to use; by default as many as torch uses at the time of the call.
    """

    def __init__(self, isa: str | None = None, *, num_threads: int | None = None) -> None:
        if isa is not None and isa not in model_isa_names():
            raise ValueError(f"{isa} products cannot run here; there are {', '.join(model_isa_names())}")
        self.isa = isa or model_isa_names()[0]
        self._team = library.Team(num_threads)
        self._workspace = library.native().ProductWorkspace()

    def __call__(self, x: Tensor, matrix: Matrix, dtype: torch.dtype | None = None) -> Tensor:
        """Product of `x [M, in]` in a float dtype with a weight, plus its bias: `[M, out]`.

        Args:
            x: tokens.
            matrix: the weight.
            dtype: of the result, which is added up in float32; None: that of x.
        """
        x = x if x.stride(1) == 1 else x.contiguous()
        num_tokens, num_in = x.shape
        if num_in != matrix.num_in:
            raise ValueError(f"x {tuple(x.shape)} does not fit a weight of {matrix.num_in} inputs")
        out = x.new_empty(num_tokens, matrix.num_out, dtype=dtype)
        self._workspace.multiply(
            isa=self.isa,
            threads=self._team.threads(),
            matrix=matrix,
            x=x.data_ptr(),
            dtype=library.VALUE_CODES[x.dtype],
            x_stride=x.stride(0) * x.element_size(),
            num_tokens=num_tokens,
            out_dtype=library.VALUE_CODES[out.dtype],
            out=out.data_ptr(),
        )
        return out
