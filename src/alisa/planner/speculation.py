"""When guessing ahead pays, and how far: one formula on what steps cost and how often guesses are right.

A step that tries k drafts of a sequence gives 1 + a + a^2 + ... + a^k tokens, where a is the chance that a draft is
what would have come (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192).
"""

from __future__ import annotations

from dataclasses import dataclass

GAIN = 1.05
"""How much more a step with drafts must promise than one without: estimates are noisy, and a wrong one costs."""

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
        return best if self.rate(acceptance, best) > GAIN / self.step_s else 0

    def rate(self, acceptance: float, count: int) -> float:
        """Tokens a second with so many drafts."""
        tokens = sum(acceptance**right for right in range(count + 1))
        return tokens / (self.step_s + count * (self.token_s + self.draft_s))


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
