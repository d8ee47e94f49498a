"""The tiered store as a state machine, against a dictionary: moves, deletions, hot caches, late transfers, bad disks.

Every row follows from its layer, token and position (`project`), so a row that was fetched, rebuilt or mixed up shows.
Transfers run in threads, or as late as they can, which finds whoever reuses memory that is still on its way.
"""

import tempfile
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alisa.cache.offload.residency import EVICTIONS
from alisa.cache.offload.store import TieredStore
from alisa.cache.offload.tiers import DiskTier, HostTier
from alisa.cache.offload.transfer import CopyStream, DeviceBuffer, transfer_buffers
from alisa.errors import CapacityError
from alisa.outputs import Medium
from alisa.scheduler.placement.base import Limits, SeqView, Tier, moves_down
from alisa.scheduler.placement.three_phase import ThreePhase
from alisa.scheduler.plan import ScheduledChunk
from tests.kv_cases import (
    CODEC,
    FORMAT,
    HIDDEN_BYTES,
    LatePool,
    WornTier,
    hidden_in,
    layer_inputs,
    owner_of,
    plan_of,
    project,
    read_chunks,
    selection_of,
    some_positions,
)

NUM_LAYERS, NUM_LANES, MAX_LENGTH, REBUILDABLE = 2, 3, 24, 8
ROW_BYTES = FORMAT.row_bytes


def append_kernel(rows, row_format, slots, k, v):
    assert row_format == FORMAT
    rows.index_copy_(0, slots, CODEC.encode(k, v))


def staged(rows):
    """Buffers that only copies reach, as a GPU's do."""
    stream = CopyStream(rows.device)
    return tuple(DeviceBuffer(each, stream) for each in rows)


class _Seq:
    """What must be true of an open sequence: its rows UInt8[L, n, row_bytes], and where they lie."""

    def __init__(self, num_tokens, num_bounds):
        self.rows = np.empty((NUM_LAYERS, 0, ROW_BYTES), np.uint8)
        self.bounds = [0] * num_bounds
        self.rebuildable = min(num_tokens, REBUILDABLE)
        self.most = num_tokens

    @property
    def length(self):
        return self.rows.shape[1]


def some_range(draw, model):
    """A request index that has rows, and some of its positions, [start, end)."""
    index = int(draw.choice([index for index, req_idx in sorted(model.items()) if req_idx.length]))
    start, last = sorted(draw.integers(0, model[index].length, 2).tolist())
    return index, start, last + 1


