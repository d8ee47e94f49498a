"""A linear layer with weights in 8 bits, against the library's packed product with weights in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from alisa.kernels.native.kernels import CpuKernels
from alisa.kernels.native.product import CpuProducts, model_isa_names
from alisa.lab.bench.case import Call, Candidate, Case, Role
from alisa.lab.bench.cases import ProductCase
from alisa.model.linear import FrameworkLinears, Linear
from alisa.model.linear_int8 import int8_panels
from alisa.model.linear_panels import PanelLinear

_LAYERS = 8
"""Used in turn, so that each finds its weights in memory and not in a cache."""
_TWIN_TOKENS = 16
"""The reference unpacks all weights in every call: with more tokens it shows nothing else."""


def product_case(case: ProductCase, kernels: CpuKernels) -> Case:
    """The case with random weights and inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.num_out, case.num_in, generator=generator).bfloat16()
    x = torch.randn(case.num_tokens, case.num_in, generator=generator).bfloat16()
    products = CpuProducts(_isa(kernels.isa))
    few = case.num_tokens <= _TWIN_TOKENS
    layers = [PanelLinear(int8_panels(weight), None, products) for _ in range(_LAYERS)]

    def rivals() -> Iterator[Candidate]:
        torch_has = FrameworkLinears(weight.device)
        packed = [torch_has.layer(weight, None) for _ in range(_LAYERS)]
        yield Candidate(Role.PACKED, "torch bf16", _in_turn(packed, x))
        if few:
            reference = PanelLinear(int8_panels(weight), None, None)
            yield Candidate(Role.REFERENCE, "torch reference", lambda _: reference(x))

    return Case(_in_turn(layers, x), rivals, case.num_bytes)


def _in_turn(layers: Sequence[Linear], x: Tensor) -> Call:
    return lambda number: layers[number % _LAYERS](x)


def _isa(kernels: str) -> str:
    """The products that go with these kernels: AVX-512 without VNNI has none of its own."""
    return kernels if kernels in model_isa_names() else "avx2"
