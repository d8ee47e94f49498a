"""What running a request and restoring a preempted sequence cost, learnt from the steps so far."""

from __future__ import annotations

from dataclasses import dataclass

from alisa.outputs import StepRecord
from alisa.scheduler.request import Request

_FIRST_GUESS_BYTES_PER_S = 1e9
_FIRST_GUESS_S = 1e-3
"""Of a token."""


@dataclass(slots=True)
class MeasuredCosts:
    """What a request takes, and whether a sequence that has to make room had better be swapped or preempted.

    Swapped, it keeps its rows in a lower tier and loads what it selects when it is back; preempted, it loses them,
    reads its prompt again and feeds its own output once more. Both give the same tokens.
    """

    token_bytes: int
    """Bytes of one token's rows over all layers."""
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0
    moved_bytes: int = 0
    busy_s: float = 0.0

    def learn(self, record: StepRecord) -> None:
        """Take in a step; one that read from the prefix cache says nothing of what is computed."""
        if record.cached_tokens:
            return
        if record.prefill:
            self.prefill_tokens += record.num_tokens
            self.prefill_s += record.wall_s
        else:
            self.decode_steps += 1
            self.decode_s += record.wall_s
        self.moved_bytes += record.traffic.moved_bytes
        self.busy_s += record.traffic.busy_s

    def run_s(self, prompt_tokens: int, output_tokens: float) -> float:
        """Seconds to read so many tokens of a prompt and to say so many, in steps as long as those so far."""
        prefill_s = self.prefill_s / self.prefill_tokens if self.prefill_tokens else _FIRST_GUESS_S
        decode_s = self.decode_s / self.decode_steps if self.decode_steps else _FIRST_GUESS_S
        return prompt_tokens * prefill_s + output_tokens * decode_s

    def keeps_rows(self, request: Request) -> bool:
        """Whether loading its rows back is cheaper than computing them again."""
        return self._load_s(request.num_cached * self.token_bytes) <= self._recompute_s(request)

    def _recompute_s(self, request: Request) -> float:
        """Seconds to read its prompt again and feed its output once more."""
        prefill = self.prefill_s / max(self.prefill_tokens, 1) * request.prompt_len
        return prefill + self.decode_s / max(self.decode_steps, 1) * len(request.output_ids)

    def _load_s(self, num_bytes: int) -> float:
        """Seconds to move these bytes."""
        known = self.moved_bytes > 0 and self.busy_s > 0
        return num_bytes / (self.moved_bytes / self.busy_s if known else _FIRST_GUESS_BYTES_PER_S)
