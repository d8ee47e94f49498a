"""When guessing ahead pays, and how far: one formula on what steps cost and how often guesses are right.

A step that tries k drafts of a sequence gives 1 + a + a^2 + ... + a^k tokens, where a is the chance that a draft is
what would have come (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DraftSource = Literal["policy", "text"]
"""Who makes drafts up: the policy, in exact mode, or what the text said before (prompt lookup)."""

MEASURED_ACCEPTANCE: Mapping[DraftSource, float] = MappingProxyType({"policy": 0.87, "text": 0.08})
"""The chance that a draft comes, from benchmarks/results/speculation.jsonl (SmolLM2).

policy: sketch at sparsity 0.9 with 16 prompts of 4096 tokens. text: prose, where a step gave 1.09 tokens; most places
have no draft there, and count as if theirs had been wrong. Texts that are copied gave 2.6 to 5.7, as 0.62 to 0.88 do.
"""

GAIN = 1.05
"""How much more a step with drafts must promise than one without: estimates are noisy, and a wrong one costs."""

_LEAST_TOKEN, _MOST_TOKEN = 0.03, 2.0
"""A further token of a step, as a share of the first one: no figure goes below the one, for a token that noise makes
free would be tried without end, and none above the other."""

MEMORY_PER_BELOW = 40.0
"""A row below the device takes about as long as this many on it: rows of a kilobyte came from disk at 0.3 GB/s and from
memory at 10 to 20 (SmolLM2 on a Xeon of two cores)."""


@dataclass(frozen=True, slots=True)
class StepPrices:
    """Seconds of a decode step, for one sequence of the batch: its share of what all need once, and what is its own."""

    step_s: float
    """With one token."""
    token_s: float
    """Each further token that is verified in the same step."""
    draft_s: float = 0.0
    """Making up one draft; 0 where it comes from the text itself."""

    def draft_length(self, acceptance: float, most: int) -> int:
        """Drafts that give the most tokens a second; 0 where none are better by enough.

        Args:
            acceptance: the chance that a draft is right, where those before it were.
            most: of drafts.
        """
        best = max(range(most + 1), key=lambda count: self.rate(acceptance, count))
        return best if self.pays(acceptance, best) else 0

    def pays(self, acceptance: float, count: int) -> bool:
        """Whether so many drafts promise enough more tokens a second than none."""
        return self.rate(acceptance, count) > GAIN / self.step_s

    def rate(self, acceptance: float, count: int) -> float:
        """Tokens a second with so many drafts."""
        return tokens_of_step(acceptance, count) / (self.step_s + count * (self.token_s + self.draft_s))


def further_token_s(found_s: float, first_s: float) -> float:
    """What a further token of a step is taken to cost, where so much was found, against what the first one does."""
    return max(_LEAST_TOKEN * first_s, min(found_s, _MOST_TOKEN * first_s))


def tokens_of_step(acceptance: float, count: int) -> float:
    """Tokens that a step with so many drafts gives on average."""
    return sum(acceptance**right for right in range(count + 1))


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """How a run guesses ahead, as far as it is planned."""

    source: DraftSource
    acceptance: float
    """The chance that a draft is right, where those before it were: 0 to 1."""
    most: int
    """Drafts of a sequence in one step."""


@dataclass(frozen=True, slots=True)
class DraftWork:
    """What a policy reads to make up a token, against what dense attention reads to say one; for a whole model."""

    weight_bytes: int
    token_bytes: int
    """Of one token's rows."""
    read_share: float
    """Share of the rows that the policy reads."""
    state_share: float
    """Bytes of its own state that it reads for each token, as a share of the token's rows."""
    churn: float
    """Share of what it reads that it did not read the step before; only these are not on the device."""

    def share(self, device_tokens: int, below_tokens: int) -> float:
        """Time of a draft as a share of a dense step's, as far as both wait for memory.

        Near 1 where weights outweigh rows: then drafts cannot pay, however right they are.

        Args:
            device_tokens: cached tokens of all sequences whose rows are on the device.
            below_tokens: those in lower tiers.
        """
        all_tokens, below = device_tokens + below_tokens, MEMORY_PER_BELOW * below_tokens
        drafting = (self.read_share + self.state_share) * all_tokens + self.churn * self.read_share * below
        reading = device_tokens + below
        return (self.weight_bytes + self.token_bytes * drafting) / (self.weight_bytes + self.token_bytes * reading)
