"""Teacher-forced decoding: the logits of given continuations, through the real prefill and decode path.

`--verify` compares two policies with it; perplexity is a sum over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.attention.decode import DecodeKernel
from alisa.engine.kernels import Kernels
from alisa.engine.recorder import Stopwatch
from alisa.engine.runner import PromptPiece, Runner
from alisa.kv.store import KVStore
from alisa.model.decoder import Decoder
from alisa.policy.base import SelectionPolicy
from alisa.types import Attended, Codec, Phase, Segment, StepPlan


class ScoredItem(NamedTuple):
    """A prompt and the tokens that follow it."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


class ScoredStep(NamedTuple):
    """Logits for output token number `step` of every item that has one."""

    step: int
    items: tuple[int, ...]
    """Indices of the items, in the order of the rows of `logits`."""
    logits: Tensor
    """Float32[B, V]"""
    lost_mass: float | None
    """Share of attention weight, mean over sequences, layers and heads, that lies on tokens which were not read; None
    for the first token, which prefill gives, and when it was not asked for."""


@torch.inference_mode()
def teacher_forced(
    decoder: Decoder,
    policy: SelectionPolicy,
    codec: Codec,
    kernels: Kernels,
    items: Sequence[ScoredItem],
    *,
    prefill_chunk: int,
    measure_lost_mass: bool = False,
) -> Iterator[ScoredStep]:
    """Feed every item's own tokens and yield the logits that the policy gives for each of them.

    Measuring lost mass reads every row once more per step: slow, and free of any effect on the logits.
    """
    lengths = [len(item.prompt_ids) + len(item.output_ids) for item in items]
    store = KVStore(
        num_layers=decoder.spec.num_layers,
        codec=codec,
        num_rows=sum(lengths),
        num_lanes=len(items),
        max_length=max(lengths),
        device=decoder.device,
    )
    state = policy.start(decoder.spec, len(items), max(lengths), decoder.device, kernels.selection)
    probe = _LostMass(kernels.attend, store)
    runner = Runner(decoder, policy, store, state, probe if measure_lost_mass else kernels.attend, Stopwatch())
    lanes = []
    first_logits = []
    for item, length in zip(items, lengths, strict=True):
        lanes.append(store.open(length))
        state.open(lanes[-1], length)
        first_logits.append(_read_prompt(runner, lanes[-1], item.prompt_ids, prefill_chunk))
    yield ScoredStep(0, tuple(range(len(items))), torch.cat(first_logits), None)
    for step in range(1, max(len(item.output_ids) for item in items)):
        active = tuple(index for index, item in enumerate(items) if len(item.output_ids) > step)
        segments = [Segment(lanes[index], len(items[index].prompt_ids) + step - 1, 1) for index in active]
        runner.begin(StepPlan(step, Phase.DEVICE, prefill=False, segments=tuple(segments)))
        probe.begin([lanes[index] for index in active], [len(items[index].prompt_ids) + step for index in active])
        decoded = runner.decode(
            tuple(lanes[index] for index in active),
            tuple(len(items[index].prompt_ids) + step for index in active),
            [items[index].output_ids[step - 1] for index in active],
        )
        yield ScoredStep(step, active, decoded.logits, probe.mean() if measure_lost_mass else None)


def _read_prompt(runner: Runner, lane: int, prompt_ids: Sequence[int], prefill_chunk: int) -> Tensor:
    """Prefill one prompt in the same pieces as the engine; logits Float32[1, V] of its last token."""
    logits = torch.empty(0)
    for start in range(0, len(prompt_ids), prefill_chunk):
        tokens = prompt_ids[start : start + prefill_chunk]
        segment = Segment(lane, start, len(tokens))
        runner.begin(StepPlan(0, Phase.DEVICE, prefill=True, segments=(segment,)))
        logits = runner.prefill([PromptPiece(segment, tokens, len(prompt_ids))])
    return logits


class _LostMass:
    """A decode kernel that also attends to everything, to see which share of the weight the selection holds."""

    def __init__(self, kernel: DecodeKernel, store: KVStore) -> None:
        self._kernel = kernel
        self._store = store
        self._slots = torch.empty(0)
        self._counts = torch.empty(0)
        self._lost: list[float] = []

    def begin(self, lanes: list[int], lengths: list[int]) -> None:
        """The next calls belong to a step of these sequences."""
        lane_ids = torch.tensor(lanes, device=self._store.device)
        self._slots = self._store.slot_table(lane_ids, max(lengths))[:, None]
        self._counts = torch.tensor(lengths, dtype=torch.int32, device=self._store.device)
        padding = torch.arange(max(lengths), device=self._store.device) >= self._counts[:, None, None]
        self._slots = self._slots.masked_fill(padding, 0)
        self._lost = []

    def __call__(self, q: Tensor, rows: Tensor, codec: Codec, slots: Tensor, counts: Tensor) -> Attended:
        """The kernel's own result, unchanged."""
        attended = self._kernel(q, rows, codec, slots, counts)
        everything = self._kernel(q, rows, codec, self._slots, self._counts)
        self._lost.append(float((1 - (attended.log_sum_exp - everything.log_sum_exp).exp()).clamp(0, 1).mean()))
        return attended

    def mean(self) -> float:
        """Mean over the layers of the step."""
        return sum(self._lost) / len(self._lost)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How a policy's answers compare with dense attention on the same tokens (teacher-forced)."""

    num_requests: int
    num_tokens: int
    top1_agreement: float
    """Share of tokens for which both pick the same most likely token."""
    mean_kl: float
    """Kullback-Leibler divergence KL(dense || policy) in nats per token."""
    lost_mass: float
    """Share of the attention weight on tokens that the policy did not read; 0 for dense."""


def verify(
    decoder: Decoder,
    policy: SelectionPolicy,
    dense: SelectionPolicy,
    codec: Codec,
    kernels: Kernels,
    items: Sequence[ScoredItem],
    *,
    prefill_chunk: int,
) -> VerifyReport:
    """Run the items under both policies in step and compare every next-token distribution."""
    agreed, divergence, num_tokens = 0, 0.0, 0
    lost: list[float] = []
    sparse_steps = teacher_forced(
        decoder, policy, codec, kernels, items, prefill_chunk=prefill_chunk, measure_lost_mass=True
    )
    dense_steps = teacher_forced(decoder, dense, codec, kernels, items, prefill_chunk=prefill_chunk)
    for sparse, exact in zip(sparse_steps, dense_steps, strict=True):
        expected, actual = exact.logits.log_softmax(dim=-1), sparse.logits.log_softmax(dim=-1)
        agreed += int((expected.argmax(dim=-1) == actual.argmax(dim=-1)).sum())
        divergence += float((expected.exp() * (expected - actual)).sum())
        num_tokens += len(sparse.items)
        if sparse.lost_mass is not None:
            lost.append(sparse.lost_mass)
    return VerifyReport(
        num_requests=len(items),
        num_tokens=num_tokens,
        top1_agreement=agreed / num_tokens,
        mean_kl=divergence / num_tokens,
        lost_mass=sum(lost) / len(lost) if lost else 0.0,
    )
