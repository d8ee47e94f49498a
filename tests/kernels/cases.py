"""Random decode problems, and the answer in float64 with the error that float32 arithmetic may make."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from alisa.cache import codec as codecs
from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.spec import RowFormat

ROW_DTYPES = ["float32", "bfloat16", "float16", "int8", "int4", "k8v4"]
ISAS = ["avx512", "avx2", "portable"]
SKETCH_ISAS = ["avx512_vnni", *ISAS]


@dataclass
class Problem:
    q: torch.Tensor
    rows: torch.Tensor
    codec: object
    slots: torch.Tensor
    counts: torch.Tensor
    softcap: float | None = None

    def args(self):
        return self.q, self.rows, self.codec, self.slots, self.counts, self.softcap


def make_problem(
    row_dtype,
    *,
    num_seqs=2,
    num_rows=200,
    kv_heads=2,
    group=2,
    head_dim=64,
    per_head=False,
    q_dtype=torch.float32,
    scale=1.0,
    counts=None,
    seed=0,
    softcap=None,
):
    generator = torch.Generator().manual_seed(seed)
    codec = codecs.make_codec(RowFormat(row_dtype, kv_heads, head_dim))
    k, v = (torch.randn(num_rows, kv_heads, head_dim, generator=generator) * scale for _ in range(2))
    # The pool begins 4 bytes off any alignment: an aligned load would show.
    room = torch.zeros(num_rows * codec.format.row_bytes + 4, dtype=torch.uint8)[4:]
    rows = room.view(num_rows, codec.format.row_bytes)
    rows.copy_(codec.encode(k, v))
    q = (torch.randn(num_seqs, kv_heads * group, head_dim, generator=generator) * scale).to(q_dtype)
    if counts is None:
        counts = torch.randint(1, num_rows + 1, (num_seqs,), generator=generator).tolist()
    slots = torch.full((num_seqs, kv_heads if per_head else 1, max(counts) + 1), 10**6, dtype=torch.int32)
    for seq, count in enumerate(counts):
        for chosen in slots[seq]:
            chosen[:count] = torch.randperm(num_rows, generator=generator)[:count]
    return Problem(q, rows, codec, slots, torch.tensor(counts, dtype=torch.int32), softcap)


@st.composite
def problems(draw, row_dtypes=tuple(ROW_DTYPES), scales=(1.0,), most=4):
    """Problems of up to `most` sequences and KV heads."""
    num_rows = draw(st.sampled_from([1, 3, 64, 65, 200]))
    num_seqs = draw(st.integers(1, most))
    ends = st.sampled_from([1, num_rows]) | st.integers(1, num_rows)
    return make_problem(
        draw(st.sampled_from(row_dtypes)),
        num_seqs=num_seqs,
        num_rows=num_rows,
        kv_heads=draw(st.integers(1, most)),
        group=draw(st.integers(1, 7)),
        head_dim=draw(st.sampled_from([1, 2, 7, 16, 31, 64, 80, 128, 192, 256])),
        per_head=draw(st.booleans()),
        q_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        scale=draw(st.sampled_from(scales)),
        counts=[draw(ends) for _ in range(num_seqs)],
        seed=draw(st.integers(0, 10**6)),
        softcap=draw(st.sampled_from([None, None, 0.7, 30.0])),
    )


def assert_agrees(attended, problem):
    """Out, mass and log-sum-exp are the float64 answer up to what float32 sums of these values can lose."""
    q, codec, counts = problem.q.double(), problem.codec, problem.counts.tolist()
    num_heads, head_dim = q.shape[1:]
    group = num_heads // codec.format.num_kv_heads
    num_sets = problem.slots.shape[1]
    assert attended.out.dtype == problem.q.dtype
    mass = torch.zeros(attended.mass.shape, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    for seq, count in enumerate(counts):
        for head in range(num_heads):
            kv_head = head // group
            chosen_set = kv_head if num_sets > 1 else 0
            k, v = codec.decode(problem.rows[problem.slots[seq, chosen_set, :count].long()])
            k, v = k[:, kv_head].double(), v[:, kv_head].double()
            scores = k @ q[seq, head] * head_dim**-0.5
            # A sum of n products in any order is off by at most n eps times the sum of their sizes.
            slack = float((k.abs() @ q[seq, head].abs()).max()) * head_dim**-0.5 * (head_dim + 4) * eps
            if codec.format.dtype.startswith("int"):
                # minimum * sum(q) and scale * (q . codes) cancel: both are bounded by the largest |value| times sum
                # |q|.
                slack += float(3 * k.abs().max() * q[seq, head].abs().sum()) * head_dim**-0.5 * (head_dim + 4) * eps
            if problem.softcap is not None:
                # The error of a score grows no larger; 1 - exp(-2x) adds some of the cap's.
                scores = problem.softcap * torch.tanh(scores / problem.softcap)
                slack += 8 * problem.softcap * eps
            weights = scores.softmax(0)
            weight_slack = 2 * slack + (count + 20) * eps
            out_slack = 3 * weight_slack * float(v.abs().max()) + 1e-30
            rounding = torch.finfo(problem.q.dtype).eps if problem.q.dtype != torch.float32 else eps
            subnormal = torch.finfo(problem.q.dtype).tiny
            torch.testing.assert_close(
                attended.out[seq, head].double(), weights @ v, rtol=rounding, atol=out_slack + subnormal
            )
            expected = float(scores.logsumexp(0))
            assert abs(float(attended.log_sum_exp[seq, head]) - expected) <= slack + (abs(expected) + 20) * 4 * eps
            mass[seq, chosen_set, :count] += weights
            rtol = (2 * slack + (count + 20) * eps) * 2
            assert (attended.mass[seq, chosen_set, count:] == 0).all()
        torch.testing.assert_close(attended.mass[seq].double(), mass[seq], rtol=rtol * 4, atol=rtol * num_heads + 1e-30)


def kernels(isa):
    """Kernels of one instruction set, or a skip that says why not."""
    import pytest

    if not library.available():
        pytest.skip(library.unavailable_reason())
    if isa not in library.isa_names():
        pytest.skip(f"this CPU has no {isa}")
    return cpu.CpuKernels(isa)
