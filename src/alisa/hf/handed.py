"""A forward pass of transformers that asks a function of ours for its attention, and caches nothing."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from alisa.hf.seam import AttentionRequest, MarkingCache, NewRows, scaled
from alisa.kernels.base import Attend


class HandedCache(MarkingCache):
    """Hands queries, keys and values of a pass to `attend`, and keeps nothing."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def attend(self, layer: int, request: AttentionRequest, new: NewRows, query: Tensor, mask: Tensor | None) -> Tensor:
        """See `RowOwner`."""
        q, k, v = scaled(query, request), new.k.transpose(1, 2), new.v.transpose(1, 2)
        hidden = k.new_empty(*k.shape[:2], 0)
        return self._attend(layer, q.contiguous(), k.contiguous(), v.contiguous(), hidden)


def handed_forward(model: PreTrainedModel, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Logits `[B, T, V]` of tokens and positions Int64[B, T], by a model that calls our attention function."""
    cache = HandedCache(attend)
    return model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits
