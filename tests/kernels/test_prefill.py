"""Native prefill attention against its float32 reference, in shapes that fill no block, strip or vector."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.kernels.base import KeyBlock
from alisa.kernels.native import prefill as cpu_prefill
from alisa.kernels.native.prefill import CpuPrefill
from alisa.kernels.native.prefill_engine import NativePrefill
from alisa.kernels.reference.prefill import attend_after_plain, mass_after, prefill_attention

EPS = torch.finfo(torch.bfloat16).eps
ISAS = cpu_prefill.prefill_isa_names()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU or build has no prefill kernels")
each_isa = pytest.mark.parametrize("isa", ISAS)


class Problem(NamedTuple):
    """A piece of a prompt with the blocks before it."""

    q: torch.Tensor
    own: KeyBlock
    past: list[KeyBlock]

    window: int | None = None
    softcap: float | None = None

    def native(self, isa=None):
        return CpuPrefill(isa).attend(self.q, self.own, self.past, self.window, self.softcap)


def make_problem(
    num_new, past_sizes, kv_heads, group, head_dim, *, scale=1.0, seed=0, apart=1, window=None, softcap=None
):
    """Keys and values as the model hands them over: views into one tensor, here with `apart` - 1 heads in between."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_new, kv_heads * group, head_dim, generator=generator).mul_(scale).bfloat16()
    blocks, start = [], 0
    for size in (*past_sizes, num_new):
        pairs = torch.randn(size, 2, kv_heads * apart, head_dim, generator=generator).bfloat16()
        k, v = pairs[:, :, ::apart].unbind(1)
        blocks.append(KeyBlock(start, k, v))
        start += size
    return Problem(q, blocks[-1], blocks[:-1], window, softcap)


def assert_agrees(problem, out, log_sum_exp):
    """Against float32 throughout, from the same bfloat16 q, k and v.

    What differs: weights are rounded to bfloat16 before they meet the values (each by at most EPS / 2 of itself, and
    they add up to 1), the output once more, and every score is a float32 sum of D products in another order.
    """
    q, own = problem.q.float(), KeyBlock(problem.own.start, problem.own.k.float(), problem.own.v.float())
    plain, plain_log_sum_exp = attend_after_plain(q, own, problem.past, problem.window, problem.softcap)
    values = max(float(block.v.abs().max()) for block in (own, *problem.past))
    keys = max(float(block.k.abs().max()) for block in (own, *problem.past))
    # |q| |k| bounds the products of a score and their partial sums.
    score_error = 4 * torch.finfo(torch.float32).eps * float(q.abs().max()) * keys * q.shape[2] ** 0.5 + 1e-6
    score_error += 8 * torch.finfo(torch.float32).eps * (problem.softcap or 0)
    torch.testing.assert_close(out.float(), plain, rtol=0, atol=(EPS + 2 * score_error) * values)
    torch.testing.assert_close(log_sum_exp, plain_log_sum_exp, rtol=2e-6, atol=score_error + 2e-6)


@each_isa
@settings(max_examples=60, deadline=None)
@given(
    num_new=st.integers(1, 150),
    past_sizes=st.lists(st.integers(1, 150), max_size=2),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7, 8]),
    head_dim=st.sampled_from([1, 7, 8, 32, 33, 64, 80, 96, 128, 256]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
    apart=st.integers(1, 2),
    window=st.none() | st.integers(1, 400),
    softcap=st.sampled_from([None, None, 0.5, 50.0]),
)
def test_prefill_is_that_of_plain_torch(
    isa, num_new, past_sizes, kv_heads, group, head_dim, scale, seed, apart, window, softcap
):
    options = {"scale": scale, "seed": seed, "apart": apart, "window": window, "softcap": softcap}
    problem = make_problem(num_new, past_sizes, kv_heads, group, head_dim, **options)
    assert_agrees(problem, *problem.native(isa))


