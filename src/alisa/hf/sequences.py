"""The sequences of all caches of one attached model, in one session and so under one cap."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from torch import Tensor

from alisa.attention.kv_cache import KVCacheConfig
from alisa.attention.session import KVSession
from alisa.basis.row_basis import RowBasis
from alisa.config import format_bytes
from alisa.errors import AlisaError, CapacityError, InputError
from alisa.outputs import Medium
from alisa.scheduler.placement.base import SeqView, seq_view
from alisa.scheduler.plan import Opened, ScheduledChunk, StepPlan

_COPIED_TOKENS = 1024
"""Rows that have to be copied are in pieces of so many tokens: what is in between takes no more memory."""


class Sequences:
    """Opens, steps, copies and closes sequences.

    Args:
        session: cache, policy and kernels.
        config: what the cache was built as.
        basis: that rows are in; None: that of the model.
    """

    def __init__(self, session: KVSession, config: KVCacheConfig, basis: RowBasis | None) -> None:
        self.session = session
        self._attend = session.attend if basis is None else basis.around(session.attend)
        self.max_len = config.max_model_len
        self._config = config
        self._free = list(range(config.max_num_seqs - 1, -1, -1))
        self._lengths: dict[int, int] = {}
        self._prompt_lens: dict[int, int] = {}
        self._dropped: deque[int] = deque()
        self._num_steps = 0
        self._closed = False
        self._running: object = None

    def open(self, prompt_len: int) -> int:
        """Take in a sequence; returns its request index.

        Raises:
            CapacityError: too many are open.
        """
        self._close_dropped()
        if not self._free:
            raise CapacityError(
                f"{self._config.max_num_seqs} sequences are in alisa's caches, as many as there is room for; raise "
                "max_num_seqs of alisa.hf.attach, or let caches go that are not used any more."
            )
        req_idx = self._free.pop()
        self.session.open(Opened(req_idx, str(req_idx), self.max_len, prompt_len))
        self._lengths[req_idx], self._prompt_lens[req_idx] = 0, prompt_len
        return req_idx

    def drop(self, req_indices: Iterable[int]) -> None:
        """These sequences are not wanted any more. Callable at any time, in the middle of a step too."""
        self._dropped.extend(req_indices)

    def length(self, req_idx: int) -> int:
        """Tokens of a sequence."""
        return self._lengths[req_idx]

    def prompt_len(self, req_idx: int) -> int:
        """Tokens of it that are read as a prompt."""
        return self._prompt_lens[req_idx]

    def extend_prompt(self, req_idx: int, prompt_len: int) -> None:
        """Tokens up to here are read as a prompt."""
        self.session.extend_prompt(req_idx, prompt_len)
        self._prompt_lens[req_idx] = prompt_len

    def begin(self, owner: object, chunks: Sequence[ScheduledChunk], *, prefill: bool) -> None:
        """A step of these chunks is running, until `end`.

        Raises:
            CapacityError: they do not fit.
            InputError: the model is not attached any more.
        """
        if self._closed:
            raise InputError("this cache belongs to an alisa.hf.attach that is over; make one in a new context.")
        self._close_dropped()
        ends = {chunk.req_idx: chunk.end for chunk in chunks}
        shared = {chunk.req_idx: chunk.end for chunk in chunks if chunk.source is not None}
        if (longest := max(ends.values())) > self.max_len:
            raise CapacityError(
                f"A sequence has come to {longest} tokens, and alisa.hf.attach was made for {self.max_len}; raise its "
                "max_model_len as far as the model's positions go, or generate fewer tokens."
            )
        cache, limits = self.session.cache, self._config.limits
        views = [
            seq_view(
                req_idx,
                self._prompt_lens[req_idx],
                ends.get(req_idx, length),
                cache.bounds(req_idx),
                cache.rebuildable(req_idx),
                self._config.reads,
                active=req_idx in ends,
                num_shared=0 if limits.tiers else shared.get(req_idx, cache.num_shared(req_idx)),
            )
            for req_idx, length in self._lengths.items()
        ]
        has_room = limits.has_state_room(view.length for view in views)
        decision = self._config.placement.plan(views, limits) if has_room else None
        if decision is None:
            raise CapacityError(self._refusal(views, of_state=not has_room))
        self.session.begin(StepPlan(self._num_steps, decision.phase, prefill, tuple(chunks), decision.moves))
        self._num_steps += 1
        self._lengths |= ends
        self._running = owner

    def attend(self, owner: object, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer of the running step, see `KVSession.attend`."""
        if self._running is not owner:
            raise InputError(
                "another forward pass of this model began in the middle of this one; one thread at a time may use a "
                "model that is attached to alisa."
            )
        return self._attend(layer, q, k, v, k.new_empty(*k.shape[:2], 0))

    def end(self) -> None:
        """The step is over.

        Raises:
            AlisaError: rows were lost on the way to or from a lower tier.
        """
        self._running = None
        if failed := self.session.end().failed:
            raise AlisaError(f"rows of the KV cache were lost: {'; '.join(sorted(set(failed.values())))}.")

    def fork(self, source: int) -> int:
        """Another sequence of the same tokens, which shares their rows until some have to move.

        Returns:
            Its request index.

        Raises:
            CapacityError: there is no room for it.
        """
        length = self._lengths[source]
        req_idx = self.open(max(length, self._prompt_lens[source]))
        try:
            for start in range(0, length, _COPIED_TOKENS):
                chunk = ScheduledChunk(req_idx, start, min(_COPIED_TOKENS, length - start), source)
                self.begin(self, [chunk], prefill=True)
                self.session.copy_rows(chunk)
                self.end()
        except AlisaError:
            self.drop([req_idx])
            raise
        self.session.fork_state(source, req_idx)
        return req_idx

    def truncate(self, req_idx: int, length: int) -> None:
        """The sequence ends after so many tokens."""
        self.session.truncate(req_idx, length)
        self._lengths[req_idx] = length

    def nbytes(self, medium: Medium) -> int:
        """Bytes of rows in one medium now."""
        return self.session.cache.nbytes(medium)

    def close(self) -> None:
        """Every sequence is gone, with files and threads."""
        if not self._closed:
            self._closed = True
            self.session.cache.close()

    def _close_dropped(self) -> None:
        while self._dropped and not self._closed:
            req_idx = self._dropped.popleft()
            self.session.close(req_idx)
            del self._lengths[req_idx], self._prompt_lens[req_idx]
            self._free.append(req_idx)

    def _refusal(self, views: Sequence[SeqView], *, of_state: bool) -> str:
        """Why a step has no room: for rows, or for what the policy keeps of the tokens."""
        config = self._config
        num_tokens = sum(view.length for view in views)
        if of_state:
            return (
                f"{num_tokens} tokens are in alisa's caches, and {format_bytes(config.device_bytes)} leave room for "
                f"what {type(self.session.policy).__name__} keeps of {config.state_tokens}; raise kv_device_memory of "
                "alisa.hf.attach, or let caches go that are not used any more."
            )
        num_tokens -= sum(view.num_shared for view in views)
        caps = [f"{format_bytes(config.device_bytes)} on the device"]
        caps += [f"{format_bytes(config.host_bytes)} in main memory"] if config.host_bytes else []
        caps += [f"{format_bytes(config.disk_bytes)} on disk"] if config.disk_bytes else []
        return (
            f"{num_tokens} tokens in alisa's caches need {format_bytes(num_tokens * config.token_bytes)} of KV memory "
            f"({format_bytes(config.token_bytes)} a token) and the cap is {' and '.join(caps)}; raise kv_device_memory "
            "or kv_disk_memory of alisa.hf.attach, or let caches go that are not used any more."
        )
