"""Linear layers with weights in 8 bits: how far they are from float, what they hold, and what they leave alone."""

import dataclasses

import pytest
import torch

from alisa.errors import InputError
from alisa.kernels.native import library
from alisa.kernels.native.product import CpuProducts
from alisa.model.choose_linear import choose_linear, has_fast_panels
from alisa.model.linear_int8 import GROUP, int8_panels
from alisa.model.linear_panels import PanelLinear
from alisa.model.loader import random_decoder
from alisa.model.names import panel_bytes
from alisa.planner.footprint import weight_bytes
from alisa.planner.shapes import SHAPES
from tests.specs import small_spec

CPU = torch.device("cpu")


def unpacked(codes, scales, num_in):
    rows = codes.transpose(1, 2).reshape(codes.shape[0] * 64, -1)[: len(scales), :num_in]
    return (rows.double() - 128) * scales.double().unsqueeze(1)


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (70, 130), (1030, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_moves_by_half_a_step_at_most(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = weight.clone()
    panels = int8_panels(weight)
    codes, scales = panels.codes, panels.scales
    assert torch.equal(weight, before), "the caller's tensor is left alone: it may be the embedding"
    assert panels.nbytes == panel_bytes("int8", *shape)
    assert ((unpacked(codes, scales, shape[1]) - weight.double()).abs() <= 0.5001 * scales.double().unsqueeze(1)).all()
    padding = codes.transpose(1, 2).reshape(codes.shape[0] * 64, -1)
    assert (padding[shape[0] :] == 128).all()
    assert (padding[:, shape[1] :] == 128).all()


def test_a_row_of_zeros_stays_zero():
    panels = int8_panels(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    codes, scales = panels.codes, panels.scales
    assert unpacked(codes, scales, 2).tolist()[0] == [0.0, 0.0]


@pytest.mark.parametrize("native", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("num_in", [64, 200, 2048])
def test_a_product_errs_by_what_rounding_explains(native, num_in):
    if native and not library.available():
        pytest.skip(library.unavailable_reason())
    generator = torch.Generator().manual_seed(num_in)
    weight, bias = torch.randn(96, num_in, generator=generator), torch.randn(96, generator=generator)
    x = torch.randn(3, 5, num_in, generator=generator)
    layer = PanelLinear(int8_panels(weight), bias, CpuProducts() if native else None)
    got = layer(x)
    assert got.shape == (3, 5, 96)
    exact = x.double() @ weight.double().T + bias.double()
    # An input is off by half a step of its group, a weight by half a step of its row: each term by the sum of both
    # times the other factor. Then float32: a rounding or two for each group.
    groups = torch.nn.functional.pad(x, (0, -num_in % GROUP)).unflatten(-1, (-1, GROUP)).abs().amax(-1)
    x_error = (groups / 254).repeat_interleave(GROUP, -1)[..., :num_in].double()
    w_error = (weight.abs().amax(1, keepdim=True) / 254).double()
    bound = x_error @ weight.abs().double().T + (x.abs().double() + x_error) @ w_error.expand_as(weight).T
    assert ((got.double() - exact).abs() <= 1.001 * bound).all()
    # The bound adds all errors up with one sign; that of a sum of independent ones is much smaller.
    assert (got.double() - exact).pow(2).mean().sqrt() < 0.015 * exact.pow(2).mean().sqrt()


def test_large_inputs_do_not_coarsen_those_of_other_groups():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 4 * GROUP, generator=generator)
    x[:, 0] = 1000.0
    weight = torch.randn(64, 4 * GROUP, generator=generator)
    weight[:, :GROUP] = 0
    got, exact = PanelLinear(int8_panels(weight), None, None)(x), x @ weight.T
    assert (got - exact).pow(2).mean() < 0.015**2 * exact.pow(2).mean()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_name_chooses_the_layer(name):
    linears = choose_linear(name, torch.float32, CPU)
    weight = torch.ones(8, 16)
    assert linears.layer(weight, None).format == name
    assert linears.head(weight).format == "int8", "scores of tokens are not mended by a later layer"
    assert linears.exact(weight)(torch.ones(1, 16)).tolist() == [[16.0] * 8]
    with pytest.raises(InputError, match="is for a CPU, and the model runs on cuda"):
        choose_linear(name, torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_without_the_library_the_reference_works(monkeypatch, name):
    monkeypatch.setattr(library, "available", lambda: False)
    layer = choose_linear(name, torch.float32, CPU).layer(torch.ones(8, 16), None)
    assert layer(torch.ones(2, 16)).flatten().tolist() == pytest.approx([16.0] * 16, rel=2**-11)


@pytest.mark.parametrize("weight_dtype", ["float", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decoder_holds_what_the_planner_says(tied, dtype, weight_dtype):
    if weight_dtype == "float" and not has_fast_panels(dtype, CPU):
        pytest.skip("another library has its own layout for this dtype here")
    spec = dataclasses.replace(small_spec(), tied_embeddings=tied, qkv_bias=True)
    decoder = random_decoder(spec, dtype, CPU, linears=choose_linear(weight_dtype, dtype, CPU))
    name = str(dtype).removeprefix("torch.")
    assert decoder.weight_bytes == weight_bytes(spec, name, packs_tied=True, weight_dtype=weight_dtype)


def test_large_models_take_about_half_of_16_bits():
    spec = SHAPES["opt-6.7b"]
    half = weight_bytes(spec, "bfloat16", packs_tied=True)
    assert 0.5 < weight_bytes(spec, "bfloat16", packs_tied=True, weight_dtype="int8") / half < 0.53


@pytest.mark.parametrize("weight_dtype", ["float", "int8", "int4"])
def test_scores_of_tokens_are_not_rounded_to_16_bits(weight_dtype):
    if not library.available():
        pytest.skip(library.unavailable_reason())
    if weight_dtype == "float" and not has_fast_panels(torch.bfloat16, CPU):
        pytest.skip("a matrix unit takes bfloat16 here, and gives bfloat16")
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator).to(torch.bfloat16) for n in (300, 5))
    linears = choose_linear(weight_dtype, torch.bfloat16, CPU)
    scores = linears.head(weight)(x)
    assert scores.dtype == torch.float32
    exact = x.double() @ weight.double().T
    rounded = exact.to(torch.bfloat16).double()
    if weight_dtype == "float":
        assert (scores - exact).abs().max() < (rounded - exact).abs().max() / 100
    assert len(scores.unique()) > 1.5 * len(scores.to(torch.bfloat16).unique())
    assert linears.layer(weight, None)(x).dtype == torch.bfloat16