@each_isa
def test_a_long_prompt_is_that_of_plain_torch(isa):
    problem = make_problem(1100, [], 2, 4, 64)
    assert_agrees(problem, *problem.native(isa))


@each_isa
def test_scores_that_grow_and_fall_stay_in_range(isa):
    problem = make_problem(200, [100], 1, 2, 16)
    # The running maximum rises by thousands within one row and weights from before it become nothing.
    rising = torch.linspace(-300, 300, 200)[:, None, None] * torch.ones(1, 1, 16)
    problem = problem._replace(own=problem.own._replace(k=rising.bfloat16()), q=torch.full_like(problem.q, 4.0))
    out, log_sum_exp = problem.native(isa)
    assert torch.isfinite(out.float()).all()
    assert_agrees(problem, out, log_sum_exp)


@each_isa
@settings(max_examples=40, deadline=None)
@given(
    num_new=st.integers(1, 90),
    past_size=st.integers(0, 130),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([7, 64, 80]),
    per_head=st.booleans(),
    seed=st.integers(0, 10**6),
    softcap=st.sampled_from([None, 0.5]),
    data=st.data(),
)
def test_seeds_are_those_of_plain_torch(
    isa, num_new, past_size, kv_heads, group, head_dim, per_head, seed, softcap, data
):
    problem = make_problem(num_new, [past_size] if past_size else [], kv_heads, group, head_dim, seed=seed, apart=2)
    num_seeds, num_sets = data.draw(st.integers(1, num_new)), kv_heads if per_head else 1
    first = past_size + num_new - num_seeds

    def gather(seeds):
        mass = torch.zeros(num_seeds, num_sets, past_size + num_new)
        for row, start, part in seeds:
            mass[row - first : row - first + len(part), :, start : start + part.shape[2]] += part
        return mass

    _, seeds = NativePrefill(CpuPrefill(isa))(
        problem.q, problem.own, len(problem.q), lambda: problem.past, num_seeds, num_sets, None, softcap
    )
    q = problem.q.float()
    _, log_sum_exp = attend_after_plain(q, problem.own, problem.past, None, softcap)
    blocks = [*problem.past, problem.own]
    expected = gather(mass_after(q[-num_seeds:], log_sum_exp[-num_seeds:], first, blocks, num_sets, softcap))
    # Nothing here is rounded to 16 bits: only the order of float32 sums differs.
    torch.testing.assert_close(gather(seeds), expected, rtol=1e-4, atol=1e-5)


@each_isa
@pytest.mark.parametrize(("num_threads", "share_threads"), [(2, True), (3, False), (5, True)])
def test_the_number_of_threads_changes_nothing(isa, num_threads, share_threads):
    problem = make_problem(130, [70], 3, 2, 48)
    many = CpuPrefill(isa, num_threads=num_threads, share_threads=share_threads)
    one = CpuPrefill(isa, num_threads=1)
    (out, log_sum_exp), (alone, alone_log_sum_exp) = (
        kernel.attend(problem.q, problem.own, problem.past) for kernel in (many, one)
    )
    assert torch.equal(out, alone)
    assert torch.equal(log_sum_exp, alone_log_sum_exp)
    masses = [kernel.mass(problem.q, problem.own.k, log_sum_exp, 0, 1) for kernel in (many, one)]
    assert torch.equal(*masses)


@each_isa
@pytest.mark.parametrize("window", [None, 50])
def test_a_token_does_not_depend_on_those_after_it(isa, window):
    whole = make_problem(300, [], 2, 3, 64, window=window)
    out, log_sum_exp = whole.native(isa)
    for count in (1, 5, 48, 64, 127, 299):
        own = KeyBlock(0, whole.own.k[:count], whole.own.v[:count])
        less, less_log_sum_exp = Problem(whole.q[:count], own, [], window).native(isa)
        assert torch.equal(less, out[:count])
        assert torch.equal(less_log_sum_exp, log_sum_exp[:count])


