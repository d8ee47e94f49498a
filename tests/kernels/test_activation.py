"""The activation of an MLP: native and plain agree, and no element knows its neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from alisa.kernels.native import library
from alisa.kernels.native.activation import KINDS, CpuActivation
from alisa.model.activation import make_activation, plain_activation
from alisa.spec import ActivationName

CPU = torch.device("cpu")
NAMES: tuple[ActivationName, ...] = ("relu", "silu", "gelu", "gelu_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_native = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())


def exact(name: str, x: torch.Tensor) -> torch.Tensor:
    """The function in double precision, as it is defined."""
    x = x.double()
    if name == "relu":
        return x.clamp(min=0)
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plain", [True, False])
def test_an_activation_is_the_function_it_is_named_after(name: ActivationName, dtype: torch.dtype, plain: bool) -> None:
    x = torch.linspace(-30, 30, 4001).to(dtype)
    want = exact(name, x)
    activate = plain_activation(name, gated=False) if plain else make_activation(name, gated=False, device=CPU)
    got = activate(x.clone()).double()
    # One rounding to the dtype and a few units of float32 on the way.
    unit = torch.finfo(dtype).eps
    allowed = want.abs() * (unit / 2 + 2e-6) + torch.finfo(dtype).smallest_normal * unit + 2e-7
    assert bool(((got - want).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_clamped_gate_is_that_of_gpt_oss(dtype: torch.dtype) -> None:
    """Transformers has gate and up in turns."""
    config = GptOssConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_local_experts=1)
    gate, up = (10 * torch.randn(2, 300, generator=torch.Generator().manual_seed(0))).to(dtype)
    want = GptOssExperts(config)._apply_gate(torch.stack((gate, up), dim=-1).flatten().double())
    got = make_activation("clamped_swiglu", gated=True, device=CPU)(torch.cat((gate, up)))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@needs_native
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", library.isa_names())
def test_the_native_gate_multiplies_what_is_activated(name: ActivationName, dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(5, 2, 2 * 1037)).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    want = exact(name, gate).to(dtype).double() * up.double()
    got = CpuActivation(name, gated=True, isa=isa)(x).double()
    # Rounded twice in 16 bits; the first may fall to the other side of a tie.
    unit = torch.finfo(dtype).eps
    smallest = (torch.finfo(dtype).smallest_normal * unit + 2e-7) * (1 + up.double().abs())
    assert bool(((got - want).abs() <= want.abs() * (1.5 * unit + 2e-6) + smallest).all())


@needs_native
@given(
    name=st.sampled_from(tuple(KINDS)),
    dtype=st.sampled_from(DTYPES),
    width=st.integers(1, 600),
    tokens=st.integers(1, 70),
    threads=st.integers(1, 3),
    gated=st.booleans(),
)
def test_an_element_does_not_know_its_neighbours(
    name: str, dtype: torch.dtype, width: int, tokens: int, threads: int, gated: bool
) -> None:
    torch.manual_seed(width)
    x = torch.randn(tokens, width * (2 if gated else 1)).to(dtype)
    together = CpuActivation(name, gated=gated, num_threads=threads)(x.clone())
    alone = [CpuActivation(name, gated=gated, num_threads=1)(row.clone()[None])[0] for row in x]
    assert torch.equal(together, torch.stack(alone))


@needs_native
@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_finite_stays_visible(name: str) -> None:
    x = torch.tensor([math.nan, math.inf, 1.0, -1e30, 0.0])
    got = CpuActivation(name, gated=False)(x.clone()[None])[0]
    assert math.isnan(got[0])
    assert math.isinf(got[1])
    assert bool(got[2:].isfinite().all())
