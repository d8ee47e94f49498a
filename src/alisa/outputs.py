"""What comes out of a run, as plain values without torch: text as it grows, finished requests, totals."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal


class Medium(StrEnum):
    """Where a row lies. On a CPU-only machine DEVICE is a capped pool in RAM and HOST is absent."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Phase(StrEnum):
    """The three phases of token-level scheduling (ALISA, section 5)."""

    DEVICE = "device"
    DEVICE_HOST = "device-host"
    RECOMPUTE = "recompute"


FinishReason = Literal["length", "stop", "eos", "error", "abort"]
"""`length`: all tokens asked for, or no position left; `stop`: a stop string or id; `eos`: the model's own end token;
`error`: rows of the KV cache were lost, or the logits were no numbers; the output up to there is sound; `abort`: the
caller did not want the rest."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the KV store moved and looked up in one step; a row is one token of one layer."""

    fetched_rows: int = 0
    """Read from a lower tier."""
    stored_rows: int = 0
    """Written to a lower tier, hidden states included."""
    deleted_rows: int = 0
    rebuilt_rows: int = 0
    """Rebuilt from hidden states because a layer wanted to read them."""
    moved_bytes: int = 0
    """Between the device and lower tiers, both ways, hidden states included."""
    lookups: int = 0
    """Selected rows that have left the device's own part: each is in the hot cache or must be brought."""
    hits: int = 0
    """Those of them that the hot cache held."""
    wait_s: float = 0.0
    """Time the model stood still for rows that were on their way."""
    busy_s: float = 0.0
    """Time that transfers took in their own threads; what is not waited for is hidden by the arithmetic."""

    @property
    def hidden_share(self) -> float:
        """Share of the transfer time that the model did not wait for; 1 when nothing was moved."""
        return max(0.0, 1 - self.wait_s / self.busy_s) if self.busy_s > 0 else 1.0

    @property
    def hit_rate(self) -> float:
        """Share of the look-ups that the hot cache answered; 1 when there were none."""
        return self.hits / self.lookups if self.lookups else 1.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, measured. Times are host seconds; the parts add up to `wall_s`."""

    step: int
    phase: Phase
    prefill: bool
    num_sequences: int
    num_tokens: int
    tokens_attended: int
    """Cached tokens read by decode attention, summed over sequences and layers."""
    tokens_dense: int
    """What dense attention would have read, counted the same way."""
    kv_rows: int
    """Tokens that are cached after the step, wherever their rows lie, deleted ones not counted; rows that sequences
    share count once."""
    kv_bytes: int
    """Bytes of the device pool in use after the step, over all layers, the hot cache included."""
    host_bytes: int
    disk_bytes: int
    """Bytes in use in the lower tiers, hidden states included."""
    deleted_tokens: int
    """Tokens of running sequences whose rows are deleted."""
    num_preempted: int
    """Sequences that were swapped, or lost their rows, before this step."""
    traffic: Traffic
    linear_s: float
    """The decoder without the attend seam: linear layers, norms, activations, embedding and logits."""
    attention_s: float
    """Writing new rows and attending over rows."""
    selection_s: float
    """Choosing the tokens to read and keeping the scores that choose them."""
    transfer_s: float
    """Looking rows up, asking for them, and waiting for those that were not there in time."""
    sampling_s: float
    other_s: float
    wall_s: float
    state_bytes: int = 0
    """Bytes of the selection policy's state after the step; they are under the device cap too."""
    cached_tokens: int = 0
    """Prompt tokens whose K and V came from the prefix cache in this step; the model computed nothing in it."""
    drafted_tokens: int = 0
    """Of `num_tokens`, those that were tried before it was known whether they would come."""
    accepted_tokens: int = 0
    """Those of them that came."""
    prefix_bytes: int = 0
    """Bytes of the prefix cache after the step; under the device cap too on a CPU, under the host's on a GPU."""
    covered: float | None = None
    """With a coverage: the part of the attention weight that the tokens read have, by the sketch."""


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
    cached_tokens: int = 0
    """Tokens of the prompt whose K and V came from the prefix cache."""
    drafted_tokens: int = 0
    """Tokens that were tried before it was known whether they would come."""
    accepted_tokens: int = 0
    """Those of them that came."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was in its place. Log probabilities in nats, not below -9999."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens for this place and their log probabilities, the likeliest first."""


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
    request_id: str = ""
    """Its name in the engine."""
    sample: int = 0
    """Which of the `n` texts of its prompt this is."""
    stop_reason: str | int | None = None
    """The stop string or the token id of `stop_ids` that ended it."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each output token; None: not asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each token of the prompt from the second on; None: not asked for."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What a step added to a running request."""

    index: int
    """Place of the prompt in the list that was given."""
    text: str
    """Text that became certain; it may be empty, since a stop string or a character may not be complete yet."""
    request_id: str = ""
    token_ids: tuple[int, ...] = ()
    """The new tokens."""
    sample: int = 0
    """Which of the `n` texts of its prompt grows."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each new token, where they are asked for."""


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
    """Of the device; `disk_` and `host_` are the lower tiers, hidden states included."""
    host_cap_bytes: int
    host_peak_bytes: int
    disk_cap_bytes: int
    disk_peak_bytes: int
    phase_steps: dict[str, int]
    """Decode steps by phase."""
    num_preempted: int
    """How often a sequence was swapped, or lost its rows."""
    traffic: Traffic
    policy_state_bytes: int
    """Most memory that the selection policy held; part of the device cap, in addition to `kv_peak_bytes`."""
    tokens_attended: int
    tokens_dense: int
    peak_rss_bytes: int
    cached_tokens: int = 0
    """Prompt tokens whose K and V came from the prefix cache, a prompt that was read again included."""
    prefix_cap_bytes: int = 0
    """Memory that the prefix cache may take, in addition to the caps above; 0 without one."""
    prefix_peak_bytes: int = 0
    decode_sequences: int = 0
    """Sequences of all decode steps; `decode_tokens` by it is how many tokens a step gives to each."""
    drafted_tokens: int = 0
    """As in `StepRecord`; so is the next one."""
    accepted_tokens: int = 0
    covered: float | None = None
    """As in `StepRecord`, over all decode steps."""
