"""Linear layers for inference as torch has them: weights in the layout that its matrix library reads fastest.

They serve where there are no native ones (`alisa.model.linear_panels`). On a CPU, `F.linear` converts the weight layout
in every call; a decode step reads each weight once, so that conversion costs more than the product. `PackedLinear` does
it once, at load. Either class holds its weight exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from alisa.model.coded import CodedWeight

BATCH_HINT = 16
"""Rows that oneDNN is told to expect when it chooses the blocked layout.

Measured with float32 weights 5632 x 2048 on two busy AVX-512 cores, hint 1 / 16 / 512 / none: 6.0 / 6.1 / 8.9 / 8.8 ms
for one row, 13.9 / 10.4 / 11.1 / 11.3 for 16, 25 / 19 / 16 / 20 for 64. The bfloat16 layout does not depend on it.
Fusing the activation into the product gained nothing at 1 and 16 rows, so it stays apart.
"""

ONE_ROW_INPUTS = 1024
"""Inputs up to which oneDNN adds up one row as it adds up a row among others, in float32 and native bfloat16.

Beyond, with AVX-512, a single row is summed in longer runs, and a sequence would get other bits alone than in a batch;
from two rows on nothing depends on their number, their order or the threads (oneDNN 3.12, 1 to 2048 rows; with AVX2
nothing ever does). `tests/equivalence/test_company.py` finds out if another version differs.
"""


class Linear(Protocol):
    """A matrix product with a fixed weight: `[..., in] -> [..., out]`, same dtype in and out but for tokens' scores."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and the bias."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Product of `x [..., in]` with the weight, plus the bias: `[..., out]`."""
        ...


CodedLayer = Callable[[CodedWeight, Tensor | None, int], Linear]
"""Makes a layer of a weight in 4 bits as they are, with its bias and its parts."""


class LinearMaker(Protocol):
    """Turns weights `[out, in]` into layers; the caller may drop them after."""

    @property
    def coded_layer(self) -> CodedLayer | None:
        """`layer` of weights that their file has in 4 bits; None: it must be given floats."""
        ...

    def layer(self, weight: Tensor, bias: Tensor | None, parts: int = 1) -> Linear:
        """A layer of the model; `bias [out]`.

        `parts` 2: the outputs are two halves that are needed side by side, gate and up.
        """
        ...

    def head(self, weight: Tensor) -> Linear:
        """The projection to the vocabulary, whose outputs are in float32 where that costs nothing."""
        ...

    def exact(self, weight: Tensor) -> Linear:
        """A layer whose weight is never rounded."""
        ...


class PlainLinear:
    """`F.linear` on a weight `[out, in]`; for CUDA (cuBLAS needs no packing) and whatever oneDNN does not take.

    On a CPU a single row goes twice, as in `PackedLinear`: with AVX512-FP16 torch sums it otherwise than among others.
    """

    __slots__ = ("_doubles", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self._doubles = weight.device.type == "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and the bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Product of `x [..., in]` with the weight, plus the bias: `[..., out]`."""
        if self._doubles and x.numel() == self.weight.shape[1]:
            return F.linear(_twice(x), self.weight, self.bias)[0].view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """A weight `[out, in]` reordered once into oneDNN's blocked layout; float32 and bfloat16 on a CPU.

    These two operators are what `torch.compile` uses to freeze weights for CPU inference; they are private to torch, so
    `FrameworkLinears` tries them on one row and keeps the plain form when they fail.

    A row's result does not depend on the other rows: where oneDNN treats a single row differently, it goes twice,
    which takes no longer (the weight is read once).

    Raises:
        RuntimeError: this build or CPU does not take the dtype.
    """

    __slots__ = ("_doubles", "_multiply", "_num_in", "_packed", "bias", "nbytes")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self.bias = bias
        self._num_in = weight.shape[1]
        # Private to torch, as in kernels/cpu_prefill.py.
        exact = weight.dtype == torch.float32 or (
            torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
        )
        self._doubles = self._num_in > ONE_ROW_INPUTS or not exact
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), BATCH_HINT)
        # The operator itself: the object that torch shows is two calls in Python for each product.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default._op
        self(weight.new_zeros(1, weight.shape[1]))

    def __call__(self, x: Tensor) -> Tensor:
        """Product of `x [..., in]` with the weight, plus the bias: `[..., out]`."""
        if self._doubles and x.numel() == self._num_in:
            out = self._multiply(_twice(x), self._packed, self.bias, "none", [], "")
            return out[0].view(*x.shape[:-1], -1)
        return self._multiply(x, self._packed, self.bias, "none", [], "")


def _twice(x: Tensor) -> Tensor:
    """One row `[..., in]` as two equal ones, `[2, in]`."""
    row = x.reshape(1, -1)
    return torch.cat((row, row))


class FrameworkLinears:
    """See `LinearMaker`: what torch has that is fastest for a dtype on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def coded_layer(self) -> CodedLayer | None:
        """None: torch multiplies floats."""
        return None

    def layer(self, weight: Tensor, bias: Tensor | None, parts: int = 1) -> Linear:
        """Packed by oneDNN where that takes the dtype, whatever the `parts`."""
        packable = self._device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        if packable and torch.backends.mkldnn.is_available():
            try:
                return PackedLinear(weight, bias)
            except RuntimeError:
                pass  # an old CPU or a build without oneDNN for this dtype: correct, only slower
        # No copy when the weight is already there: a tied output projection shares the embedding table this way.
        bias = None if bias is None else bias.to(self._device).contiguous()
        return PlainLinear(weight.to(self._device).contiguous(), bias)

    def head(self, weight: Tensor) -> Linear:
        """As any other."""
        return self.layer(weight, None)

    def exact(self, weight: Tensor) -> Linear:
        """As any other."""
        return self.layer(weight, None)
