"""What the model's `attend` is: the paper on one screen, and the only place where cache, policy and kernels meet.

The decoder hands over q, k and v of one layer and gets the attention output back; it does not know that a cache exists.
Whoever runs a model over cached rows (the engine, teacher-forced scoring, the evaluations) goes through one session:

    session.begin(plan)                             rows and state have room, moves are under way
    decoder.forward(tokens, positions, session.attend)
    session.end()                                   what was read and moved
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from alisa.attention.fixed import FixedReader
from alisa.attention.prefill import PrefillStep, token_places
from alisa.attention.reader import StepReader, in_chunks
from alisa.attention.sketched import SketchedReader
from alisa.attention.timing import StepSection, StepTimer
from alisa.attention.window import window_selection
from alisa.budget import Budget
from alisa.cache.base import RowStore
from alisa.cache.manager import CacheManager
from alisa.cache.prefix.cache import PrefixCache
from alisa.kernels.base import AttendAll, Attended, Selection, StepBatch
from alisa.kernels.choose import AttentionBackend
from alisa.kernels.reference.sinks import with_sinks
from alisa.outputs import Traffic
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.policy.dense import Dense
from alisa.scheduler.plan import Opened, ScheduledChunk, StepPlan
from alisa.scheduler.prefix import BLOCK_TOKENS, BlockName
from alisa.spec import AttentionShape

if TYPE_CHECKING:
    from alisa.kernels import _native


class StepTraffic(NamedTuple):
    """What a step read and moved."""

    tokens_attended: tuple[int, ...]
    """Cached tokens that decode attention read for each chunk of the plan, summed over layers; 0 in prefill."""
    traffic: Traffic
    failed: dict[int, str]
    """Request indices whose rows were lost, and why: their output is worthless."""
    covered: float | None = None
    """The part of the weight that the tokens read have, by the policy, mean over layers and heads; None: nobody asked
    for a coverage."""


class _Layer(NamedTuple):
    """What a step asks of a layer."""

    window: int | None
    """Its sliding window: it reads exactly that, and no policy is asked."""
    among_full: int
    """Its number among the layers without one, which are those that the policy knows."""


class _Ahead(NamedTuple):
    """Selections of every layer for a step that has not come yet."""

    req_indices: tuple[int, ...]
    lengths: tuple[int, ...]
    selections: tuple[Selection, ...]


class KVSession:
    """A cache and a policy's state, driven step by step.

    Args:
        cache: where rows lie.
        policy: which tokens are read.
        state: what the policy remembers.
        backend: the kernels.
        shape: of the attention.
        device: of the model.
        timer: told where the time goes.
        looks_ahead: choose a step's tokens when the step before it has been through all layers, and let the cache fetch
            what is missing while logits and tokens are computed. Only for policies that do not look at the query.
        sinks: of each layer, Float32[H]; None: the model has none.
        exact: the policy chooses what drafts read (`StepPlan.is_draft`), and every other decode step reads all.
        prefix: keeps K and V of prompts for others that begin alike; None: nobody does.
    """

    def __init__(
        self,
        cache: CacheManager,
        policy: SelectionPolicy,
        state: PolicyState,
        backend: AttentionBackend,
        shape: AttentionShape,
        device: torch.device,
        timer: StepTimer,
        *,
        looks_ahead: bool = False,
        sinks: Sequence[Tensor] | None = None,
        exact: bool = False,
        prefix: PrefixCache | None = None,
    ) -> None:
        assert shape.has_sinks == (sinks is not None), "whoever runs a model with sinks hands them over"
        self.cache = cache
        self.prefix = prefix
        self.policy = policy
        self.state = state
        self.shape = shape
        self._layers = [_Layer(shape.window(i), shape.among_full(i)) for i in range(shape.num_layers)]
        self._sinks = sinks
        self._windows = sorted({window for window in shape.windows if window is not None})
        self._device = device
        self._looks_ahead = looks_ahead and (exact or not policy.query_aware)
        self._timer = timer
        self._prefill_kernel = timer.timed(StepSection.ATTENTION, backend.prefill)
        self._kernel = timer.timed(StepSection.ATTENTION, backend.attend)
        self._in_pieces = backend.attend.in_pieces
        self._on_append = timer.timed(StepSection.SELECTION, state.on_append)
        # What a state leaves at its default, which does nothing, need not be called in every layer of every step.
        self._keeps_tokens = type(state).on_append is not PolicyState.on_append
        self._sketch_step, self._in_one_call = backend.sketch_step, False
        self._fixed_step, self._is_fixed = backend.fixed_step, False
        self._drafting = self._reading = self._reader = StepReader(policy, state, timer)
        if exact:
            assert policy.can_truncate, "drafts are taken back"
            self._reading = StepReader(Dense(), Dense().make_state(), timer)
        self._covers = False
        self._observe_prompt = timer.timed(StepSection.SELECTION, state.observe_prompt)
        self._begin_cache = timer.timed(StepSection.BEGIN, cache.begin)
        self._next_chunk = timer.timed(StepSection.TRANSFER, next)
        self.selection = Selection(torch.empty(0), torch.empty(0), ())
        """What the last layer of a decode step read; evaluations look at it."""
        self._prompt_lens: dict[int, int] = {}
        self._block_names: dict[int, tuple[BlockName, ...]] = {}
        self._budgets: dict[int, Budget] = {}  # of sequences that have one of their own
        self.max_lengths: dict[int, int] = {}
        """By request index: tokens that the sequence may come to."""
        self._bind(cache.store)
        self._ahead: _Ahead | None = None
        self._prefill: PrefillStep | None = None
        self._batch = StepBatch((), (), torch.empty(0), torch.empty(0))
        self._positions = torch.empty(0)
        self._chosen: Sequence[Selection] | None = None
        self._in_window: dict[int, Selection] = {}
        self._read: list[tuple[int, ...]] = []
        self._covered: list[Tensor] = []
        self._num_chunks = 0

    def open(self, sequence: Opened) -> None:
        """A sequence takes a request index; nothing of its former owner remains.

        Raises:
            CapacityError: sequences of this length were not provided for; nothing has changed.
        """
        self.cache.open(sequence.req_idx, sequence.num_tokens)
        self.state.open(sequence.req_idx, sequence.num_tokens)
        self._prompt_lens[sequence.req_idx] = sequence.prompt_len
        self._block_names[sequence.req_idx] = sequence.block_names
        self.max_lengths[sequence.req_idx] = sequence.num_tokens
        if sequence.budget is not None:
            self._budgets[sequence.req_idx] = sequence.budget

    def extend_prompt(self, req_idx: int, prompt_len: int) -> None:
        """The sequence goes on with tokens up to `prompt_len` that are read as a prompt is.

        For policies that do not observe prompts: attention that is observed belongs to one prompt read in one go.
        """
        assert not self.policy.observation_window(prompt_len), "what is observed cannot be taken up again"
        self._prompt_lens[req_idx] = prompt_len

    def copy_rows(self, chunk: ScheduledChunk) -> None:
        """A step that has begun, with this one chunk of a prompt, has the rows of the chunk's source and is over."""
        for layer in range(self.shape.num_layers):
            self._store.copy(layer, chunk)

    def fork_state(self, source: int, req_idx: int) -> None:
        """The policy knows of a sequence, all of whose rows are those of `source`, what it knows of that one."""
        self.state.fork(source, req_idx)

    def truncate(self, req_idx: int, length: int) -> None:
        """The sequence ends after `length` tokens; for policies that can take tokens back."""
        assert self.policy.can_truncate, "the policy's state would remember the others"
        self.cache.store.truncate(req_idx, length)

    def close(self, req_idx: int) -> None:
        """Every row and every other trace of the sequence is gone; its index may be given away at once."""
        self.cache.release(req_idx)
        self.state.close(req_idx)
        del self._prompt_lens[req_idx], self._block_names[req_idx], self.max_lengths[req_idx]
        self._budgets.pop(req_idx, None)
        self._ahead = None

    def begin(self, plan: StepPlan) -> None:
        """Sequences of the plan are closed and opened, its moves are under way, and its chunks have room.

        Raises:
            CapacityError: a chunk does not continue its sequence, or there is no room.
        """
        self._make_room(plan)
        if plan.prefill:
            # A prompt may have the index, and come to the length, of a sequence that the choice made ahead was for.
            self._ahead = None
            self._prefill = self._prefill_step(plan.chunks)
        else:
            self._prefill = None
            self._begin_decode(plan)

    def restore(self, plan: StepPlan) -> StepTraffic:
        """A whole step whose chunks come from the prefix cache: rows and policy get what they got the first time.

        Raises:
            CapacityError: as `begin`.
        """
        assert self.prefix is not None, "plans that restore are made where there is a prefix cache"
        self._make_room(plan)
        self._ahead = None
        names = [
            name
            for chunk in plan.chunks
            for name in self._block_names[chunk.req_idx][chunk.start // BLOCK_TOKENS : chunk.end // BLOCK_TOKENS]
        ]
        slots = self.prefix.slots(names)
        req_index, positions = token_places(plan.chunks, self._device)
        for layer, (window, among_full) in enumerate(self._layers):
            k, v, hidden = self.prefix.read(layer, slots, self._device)
            self._append(layer, k, v, hidden)
            if window is None:
                self._on_append(among_full, req_index, positions, k, v)
        return self._traffic()

    def _make_room(self, plan: StepPlan) -> None:
        for req_idx in plan.closed:
            self.close(req_idx)
        for sequence in plan.opened:
            self.open(sequence)
        for chunk in plan.chunks:
            self.state.reserve(chunk.req_idx, chunk.end)
        store = self._begin_cache(plan)
        if store is not self._store:
            self._bind(store)
        self._read = []
        self._covered = []
        self._num_chunks = len(plan.chunks)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer: q `[B, T, H, D]`, k and v `[B, T, G, D]`, hidden `[B, T, C]`; returns `[B, T, H, D]`.

        Decode: T = 1, those of the B tokens that belong to a sequence one after the other. Prefill: B = 1, chunks of
        prompts packed one after the other.
        """
        if self._prefill is not None:
            return self._prefill.attend(layer, q, k, v, hidden)
        window, among_full = self._layers[layer]
        if self._in_one_call and window is None:
            self.selection = self._sketched.selection(among_full)
            self._read.append(self.selection.num_tokens)
            return self._sketched.attend(among_full, q, k, v)
        query, key, value = q[:, 0], k[:, 0], v[:, 0]
        self._append(layer, key, value, hidden[:, 0])
        if window is not None:
            self.selection = self._in_window[window]
            self._read.append(self.selection.num_tokens)
            attended = self._attend(layer, query, self.selection)
            out = attended.out
            if self._sinks is not None:
                out = with_sinks(out, attended.log_sum_exp, self._sinks[layer])
            return out[:, None]
        if self._keeps_tokens:
            self._on_append(among_full, self._batch.req_index, self._positions, key, value)
        reader = self._reader
        selection = reader.select(among_full, query) if self._chosen is None else self._chosen[layer]
        attended = self._attend(layer, query, selection)
        self.selection = selection
        self._read.append(selection.num_tokens)
        if self._covers and (shares := self.state.weight_read(among_full)) is not None:
            self._covered.append(shares.mean())
        out = reader.output(among_full, selection, attended)
        if self._sinks is not None:
            out = with_sinks(out, reader.log_sum_exp(among_full, attended), self._sinks[layer])
        return out[:, None]

    @property
    def attend_all(self) -> AttendAll | None:
        """All layers of the step in one call, in place of `attend`; None: this step has no such call."""
        here = self._prefill is None and not self._windows and (self._in_one_call or self._is_fixed)
        return self._attend_all if here else None

    def end(self) -> StepTraffic:
        """The step is over; the next one's selections are made and asked for, where history alone decides them."""
        reads_on = self._prefill is None and self._reader is self._reading
        if reads_on and self._looks_ahead and self.cache.has_tiers:
            self._look_ahead()
        return self._traffic()

    @contextmanager
    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_native.LayerAttention]:
        reader = self._sketched if self._in_one_call else self._fixed
        with reader.attend_all(q, k, v) as attention:
            yield attention
        selections = [reader.selection(layer) for layer in range(self.shape.num_layers)]
        self._read.extend(selection.num_tokens for selection in selections)
        self.selection = selections[-1]

    def _traffic(self) -> StepTraffic:
        attended = tuple(sum(layers) for layers in zip(*self._read, strict=True)) or (0,) * self._num_chunks
        if len(attended) > self._num_chunks:
            attended = in_chunks(attended, self._batch)
        traffic, failed = self._store.traffic(), self._store.failed()
        if self.prefix is not None:
            self.prefix.end(failed)
        covered = float(torch.stack(self._covered).mean()) if self._covered else None
        return StepTraffic(attended, traffic, failed, covered)

    def _bind(self, store: RowStore) -> None:
        """From now on rows come from this store."""
        self._store = store
        self._codec = store.codec
        self._append = self._timer.timed(StepSection.ATTENTION, store.append)
        self._prefetch = self._timer.timed(StepSection.TRANSFER, store.prefetch)
        full = [layer for layer, (window, _) in enumerate(self._layers) if window is None]
        self._sketched = SketchedReader(self._sketch_step, self.state, store, full, self.shape.num_heads, self._timer)
        self._fixed = FixedReader(self._fixed_step, store, self.shape.softcap, self._timer)

    def _prefill_step(self, chunks: tuple[ScheduledChunk, ...]) -> PrefillStep:
        observed_from: list[int | None] = []
        prompt_lens = [self._prompt_lens[chunk.req_idx] for chunk in chunks]
        for chunk, prompt_len in zip(chunks, prompt_lens, strict=True):
            first = max(chunk.start, prompt_len - self.policy.observation_window(prompt_len))
            observed_from.append(first if first < chunk.end else None)
        self._batch = self._batch_of((), ())
        append = self._append
        if self.prefix is not None:
            self.prefix.begin(chunks, [self._block_names[chunk.req_idx] for chunk in chunks])
            append = self._append_and_keep
        return PrefillStep(
            self._store,
            append,
            self._on_append,
            self._observe_prompt,
            self._prefill_kernel,
            chunks,
            prompt_lens,
            observed_from,
            self.policy.num_sets(self.shape),
            self.shape,
            self._sinks,
            self._device,
        )

    def _append_and_keep(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor) -> None:
        """Rows are written, and the prefix cache has a copy of what they were written from."""
        assert self.prefix is not None, "there is somebody who keeps it"
        self._append(layer, k, v, hidden)
        self.prefix.write(layer, k, v, hidden)

    def _begin_decode(self, plan: StepPlan) -> None:
        """Lay out the step; selections that were made ahead for just this step are taken."""
        tokens = [(c.req_idx, length) for c in plan.chunks for length in range(c.start + 1, c.end + 1)]
        assert len(tokens) == len(plan.chunks) or self.policy.can_truncate, "tokens of this policy come one by one"
        req_indices, lengths = tuple(req_idx for req_idx, _ in tokens), tuple(length for _, length in tokens)
        self._reader = self._drafting if plan.is_draft else self._reading
        self._batch = self._batch_of(req_indices, lengths)
        budgets = self._batch.budgets or (self.policy.budget,)
        self._covers = self._drafting is self._reading and any(budget.coverage is not None for budget in budgets)
        self._positions = self._batch.length_counts.to(torch.int64) - 1
        # Also where the choice was made ahead: room for the new tokens may have moved what the state knows.
        self._reader.begin(self._batch)
        self._in_window = {window: window_selection(self._batch, window) for window in self._windows}
        ahead, self._ahead = self._ahead, None
        is_chosen = ahead is not None and (ahead.req_indices, ahead.lengths) == (req_indices, lengths)
        reads_on = self._reader is self._reading  # a draft reads other tokens than were chosen
        self._chosen = ahead.selections if ahead is not None and is_chosen and reads_on else None
        chooses = self._chosen is None and self._reader is self._drafting and self._sinks is None
        self._in_one_call = chooses and self._sketched.begin(self._batch.req_index, self._positions)
        plain = self._chosen is None and not self._keeps_tokens and self._sinks is None
        self._is_fixed = plain and self._fixed.begin(self._reader.fixed_selection())

    def _attend(self, layer: int, query: Tensor, selection: Selection) -> Attended:
        """Attention over the selected rows, in one call or piece by piece: the same, to the last bit."""
        chunks = self._store.chunks(layer, selection)
        chunk = self._next_chunk(chunks, None)
        assert chunk is not None, "every sequence reads at least its own token"
        if chunk.span is None:
            return self._kernel(
                query, chunk.rows, self._codec, chunk.slots, selection.counts, self.shape.softcap, selection.entries
            )
        width = chunk.slots.shape[2]
        pieces = self._in_pieces(query, self._codec, selection.counts, width, self.shape.softcap, selection.entries)
        add = self._timer.timed(StepSection.ATTENTION, pieces.add)
        while chunk is not None:
            assert chunk.span is not None, "a selection is one chunk, or all of it is pieces"
            add(chunk.rows, chunk.slots, chunk.span.begins, chunk.span.ends)
            chunk = self._next_chunk(chunks, None)
        return self._timer.timed(StepSection.ATTENTION, pieces.finish)()

    def _look_ahead(self) -> None:
        """Choose for the next step of the same sequences. If it turns out another, choosing again gives the same."""
        lengths = zip(self._batch.req_indices, self._batch.lengths, strict=True)
        longer = {req_idx: n + 1 for req_idx, n in lengths if n < self._store.max_length}
        if not longer:
            return
        following = self._batch_of(tuple(longer), tuple(longer.values()))
        self._reading.begin(following)
        no_query = torch.empty(0)
        in_window = {window: window_selection(following, window) for window in self._windows}
        selections = tuple(
            self._reading.select(among_full, no_query) if window is None else in_window[window]
            for window, among_full in self._layers
        )
        for layer, selection in enumerate(selections):
            self._prefetch(layer, following.req_indices, selection)
        self._ahead = _Ahead(following.req_indices, following.lengths, selections)

    def _batch_of(self, req_indices: tuple[int, ...], lengths: tuple[int, ...]) -> StepBatch:
        index = torch.tensor(req_indices, dtype=torch.int64, device=self._device)
        counts = torch.tensor(lengths, dtype=torch.int32, device=self._device)
        budgets = None
        if self._budgets:
            budgets = tuple(self._budgets.get(req_idx, self.policy.budget) for req_idx in req_indices)
        return StepBatch(req_indices, lengths, index, counts, budgets)
