"""Teacher-forced decoding: the logits of given continuations, through the real prefill and decode path.

`--verify` compares two policies with it; every evaluation in `alisa.lab.eval` that asks what a policy costs is a sum
over it. `Scorer` is a model made ready for that: it cuts any number of items into batches whose rows fit the memory
cap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.attention.build import build_session
from alisa.attention.caps import device_cap
from alisa.attention.prefill import chunk_tokens
from alisa.attention.sparse_prompts import QUERY_BLOCK_TOKENS, with_sparse_prompts
from alisa.attention.timing import StepTimer
from alisa.budget import state_tokens
from alisa.cache.capacity import resident_table_bytes
from alisa.cache.manager import CacheManager
from alisa.cache.store import KVStore
from alisa.config import format_bytes
from alisa.engine.runner import ModelRunner
from alisa.errors import CapacityError
from alisa.kernels.base import Attended, AttentionPieces, Codec, DecodeKernel
from alisa.kernels.choose import AttentionBackend, choose_backend
from alisa.llm import LLM
from alisa.model.decoder import Decoder
from alisa.outputs import Phase
from alisa.policy.base import SelectionPolicy
from alisa.scheduler.plan import Opened, ScheduledChunk, StepPlan
from alisa.spec import AttentionShape, RowFormat


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
    tokens_read: tuple[int, ...] = ()
    """Of each item, summed over the layers; none for the first token."""


class ScoredOutput(NamedTuple):
    """What a policy thinks of the output of one item."""

    log_likelihoods: Tensor
    """Float32[T] on the CPU: log probability of each output token, in nats."""
    greedy: Tensor
    """Bool[T] on the CPU: whether each is the most likely token."""
    tokens_read: int
    """Summed over decode steps and layers."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model and the memory it may use for scoring."""

    decoder: Decoder
    kernels: AttentionBackend
    kv_cap_bytes: int
    """Hard cap of the rows, their tables and the policy's state held at once."""
    max_batch: int
    """Most items that are decoded together."""
    prefill_chunk: int

    @classmethod
    def of(cls, llm: LLM) -> Scorer:
        """The model of `llm`, under the same memory cap: its engine gives back what it holds.

        Raises:
            InputError: requests are running.
        """
        llm.free_engine()
        return cls(
            decoder=llm.decoder,
            kernels=choose_backend(llm.decoder.device),
            kv_cap_bytes=device_cap(llm.config, llm.decoder.device),
            max_batch=llm.config.max_num_seqs,
            prefill_chunk=llm.config.prefill_chunk,
        )

    def with_sparse_prompts(self, alpha: float | None) -> Scorer:
        """One that reads prompts as `EngineConfig.sparse_prompts` says."""
        return replace(self, kernels=with_sparse_prompts(self.kernels, alpha))

    def batches(self, items: Sequence[ScoredItem], codec: Codec, policy: SelectionPolicy) -> Iterator[tuple[int, ...]]:
        """Indices of the items in groups that fit the cap, all of it; long items go with long ones.

        Raises:
            CapacityError: an item does not fit the cap alone; nothing has been run.
        """
        order = sorted(range(len(items)), key=lambda index: -items[index].num_tokens)
        sizes = self._sizes(policy, codec, [items[index].num_tokens for index in order])
        if sizes and sizes[0] > self.kv_cap_bytes:
            raise CapacityError(
                f"Scoring {items[order[0]].num_tokens} tokens needs {format_bytes(sizes[0])} of KV memory and the cap "
                f"is {format_bytes(self.kv_cap_bytes)}; raise --kv-device-memory or take shorter texts."
            )
        return groups(order, sizes, self.kv_cap_bytes, self.max_batch)

    def score(self, policy: SelectionPolicy, codec: Codec, items: Sequence[ScoredItem]) -> list[ScoredOutput]:
        """Log likelihoods of every item's output under a policy, in the order of the items.

        Raises:
            CapacityError: an item does not fit the cap alone; nothing has been run.
        """
        outputs: dict[int, ScoredOutput] = {}
        for batch in self.batches(items, codec, policy):
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

    def fits(self, item: ScoredItem, codec: Codec, policy: SelectionPolicy) -> bool:
        """Whether an item can be scored under the cap."""
        return self._sizes(policy, codec, [item.num_tokens])[0] <= self.kv_cap_bytes

    def _sizes(self, policy: SelectionPolicy, codec: Codec, lengths: Sequence[int]) -> list[int]:
        """Bytes of rows, tables and state of sequences that are held together, the longest of them first."""
        if not lengths:
            return []
        longest = lengths[0]
        state = policy.start(
            self.decoder.spec.attention.full_layers(),
            max_num_seqs=1,
            num_tokens=state_tokens(longest),
            max_len=longest,
            device=self.decoder.device,
            kernels=self.kernels.selection,
        )
        state.open(0, longest)
        sequence_bytes = state.nbytes
        state.reserve(0, longest)
        token_bytes = (state.nbytes - sequence_bytes) // max(state_tokens(longest), 1)
        sequence_bytes += resident_table_bytes(longest, 1, longest)
        row_bytes = self.decoder.spec.num_layers * codec.format.row_bytes
        return [sequence_bytes + n * row_bytes + state_tokens(n) * token_bytes for n in lengths]

    def _score_batch(
        self, policy: SelectionPolicy, codec: Codec, items: Sequence[ScoredItem]
    ) -> Iterator[ScoredOutput]:
        longest = max(len(item.output_ids) for item in items)
        padded = [[*item.output_ids, *([0] * (longest - len(item.output_ids)))] for item in items]
        targets = torch.tensor(padded, device=self.decoder.device)
        likelihoods = torch.zeros(len(items), longest, device=self.decoder.device)
        greedy = torch.zeros(len(items), longest, dtype=torch.bool, device=self.decoder.device)
        tokens_read = [0] * len(items)
        for step in self.steps(policy, codec, items):
            for index, count in zip(step.items, step.tokens_read, strict=False):
                tokens_read[index] += count
            rows = torch.tensor(step.items, device=self.decoder.device)
            wanted = targets[rows, step.step]
            likelihoods[rows, step.step] = step.logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
            greedy[rows, step.step] = step.logits.argmax(dim=-1) == wanted
        likelihoods, greedy = likelihoods.cpu(), greedy.cpu()
        for index, item in enumerate(items):
            count = len(item.output_ids)
            yield ScoredOutput(likelihoods[index, :count], greedy[index, :count], tokens_read[index])