class TieredMachine(RuleBasedStateMachine):
    """`model` maps a request index to its `_Seq`; `doomed` req_indices had a row that the tier refused to read or
    write."""

    @initialize(
        eviction=st.sampled_from(EVICTIONS),
        num_rows=st.integers(3, 24),
        media=st.sampled_from(((Medium.DISK,), (Medium.HOST, Medium.DISK))),
        staging=st.sampled_from(((1, 1), (3, 1), (3, 3), (16, 4))),
        in_flight_bytes=st.sampled_from((0, 600, 1 << 20)),
        late=st.booleans(),
        append=st.sampled_from((None, append_kernel)),
        make_buffers=st.sampled_from((transfer_buffers, staged)),
    )
    def start(self, eviction, num_rows, media, staging, in_flight_bytes, late, append, make_buffers):
        self.num_rows = num_rows
        self.tiers = [WornTier(self.make_tier(medium, 40, ROW_BYTES)) for medium in media]
        self.hidden_tier = WornTier(self.make_tier(media[-1], NUM_LANES * REBUILDABLE, HIDDEN_BYTES))
        self.limits = Limits(num_rows, tuple(Tier(tier.medium, tier.num_rows) for tier in self.tiers), REBUILDABLE)
        self.store = TieredStore(
            num_layers=NUM_LAYERS,
            codec=CODEC,
            num_rows=num_rows,
            max_num_seqs=NUM_LANES,
            max_length=MAX_LENGTH,
            tiers=self.tiers,
            hidden=hidden_in(self.hidden_tier),
            rebuildable=REBUILDABLE,
            eviction=eviction,
            staging_rows=staging[0],
            piece_columns=staging[1],
            in_flight_bytes=in_flight_bytes,
            append=append,
            make_buffers=make_buffers,
        )
        self.pool = LatePool() if late else None
        if self.pool is not None:
            self.store._transfers._pool = self.pool
        tables = list(self.store._tables())
        for tier, table in zip((*self.tiers, self.hidden_tier), tables, strict=True):
            tier.on_refusal = lambda slots, table=table: self.doom(table, slots)
        self.model = {}
        self.doomed = set()
        self.guess, self.num_ahead = {}, 0
        self.num_written = 0

    @staticmethod
    def make_tier(medium, num_rows, row_bytes):
        if medium is Medium.HOST:
            return HostTier(NUM_LAYERS, num_rows, row_bytes)
        # Steps of a few slots: the file grows while it is used.
        return DiskTier(
            Path(tempfile.gettempdir()), NUM_LAYERS, num_rows, row_bytes, step_bytes=7 * NUM_LAYERS * row_bytes
        )

    def doom(self, table, slots):
        self.doomed |= {owner_of(self.store, table, slot) for slot in slots}

    # --- sequences ---------------------------------------------------------------------------------------------------

    @rule(req_idx=st.integers(0, NUM_LANES - 1), num_tokens=st.integers(1, MAX_LENGTH + 2))
    def open(self, req_idx, num_tokens):
        if num_tokens > MAX_LENGTH:
            with pytest.raises(CapacityError, match=str(num_tokens)):
                self.store.open(req_idx, num_tokens)
        elif req_idx in self.model:
            with pytest.raises(AssertionError, match=f"request index {req_idx} is in use"):
                self.store.open(req_idx, num_tokens)
        else:
            self.store.open(req_idx, num_tokens)
            self.model[req_idx] = _Seq(num_tokens, len(self.tiers) + 1)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data):
        self.let_go(data.draw(st.sampled_from(sorted(self.model))))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        """The rows before the cut stay where they are, those after it make room everywhere."""
        index = data.draw(st.sampled_from(sorted(self.model)))
        req_idx = self.model[index]
        length = data.draw(st.integers(0, req_idx.length))
        self.store.truncate(index, length)
        req_idx.rows = req_idx.rows[:, :length]
        req_idx.bounds = [min(bound, length) for bound in req_idx.bounds]

    def let_go(self, req_idx):
        self.store.release(req_idx)
        del self.model[req_idx]
        self.doomed.discard(req_idx)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), excess=st.integers(1, 3))
    def refuse(self, data, excess):
        """Positions beyond the longest sequence, or with a gap, are refused and change nothing."""
        req_idx = data.draw(st.sampled_from(sorted(self.model)))
        length = self.model[req_idx].length
        for wrong in (
            ScheduledChunk(req_idx, length, MAX_LENGTH - length + excess),
            ScheduledChunk(req_idx, length + excess, 1),
        ):
            with pytest.raises(CapacityError, match=f"Request index {req_idx}"):
                self.store.begin(plan_of([wrong]))

    # --- a step ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(req_idx.length < req_idx.most for req_idx in self.model.values()))
    @rule(
        seed=st.integers(0, 2**32 - 1),
        most=st.sampled_from((1, 1, MAX_LENGTH)),
        wild=st.booleans(),
        guesses=st.sampled_from(("right", "wrong", "none")),
    )
    def step(self, seed, most, wild, guesses):
        """New tokens of some sequences: moves, rows in, selected rows out, guesses about the next step."""
        draw = np.random.default_rng(seed)
        growing = [index for index, req_idx in sorted(self.model.items()) if req_idx.length < req_idx.most]
        req_indices = draw.permutation(growing)[: draw.integers(1, len(growing) + 1)].tolist()
        chunks = []
        for index in req_indices:
            req_idx = self.model[index]
            chunks.append(
                ScheduledChunk(
                    index, req_idx.length, int(draw.integers(1, min(most, req_idx.most - req_idx.length) + 1))
                )
            )
        moves = self.moves(draw, chunks, wild=wild)
        if moves is None:
            return
        stored, deleted = self.account(chunks, moves)
        prefill = most > 1
        self.store.traffic()
        self.store.begin(plan_of(chunks, moves, prefill=prefill))
        self.write(chunks)
        if prefill:
            self.read_prompts(draw, chunks)
            self.check_traffic(stored, deleted, 0)
        else:
            lookups = self.look(draw, req_indices)
            self.check_traffic(stored, deleted, lookups)
            self.guess, self.num_ahead = {}, 0
            if guesses != "none":
                self.look_ahead(draw, keep=guesses == "right")
        self.fail()

    def moves(self, draw, chunks, *, wild):
        """Any legal moves, or those that a scheduler wants; None: this step has no room."""
        ends = {chunk.req_idx: chunk.end for chunk in chunks}
        views = [
            SeqView(
                index,
                0,
                ends.get(index, req_idx.length),
                tuple(req_idx.bounds),
                int(draw.integers(0, ends.get(index, req_idx.length) + 1)),
                int(draw.integers(0, 5)),
                req_idx.rebuildable,
                index in ends,
            )
            for index, req_idx in self.model.items()
        ]
        if wild:
            bounds = [self.lower(draw, view) for view in views]
            if self.fits(views, bounds):
                return moves_down(views, bounds, self.limits)
        decision = ThreePhase(chunk=int(draw.integers(1, 5))).plan(views, self.limits)
        return None if decision is None else decision.moves

    def lower(self, draw, view):
        """Random bounds that the present ones can become."""
        found, upper = [], view.length
        for level, bound in enumerate(view.bounds):
            last = level + 1 == len(view.bounds)
            upper = max(min(upper, view.rebuildable), bound) if last else upper
            upper = int(draw.choice((bound, upper, draw.integers(bound, upper + 1))))
            found.append(upper)
        return found

    def fits(self, views, bounds):
        if sum(view.length - ends[0] for view, ends in zip(views, bounds, strict=True)) > self.num_rows:
            return False
        held = [sum(ends[level] - ends[level + 1] for ends in bounds) for level in range(len(self.tiers))]
        return all(count <= tier.num_rows for count, tier in zip(held, self.tiers, strict=True))

    def account(self, chunks, moves):
        """Rows and hidden states that go down and rows that are deleted, all layers; and the model's bounds follow."""
        media = [Medium.DEVICE, *(tier.medium for tier in self.tiers), None]
        rows, deleted = 0, 0
        for move in moves:
            req_idx = self.model[move.req_idx]
            source, target = media.index(move.source), media.index(move.target)
            assert target > source
            rows += move.num_tokens if move.target is not None else 0
            deleted += max(min(move.end, req_idx.length) - move.start, 0) if move.target is None else 0
            for level in range(source, target):
                assert move.start <= req_idx.bounds[level] <= move.end, "a move leaves a gap"
                req_idx.bounds[level] = move.end
        hidden = 0
        for chunk in chunks:
            hidden += max(min(chunk.end, self.model[chunk.req_idx].rebuildable) - chunk.start, 0)
        return (rows * NUM_LAYERS, hidden * NUM_LAYERS), deleted * NUM_LAYERS

    def write(self, chunks):
        counts = [chunk.count for chunk in chunks]
        hidden = layer_inputs(self.num_written, sum(counts))
        self.num_written += sum(counts)
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks])
        pairs = [project(layer, hidden, positions) for layer in range(NUM_LAYERS)]
        self.pending = [(k, v, hidden) for k, v in pairs]
        written = np.stack([CODEC.encode(k, v).numpy() for k, v in pairs])
        for chunk, rows in zip(chunks, np.split(written, np.cumsum(counts)[:-1], axis=1), strict=True):
            req_idx = self.model[chunk.req_idx]
            req_idx.rows = np.concatenate((req_idx.rows, rows), axis=1)

    def read_prompts(self, draw, chunks):
        """Every layer writes its rows and reads those before them, a block at a time."""
        for layer in range(NUM_LAYERS):
            self.store.append(layer, *self.pending[layer])
            for chunk in chunks:
                block = int(draw.integers(1, MAX_LENGTH))
                for first in range(0, chunk.start, block):
                    self.read(layer, chunk.req_idx, first, min(first + block, chunk.start))

    def look(self, draw, req_indices):
        """Every layer writes its rows and reads a selection; how many selected rows lay below the device."""
        lookups = 0
        for layer in range(NUM_LAYERS):
            self.store.append(layer, *self.pending[layer])
            guess = self.guess.get(layer, {})
            if all(guess.get(index, [-1])[-1] == self.model[index].length - 1 for index in req_indices):
                chosen = [guess[index] for index in req_indices]
            else:
                chosen = [some_positions(draw, self.model[index].length) for index in req_indices]
            selection = selection_of(chosen)
            found = read_chunks(self.store.chunks(layer, selection), ROW_BYTES, selection)
            for index, at, rows in zip(req_indices, chosen, found, strict=True):
                lookups += sum(position < self.model[index].bounds[0] for position in at)
                if index not in self.doomed:
                    assert np.array_equal(rows[: len(at)], self.model[index].rows[layer, at])
        return lookups

    def look_ahead(self, draw, *, keep):
        """Announce selections of a next step of some req_indices, which comes as announced or not."""
        growing = [index for index, req_idx in sorted(self.model.items()) if req_idx.length < MAX_LENGTH]
        req_indices = tuple(draw.permutation(growing)[: draw.integers(1, NUM_LANES + 1)].tolist())
        if not req_indices:
            return
        for layer in range(NUM_LAYERS):
            chosen = [some_positions(draw, self.model[index].length + 1) for index in req_indices]
            self.store.prefetch(layer, req_indices, selection_of(chosen))
            if keep:
                self.guess[layer] = dict(zip(req_indices, chosen, strict=True))
        traffic = self.store.traffic()
        self.num_ahead += traffic.fetched_rows + traffic.rebuilt_rows
        assert traffic.lookups == traffic.hits == 0

    def check_traffic(self, stored, deleted, lookups):
        traffic = self.store.traffic()
        rows, hidden = stored
        assert traffic.stored_rows == rows + hidden
        assert traffic.deleted_rows == deleted
        assert traffic.lookups == lookups
        brought = traffic.fetched_rows + traffic.rebuilt_rows
        if lookups:  # what was fetched ahead and is read now is no hit; guesses may have been wrong
            assert brought <= traffic.lookups - traffic.hits <= brought + self.num_ahead, (traffic, self.num_ahead)
        fetched_bytes = traffic.fetched_rows * ROW_BYTES + traffic.rebuilt_rows * HIDDEN_BYTES
        assert traffic.moved_bytes == rows * ROW_BYTES + hidden * HIDDEN_BYTES + fetched_bytes
        assert all(type(count) in (int, float) for count in astuple(traffic)), "a report is written from them"
        assert traffic.wait_s >= 0
        assert traffic.busy_s >= 0

    # --- reading, waiting, failing -----------------------------------------------------------------------------------

    @precondition(lambda self: any(req_idx.length for req_idx in self.model.values()))
    @rule(seed=st.integers(0, 2**32 - 1))
    def read_back(self, seed):
        draw = np.random.default_rng(seed)
        self.read(int(draw.integers(NUM_LAYERS)), *some_range(draw, self.model))
        self.fail()

    def read(self, layer, index, start, end):
        rows = CODEC.encode(*self.store.read(layer, index, start, end)).numpy()
        if index not in self.doomed:
            assert np.array_equal(rows, self.model[index].rows[layer, start:end])

    @precondition(lambda self: self.pool is not None and self.pool.pending)
    @rule(seed=st.integers(0, 2**32 - 1))
    def some_transfers_end(self, seed):
        draw = np.random.default_rng(seed)
        for _ in range(int(draw.integers(1, len(self.pool.pending) + 1))):
            self.pool.run(int(draw.integers(len(self.pool.pending))))

    @rule(tier=st.integers(0, 2), layer=st.integers(0, NUM_LAYERS - 1), slot=st.integers(0, 39))
    def wear(self, tier, layer, slot):
        """A row of a tier goes bad."""
        self.wait_for_threads()
        tiers = [*self.tiers, self.hidden_tier]
        tiers[tier % len(tiers)].bad.add((layer, slot))

    @rule()
    def settle(self):
        """When nothing is on its way, all req_indices that lost something are known."""
        self.store.drain()
        failed = self.store.failed()
        assert set(failed) == self.doomed
        assert set(failed.values()) <= {"Input/output error"}
        for req_idx in failed:
            self.let_go(req_idx)

    def fail(self):
        """Sequences that lost rows are known and go, no others."""
        if any(tier.bad for tier in (*self.tiers, self.hidden_tier)):
            self.wait_for_threads()
        failed = self.store.failed()
        assert set(failed) <= self.doomed
        for req_idx in failed:
            self.let_go(req_idx)

    def wait_for_threads(self):
        """Nothing is on its way where bad rows are concerned: which sequences are open, and so what is drawn next, must
        not depend on how fast threads are. With a late pool it does not."""
        if self.pool is None:
            self.store.drain()

    @invariant()
    def agrees(self):
        self.store.check()
        lengths = {index: req_idx.length for index, req_idx in self.model.items()}
        assert {index: self.store.length(index) for index in self.model} == lengths
        assert all(self.store.bounds(index) == tuple(req_idx.bounds) for index, req_idx in self.model.items())
        deleted = sum(req_idx.bounds[-1] for req_idx in self.model.values())
        assert self.store.deleted_tokens == deleted
        assert self.store.used_rows == sum(lengths.values()) - deleted
        token_bytes = NUM_LAYERS * ROW_BYTES
        assert self.store.nbytes(Medium.DEVICE) <= self.num_rows * token_bytes
        kept = sum(min(req_idx.length, req_idx.rebuildable) for req_idx in self.model.values())
        expected = dict.fromkeys(Medium, 0) | {self.hidden_tier.medium: kept * NUM_LAYERS * HIDDEN_BYTES}
        for level, tier in enumerate(self.tiers):
            expected[tier.medium] += token_bytes * sum(
                req_idx.bounds[level] - req_idx.bounds[level + 1] for req_idx in self.model.values()
            )
        assert self.store.nbytes(Medium.HOST) == expected[Medium.HOST]
        assert self.store.nbytes(Medium.DISK) == expected[Medium.DISK]

    def teardown(self):
        for layer in range(NUM_LAYERS):
            for index, req_idx in self.model.items():
                if req_idx.length:
                    self.read(layer, index, 0, req_idx.length)
        self.settle()
        for index in list(self.model):
            self.let_go(index)
        self.agrees()
        assert [self.store.nbytes(medium) for medium in Medium] == [0, 0, 0]
        self.store.close()


TestTieredStore = TieredMachine.TestCase
TestTieredStore.settings = settings(max_examples=60, stateful_step_count=25)
