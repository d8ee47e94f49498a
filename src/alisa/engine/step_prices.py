"""What decode steps with and without drafts take, measured while a batch runs.

Steps without drafts are the measure of all: some come first, and one now and then, so that drafts are compared with
what the batch does without them as it is now, not with what it did once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from alisa.planner.speculation import StepPrices, further_token_s

_FIRST_TOKEN = 0.3
"""A further token of a step, as a share of the first one, before any was measured (0.09 for a model of 135M alone, 0.5
for 16 sequences of 4096 tokens)."""

_PLAIN_FIRST, _PLAIN_EVERY = 3, 16
"""Steps without drafts that come first, of which the first one warms up, and after how many with drafts one comes."""

_WORTH_STEPS, _WORTH = 4, 0.98
"""Steps with drafts after which is looked at what they gave, and the share of a plain token's time that will do."""

_FIRST_REST, _LAST_REST = 16, 512
"""Steps without drafts after some that were not worth it; twice as many each time."""


class DraftedStep(NamedTuple):
    """A decode step as it was done."""

    num_sequences: int
    num_tokens: int
    """That were verified, drafts included."""
    num_accepted: int
    """Drafts that came."""
    wall_s: float
    """All of it."""
    num_passes: int
    """In which the policy made up drafts."""
    drafting_s: float
    """Time of these."""


@dataclass(slots=True)
class Worth:
    """Whether drafts of one kind made steps faster lately; where they did not, none are tried for a while."""

    cost: float = 0.0
    """Time for a token, as a share of that without drafts."""
    num_steps: int = 0
    rest: int = _FIRST_REST
    left: int = 0
    """Steps of the rest that are still to come."""

    def learn(self, cost: float) -> None:
        """Take in a step with such drafts."""
        self.cost = cost if self.num_steps == 0 else self.cost + 0.3 * (cost - self.cost)
        self.num_steps += 1
        if self.num_steps < _WORTH_STEPS:
            return
        if self.cost > _WORTH:
            self.left, self.rest = self.rest, min(2 * self.rest, _LAST_REST)
            self.num_steps = 0
        else:
            self.rest = _FIRST_REST


@dataclass(slots=True)
class BatchPrices:
    """Of batches of about one size."""

    plain_s: float = 0.0
    """A step without drafts."""
    token_s: float = 0.0
    """Each further token."""
    pass_ratio: float = 1.0
    """What a pass of drafts takes, against what is expected of it."""
    num_plain: int = 0
    num_passes: int = 0
    since_plain: int = 0
    from_text: Worth = field(default_factory=Worth)
    by_policy: Worth = field(default_factory=Worth)

    @property
    def wants_plain(self) -> bool:
        """Whether the next step is to have no drafts, to see what it takes."""
        return self.num_plain < _PLAIN_FIRST or self.since_plain >= _PLAIN_EVERY

    def of_sequence(self, num_sequences: int) -> StepPrices:
        """One sequence's share, without the price of making up drafts."""
        return StepPrices(self.plain_s / num_sequences, self.token_s)

    def learn(self, step: DraftedStep, draft_share: float) -> None:
        """Take in a step; a pass of drafts was expected to take this share of a plain step."""
        further = step.num_tokens - step.num_sequences
        for worth in (self.from_text, self.by_policy):
            worth.left = max(worth.left - 1, 0)
        if not further and not step.num_passes:
            self._learn_plain(step)
        elif self.plain_s:
            self._learn_drafted(step, further, draft_share)

    def _learn_plain(self, step: DraftedStep) -> None:
        self.num_plain += 1
        self.since_plain = 0
        # Nobody knows what a step with several tokens takes before there was one.
        is_first = self.num_plain <= 2
        self.plain_s = step.wall_s if is_first else self.plain_s + 0.3 * (step.wall_s - self.plain_s)
        if not self.token_s or is_first:
            self.token_s = _FIRST_TOKEN * self.plain_s / step.num_sequences

    def _learn_drafted(self, step: DraftedStep, further: int, draft_share: float) -> None:
        self.since_plain += 1
        each_s = self.plain_s / step.num_sequences
        if further:
            measured = (step.wall_s - step.drafting_s - self.plain_s) / further
            self.token_s += 0.4 * (further_token_s(measured, each_s) - self.token_s)
        if step.num_passes and draft_share:
            measured = step.drafting_s / step.num_passes / (self.plain_s * draft_share)
            self.pass_ratio += (0.4 if self.num_passes else 1.0) * (measured - self.pass_ratio)
            self.num_passes += step.num_passes
        worth = self.by_policy if step.num_passes else self.from_text
        worth.learn(step.wall_s / (step.num_sequences + step.num_accepted) / each_s)
