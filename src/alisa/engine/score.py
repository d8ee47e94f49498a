"""Teacher-forced decoding: the logits of given continuations, through the real prefill and decode path.

`--verify` compares two policies with it; every evaluation in `alisa.eval` that asks what a policy costs is a sum over
it. `Scorer` is a model made ready for that: it cuts any number of items into batches whose rows fit the memory cap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.attention.decode import AttentionPieces, DecodeKernel
from alisa.config import format_bytes
from alisa.engine.kernels import Kernels
from alisa.engine.recorder import Stopwatch
from alisa.engine.runner import PromptPiece, Runner
from alisa.errors import CapacityError
from alisa.kv.store import KVStore
from alisa.model.decoder import Decoder
from alisa.policy.base import SelectionPolicy
from alisa.types import Attended, Codec, Phase, RowFormat, Segment, StepPlan


class ScoredItem(NamedTuple):
    """A prompt and the tokens that follow it."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Length of both together."""
        return len(self.prompt_ids) + len(self.output_ids)


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


class ScoredOutput(NamedTuple):
    """What a policy thinks of the output of one item."""

    log_likelihoods: Tensor
    """Float32[T] on the CPU: log probability of each output token, in nats."""
    greedy: Tensor
    """Bool[T] on the CPU: whether each is the most likely token."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model and the memory it may use for scoring."""

    decoder: Decoder
    kernels: Kernels
    kv_cap_bytes: int
    """Hard cap of the KV rows held at once."""
    max_batch: int
    """Items decoded together at the most."""
    prefill_chunk: int

    def batches(self, items: Sequence[ScoredItem], codec: Codec) -> Iterator[tuple[int, ...]]:
        """Indices of the items in groups whose rows fit the cap; long items go with long ones.

        Raises:
            CapacityError: an item does not fit the cap alone; nothing has been run.
        """
        token_bytes = self.decoder.spec.num_layers * codec.format.row_bytes
        num_rows = self.kv_cap_bytes // token_bytes
        order = sorted(range(len(items)), key=lambda index: -items[index].num_tokens)
        if items and items[order[0]].num_tokens > num_rows:
            longest = items[order[0]].num_tokens
            raise CapacityError(
                f"Scoring {longest} tokens needs {format_bytes(longest * token_bytes)} of KV memory and the cap is "
                f"{format_bytes(self.kv_cap_bytes)}; raise --kv-device-memory or take shorter texts."
            )
        return groups(order, [items[index].num_tokens for index in order], num_rows, self.max_batch)

    def score(self, policy: SelectionPolicy, codec: Codec, items: Sequence[ScoredItem]) -> list[ScoredOutput]:
        """Log likelihoods of every item's output under a policy, in the order of the items.

        Raises:
            CapacityError: an item does not fit the cap alone; nothing has been run.
        """
        outputs: dict[int, ScoredOutput] = {}
        for batch in self.batches(items, codec):
            found = self._score_batch(policy, codec, [items[index] for index in batch])
            outputs |= dict(zip(batch, found, strict=True))
        return [outputs[index] for index in range(len(items))]

    def steps(
        self,
        policy: SelectionPolicy,
        codec: Codec,
        items: Sequence[ScoredItem],
        *,
        measure_lost_mass: bool = False,
    ) -> Iterator[ScoredStep]:
        """`teacher_forced` over one batch, as it is."""
        return teacher_forced(
            self.decoder,
            policy,
            codec,
            self.kernels,
            items,
            prefill_chunk=self.prefill_chunk,
            measure_lost_mass=measure_lost_mass,
        )

    def _score_batch(
        self, policy: SelectionPolicy, codec: Codec, items: Sequence[ScoredItem]
    ) -> Iterator[ScoredOutput]:
        longest = max(len(item.output_ids) for item in items)
        padded = [[*item.output_ids, *([0] * (longest - len(item.output_ids)))] for item in items]
        targets = torch.tensor(padded, device=self.decoder.device)
        likelihoods = torch.zeros(len(items), longest, device=self.decoder.device)
        greedy = torch.zeros(len(items), longest, dtype=torch.bool, device=self.decoder.device)
        for step in self.steps(policy, codec, items):
            rows = torch.tensor(step.items, device=self.decoder.device)
            wanted = targets[rows, step.step]
            likelihoods[rows, step.step] = step.logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
            greedy[rows, step.step] = step.logits.argmax(dim=-1) == wanted
        likelihoods, greedy = likelihoods.cpu(), greedy.cpu()
        for index, item in enumerate(items):
            count = len(item.output_ids)
            yield ScoredOutput(likelihoods[index, :count], greedy[index, :count])


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

    The rows of all items are held at once; `Scorer.batches` cuts more into what fits. Measuring lost mass reads every
    row once more per step: slow, and free of any effect on the logits.
    """
    lengths = [item.num_tokens for item in items]
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
    attend = probe if measure_lost_mass else kernels.attend
    runner = Runner(decoder, policy, store, state, kernels.prefill, attend, Stopwatch())
    lanes = []
    for length in lengths:
        lanes.append(store.open(length))
        state.open(lanes[-1], length)
    yield ScoredStep(0, tuple(range(len(items))), _read_prompts(runner, lanes, items, prefill_chunk), None)
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


def groups(order: Sequence[int], sizes: Sequence[int], most: int, most_items: int) -> Iterator[tuple[int, ...]]:
    """Neighbours of `order`, as many together as both limits allow; one that is too large by itself comes alone."""
    group: list[int] = []
    total = 0
    for index, size in zip(order, sizes, strict=True):
        if group and (total + size > most or len(group) == most_items):
            yield tuple(group)
            group.clear()
            total = 0
        group.append(index)
        total += size
    if group:
        yield tuple(group)


def _read_prompts(runner: Runner, lanes: Sequence[int], items: Sequence[ScoredItem], prefill_chunk: int) -> Tensor:
    """Prefill every prompt in pieces of the engine's size, short ones packed; logits Float32[B, V] of the last tokens.

    Pieces start at multiples of `prefill_chunk`, as in the engine, whatever they are packed with.
    """
    pieces = [
        PromptPiece(Segment(lane, start, len(tokens)), tokens, len(item.prompt_ids))
        for lane, item in zip(lanes, items, strict=True)
        for start in range(0, len(item.prompt_ids), prefill_chunk)
        if (tokens := item.prompt_ids[start : start + prefill_chunk])
    ]
    # A prompt's pieces must not meet in one pass: a later one reads the rows of the earlier.
    logits: list[Tensor] = []
    packed: list[PromptPiece] = []
    for piece in pieces:
        size = sum(other.segment.count for other in packed)
        if packed and (size + piece.segment.count > prefill_chunk or piece.segment.start):
            logits.append(_prefill(runner, packed))
            packed = []
        packed.append(piece)
    logits.append(_prefill(runner, packed))
    return torch.cat(logits)


def _prefill(runner: Runner, pieces: Sequence[PromptPiece]) -> Tensor:
    """One pass of these pieces through the model."""
    segments = tuple(piece.segment for piece in pieces)
    runner.begin(StepPlan(0, Phase.DEVICE, prefill=True, segments=segments))
    return runner.prefill(pieces)


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

    def in_pieces(self, q: Tensor, codec: Codec, counts: Tensor, num_slots: int) -> AttentionPieces:
        """Never asked for: a `KVStore` gives every selection in one part."""
        raise AssertionError("rows that are all on the device come in one part")

    def piece_columns(self, row_format: RowFormat, num_heads: int) -> int:
        """The kernel's own."""
        return self._kernel.piece_columns(row_format, num_heads)

    def mean(self) -> float:
        """Mean over the layers of the step."""
        return sum(self._lost) / len(self._lost)
