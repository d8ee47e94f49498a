"""What comes out of a run, as plain values without torch: text as it grows, finished requests, totals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alisa.types import Traffic

FinishReason = Literal["length", "stop", "eos", "error"]
"""`length`: all tokens asked for, or no position left; `stop`: a stop string or id; `eos`: the model's own end token;
`error`: rows of the KV cache were lost, the output up to there is sound."""


@dataclass(frozen=True, slots=True)
class RequestReport:
    """What one request cost. Times in seconds."""

    prompt_tokens: int
    output_tokens: int
    queue_s: float
    """From submission to admission."""
    prefill_s: float
    """From admission to the first token."""
    first_token_s: float
    """From submission to the first token."""
    decode_s: float
    """From the first token to the last."""
    tokens_attended: int
    """Cached tokens that decode attention read, summed over steps and layers."""
    tokens_dense: int
    """What dense attention would have read."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request."""

    index: int
    """Place of the prompt in the list that was given."""
    prompt: str
    prompt_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    report: RequestReport
    error: str = ""
    """What went wrong, when that is why it ended."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a running request."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Totals of one `stream` or `generate`."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    wall_s: float
    prefill_s: float
    """Time of prefill steps; the first token of each request comes from them."""
    decode_s: float
    """Time of decode steps; the parts below divide it."""
    linear_s: float
    attention_s: float
    selection_s: float
    transfer_s: float
    sampling_s: float
    other_s: float
    decode_tokens: int
    """Tokens that decode steps gave."""
    kv_cap_bytes: int
    kv_peak_bytes: int
    """Of the device; `disk_` and `host_` are the lower tiers, remnants included."""
    host_cap_bytes: int
    host_peak_bytes: int
    disk_cap_bytes: int
    disk_peak_bytes: int
    phase_steps: dict[str, int]
    """Decode steps by phase."""
    num_preempted: int
    """How often a sequence had to give way."""
    traffic: Traffic
    policy_state_bytes: int
    """Memory of the selection policy, not part of the cap."""
    tokens_attended: int
    tokens_dense: int
    peak_rss_bytes: int
