"""The sequences of one cache: what transformers calls a batch, padded on the left, driven through the session.

Transformers counts padded tokens, the same for every sequence; the session knows real ones only:

    padded   0 ............ pads ............................ length
    real                    0 ............................... length - pads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.errors import AlisaError, InputError
from alisa.hf.observed import ObservedAttention
from alisa.hf.seam import AttentionRequest, NewRows, marked, scaled
from alisa.hf.sequences import Sequences
from alisa.scheduler.plan import ScheduledChunk


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence of the batch."""

    pads: int
    """Padded tokens before its first real one; all so far, while there is none."""
    req_idx: int | None = None
    """None: it has no real token yet."""


class _Step(NamedTuple):
    """How the tokens of a forward pass are handed to the session."""

    prefill: bool
    is_empty: bool
    """No real token is among them."""
    real: Tensor | None
    """Int64[N] into the B * T tokens: those that are handed over, no padding and no twins; None: all."""
    twins: Tensor | None = None
    """Int64[B]: of each sequence the first one that is the same; None: they all differ."""


class Batch:
    """Rows of a batch, its padding and its token ids.

    Args:
        sequences: those of the attached model.
        observed: how its layers attend.
    """

    def __init__(self, sequences: Sequences, observed: ObservedAttention) -> None:
        self._sequences = sequences
        self._observed = observed
        self._rows: list[_Row] = []
        self._length = 0
        self._new = 0
        """Tokens of the running forward pass."""
        self._layer = 0
        """The layer that comes next in it."""
        self._pending: NewRows | None = None
        self._step = _Step(prefill=True, is_empty=True, real=None)
        self._expected = 0
        self._ids: list[Tensor] | None = []
        self._next_ids: Tensor | None = None
        self._next_twins: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """B; 0 before the first tokens."""
        return len(self._rows)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self._observed.requests)

    @property
    def max_len(self) -> int:
        """Longest sequence."""
        return self._sequences.max_len

    @property
    def policy(self) -> str:
        """Its name."""
        return type(self._sequences.session.policy).__name__

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: where every step reads all, and nothing remembers what was read."""
        policy = self._sequences.session.policy
        return policy.reads(self.max_len) == (0, self.max_len)

    @property
    def token_ids(self) -> Tensor | None:
        """Int64[B, S] of the padded tokens so far; None: not known, since embeddings were given."""
        if self._ids is None:
            return None
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids, dim=1)]
        return self._ids[0] if self._ids else torch.empty(self.size, 0, dtype=torch.int64)

    def length(self, layer: int = 0) -> int:
        """Padded tokens that a layer has seen."""
        return self._length + (self._new if layer < self._layer else 0)

    def expect(self, num_tokens: int) -> None:
        """The prompt that is read now, in one forward pass or more, ends at this padded length."""
        self._expected = num_tokens

    def note(self, ids: Tensor | None, twins: Sequence[int] = ()) -> None:
        """The forward pass that comes is of these ids Int64[B, T]; None: not known.

        `twins`: of each sequence the first one for which the model is given the same; none: they may all differ. What
        begins a cache is then read once, and has its rows once.
        """
        self._next_ids, self._next_twins = ids, tuple(twins)

    # --- a forward pass ------------------------------------------------------------------------------------------

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The new keys and values of a layer `[B, G, T, D]`, marked as this batch's.

        Raises:
            InputError: an earlier forward pass broke off.
        """
        if layer != self._layer or self._pending is not None:
            raise InputError(
                "a forward pass with this cache broke off, so that its layers hold different tokens; make a new one."
            )
        self._pending = NewRows(self, layer, k, v)
        return marked(self._pending)

    def attend(self, layer: int, request: AttentionRequest, new: NewRows, query: Tensor, mask: Tensor | None) -> Tensor:
        """See `RowOwner`."""
        if new is not self._pending or request != self._observed.requests[layer]:
            raise InputError(
                f"layer {layer} attends otherwise than when the model was attached: {request}, then "
                f"{self._observed.requests[layer]}; attach it again after a change."
            )
        if layer == 0:
            self._begin(new, mask)
        self._pending, self._layer = None, layer + 1
        out = self._attend(layer, request, query, new.k, new.v)
        if layer == self.num_layers - 1:
            self._end()
        return out

    def _begin(self, new: NewRows, mask: Tensor | None) -> None:
        """The session has begun a step of the new tokens that are no padding."""
        batch_size, _, num_tokens, _ = new.k.shape
        if self.size not in (0, batch_size):
            raise InputError(
                f"the cache holds {self.size} sequences and the model was called with {batch_size}; reorder or repeat "
                "the cache with them, or make a new one."
            )
        total = self._length + num_tokens
        pads = self._pads(mask, batch_size, total)
        twins = self._next_twins if not self._rows and len(self._next_twins) == batch_size else range(batch_size)
        self._rows = self._rows or [_Row(0)] * batch_size
        for index in sorted({*twins}):  # one by one: where there is no room for all, those that are open are known
            self._rows[index] = self._opened(self._rows[index], pads[index], total)
        self._new = num_tokens
        is_decode = num_tokens == 1 and self._expected <= total and all(map(self._has_read_prompt, self._rows))
        if not is_decode:
            self._extend_prompts(max(total, self._expected))
        chunks = [
            ScheduledChunk(row.req_idx, self._sequences.length(row.req_idx), count)
            for row in self._rows
            if row.req_idx is not None and (count := total - max(row.pads, self._length))
        ]
        if chunks:
            self._sequences.begin(self, chunks, prefill=not is_decode)
        is_read = [twin == index for index, twin in enumerate(twins)]
        self._step = _Step(
            not is_decode,
            not chunks,
            self._real(num_tokens, total, is_read, new.k.device),
            None if all(is_read) else torch.tensor(twins, device=new.k.device),
        )

    def _end(self) -> None:
        self._length += self._new
        self._layer = self._new = 0
        if self._expected <= self._length:
            self._expected = 0
        if self._ids is not None and self._next_ids is not None:
            self._ids.append(self._next_ids)
        else:
            self._ids = None
        if not self._step.is_empty:
            self._sequences.end()
        if self._step.twins is not None:
            for index, twin in enumerate(self._step.twins.tolist()):
                if twin != index:
                    self._rows[index] = self._copy(self._rows[twin])

    def _attend(self, layer: int, request: AttentionRequest, query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Query `[B, H, T, D]`, k and v `[B, G, T, D]`; returns `[B, T, H, D]`, zeros where there is padding."""
        q, k, v = scaled(query, request), k.transpose(1, 2), v.transpose(1, 2)
        if not self._step.prefill:
            return self._sequences.attend(self, layer, q.contiguous(), k.contiguous(), v.contiguous())
        if self._step.is_empty:
            return torch.zeros_like(q)
        packed = [tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in (q, k, v)]
        real = self._step.real
        if real is None:
            return self._sequences.attend(self, layer, *packed).view(q.shape)
        attended = self._sequences.attend(self, layer, *(tensor.index_select(1, real) for tensor in packed))
        out = torch.zeros_like(packed[0]).index_copy_(1, real, attended).view(q.shape)
        return out if self._step.twins is None else out.index_select(0, self._step.twins)

    # --- padding and prompts -------------------------------------------------------------------------------------

    def _pads(self, mask: Tensor | None, batch_size: int, total: int) -> list[int]:
        """Padding before each sequence, by the mask of the call."""
        if mask is None:
            return [row.pads for row in self._rows] or [0] * batch_size
        if mask.dim() != 2 or mask.shape != (batch_size, total):
            raise InputError(
                f"the attention mask is {tuple(mask.shape)}, and alisa takes one number for each token so far, "
                f"({batch_size}, {total}): 0 for padding before a sequence, 1 for its tokens."
            )
        # A row without a token is all padding.
        pads = torch.where(mask.any(dim=1), mask.to(torch.int8).argmax(dim=1), total)
        if not torch.equal(mask.sum(dim=1), total - pads):
            raise InputError(
                "the attention mask has padding after or inside a sequence; pad on the left "
                "(tokenizer.padding_side = 'left')."
            )
        return pads.tolist()

    def _opened(self, row: _Row, pads: int, total: int) -> _Row:
        """The sequence, open as soon as it has a real token."""
        if row.req_idx is not None:
            if pads != row.pads:
                raise InputError(
                    f"the attention mask has {pads} tokens of padding before a sequence that had {row.pads} when the "
                    "cache was filled; pass the mask of all tokens so far."
                )
            return row
        if pads == total:
            return _Row(pads)
        return _Row(pads, self._sequences.open(max(total, self._expected) - pads))

    def _has_read_prompt(self, row: _Row) -> bool:
        return row.req_idx is not None and (
            0 < self._sequences.prompt_len(row.req_idx) <= self._sequences.length(row.req_idx)
        )

    def _extend_prompts(self, prompt_end: int) -> None:
        """What comes is read as a prompt, up to this padded length."""
        for row in self._rows:
            if row.req_idx is None or prompt_end - row.pads <= self._sequences.prompt_len(row.req_idx):
                continue
            policy = self._sequences.session.policy
            if policy.observation_window(prompt_end):
                raise InputError(
                    f"{self.policy} watches the attention of a prompt and cannot take one up again: several tokens "
                    "were given to a cache that has some; use policy='sketch', or a new cache with all tokens at once."
                )
            self._sequences.extend_prompt(row.req_idx, prompt_end - row.pads)

    def _real(self, num_tokens: int, total: int, is_read: Sequence[bool], device: torch.device) -> Tensor | None:
        """See `_Step`; of each sequence, whether it is handed over."""
        if all(is_read) and all(row.pads <= self._length for row in self._rows):
            return None
        firsts = [
            min(max(row.pads - self._length, 0), num_tokens) if read else num_tokens
            for row, read in zip(self._rows, is_read, strict=True)
        ]
        return torch.tensor(
            [index * num_tokens + token for index, first in enumerate(firsts) for token in range(first, num_tokens)],
            device=device,
        )

    # --- as a whole ----------------------------------------------------------------------------------------------

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i is what sequence `indices[i]` was; two that were the same one share its rows or have copies.

        Raises:
            CapacityError: there is no room for them.
        """
        if list(indices) == list(range(self.size)):
            return
        wanted = set(indices)
        self._sequences.drop(
            row.req_idx for index, row in enumerate(self._rows) if index not in wanted and row.req_idx is not None
        )
        sources = self._rows
        self._rows = [sources[index] for index in sorted(wanted)]  # all that is there, should a copy have no room
        copies = []
        taken: set[int] = set()
        for place, index in enumerate(indices):
            if index in taken:
                copies.append(place)
                self._rows.append(self._copy(sources[index]))
            taken.add(index)
        made = dict(zip(copies, self._rows[len(wanted) :], strict=True))
        self._rows = [made.get(place, sources[index]) for place, index in enumerate(indices)]
        if (ids := self.token_ids) is not None:
            self._ids = [ids.index_select(0, torch.tensor(indices, device=ids.device))]

    def crop(self, num_tokens: int) -> None:
        """The last `num_tokens` padded tokens are gone."""
        length = max(self._length - num_tokens, 0)
        rows = []
        for row in self._rows:
            if row.req_idx is None or length > row.pads:
                rows.append(replace(row, pads=min(row.pads, length)) if row.req_idx is None else row)
                if row.req_idx is not None:
                    self._sequences.truncate(row.req_idx, length - row.pads)
            else:
                self._sequences.drop([row.req_idx])
                rows.append(_Row(length))
        if (ids := self.token_ids) is not None:
            self._ids = [ids[:, :length]]
        self._rows, self._length = rows, length

    def copy(self) -> Batch:
        """Another batch with the same tokens, which goes on in its own way.

        Raises:
            CapacityError: there is no room for them.
        """
        twin = Batch(self._sequences, self._observed)
        try:
            for row in self._rows:
                twin._rows.append(self._copy(row))
        except AlisaError:
            twin.clear()
            raise
        twin._length, twin._expected = self._length, self._expected
        twin._ids = None if self._ids is None else list(self._ids)
        return twin

    def clear(self) -> None:
        """No sequences, no tokens."""
        self._sequences.drop(row.req_idx for row in self._rows if row.req_idx is not None)
        self._rows.clear()
        self._ids: list[Tensor] | None = []
        self._pending = None
        self._length = self._new = self._layer = self._expected = 0

    def _copy(self, row: _Row) -> _Row:
        return row if row.req_idx is None else replace(row, req_idx=self._sequences.fork(row.req_idx))
