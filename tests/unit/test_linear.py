"""Linear layers of torch and in panels, all against float64; which one is chosen."""

from __future__ import annotations

import pytest
import torch

from alisa.kernels.native import library
from alisa.kernels.native import product as cpu_product
from alisa.model.choose_linear import choose_linear, has_fast_panels
from alisa.model.linear import FrameworkLinears, PackedLinear, PlainLinear
from alisa.model.linear_panels import PanelLinear, float_panels
from alisa.model.names import panel_bytes

CPU = torch.device("cpu")
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place of 1."""


def onednn_takes(dtype):
    """Whether oneDNN packs weights of this dtype on this CPU: 16 bits need AVX-512, or what came after it."""
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (193, 71), (2048, 33)])
@pytest.mark.parametrize("shape", [(1,), (16,), (1, 1), (2, 7), (130,)], ids=str)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_packed_and_plain_agree_with_float64(dtype, shape, num_in, num_out, bias):
    generator = torch.Generator().manual_seed(num_in + len(shape))
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    offset = torch.randn(num_out, generator=generator).to(dtype) if bias else None
    x = torch.randn(*shape, num_in, generator=generator).to(dtype)
    product = x.double() @ weight.double().T
    exact = product if offset is None else product + offset.double()
    # Products of 16-bit numbers are exact in float32, in which both sum: n terms in any order err by at most n halves
    # of a unit of the sum of their sizes. Then the result is rounded to the dtype, the product before the bias perhaps
    # too.
    sizes = x.double().abs() @ weight.double().abs().T + 1
    bound = num_in * EPSILON[torch.float32] * sizes + 1.1 * EPSILON[dtype] * (exact.abs() + product.abs())
    plain = PlainLinear(weight, offset)
    layers = [plain, PackedLinear(weight, offset)] if onednn_takes(dtype) else [plain]
    panels = [
        PanelLinear(float_panels(weight), offset, cpu_product.CpuProducts(isa)) for isa in cpu_product.model_isa_names()
    ]
    for layer in (*layers, *panels):
        y = layer(x)
        assert y.shape == (*shape, num_out)
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= bound).all()
    assert (bound < 0.2 * exact.abs().mean()).all(), "a bound this wide would admit zeros"
    assert {layer.nbytes for layer in layers} == {(num_out * num_in + bias * num_out) * dtype.itemsize}
    for layer in panels:
        assert layer.nbytes == panel_bytes(str(dtype).removeprefix("torch."), num_out, num_in) + 4 * bias * num_out


@pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())
@pytest.mark.parametrize("rows", [5, 64, 100])
@pytest.mark.parametrize("name", ["float", "int8", "int4"])
def test_parts_are_apart_and_give_what_the_whole_gives(name, rows):
    """Each part begins a panel of its own, so that gate and up lie side by side; products do not show it."""
    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(2 * rows, 70, generator=generator), torch.randn(2 * rows, generator=generator)
    x = torch.randn(3, 70, generator=generator)
    linears = choose_linear(name, torch.float32, CPU)
    assert torch.equal(linears.layer(weight, bias, 2)(x), linears.layer(weight, bias)(x))


def test_the_device_and_dtype_choose_the_layer():
    weight = torch.ones(8, 16)
    for dtype in (torch.float32, torch.bfloat16):
        fast = has_fast_panels(dtype, CPU)
        of_torch = PackedLinear if onednn_takes(dtype) else PlainLinear
        layer = choose_linear("float", dtype, CPU).layer(weight.to(dtype), None)
        assert type(layer) is (PanelLinear if fast else of_torch)
        assert type(FrameworkLinears(CPU).layer(weight.to(dtype), None)) is of_torch
    half = choose_linear("float", torch.float16, CPU).layer(weight.to(torch.float16), None)
    assert type(half) is PlainLinear
    assert half(torch.ones(1, 16, dtype=torch.float16)).tolist() == [[16.0] * 8]


def test_without_onednn_the_plain_layer_works(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight = torch.ones(8, 16)
    layer = FrameworkLinears(CPU).layer(weight, None)
    assert type(layer) is PlainLinear
    assert layer.weight.data_ptr() == weight.data_ptr(), "a plain layer shares the weight"


def test_a_packing_that_fails_falls_back(monkeypatch):
    def refuse(self, weight, bias):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(PackedLinear, "__init__", refuse)
    assert type(FrameworkLinears(CPU).layer(torch.ones(8, 16), torch.ones(8))) is PlainLinear


def test_a_packed_layer_does_not_hold_the_weight_it_was_made_from():
    weight, bias = torch.ones(8, 16), torch.ones(8)
    layers = [
        linears.layer(weight, bias) for linears in (FrameworkLinears(CPU), choose_linear("float", torch.float32, CPU))
    ]
    weight.zero_()
    for layer in layers:
        assert layer(torch.ones(1, 16)).tolist() == [[17.0] * 8]
