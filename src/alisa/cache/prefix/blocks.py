"""Memory for blocks of K and V of prompts: as the model made them, whatever the row codec makes of them later.

    memory [blocks, L, BLOCK_TOKENS, G * D of K, then G * D of V, then C of the layer input where rows may be deleted]

A block is one run of bytes over all layers, so that it goes to a file and back in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.cache.pool import allocate_pool
from alisa.scheduler.prefix import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """What a block holds."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """That of the model's arithmetic."""
    hidden_size: int = 0
    """C where the input of every layer is kept, so that rows may be deleted later; 0: it is not."""

    @property
    def kv_size(self) -> int:
        """Values of K, and of V, of one token of one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def token_size(self) -> int:
        """Values of one token of one layer."""
        return 2 * self.kv_size + self.hidden_size

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.num_layers * BLOCK_TOKENS * self.token_size * self.dtype.itemsize


class BlockMemory:
    """Main memory for a number of blocks; it is taken from the system as blocks are written.

    Args:
        num_blocks: how many.
        layout: of each.

    Raises:
        CapacityError: the machine has less memory.
    """

    def __init__(self, num_blocks: int, layout: BlockLayout) -> None:
        self.layout = layout
        shape = (num_blocks, layout.num_layers, BLOCK_TOKENS, layout.token_size)
        rows, row_bytes = layout.num_layers * BLOCK_TOKENS, layout.token_size * layout.dtype.itemsize
        pool = allocate_pool(num_blocks, rows, row_bytes, torch.device("cpu"))
        self._memory = pool.view(layout.dtype).view(shape)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> None:
        """K, V `[n * BLOCK_TOKENS, G, D]` and hidden `[n * BLOCK_TOKENS, C]` of one layer are in slots Int64[n]."""
        size = self.layout.kv_size
        rows = self._memory[:, layer]
        for values, start in ((k, 0), (v, size), (hidden, 2 * size)):
            if start < self.layout.token_size:
                blocks = values.reshape(len(slots), BLOCK_TOKENS, -1)
                rows[slots, :, start : start + blocks.shape[2]] = blocks.to(rows.device)

    def read(self, layer: int, slots: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """What `write` was given for these slots, on a device; hidden is `[n * BLOCK_TOKENS, 0]` where none is kept."""
        layout = self.layout
        rows = self._memory[:, layer].index_select(0, slots).flatten(0, 1).to(device)
        k, v, hidden = rows.split((layout.kv_size, layout.kv_size, layout.hidden_size), dim=1)
        heads = (layout.num_kv_heads, layout.head_dim)
        return k.unflatten(1, heads), v.unflatten(1, heads), hidden

    def block_bytes(self, slot: int) -> memoryview:
        """The bytes of a block; writing to them writes to the block."""
        return self._memory[slot].view(-1).view(torch.uint8).numpy().data
