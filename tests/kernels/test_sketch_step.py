"""A layer of a step in one native call: what the single calls give, to the last bit, whatever the threads."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alisa.cache.codec import make_codec
from alisa.kernels.base import Ranking, Sketch
from alisa.kernels.native import library
from alisa.kernels.native.kernels import CpuKernels
from alisa.kernels.native.sketch_step import CpuSketchStep
from alisa.kernels.sketch_step import LayerRows, StepSlots
from alisa.spec import RowFormat
from tests.kernels.cases import ROW_DTYPES, SKETCH_ISAS, kernels

pytestmark = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def new_sketch(num_tokens, num_heads, head_dim, bits, parts):
    codes = torch.zeros(num_tokens, num_heads * parts, -(-head_dim // parts * bits // 8), dtype=torch.uint8)
    return Sketch(codes, torch.zeros(num_tokens, num_heads * parts, 2, dtype=torch.float16), bits, parts)


class Step:
    """Sequences with all but their last tokens written, and what is asked of the last ones."""

    def __init__(self, lengths, *, group, kv_heads, head_dim, parts, per_head, dtype, row_dtype, share, softcap, seed):
        generator = torch.Generator().manual_seed(seed)
        num_seqs, width = len(lengths), max(lengths)
        capacity = width + 5
        num_rows = num_seqs * capacity
        self.format = RowFormat(row_dtype, kv_heads, head_dim)
        self.num_heads = kv_heads * group
        self.layer = LayerRows(
            torch.zeros(num_rows, self.format.row_bytes, dtype=torch.uint8),
            new_sketch(num_rows, kv_heads, head_dim, 4, parts),
            new_sketch(num_rows, kv_heads, head_dim, 2, parts),
        )
        starts = torch.randperm(num_seqs, generator=generator) * capacity
        # Two tables with a sequence between: tokens say whose rows they read.
        table = torch.randperm(num_rows, generator=generator).to(torch.int32).view(num_seqs, capacity)
        self.rows_of_token = torch.randperm(num_seqs, generator=generator) if seed % 2 else None
        self.table = table[:, : width + seed % 3]
        of_token = table if self.rows_of_token is None else table[self.rows_of_token]
        self.of_token = of_token
        last = torch.tensor(lengths) - 1
        self.ids = starts + last
        self.new_slots = of_token.gather(1, last[:, None])[:, 0].to(torch.int64)

        def random(num, heads):
            return torch.randn(num, heads, head_dim, generator=generator).to(dtype)

        writer = CpuKernels("portable", num_threads=1)
        for seq, length in enumerate(lengths):
            if length > 1:
                k, v = random(length - 1, kv_heads), random(length - 1, kv_heads)
                ids = starts[seq] + torch.arange(length - 1)
                writer.append(self.layer.rows, self.format, of_token[seq, : length - 1].to(torch.int64), k, v)
                writer.sketch_append(self.layer.keys, ids, k)
                writer.sketch_append(self.layer.values, ids, v)
        self.q = random(num_seqs, self.num_heads)
        self.k, self.v = torch.stack([random(num_seqs, kv_heads), random(num_seqs, kv_heads)], 1).unbind(1)
        num_sets = kv_heads if per_head else 1
        recent = [round((length - 1) * share / 2) for length in lengths]
        older = [min(some, length - 1 - some) for some, length in zip(recent, lengths, strict=True)]
        counts = [some + more + 1 for some, more in zip(recent, older, strict=True)]

        def column(values):
            return torch.tensor(values, dtype=torch.int32).repeat_interleave(num_sets)

        ends = [length - 1 - some for some, length in zip(recent, lengths, strict=True)]
        self.ranking = Ranking(
            starts,
            torch.tensor(lengths, dtype=torch.int32),
            column(ends),
            column(older),
            column(counts),
            max(counts),
            width,
            num_sets,
            softcap,
        )

    def by_single_calls(self, isa):
        """Output, positions, shares and the layer's tensors."""
        single, layer, ranking = CpuKernels(isa, num_threads=1), clone(self.layer), self.ranking
        single.append(layer.rows, self.format, self.new_slots, self.k, self.v)
        single.sketch_append(layer.keys, self.ids, self.k)
        single.sketch_append(layer.values, self.ids, self.v)
        chosen, rest = single.sketch_complete(self.q, layer.keys, layer.values, ranking)
        positions = chosen.positions.view(len(self.q), -1)
        slots = self.of_token.gather(1, positions.to(torch.int64)).view(len(self.q), ranking.num_sets, -1)
        counts = ranking.counts[:: ranking.num_sets].contiguous()
        attended = single(self.q, layer.rows, make_codec(self.format), slots, counts, ranking.softcap)
        out = single.rest_blend(attended.out, chosen.shares, rest)
        return (out, chosen.positions, chosen.shares, *tensors(layer))

    def in_one_call(self, isa, threads, *, share_threads=False):
        layer = clone(self.layer)
        kernel = CpuSketchStep(isa, num_threads=threads, share_threads=share_threads)
        steps = kernel.bind([layer], self.format, self.num_heads)
        slots = StepSlots(self.new_slots, self.table, self.rows_of_token)
        running = steps.begin(slots, self.ranking, self.ids)
        out = running(0, self.q[:, None], self.k[:, None], self.v[:, None])
        return (out[:, 0], running.positions, running.shares, *tensors(layer))