@torch.inference_mode()
def teacher_forced(
    decoder: Decoder,
    policy: SelectionPolicy,
    codec: Codec,
    kernels: AttentionBackend,
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
    decoder = decoder.for_rows(codec.format.dtype)
    store = flat_store(decoder, codec, kernels, num_rows=sum(lengths), num_seqs=len(items), max_length=max(lengths))
    probe = _LostMass(kernels.attend, store, decoder.spec.attention)
    session = build_session(
        CacheManager(store),
        policy,
        kernels._replace(attend=probe, sketch_step=None, fixed_step=None) if measure_lost_mass else kernels,
        decoder.spec.attention,
        decoder.device,
        max_num_seqs=len(items),
        state_tokens=sum(map(state_tokens, lengths)),
        max_len=max(lengths),
        sinks=decoder.sinks,
    )
    runner = ModelRunner(decoder, session, StepTimer())
    # Whole blocks, because the kernels may read prompts sparsely; where they do not, pieces change no logit.
    chunk = chunk_tokens(prefill_chunk, codec.format.dtype, decoder.dtype, unit=QUERY_BLOCK_TOKENS)
    for index, item in enumerate(items):
        num_rows = max(item.num_tokens - 1, len(item.prompt_ids))  # as in the engine: the last token is never fed
        session.open(Opened(index, str(index), num_rows, len(item.prompt_ids)))
    yield ScoredStep(0, tuple(range(len(items))), _read_prompts(runner, items, chunk), None)
    for step in range(1, max(len(item.output_ids) for item in items)):
        active = tuple(index for index, item in enumerate(items) if len(item.output_ids) > step)
        chunks = tuple(ScheduledChunk(index, len(items[index].prompt_ids) + step - 1, 1) for index in active)
        probe.begin(list(active), [chunk.end for chunk in chunks])
        tokens = [[items[index].output_ids[step - 1]] for index in active]
        result = runner.run(StepPlan(step, Phase.DEVICE, prefill=False, chunks=chunks), tokens, [True] * len(active))
        lost_mass = probe.mean() if measure_lost_mass else None
        yield ScoredStep(step, active, result.logits, lost_mass, result.traffic.tokens_attended)


def flat_store(
    decoder: Decoder, codec: Codec, kernels: AttentionBackend, *, num_rows: int, num_seqs: int, max_length: int
) -> KVStore:
    """A pool for rows that all stay on the device."""
    return KVStore(
        num_layers=decoder.spec.num_layers,
        codec=codec,
        num_rows=num_rows,
        max_num_seqs=num_seqs,
        max_length=max_length,
        device=decoder.device,
        append=kernels.append,
    )


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


def _read_prompts(runner: ModelRunner, items: Sequence[ScoredItem], prefill_chunk: int) -> Tensor:
    """Prefill every prompt in chunks of the engine's size, short ones packed; logits Float32[B, V] of the last tokens.

    Chunks start at multiples of `prefill_chunk`, as in the engine, whatever they are packed with.
    """
    chunks = [
        ScheduledChunk(index, start, min(prefill_chunk, len(item.prompt_ids) - start))
        for index, item in enumerate(items)
        for start in range(0, len(item.prompt_ids), prefill_chunk)
    ]
    # A prompt's chunks must not meet in one pass: a later one reads the rows of the earlier.
    logits: list[Tensor] = []
    packed: list[ScheduledChunk] = []
    for chunk in chunks:
        if packed and (sum(other.count for other in packed) + chunk.count > prefill_chunk or chunk.start):
            logits.append(_prefill(runner, packed, items))
            packed = []
        packed.append(chunk)
    logits.append(_prefill(runner, packed, items))
    return torch.cat(logits)


def _prefill(runner: ModelRunner, chunks: Sequence[ScheduledChunk], items: Sequence[ScoredItem]) -> Tensor:
    """One pass of these chunks through the model."""
    prompts = [items[chunk.req_idx].prompt_ids for chunk in chunks]
    tokens = [prompt[chunk.start : chunk.end] for prompt, chunk in zip(prompts, chunks, strict=True)]
    wanted = [chunk.end == len(prompt) for prompt, chunk in zip(prompts, chunks, strict=True)]
    return runner.run(StepPlan(0, Phase.DEVICE, prefill=True, chunks=tuple(chunks)), tokens, wanted).logits


class _LostMass:
    """A decode kernel that also attends to everything, to see which share of the weight the selection holds.

    A sliding window loses nothing: it is what the model sees.
    """

    def __init__(self, kernel: DecodeKernel, store: KVStore, shape: AttentionShape) -> None:
        self._kernel = kernel
        self._store = store
        self._shape = shape
        self._step: tuple[list[int], list[int]] = ([], [])
        self._everything: tuple[Tensor, Tensor] | None = None
        self._lost: list[float] = []

    def begin(self, req_indices: list[int], lengths: list[int]) -> None:
        """The next calls belong to a step of these sequences."""
        self._step = (req_indices, lengths)
        self._everything = None
        self._lost = []

    def __call__(
        self,
        q: Tensor,
        rows: Tensor,
        codec: Codec,
        slots: Tensor,
        counts: Tensor,
        softcap: float | None = None,
        entries: Tensor | None = None,
    ) -> Attended:
        """The kernel's own result, unchanged."""
        attended = self._kernel(q, rows, codec, slots, counts, softcap, entries)
        if self._shape.window(len(self._lost)) is not None:
            self._lost.append(0.0)
            return attended
        if self._everything is None:  # the rows of the step have slots only now
            self._everything = self._all_slots()
        everything = self._kernel(q, rows, codec, *self._everything, softcap)
        self._lost.append(float((1 - (attended.log_sum_exp - everything.log_sum_exp).exp()).clamp(0, 1).mean()))
        return attended

    def _all_slots(self) -> tuple[Tensor, Tensor]:
        """Slots Int32[B, 1, K] and counts Int32[B] of every row of the step's sequences."""
        req_indices, lengths = self._step
        req_index = torch.tensor(req_indices, device=self._store.device)
        counts = torch.tensor(lengths, dtype=torch.int32, device=self._store.device)
        slots = self._store.slot_table(req_index, max(lengths))[:, None]
        padding = torch.arange(max(lengths), device=self._store.device) >= counts[:, None, None]
        return slots.masked_fill(padding, 0), counts

    def in_pieces(
        self,
        q: Tensor,
        codec: Codec,
        counts: Tensor,
        num_slots: int,
        softcap: float | None = None,
        entries: Tensor | None = None,
    ) -> AttentionPieces:
        """Never asked for: a `KVStore` gives every selection in one chunk."""
        raise AssertionError("rows that are all on the device come in one chunk")

    def piece_columns(self, row_format: RowFormat, num_heads: int) -> int:
        """The kernel's own."""
        return self._kernel.piece_columns(row_format, num_heads)

    def mean(self) -> float:
        """Mean over the layers of the step."""
        return sum(self._lost) / len(self._lost)
