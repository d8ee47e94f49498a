"""Linear layers whose weights lie in panels, as native products read them, in any of four formats."""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.base import Panels, WeightFormat
from alisa.kernels.native.product import CpuProducts, make_matrix
from alisa.model.linear_int4 import multiply_int4
from alisa.model.linear_int8 import multiply_int8
from alisa.spec import LANES, STEP_INPUTS


class PanelLinear:
    """A weight in panels, and its bias.

    Args:
        panels: the weight.
        bias: `[out]`, or None.
        products: do the arithmetic; None, for integer weights: plain torch does.
        dtype: of the outputs, which are added up in float32; None: that of the inputs.
    """

    __slots__ = ("_bias", "_dtype", "_panels", "_products", "matrix", "nbytes")

    def __init__(
        self, panels: Panels, bias: Tensor | None, products: CpuProducts | None, dtype: torch.dtype | None = None
    ) -> None:
        self._panels = panels
        self._bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._products = products
        self._dtype = dtype
        self.matrix = None if products is None else make_matrix(panels, self._bias)
        """What native code calls the weight; None without it."""
        self.nbytes = panels.nbytes + (0 if self._bias is None else self._bias.nbytes)

    @property
    def format(self) -> str:
        """Of the weight."""
        return self._panels.format

    def __call__(self, x: Tensor) -> Tensor:
        """Product of `x [..., in]` with the weight, plus the bias: `[..., out]`."""
        tokens = x.reshape(-1, x.shape[-1])
        if self._products is not None and self.matrix is not None:
            out = self._products(tokens, self.matrix, self._dtype)
        else:
            multiply = multiply_int8 if self._panels.format == "int8" else multiply_int4
            out = multiply(tokens, self._panels, self._bias).to(self._dtype or x.dtype)
        return out.view(*x.shape[:-1], out.shape[1])


def float_panels(weight: Tensor, parts: int = 1) -> Panels:
    """A weight `[out, in]` in float32 or bfloat16, laid out; padding is zero."""
    num_out, num_in = weight.shape
    name: WeightFormat = "float32" if weight.dtype == torch.float32 else "bfloat16"
    inputs = STEP_INPUTS[name]
    steps, rows = -(-num_in // inputs), num_out // parts
    per_part = -(-rows // LANES)
    codes = weight.new_empty(parts * per_part, steps, LANES, inputs)
    # What one step reads of a lane is four bytes in every format: a panel is a transposed matrix of them.
    words = codes.view(torch.int32).view(-1, steps, LANES)
    for panel in range(len(codes)):
        part, first = divmod(panel, per_part)
        begin = part * rows + first * LANES
        found = weight[begin : min(begin + LANES, (part + 1) * rows)]
        if found.shape != (LANES, steps * inputs) or not found.is_contiguous():
            whole = weight.new_zeros(LANES, steps * inputs)
            whole[: len(found), :num_in] = found
            found = whole
        words[panel].copy_(found.view(torch.int32).view(LANES, steps).t())
    return Panels(name, codes, None, None, num_in, num_out, parts)
