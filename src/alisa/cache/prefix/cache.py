"""Beginnings of prompts whose K and V are known: kept while there is room, the ones not used for longest given up.

What is kept is a copy of what prefill appended to the rows of a sequence, so that a later prompt with the same
beginning appends it again instead of computing it. Rows, tiers and policies know nothing of it: to them it is a prompt
that is read very fast. A step either writes blocks (`begin`, `write`, `end`) or reads them (`fetch`, `read`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.cache.free_slots import FreeSlots
from alisa.cache.prefix.blocks import BlockLayout, BlockMemory
from alisa.cache.prefix.files import BlockFiles
from alisa.scheduler.plan import ScheduledChunk
from alisa.scheduler.prefix import BLOCK_TOKENS, BlockName


class _NewBlock(NamedTuple):
    """A block that the running step computes."""

    name: BlockName
    slot: int
    req_idx: int
    first_token: int
    """Among the tokens of the step."""


class PrefixCache:
    """Blocks in memory and, below them, in a directory. A `PrefixView`.

    Args:
        num_blocks: that memory holds, at least 1.
        layout: of a block.
        files: where blocks are kept from one run to the next; None: nowhere.
        hit_tokens: see `PrefixView`.
    """

    def __init__(self, num_blocks: int, layout: BlockLayout, files: BlockFiles | None, hit_tokens: int) -> None:
        self._memory = BlockMemory(num_blocks, layout)
        self._files = files
        self._hit_tokens = hit_tokens
        self._free = FreeSlots(num_blocks)
        self.capacity = num_blocks
        """Blocks that memory holds."""
        self._slots: OrderedDict[BlockName, int] = OrderedDict()
        """Where each block is, the one not used for longest first."""
        self._in_use: set[BlockName] = set()
        """Blocks of the step that is planned or running: they stay."""
        self._new: list[_NewBlock] = []
        self._new_slots = self._new_tokens = torch.empty(0, dtype=torch.int64)

    @property
    def hit_tokens(self) -> int:
        """See `PrefixView`."""
        return self._hit_tokens

    @property
    def num_blocks(self) -> int:
        """Blocks in memory."""
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks in memory."""
        return self.num_blocks * self._memory.layout.nbytes

    def known(self, names: Sequence[BlockName]) -> int:
        """See `PrefixView`; the end of a prompt is given up before its beginning."""
        return bisect_left(names, True, key=lambda name: name not in self._slots)

    def fetch(self, names: Sequence[BlockName], first: int, count: int) -> int:
        """See `PrefixView`: blocks that lie in files come into memory, as far as there is room."""
        end = first
        for name in names[first : first + count]:
            if name in self._slots:
                self._save(name)
            elif not self._load(name):
                break
            self._in_use.add(name)
            end += 1
        self._touch(names[:end])
        return end - first

    def read(self, layer: int, slots: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """K, V `[n * BLOCK_TOKENS, G, D]` and hidden `[n * BLOCK_TOKENS, C or 0]` of one layer."""
        return self._memory.read(layer, slots, device)

    def slots(self, names: Sequence[BlockName]) -> Tensor:
        """Where blocks are that were fetched for this step, Int64[n]."""
        return torch.tensor([self._slots[name] for name in names], dtype=torch.int64)

    def begin(self, chunks: Sequence[ScheduledChunk], names: Sequence[Sequence[BlockName]]) -> None:
        """A step computes these chunks of prompts, packed one after the other; `names` are of their whole prompts.

        Blocks that are not known yet get room, as far as there is some.
        """
        self._give_back(self._new)  # of a step that did not come to its end
        self._new = []
        packed = 0
        taken: set[BlockName] = set()
        for chunk, own in zip(chunks, names, strict=True):
            self._use(own[: chunk.start // BLOCK_TOKENS])
            for index in range(chunk.start // BLOCK_TOKENS, min(chunk.end // BLOCK_TOKENS, len(own))):
                if own[index] in self._slots or own[index] in taken:
                    continue
                slot = self._take()
                if slot is None:  # what comes after it could not be found
                    break
                first_token = packed + index * BLOCK_TOKENS - chunk.start
                self._new.append(_NewBlock(own[index], slot, chunk.req_idx, first_token))
                taken.add(own[index])
            packed += chunk.count
        self._new_slots = torch.tensor([new.slot for new in self._new], dtype=torch.int64)
        starts = torch.tensor([new.first_token for new in self._new], dtype=torch.int64)
        self._new_tokens = (starts[:, None] + torch.arange(BLOCK_TOKENS)).flatten()

    def write(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor) -> None:
        """K, V `[T, G, D]` and hidden `[T, C]` of one layer of the step that has begun."""
        if self._new:
            tokens = self._new_tokens.to(k.device)
            parts = (values.index_select(0, tokens) for values in (k, v, hidden))
            self._memory.write(layer, self._new_slots, *parts)

    def end(self, failed: Collection[int]) -> None:
        """The step's blocks are known from now on, but not those of request indices whose rows were lost."""
        for new in reversed(self._new):  # the end of a prompt is given up before its beginning
            if new.req_idx in failed:
                self._free.give_back([new.slot])
            else:
                self._slots[new.name] = new.slot
                self._save(new.name)
        self._new = []
        self._in_use.clear()

    def check(self) -> None:
        """Assert that every slot is free or belongs to one block; callable between steps."""
        assert not self._new, "a step has not ended"
        assert not self._in_use, "a step has not ended"
        self._free.check(self._slots.values())

    def _use(self, names: Sequence[BlockName]) -> None:
        """Blocks of a prompt that goes on in this step stay, and count as used."""
        self._in_use.update(names)
        self._touch(names)

    def _touch(self, names: Sequence[BlockName]) -> None:
        for name in reversed(names):
            if name in self._slots:
                self._slots.move_to_end(name)

    def _load(self, name: BlockName) -> bool:
        """Whether the block has come from a file into memory."""
        if self._files is None or not self._files.has(name):
            return False
        slot = self._take()
        if slot is None:
            return False
        if not self._files.read(name, self._memory.block_bytes(slot)):
            self._free.give_back([slot])
            return False
        self._slots[name] = slot
        return True

    def _take(self) -> int | None:
        """A slot for one more block; None: everything in memory is of use to this step."""
        if not len(self._free):
            name = next((name for name in self._slots if name not in self._in_use), None)
            if name is None:
                return None
            self._free.give_back([self._slots.pop(name)])
        return int(self._free.take(1)[0])

    def _save(self, name: BlockName) -> None:
        """The block is in a file, which counts as used now."""
        if self._files is not None:
            self._files.write(name, self._memory.block_bytes(self._slots[name]))

    def _give_back(self, blocks: Sequence[_NewBlock]) -> None:
        self._free.give_back(new.slot for new in blocks)
