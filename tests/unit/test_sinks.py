"""Logits that join a head's softmax and read nothing, through prompts, decode steps, windows and policies."""

from dataclasses import replace

import pytest
import torch

from alisa.attention.build import build_session
from alisa.budget import Budget, state_tokens
from alisa.cache.codec import make_codec
from alisa.cache.manager import CacheManager
from alisa.cache.store import KVStore
from alisa.kernels.base import KeyBlock
from alisa.kernels.choose import choose_backend
from alisa.kernels.reference.prefill import prefill_attention
from alisa.outputs import Phase
from alisa.policy.dense import Dense
from alisa.policy.pattern import Local
from alisa.policy.sketch import KeySketch
from alisa.scheduler.plan import Opened, ScheduledChunk, StepPlan
from alisa.spec import AttentionShape, RowFormat

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 4, 2, 16
PROMPT, TOKENS = 40, 60


def rows(seed, heads, tokens=TOKENS):
    return torch.randn(1, tokens, heads, DIM, generator=torch.Generator().manual_seed(seed))


def weights_of(q, k, sinks, seen):
    """(weights of the tokens [H, T, S], without those of the sinks), by a softmax with one column more."""
    scores = torch.einsum("thd,shd->hts", q[0], k[0].repeat_interleave(HEADS // KV_HEADS, dim=1)).double() / DIM**0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    column = sinks.double()[:, None, None].expand(HEADS, len(seen), 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]


def expected(q, k, v, sinks, seen):
    values = v[0].repeat_interleave(HEADS // KV_HEADS, dim=1).double()
    return torch.einsum("hts,shd->thd", weights_of(q, k, sinks, seen), values)


def causal(tokens, window=None):
    ages = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (ages >= 0) & (ages < (window or tokens))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_is_read_beside_sinks(window, dtype):
    q, k, v = rows(0, HEADS), rows(1, KV_HEADS), rows(2, KV_HEADS)
    q, k, v = (values.to(dtype) for values in (q, k, v))
    sinks = torch.tensor([-30.0, 0.0, 3.0, 30.0])
    wanted = expected(q.float(), k.float(), v.float(), sinks, causal(TOKENS, window))
    for kernel in (prefill_attention, choose_backend(CPU).prefill):
        out, _ = kernel(q[0], KeyBlock(0, k[0], v[0]), TOKENS, tuple, 0, 1, window, None, sinks)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    assert out[:, 3].abs().max() < 1e-9  # all weight is the sink's


def session_of(policy, sinks, windows=()):
    shape = AttentionShape(len(sinks), HEADS, KV_HEADS, DIM, scale=DIM**-0.5, windows=windows, has_sinks=True)
    backend = choose_backend(CPU)
    store = KVStore(
        num_layers=len(sinks),
        codec=make_codec(RowFormat("float32", KV_HEADS, DIM)),
        num_rows=TOKENS,
        max_num_seqs=1,
        max_length=TOKENS,
        device=CPU,
        append=backend.append,
    )
    return build_session(
        CacheManager(store),
        policy,
        backend,
        shape,
        CPU,
        max_num_seqs=1,
        state_tokens=state_tokens(TOKENS),
        max_len=TOKENS,
        sinks=sinks,
    )


def through(session, layer, q, k, v):
    """The outputs `[T, H, D]` of one layer: a prompt, then token by token, and what each of these read."""
    hidden = torch.zeros(1, TOKENS, 4)
    opened = (Opened(0, "0", TOKENS, PROMPT),)
    session.begin(StepPlan(0, Phase.DEVICE, prefill=True, chunks=(ScheduledChunk(0, 0, PROMPT),), opened=opened))
    span = slice(0, PROMPT)
    outs, read = [session.attend(layer, q[:, span], k[:, span], v[:, span], hidden[:, span])[0]], []
    session.end()
    for place in range(PROMPT, TOKENS):
        session.begin(StepPlan(place, Phase.DEVICE, prefill=False, chunks=(ScheduledChunk(0, place, 1),)))
        span = slice(place, place + 1)
        outs.append(session.attend(layer, q[:, span], k[:, span], v[:, span], hidden[:, span])[0])
        read.append(session.selection.positions[0, 0, : session.selection.num_tokens[0]].tolist())
        session.end()
    return torch.cat(outs), read


@pytest.mark.parametrize("windows", [(), (9, None)])
def test_dense_steps_go_on_as_the_prompt_did(windows):
    q, k, v = rows(3, HEADS), rows(4, KV_HEADS), rows(5, KV_HEADS)
    sinks = (torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 4.0, 0.5]))
    layer = 0
    out, _ = through(session_of(Dense(Budget(0.0)), sinks, windows), layer, q, k, v)
    wanted = expected(q, k, v, sinks[layer], causal(TOKENS, windows[layer] if windows else None))
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)