@each_isa
@pytest.mark.parametrize("lost", [70, 128, 300])
def test_blocks_that_a_window_hides_need_not_be_there(isa, lost):
    """To the last bit: what is hidden and not skipped counts as nothing."""
    problem = make_problem(40, [128, 172, 100], 1, 3, 32, window=401 - lost)
    out, log_sum_exp = problem.native(isa)
    fewer = [block for block in problem.past if block.start + len(block.k) > lost]
    less, less_log_sum_exp = problem._replace(past=fewer).native(isa)
    assert torch.equal(out, less)
    assert torch.equal(log_sum_exp, less_log_sum_exp)
    assert torch.isfinite(out.float()).all()


@pytest.mark.parametrize("window", [None, 60, 320])
def test_a_piece_of_a_section_sees_through_a_window_what_the_section_sees(window):
    whole = make_problem(300, [64], 2, 3, 64)
    for kernel in (NativePrefill(CpuPrefill()), prefill_attention):
        out, _ = kernel(whole.q, whole.own, 300, lambda: whole.past, 0, 1, window)
        for first, last in ((0, 1), (0, 64), (1, 65), (270, 299), (299, 300)):
            own = KeyBlock(whole.own.start, whole.own.k[:last], whole.own.v[:last])
            piece, _ = kernel(whole.q[first:last], own, 300, lambda: whole.past, 0, 1, window)
            assert torch.equal(piece, out[first:last])


def test_a_piece_of_a_section_gets_what_the_section_gets():
    whole = make_problem(300, [64], 2, 3, 64)
    kernel = NativePrefill(CpuPrefill())
    out, seeds = kernel(whole.q, whole.own, 300, lambda: whole.past, 40, 2)
    mass = {seed.start: seed.mass for seed in seeds}
    for first, last in ((0, 1), (0, 64), (1, 65), (270, 299), (299, 300)):
        own = KeyBlock(whole.own.start, whole.own.k[:last], whole.own.v[:last])
        num_observed = max(0, last - max(first, 260))
        piece, observed = kernel(whole.q[first:last], own, 300, lambda: whole.past, num_observed, 2)
        assert torch.equal(piece, out[first:last])
        for seed in observed:
            assert seed.first == 64 + last - num_observed
            row = seed.first - 64 - 260
            assert torch.equal(seed.mass, mass[seed.start][row : row + num_observed, :, : seed.mass.shape[2]])


def test_queries_of_any_stride_are_read_in_place():
    problem = make_problem(20, [], 2, 2, 32)
    wide = torch.zeros(20, 4, 64, dtype=torch.bfloat16)
    wide[..., :32] = problem.q
    spread = wide.transpose(0, 2).contiguous().transpose(0, 2)[..., :32]
    for q in (wide[..., :32], spread):
        assert torch.equal(problem._replace(q=q).native()[0], problem.native()[0])


def test_other_dtypes_go_to_torch():
    problem = make_problem(9, [], 1, 2, 16)
    q, own = problem.q.float(), KeyBlock(0, problem.own.k.float(), problem.own.v.float())
    out, seeds = NativePrefill(CpuPrefill())(q, own, 9, tuple, 3, 1)
    expected, expected_seeds = prefill_attention(q, own, 9, tuple, 3, 1)
    assert torch.equal(out, expected)
    assert all(torch.equal(seed.mass, other.mass) for seed, other in zip(seeds, expected_seeds, strict=True))


def test_what_does_not_fit_is_refused():
    problem = make_problem(4, [], 2, 2, 8)
    kernel = CpuPrefill()
    with pytest.raises(ValueError, match="do not fit each other"):
        kernel.attend(problem.q[:, :3], problem.own, [])
    with pytest.raises(TypeError, match="are bfloat16, not"):
        kernel.attend(problem.q.float(), problem.own, [])
    with pytest.raises(ValueError, match="log-sum-exp is"):
        kernel.mass(problem.q, problem.own.k, torch.zeros(4), 0, 1)
