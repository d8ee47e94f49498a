"""Hidden states: what deleted rows are made from again.

ALISA deletes rows and recomputes them but does not say from what. From token ids, a row costs the whole prefix through
all layers; from the layer input it costs one product with W_K and W_V, gives the same row for any subset of tokens, and
takes C values instead of 2 * G * D: half of a multi-head row, more than the whole row of most grouped-query models. The
layer input is what HCache (arXiv 2410.05004) and KVPR (2411.17089) keep, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.cache.offload.table import SlotTable
from alisa.cache.offload.tiers import LowerTier
from alisa.kernels.base import Codec, Rebuild, Slots
from alisa.spec import RowFormat

_GROUP = 64
"""Values of a hidden state that share a scale when it is kept as integers."""


def hidden_format(dtype: str, hidden_size: int) -> RowFormat:
    """A hidden state `[C]` seen as a row `[2, G', D']`, so that the row codecs apply; C must be even."""
    if hidden_size % (2 * _GROUP) == 0:
        return RowFormat(dtype, hidden_size // (2 * _GROUP), _GROUP)
    return RowFormat(dtype, 1, hidden_size // 2)


class HiddenStateCache:
    """Layer inputs of the tokens that may be deleted, in a lower tier, by (layer, slot).

    Args:
        tier: where they lie; its rows are hidden states.
        codec: of `hidden_format`.
        rebuild: the model's projection.
        dtype: what the model computes in.
    """

    def __init__(self, tier: LowerTier, codec: Codec, rebuild: Rebuild, dtype: torch.dtype) -> None:
        self.tier = tier
        self.table = SlotTable(tier.num_rows)
        """Slots of the tier, by row id."""
        self.row_bytes = codec.format.row_bytes
        self._codec = codec
        self._rebuild = rebuild
        self._dtype = dtype

    def encode(self, hidden: Tensor) -> Tensor:
        """Layer inputs `[N, C]` as bytes UInt8[N, row_bytes]."""
        halves = hidden.view(len(hidden), 2, self._codec.format.num_kv_heads, self._codec.format.head_dim)
        return self._codec.encode(halves[:, 0], halves[:, 1])

    def rows(self, layer: int, encoded: Tensor, positions: Slots, codec: Codec) -> Tensor:
        """The rows UInt8[N, row_bytes] of tokens at these positions, made again in one product."""
        first, second = self._codec.decode(encoded)
        hidden = torch.stack((first, second), dim=1).view(len(encoded), -1).to(self._dtype)
        k, v = self._rebuild(layer, hidden, torch.from_numpy(positions).to(encoded.device, torch.int64))
        return codec.encode(k, v)
