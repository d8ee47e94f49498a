"""Heads in another basis: native and plain agree, and no token knows its neighbours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.kernels.native import library
from alisa.kernels.native.turn import CpuTurn
from alisa.kernels.reference.turn import PlainTurn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_native = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())


def case(dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    heads = torch.randn(7, kv_heads * group, head_dim, generator=draw).to(dtype)
    matrices = torch.randn(kv_heads, head_dim, head_dim, generator=draw)
    return heads, matrices, torch.randn(kv_heads, head_dim, generator=draw)


def exact(heads: torch.Tensor, matrices: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    groups = heads.double().unflatten(1, (len(matrices), -1))
    return (torch.einsum("nghd,gde->nghe", groups, matrices.double()) - shifts.double()[:, None]).flatten(1, 2)


def assert_near(got: torch.Tensor, heads: torch.Tensor, matrices: torch.Tensor, shifts: torch.Tensor) -> None:
    """A sum of D + 1 terms in float32, rounded once to the dtype."""
    want, sizes = exact(heads, matrices, shifts), exact(heads.abs(), matrices.abs(), -shifts.abs())
    allowed = sizes * (heads.shape[-1] + 2) * 2**-23 + want.abs() * torch.finfo(heads.dtype).eps + 1e-6
    assert bool(((got.double() - want).abs() <= allowed).all())


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([1, 2, 15, 16, 31, 64, 80, 256]),
)
def test_heads_are_multiplied_with_the_matrix_of_their_kv_head(dtype, kv_heads, group, head_dim):
    problem = case(dtype, kv_heads, group, head_dim)
    assert_near(PlainTurn(*problem[1:])(problem[0]), *problem)
    for isa in library.isa_names():
        assert_near(CpuTurn(*problem[1:], isa=isa)(problem[0]), *problem)


def test_a_token_gets_the_same_in_any_company():
    heads, matrices, shifts = case(torch.float32, 2, 3, 80)
    for turn in [PlainTurn(matrices, shifts), *(CpuTurn(matrices, shifts, isa=isa) for isa in library.isa_names())]:
        together = turn(heads)
        assert all(torch.equal(turn(heads[i : i + 1])[0], together[i]) for i in range(len(heads)))


@needs_native
def test_heads_may_be_a_part_of_a_wider_tensor_with_any_leading_dimensions():
    _, matrices, shifts = case(torch.float32, 2, 1, 16)
    fused = torch.randn(3, 5, 2, 2, 16)
    turn = CpuTurn(matrices, shifts, num_threads=2)
    for half in fused.unbind(2):
        assert torch.equal(turn(half), turn(half.contiguous()))


@needs_native
def test_what_does_not_fit_is_refused():
    heads, matrices, shifts = case(torch.float32, 2, 1, 16)
    turn = CpuTurn(matrices, shifts)
    with pytest.raises(ValueError, match="2 KV heads of 16"):
        turn(heads[..., :8])
    with pytest.raises(ValueError, match="2 KV heads of 16"):
        turn(heads[:, :1])
    with pytest.raises(TypeError, match="a float"):
        turn(heads.double())