def test_what_a_window_reads_competes_with_the_sink_alone():
    """A policy that knows nothing of the other tokens takes those it reads for all there are."""
    q, k, v = rows(6, HEADS), rows(7, KV_HEADS), rows(8, KV_HEADS)
    sinks = (torch.tensor([0.0, 1.0, 2.0, 3.0]),)
    out, read = through(session_of(Local(Budget(0.8, dense_until=0)), sinks), 0, q, k, v)
    seen = causal(TOKENS)
    for place, positions in enumerate(read, PROMPT):
        assert len(positions) < place
        seen[place] = torch.isin(torch.arange(TOKENS), torch.tensor(positions))
    torch.testing.assert_close(out.double(), expected(q, k, v, sinks[0], seen), atol=1e-5, rtol=1e-5)


def test_a_sink_competes_with_the_tokens_that_a_sketch_adds_up_too():
    """By exact keys: those read with their values, the others with the mean of all, over the weight of all three."""
    q, k, v = rows(9, HEADS) * 2, rows(10, KV_HEADS), rows(11, KV_HEADS)
    sinks = (torch.tensor([0.0, 2.0, 4.0, 6.0]),)
    policy = KeySketch(Budget(0.8, dense_until=0), None, completion="mean")
    out, read = through(session_of(policy, sinks), 0, q, k, v)
    weights = weights_of(q, k, sinks[0], causal(TOKENS))
    values = v[0].repeat_interleave(HEADS // KV_HEADS, dim=1).double()
    for place, positions in enumerate(read, PROMPT):
        left = weights[:, place].clone()
        left[:, positions] = 0
        mean = values[: place + 1].mean(0)
        wanted = torch.einsum("hs,shd->hd", weights[:, place] - left, values) + left.sum(1, keepdim=True) * mean
        torch.testing.assert_close(out[place].double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_sketch_with_values_is_closer_to_dense_attention_beside_sinks_than_without():
    q, k, v = rows(12, HEADS), rows(13, KV_HEADS), rows(14, KV_HEADS)
    sinks = (torch.tensor([0.0, 2.0, 4.0, 6.0]),)
    wanted = expected(q, k, v, sinks[0], causal(TOKENS))[PROMPT:]
    errors = {}
    for completion in ("values", "none"):
        policy = KeySketch(Budget(0.8, dense_until=0), 8, completion=completion)
        out, read = through(session_of(policy, sinks), 0, q, k, v)
        assert max(map(len, read)) < TOKENS / 3
        errors[completion] = float((out[PROMPT:].double() - wanted).norm() / wanted.norm())
    assert errors["values"] < 0.25  # two bits of each value
    assert errors["none"] > 2 * errors["values"]


def test_whoever_forgets_the_sinks_is_told():
    session = session_of(Dense(Budget(0.0)), (torch.zeros(HEADS),))
    with pytest.raises(AssertionError, match="hands them over"):
        build_session(
            session.cache,
            session.policy,
            choose_backend(CPU),
            replace(session.shape, num_layers=1),
            CPU,
            max_num_seqs=1,
            state_tokens=64,
            max_len=TOKENS,
        )
