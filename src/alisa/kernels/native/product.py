"""Products with 8-bit weights, native, as functions of tensors."""

from __future__ import annotations

from torch import Tensor

from alisa.kernels.checks import check_multiply
from alisa.kernels.native import library


def product_isa_names() -> tuple[str, ...]:
    """Instruction sets that this build and this CPU have in common, fastest first; empty without the library."""
    return tuple(library.native().product_isa_names()) if library.available() else ()


class CpuProducts:
    """The native products with 8-bit weights, with their working memory.

    Args:
        isa: one of `product_isa_names()`; by default the fastest.
        num_threads: threads to use; by default as many as torch uses at the time of the call.
    """

    def __init__(self, isa: str | None = None, *, num_threads: int | None = None) -> None:
        native = library.native()
        if isa is not None and isa not in product_isa_names():
            raise ValueError(f"{isa} products cannot run here; there are {', '.join(product_isa_names())}")
        self.isa = isa or product_isa_names()[0]
        self._team = library.Team(num_threads)
        self._workspace = native.ProductWorkspace()

    def __call__(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """Product of `x [M, in]` with a weight in 8 bits, plus the bias: `[M, out]` in the dtype of x.

        Args:
            x: float32, bfloat16 or float16.
            codes: UInt8[ceil(out / 64), ceil(in / 4), 64, 4], contiguous, padded with 128.
            scales: Float32[out].
            bias: Float32[out], or None.
        """
        check_multiply(x, codes, scales, bias)
        x = x if x.stride(1) == 1 else x.contiguous()
        num_tokens, num_in = x.shape
        out = x.new_empty(num_tokens, len(scales))
        self._workspace.multiply(
            isa=self.isa,
            threads=self._team.threads(),
            x=x.data_ptr(),
            dtype=library.VALUE_CODES[x.dtype],
            x_stride=x.stride(0) * x.element_size(),
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            num_tokens=num_tokens,
            num_in=num_in,
            num_out=len(scales),
        )
        return out