def clone(layer):
    rows, keys, values = layer
    return LayerRows(
        rows.clone(), *(each._replace(codes=each.codes.clone(), ranges=each.ranges.clone()) for each in (keys, values))
    )


def tensors(layer):
    return layer.rows, layer.keys.codes, layer.keys.ranges, layer.values.codes, layer.values.ranges


def assert_equal(found, expected):
    names = ("out", "positions", "shares", "rows", "key codes", "key ranges", "value codes", "value ranges")
    for name, one, other in zip(names, found, expected, strict=True):
        assert torch.equal(one.view(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


@st.composite
def steps(draw):
    parts = draw(st.sampled_from([1, 1, 2]))
    return Step(
        draw(st.lists(st.integers(1, 40) | st.sampled_from([64, 257, 700]), min_size=1, max_size=4)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 17])),
        kv_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([2, 16, 64, 80, 128])) * parts,
        parts=parts,
        per_head=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        row_dtype=draw(st.sampled_from(ROW_DTYPES)),
        share=draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        seed=draw(st.integers(0, 10**6)),
    )


@pytest.mark.parametrize("isa", SKETCH_ISAS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(step=steps())
def test_one_call_gives_what_the_single_calls_give(isa, step):
    kernels(isa)  # or a skip
    assert_equal(step.in_one_call(isa, 1), step.by_single_calls(isa))


def long_step(seed=1):
    """Enough work for several threads, several items for each sequence, and rows of its own table for each token."""
    return Step(
        [1500, 3, 700, 1100],
        group=3,
        kv_heads=3,
        head_dim=64,
        parts=1,
        per_head=False,
        dtype=torch.bfloat16,
        row_dtype="bfloat16",
        share=0.4,
        softcap=None,
        seed=seed,
    )


@pytest.mark.parametrize("share_threads", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads, share_threads):
    step = long_step()
    expected = step.by_single_calls(None)
    for _ in range(3):
        assert_equal(step.in_one_call(None, threads, share_threads=share_threads), expected)


def test_instruction_sets_write_the_same_rows_and_codes():
    found = [long_step().in_one_call(isa, 1)[3:] for isa in SKETCH_ISAS if isa in library.isa_names()]
    for other in found[1:]:
        assert all(torch.equal(one, first) for one, first in zip(other, found[0], strict=True))


def test_the_comparison_notices_another_token():
    step = long_step()
    expected = step.by_single_calls(None)
    step.v[0, 0, 0] += 1
    with pytest.raises(AssertionError):
        assert_equal(step.in_one_call(None, 1), expected)


def test_a_layer_unlike_the_first_is_refused():
    step = long_step()
    steps = CpuSketchStep(num_threads=1).bind([step.layer], step.format, step.num_heads)
    running = steps.begin(StepSlots(step.new_slots, step.table, step.rows_of_token), step.ranking, step.ids)
    q, k, v = step.q[:, None], step.k[:, None], step.v[:, None]
    running(0, q, k, v)
    with pytest.raises(ValueError, match="not as in other layers"):
        running(0, q, k[..., :8], v)
    with pytest.raises(ValueError, match="not as in other layers"):
        running(0, q.float(), k, v)


def test_slots_that_do_not_fit_are_refused():
    step = long_step()
    steps = CpuSketchStep(num_threads=1).bind([step.layer], step.format, step.num_heads)
    short = steps.begin(StepSlots(step.new_slots, step.table[:2], None), step.ranking, step.ids)
    with pytest.raises(ValueError, match="no slots"):
        short(0, step.q[:, None], step.k[:, None], step.v[:, None])
    wide = steps.begin(StepSlots(step.new_slots, step.table.long(), None), step.ranking, step.ids)
    with pytest.raises(TypeError, match="Int32"):
        wide(0, step.q[:, None], step.k[:, None], step.v[:, None])
