"""What the tests of the KV stores share: plans and selections from plain lists, rows that say whose they are, tiers
that fail, and transfers that finish when the test wants it."""

from __future__ import annotations

from concurrent.futures import Executor, Future

import numpy as np
import torch

from alisa.cache.codec import FloatCodec
from alisa.cache.offload.hidden import HiddenStateCache, hidden_format
from alisa.cache.row_ids import BLOCK_TOKENS
from alisa.kernels.base import Selection
from alisa.outputs import Phase
from alisa.scheduler.plan import StepPlan
from alisa.spec import RowFormat

FORMAT = RowFormat("float32", num_kv_heads=2, head_dim=3)
CODEC = FloatCodec(FORMAT)
HIDDEN_SIZE = 4


def plan_of(chunks, moves=(), *, prefill=False):
    return StepPlan(0, Phase.DEVICE, prefill, tuple(chunks), tuple(moves))


def selection_of(positions):
    """Ascending lists of positions, one for each sequence, as a selection with one index set."""
    counts = [len(row) for row in positions]
    padded = torch.zeros(len(positions), 1, max(counts), dtype=torch.int32)
    for row, chosen in enumerate(positions):
        padded[row, 0, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return Selection(padded, torch.tensor(counts, dtype=torch.int32), tuple(counts))


def some_positions(draw, length):
    """A random ascending choice of positions below `length`, the last one among them."""
    return np.flatnonzero(np.append(draw.random(length - 1) < draw.random(), True)).tolist()


def read_chunks(chunks, row_bytes, selection):
    """The rows of every selected entry, UInt8[B, K, row_bytes] and 0 on padding, as the attention kernels find them.

    Each entry must come in exactly one chunk. Chunks are used up one by one: a buffer is valid until the next one.
    """
    num_seqs, _, width = selection.positions.shape
    found = np.zeros((num_seqs, width, row_bytes), np.uint8)
    times = np.zeros((num_seqs, width), np.int64)
    for chunk in chunks:
        slots, columns = chunk.slots[:, 0].numpy(), np.arange(width)
        assert slots.shape == (num_seqs, width)
        begins = np.zeros(num_seqs, np.int32) if chunk.span is None else chunk.span.begins.numpy()
        ends = selection.counts.numpy() if chunk.span is None else chunk.span.ends.numpy()
        came = times.sum(axis=1)
        assert ((begins == came) | (begins == ends)).all(), "the pieces of a sequence do not come in order"
        here = (columns >= begins[:, None]) & (columns < ends[:, None])
        times += here
        found[here] = chunk.rows.numpy()[slots[here]]
    wanted = np.arange(width) < np.array(selection.num_tokens)[:, None]
    assert np.array_equal(times, wanted), "an entry came twice or never"
    return found


def project(layer, hidden, positions):
    """A stand-in for the model's projection: every layer, token and position gives other rows, exact in float32."""
    base = hidden.sum(dim=1) + 1000 * layer + 100_000 * positions
    k = base[:, None, None] + torch.arange(6, dtype=torch.float32).view(2, 3) / 8
    return k, -k


def layer_inputs(first, count):
    """Layer inputs `[count, C]` of tokens that are told apart by their number."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)[:, None]
    return numbers + torch.tensor([0.5, 0.0, -0.25, 0.125])


def hidden_in(tier):
    """Hidden states from which `project` makes rows again; rows of the tier have `HIDDEN_BYTES`."""
    return HiddenStateCache(tier, FloatCodec(hidden_format("float32", HIDDEN_SIZE)), project, torch.float32)


HIDDEN_BYTES = hidden_format("float32", HIDDEN_SIZE).row_bytes


def owner_of(store, table, slot):
    """The request index of a tiered store that has this slot of a tier."""
    [row_id] = np.flatnonzero(table.slots == slot)
    [owner] = [req_idx for req_idx in store._open if row_id // BLOCK_TOKENS in store._row_ids._blocks(req_idx)]
    return owner


class WornTier:
    """A lower tier some of whose rows, (layer, slot), cannot be read or written; `on_refusal` hears of their slots."""

    def __init__(self, tier):
        self.tier, self.medium, self.num_rows = tier, tier.medium, tier.num_rows
        self.bad = set()
        self.on_refusal = lambda slots: None

    def read(self, layer, slots, target, target_rows):
        self._look(layer, slots)
        self.tier.read(layer, slots, target, target_rows)

    def write(self, layer, slots, source, source_rows):
        self._look(layer, slots)
        self.tier.write(layer, slots, source, source_rows)

    def close(self):
        self.tier.close()

    def _look(self, layer, slots):
        if worn := self.bad & {(layer, slot) for slot in np.asarray(slots).tolist()}:
            self.on_refusal([slot for _, slot in worn])
            raise OSError(5, "Input/output error")


class LatePool(Executor):
    """An executor in which a job runs when somebody waits for it, or when the test calls `run`: as late as it gets."""

    def __init__(self):
        self.pending = []

    def submit(self, work, /, *args, **kwargs):
        future = _LateFuture(self, lambda: work(*args, **kwargs))
        self.pending.append(future)
        return future

    def run(self, index):
        """The job at this place of the queue runs now."""
        self.pending[index].run()


class _LateFuture(Future):
    def __init__(self, pool, work):
        super().__init__()
        self._pool, self._work = pool, work

    def run(self):
        self._pool.pending.remove(self)
        try:
            self.set_result(self._work())
        except BaseException as error:  # as concurrent.futures does
            self.set_exception(error)

    def result(self, timeout=None):
        if not self.done():
            self.run()
        return super().result(timeout)
