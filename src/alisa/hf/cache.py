"""The cache that a model in transformers is given: it keeps rows where alisa keeps them, and no tensors."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from transformers import Cache

from alisa.errors import InputError
from alisa.hf.batch import Batch


class AlisaCache(Cache):
    """KV rows of one batch; made by the cache factory of `alisa.hf.attach`.

    It is a `transformers.Cache`: pass it as `past_key_values`, reorder it, copy it with `copy.deepcopy`. Its rows are
    free when it is gone.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__(layers=[])
        self.batch = batch
        """The sequences."""
        weakref.finalize(self, batch.clear)

    def __repr__(self) -> str:
        return f"AlisaCache({self.batch.size} sequences of {self.batch.length()} tokens, {self.batch.policy})"

    def __len__(self) -> int:
        return self.batch.num_layers

    def __deepcopy__(self, memo: dict[int, Any]) -> AlisaCache:
        return AlisaCache(self.batch.copy())

    def __reduce__(self) -> str:
        raise InputError("the rows of an alisa cache cannot be pickled; copy it with copy.deepcopy in this process.")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """New keys and values `[B, G, T, D]` of a layer; returns these alone, marked for the attention function."""
        return self.batch.update(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Padded tokens so far."""
        return self.batch.length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """All tokens so far and the new ones, from the first; what is read of them is the policy's business."""
        return self.batch.length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Longest sequence."""
        return self.batch.max_len

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i is what sequence `beam_idx[i]` was; two that were the same one share its rows or have copies."""
        self.batch.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences, in this order."""
        self.batch.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times, its copies next to it."""
        self.batch.select([index for index in range(self.batch.size) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """The last `-tokens_to_remove` tokens are gone.

        Raises:
            InputError: the policy is sparse, so that its choices cannot be taken back.
            ValueError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, or 0, and was given {tokens_to_remove}")
        if tokens_to_remove:
            self._check_croppable()
            self.batch.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Called before assisted decoding.

        Raises:
            InputError: the policy is sparse.
        """
        self._check_croppable()

    def reset(self) -> None:
        """No sequences, no tokens."""
        self.batch.clear()

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first tokens."""
        return self.batch.size or -1

    @property
    def is_initialized(self) -> bool:
        """Whether it has tokens."""
        return self.batch.size > 0

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return self.batch.is_croppable

    def _check_croppable(self) -> None:
        if not self.batch.is_croppable:
            raise InputError(
                f"assisted decoding takes tokens back, and what {self.batch.policy} has chosen by them stays; use "
                "policy='dense', or no assistant and no prompt lookup."
            )


def refuse_other_prompt(cache: AlisaCache, ids: Tensor) -> None:
    """Raise InputError where a cache has other tokens than the prompt Int64[B, S] that is to be continued with it."""
    known = cache.batch.token_ids
    if known is None or not cache.batch.size:
        return
    length = known.shape[1]
    if ids.shape[0] != known.shape[0]:
        raise InputError(
            f"the cache holds {known.shape[0]} sequences and the prompt has {ids.shape[0]}; make a new cache, or "
            "repeat this one (batch_repeat_interleave)."
        )
    if ids.shape[1] <= length or not ids[:, :length].to(known.device).equal(known):
        raise InputError(
            f"the cache holds {length} tokens of another text than the prompt of {ids.shape[1]} tokens, which would "
            "go on with it; make a new cache for each prompt, or pass the whole conversation."
        )
