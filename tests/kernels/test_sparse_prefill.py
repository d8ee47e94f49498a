"""Attention to chosen blocks: native against plain torch, plain torch against a loop, and neither knows of pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.kernels.base import KeyBlock
from alisa.kernels.native.prefill import CpuPrefill
from alisa.kernels.native.sparse_prefill import NativeSparsePrefill
from alisa.kernels.reference.prefill import attend_after_plain
from alisa.kernels.reference.sparse_prefill import BLOCK, block_means, choose_blocks, sparse_prefill_attention
from tests.kernels.test_prefill import EPS, ISAS, each_isa, make_problem

native = pytest.mark.skipif(not ISAS, reason="this CPU or build has no prefill kernels")


def problem_of(num_new, past_sizes, kv_heads, group, head_dim, seed, softcap=None, apart=1):
    """Keys of a block have a direction, and the queries of a block that of another: there is something to choose."""
    problem = make_problem(num_new, past_sizes, kv_heads, group, head_dim, seed=seed, softcap=softcap, apart=apart)
    generator = torch.Generator().manual_seed(seed + 1)
    directions: list[torch.Tensor] = []
    for block in (*problem.past, problem.own):
        for k in block.k.split(BLOCK):
            directions.append(torch.randn(kv_heads, head_dim, generator=generator))
            k += directions[-1].bfloat16()
    for queries in problem.q.split(BLOCK):
        found = directions[int(torch.randint(len(directions), (), generator=generator))]
        queries += 2 * found.repeat_interleave(group, 0).bfloat16()
    return problem


def kernels():
    return {"torch": sparse_prefill_attention, **{isa: NativeSparsePrefill(CpuPrefill(isa)) for isa in ISAS}}


def sparse(kernel, problem, alpha):
    return kernel(problem.q, problem.own, lambda: problem.past, alpha, problem.softcap)


def all_keys(problem):
    return torch.cat([block.k for block in (*problem.past, problem.own)])


def plain(problem, chosen):
    """Each block of queries on its own, in float32, with the keys that it does not read cut out."""
    k, v = (torch.cat([values[i] for values in (*problem.past, problem.own)]) for i in (1, 2))
    first, out = len(k) - len(problem.q), torch.empty(problem.q.shape)
    group = problem.q.shape[1] // k.shape[1]
    for number, queries in enumerate(problem.q.split(BLOCK)):
        start = first + number * BLOCK
        for kv_head in range(k.shape[1]):
            read = chosen[number, kv_head, : start // BLOCK].repeat_interleave(BLOCK).nonzero()[:, 0]
            heads, of = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
            mine = slice(start, start + len(queries))
            own = KeyBlock(start, k[mine, of].float(), v[mine, of].float())
            past = [KeyBlock(0, k[read, of], v[read, of])] if len(read) else []
            found, _ = attend_after_plain(queries[:, heads].float(), own, past, None, problem.softcap)
            out[number * BLOCK : number * BLOCK + len(queries), heads] = found
    return out


SHAPES = {
    "num_new": st.integers(1, 330),
    "past_blocks": st.lists(st.integers(1, 5), max_size=2),
    "kv_heads": st.integers(1, 3),
    "group": st.sampled_from([1, 2, 3, 4, 7, 8]),
    "head_dim": st.sampled_from([8, 33, 64, 80, 256]),
    "alpha": st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9]),
    "seed": st.integers(0, 10**6),
    "softcap": st.sampled_from([None, None, 5.0]),
}


def check(kernel, chosen, problem, alpha):
    """The bound is that of `test_prefill.assert_agrees`, with more sums to come together."""
    values = max(float(block.v.abs().max()) for block in (problem.own, *problem.past))
    torch.testing.assert_close(
        sparse(kernel, problem, alpha).float(), plain(problem, chosen), rtol=0, atol=2 * EPS * values
    )


def with_all(chosen, problem):
    """A choice, and one of everything for a last block that is not whole."""
    last = torch.ones(-(-len(problem.q) // BLOCK) - len(chosen), chosen.shape[1], chosen.shape[2], dtype=torch.bool)
    return torch.cat((chosen, last))


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_the_reference_attends_to_what_it_chooses(
    num_new, past_blocks, kv_heads, group, head_dim, alpha, seed, softcap
):
    problem = problem_of(num_new, [n * BLOCK for n in past_blocks], kv_heads, group, head_dim, seed, softcap)
    whole = num_new // BLOCK * BLOCK
    means = block_means(all_keys(problem), torch.bfloat16)
    chosen = choose_blocks(problem.q[:whole], means, sum(past_blocks), alpha, softcap)
    check(sparse_prefill_attention, with_all(chosen, problem), problem, alpha)


@native
@each_isa
@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_native_is_plain_torch(isa, num_new, past_blocks, kv_heads, group, head_dim, alpha, seed, softcap):
    problem = problem_of(num_new, [n * BLOCK for n in past_blocks], kv_heads, group, head_dim, seed, softcap)
    whole, first, kernel = num_new // BLOCK * BLOCK, sum(past_blocks), CpuPrefill(isa)
    means = kernel.means(all_keys(problem))
    # Sums of 64 values in another order, rounded to bfloat16 once.
    torch.testing.assert_close(means, block_means(all_keys(problem), torch.bfloat16), rtol=2 * EPS, atol=1e-6)
    chosen = torch.zeros(whole // BLOCK, kv_heads, first + whole // BLOCK, dtype=torch.uint8)
    kernel.choose(problem.q[:whole], means, first, alpha, chosen, softcap)
    # A total is a sum of 64 weights: what is within a thousandth of the limit may fall to either side.
    least, most = (choose_blocks(problem.q[:whole], means, first, alpha * by, softcap) for by in (1.001, 0.999))
    assert not (least & ~chosen.bool()).any()
    assert not (chosen.bool() & ~most).any()
    check(NativeSparsePrefill(kernel), with_all(chosen.bool(), problem), problem, alpha)


@settings(max_examples=30, deadline=None)
@given(alpha=st.floats(0.001, 0.9), seed=st.integers(0, 10**6), softcap=st.sampled_from([None, 2.0]))
def test_a_choice_is_that_of_a_loop(alpha, seed, softcap):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2 * BLOCK, 4, 16, generator=generator)
    means = torch.randn(9, 2, 16, generator=generator)
    chosen = choose_blocks(q, means, 8, alpha, softcap)
    for block in range(2):
        own = 8 + block
        for kv_head in range(2):
            read = {0, own - 2, own - 1, own}
            for head in (2 * kv_head, 2 * kv_head + 1):
                scores = q[block * BLOCK : (block + 1) * BLOCK, head].double() @ means[:own, kv_head].double().T / 4
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                totals = [sum(float((row[i] - row.max()).exp()) for row in scores) for i in range(own)]
                limit = alpha * max(totals)
                if min(abs(total - limit) for total in totals) < 1e-4 * limit:
                    return
                read |= {i for i, total in enumerate(totals) if total >= limit}
            assert set(chosen[block, kv_head].nonzero()[:, 0].tolist()) == read


@pytest.mark.parametrize("name", ["torch", *ISAS])
@settings(max_examples=20, deadline=None)
@given(
    num_new=st.integers(65, 500),
    group=st.sampled_from([1, 3, 4, 8]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_pieces_that_end_where_blocks_do_change_no_bit(name, num_new, group, softcap, seed, data):
    kernel = kernels()[name]
    problem = problem_of(num_new, [2 * BLOCK], 2, group, 32, seed, softcap)
    out = sparse(kernel, problem, 0.2)
    cuts = data.draw(st.sets(st.integers(1, (num_new - 1) // BLOCK)))
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), -(-num_new // BLOCK)], strict=True):
        piece = slice(first * BLOCK, min(last * BLOCK, num_new))
        own = KeyBlock(problem.own.start, problem.own.k[: piece.stop], problem.own.v[: piece.stop])
        assert torch.equal(kernel(problem.q[piece], own, lambda: problem.past, 0.2, softcap), out[piece])


@native
@each_isa
@pytest.mark.parametrize("num_new", [64, 200, 384])
def test_native_at_zero_is_dense_to_the_last_bit(isa, num_new):
    problem = problem_of(num_new, [128, 192], 2, 3, 64, 1)
    dense, _ = problem.native(isa)
    kernel = NativeSparsePrefill(CpuPrefill(isa))
    assert torch.equal(sparse(kernel, problem, 0.0), dense)
    assert not torch.equal(sparse(kernel, problem, 0.5), dense)


@native
@pytest.mark.parametrize(("num_threads", "share_threads"), [(2, True), (3, False)])
def test_the_number_of_threads_changes_nothing(num_threads, share_threads):
    problem = problem_of(330, [320], 3, 2, 48, 2)
    many = NativeSparsePrefill(CpuPrefill(num_threads=num_threads, share_threads=share_threads))
    one = NativeSparsePrefill(CpuPrefill(num_threads=1))
    assert torch.equal(sparse(many, problem, 0.2), sparse(one, problem, 0.2))


@native
def test_keys_of_any_stride_are_read_in_place():
    apart = problem_of(130, [128], 2, 2, 32, 3, apart=2)
    together = apart._replace(
        own=KeyBlock(128, apart.own.k.contiguous(), apart.own.v.contiguous()),
        past=[KeyBlock(0, block.k.contiguous(), block.v.contiguous()) for block in apart.past],
    )
    kernel = NativeSparsePrefill(CpuPrefill())
    assert torch.equal(sparse(kernel, apart, 0.2), sparse(kernel, together, 0.2))


@native
def test_other_dtypes_go_to_torch():
    problem = problem_of(130, [64], 1, 2, 16, 4)
    problem = problem._replace(
        q=problem.q.float(),
        own=KeyBlock(64, problem.own.k.float(), problem.own.v.float()),
    )
    found = sparse(NativeSparsePrefill(CpuPrefill()), problem, 0.2)
    assert torch.equal(found, sparse(sparse_prefill_attention, problem, 0.2))


def test_sinks_take_their_part():
    problem = problem_of(130, [64], 1, 2, 16, 5)
    for kernel in kernels().values():
        plain_out = sparse(kernel, problem, 0.2)
        none, much = (
            kernel(problem.q, problem.own, lambda: problem.past, 0.2, None, torch.full((2,), value))
            for value in (-1e4, 1e4)
        )
        torch.testing.assert_close(none, plain_out)
        assert not much.any()
