"""Decode and prefill attention against the definition, written out head by head."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.cache.codec import FloatCodec
from alisa.kernels.base import KeyBlock
from alisa.kernels.reference import prefill
from alisa.kernels.reference.decode import decode_attention
from alisa.kernels.reference.prefill import attend_after, attend_after_plain, causal_attention, causal_mass, mass_after
from alisa.spec import RowFormat


def by_definition(q, k, v):
    """One head: q [D], k and v [N, D] -> (out, weights, log-sum-exp) in float64."""
    scores = (k.double() @ q.double()) / math.sqrt(len(q))
    log_sum_exp = scores.logsumexp(0)
    weights = (scores - log_sum_exp).exp()
    return weights @ v.double(), weights, log_sum_exp


@settings(max_examples=40, deadline=None)
@given(
    num_seqs=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 5, 8]),
    per_head=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_decode_attention_is_the_definition(num_seqs, kv_heads, group, head_dim, per_head, dtype, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_sets = 20, kv_heads if per_head else 1
    codec = FloatCodec(RowFormat(dtype, kv_heads, head_dim))
    k, v = (torch.randn(num_rows, kv_heads, head_dim, generator=generator) * scale for _ in range(2))
    rows = codec.encode(k, v)
    k, v = codec.decode(rows)
    q = torch.randn(num_seqs, kv_heads * group, head_dim, generator=generator)
    counts = torch.randint(1, num_rows + 1, (num_seqs,), generator=generator, dtype=torch.int32)
    slots = torch.zeros(num_seqs, num_sets, int(counts.max()), dtype=torch.int32)
    for b in range(num_seqs):
        for j in range(num_sets):
            slots[b, j, : counts[b]] = torch.randperm(num_rows, generator=generator)[: counts[b]]
    out, mass, log_sum_exp = decode_attention(q, rows, codec, slots, counts)
    expected_mass = torch.zeros(mass.shape, dtype=torch.float64)
    for b in range(num_seqs):
        for h in range(kv_heads * group):
            g = h // group
            chosen = slots[b, g if per_head else 0, : counts[b]].long()
            expected, weights, total = by_definition(q[b, h], k[chosen, g], v[chosen, g])
            torch.testing.assert_close(out[b, h].double(), expected, rtol=1e-5, atol=1e-5 * scale)
            torch.testing.assert_close(log_sum_exp[b, h].double(), total, rtol=1e-5, atol=1e-5)
            expected_mass[b, g if per_head else 0, : counts[b]] += weights
    torch.testing.assert_close(mass.double(), expected_mass, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mass.sum(dim=(1, 2)), torch.full((num_seqs,), float(kv_heads * group)))


def full_weights(q, k, window=None, softcap=None):
    """Float64[H, T, S] causal weights of the last T of S tokens."""
    num_new, num_heads, head_dim = q.shape
    keys = k.double().repeat_interleave(num_heads // k.shape[1], dim=1)
    scores = torch.einsum("thd,shd->hts", q.double(), keys) / math.sqrt(head_dim)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.ones(num_new, len(k), dtype=torch.bool).triu(len(k) - num_new + 1)
    if window is not None:
        hidden |= torch.ones(num_new, len(k), dtype=torch.bool).tril(len(k) - num_new - window)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def causal_case(num_new, num_past, kv_heads, window=None, softcap=None):
    """q, k, v, and the attention of the last `num_new` tokens by definition."""
    generator = torch.Generator().manual_seed(num_new * 10 + num_past)
    q = torch.randn(num_new, 4, 8, generator=generator)
    k, v = (torch.randn(num_new + num_past, kv_heads, 8, generator=generator) for _ in range(2))
    values = v.double().repeat_interleave(4 // kv_heads, dim=1)
    return q, k, v, torch.einsum("hts,shd->thd", full_weights(q, k, window, softcap), values)


def blocks_of(k, v, end, size):
    return [
        KeyBlock(first, k[first : first + size][: end - first], v[first : first + size][: end - first])
        for first in range(0, end, size)
    ]


@pytest.mark.parametrize("num_new", [7, 1])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_causal_attention_is_the_definition(num_new, kv_heads):
    q, k, v, expected = causal_case(num_new, 0, kv_heads)
    torch.testing.assert_close(causal_attention(q, k, v).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_new", "num_past", "size"), [(5, 6, 4), (1, 9, 9), (3, 8, 1), (4, 0, 1)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("attend", "block_scores"), [(attend_after, 1 << 23), (attend_after_plain, 1), (attend_after_plain, 1 << 23)]
)
def test_attention_after_cached_blocks_is_the_definition(
    num_new, num_past, size, kv_heads, attend, block_scores, monkeypatch
):
    monkeypatch.setattr(prefill, "MASS_BLOCK_SCORES", block_scores)
    q, k, v, expected = causal_case(num_new, num_past, kv_heads)
    own = KeyBlock(num_past, k[num_past:], v[num_past:])
    past = blocks_of(k, v, num_past, size)
    out, log_sum_exp = attend(q, own, past)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for num_sets in (1, kv_heads):
        mass = torch.zeros(num_new, num_sets, num_past + num_new)
        for first, start, part in mass_after(q, log_sum_exp, num_past, [*past, own], num_sets):
            rows = slice(first - num_past, first - num_past + len(part))
            mass[rows, :, start : start + part.shape[2]] += part
        weights = full_weights(q, k).view(num_sets, -1, num_new, num_past + num_new).sum(1)
        torch.testing.assert_close(mass.double(), weights.transpose(0, 1), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    num_new=st.integers(1, 70),
    num_past=st.integers(0, 90),
    size=st.integers(1, 90),
    kv_heads=st.sampled_from([4, 2]),
    window=st.integers(1, 170),
    softcap=st.sampled_from([None, 0.5]),
)
def test_attention_through_a_window_is_the_definition(num_new, num_past, size, kv_heads, window, softcap):
    q, k, v, expected = causal_case(num_new, num_past, kv_heads, window, softcap)
    own = KeyBlock(num_past, k[num_past:], v[num_past:])
    past = blocks_of(k, v, num_past, size)
    for attend in (attend_after, attend_after_plain):
        out, _ = attend(q, own, past, window, softcap)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    out, observed = prefill.prefill_attention(q, own, num_new, lambda: past, 0, 1, window, softcap)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert not list(observed)


@pytest.mark.parametrize("num_sets", [1, 2])
def test_capped_scores_show_in_the_mass_too(num_sets):
    q, k, v, _ = causal_case(5, 0, 2, None, 0.5)
    _, observed = prefill.prefill_attention(q, KeyBlock(0, k, v), 5, tuple, 3, num_sets, None, 0.5)
    mass = torch.cat([part.mass for part in observed])
    weights = full_weights(q, k, None, 0.5).view(num_sets, -1, 5, 5).sum(1)[:, 2:]
    torch.testing.assert_close(mass.double(), weights.transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codes", [False, True])
def test_attention_after_cached_blocks_in_sixteen_bits_is_that_of_plain_torch(dtype, codes):
    q, k, v, _ = causal_case(5, 6, 2)
    q, k, v = (100 * q).to(dtype), k.to(dtype), v.to(dtype)  # weights from one to nearly nothing
    past = (k.float(), v.float()) if codes else (k, v)  # rows of codes are read as float32
    case = q, KeyBlock(6, k[6:], v[6:]), blocks_of(*past, 6, 4)
    (out, log_sum_exp), (plain, plain_log_sum_exp) = attend_after(*case), attend_after_plain(*case)
    assert out.dtype == dtype
    # Weights and each block's output are rounded to 16 bits before they are merged.
    torch.testing.assert_close(out, plain, rtol=0, atol=4 * torch.finfo(dtype).eps * float(v.abs().max()))
    torch.testing.assert_close(log_sum_exp, plain_log_sum_exp, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_past", [0, 64])
def test_a_piece_of_a_section_gets_what_the_section_gets(dtype, num_past):
    generator = torch.Generator().manual_seed(5)
    num_new, num_observed = 1024, 100
    q = torch.randn(num_new, 6, 32, generator=generator).to(dtype)
    k, v = (torch.randn(num_past + num_new, 2, 32, generator=generator).to(dtype) for _ in range(2))
    past = blocks_of(k, v, num_past, num_past or 1)

    def run(first, last):
        own = KeyBlock(num_past, k[num_past : num_past + last], v[num_past : num_past + last])
        wanted = max(0, last - max(first, num_new - num_observed))
        out, observed = prefill.prefill_attention(q[first:last], own, num_new, lambda: past, wanted, 2)
        mass = torch.zeros(wanted, 2, num_past + num_new)
        for row, start, part in observed:
            row -= num_past + last - wanted
            mass[row : row + len(part), :, start : start + part.shape[2]] += part
        return out, mass

    out, mass = run(0, num_new)
    rows = []
    for first, last in itertools.pairwise((0, 1, 256, 560, 940, 970, 1024)):
        piece, observed = run(first, last)
        assert torch.equal(piece, out[first:last]), (first, last)
        rows.append(observed)
    assert torch.equal(torch.cat(rows), mass)


@pytest.mark.parametrize("num_sets", [1, 2])
@pytest.mark.parametrize("block_scores", [1, 100, 1 << 23])
def test_causal_mass_is_the_weights_summed_over_heads(num_sets, block_scores, monkeypatch):
    monkeypatch.setattr(prefill, "MASS_BLOCK_SCORES", block_scores)
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(5, 4, 8, generator=generator), torch.randn(9, 2, 8, generator=generator)
    weights = full_weights(q, k)  # [H, T, S]
    grouped = weights.view(2, 2, 5, 9).sum(1) if num_sets == 2 else weights.sum(0, keepdim=True)
    blocks = list(causal_mass(q, k, 4, num_sets))
    assert [first for first, _ in blocks] == [4 + sum(len(m) for _, m in blocks[:i]) for i in range(len(blocks))]
    mass = torch.cat([mass for _, mass in blocks])
    torch.testing.assert_close(mass.double(), grouped.transpose(0, 1), rtol=1e-5, atol=1e-6)
