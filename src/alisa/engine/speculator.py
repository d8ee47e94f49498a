"""How many tokens a step tries of each request before it is known whether they come, and which.

A draft changes no token: each is chosen from the logits of its place as it would be without drafts, and rows of drafts
that did not come are taken back. So what is decided here decides only how long it takes, and may follow the clock.

Drafts come from the text itself (`alisa.engine.lookup`); in exact mode the selection policy makes them up where the
text has none (`alisa.engine.drafter`). How far to guess follows from what was measured: how often the guesses of this
request came true, and what steps cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from alisa.engine.lookup import TokenText
from alisa.planner.speculation import StepPrices
from alisa.scheduler.request import Request

BY_POLICY = 0
"""Instead of a number of equal tokens: the source of a draft that no match gave."""

_FIRST_PAUSE, _LAST_PAUSE = 8, 512
"""Steps after which drafts that did not pay are tried again; twice as many each time."""

_PROBE = 2
"""Drafts of such a try."""


_FIRST_TOKEN, _LEAST_TOKEN = 0.1, 0.03
"""A further token of a step, as a share of the first one: what is thought before any was measured (0.09 for a model of
135M, batch 1), and what no measurement goes below, for one that noise makes free would be tried without end."""


class DraftedStep(NamedTuple):
    """A decode step as it was done."""

    num_sequences: int
    num_tokens: int
    """That were verified, drafts included."""
    wall_s: float
    """All of it."""
    num_passes: int
    """In which the policy made up drafts."""
    drafting_s: float
    """Time of these."""


class Speculator(Protocol):
    """Sets `Request.num_drafts` and `draft_ids`."""

    @property
    def most(self) -> int:
        """Drafts of a request in one step."""
        ...

    def propose(self, requests: Iterable[Request]) -> None:
        """Before a step: drafts for those of the running requests that could use them, none for the others."""
        ...

    def learn(self, requests: Iterable[tuple[Request, int, int]], step: DraftedStep) -> None:
        """After a decode step: of each request, how many drafts were tried and how many came."""
        ...

    def forget(self, request_id: str) -> None:
        """The request is over."""
        ...


class NoDrafts:
    """One token at a time."""

    most = 0

    def propose(self, requests: Iterable[Request]) -> None:
        """See `Speculator`."""

    def learn(self, requests: Iterable[tuple[Request, int, int]], step: DraftedStep) -> None:
        """See `Speculator`."""

    def forget(self, request_id: str) -> None:
        """See `Speculator`."""


@dataclass(slots=True)
class Acceptance:
    """How often drafts of one source came true lately; before any did, as if some had."""

    accepted: float
    tried: float
    pause: int = _FIRST_PAUSE
    waited: int = 0

    @property
    def rate(self) -> float:
        """The chance that a draft comes true, where those before it did."""
        return self.accepted / self.tried

    def learn(self, drafted: int, accepted: int) -> None:
        """What came after the first wrong draft says nothing."""
        self.accepted = 0.9 * self.accepted + accepted
        self.tried = 0.9 * self.tried + min(accepted + 1, drafted)

    def length(self, prices: StepPrices, most: int) -> int:
        """Drafts to try; now and then some where none seem to pay, for that may have changed."""
        found = prices.draft_length(self.rate, most)
        if found:
            self.pause, self.waited = _FIRST_PAUSE, 0
            return found
        self.waited += 1
        if self.waited < self.pause or not prices.draft_length(1.0, most):
            return 0
        self.pause, self.waited = min(2 * self.pause, _LAST_PAUSE), 0
        return min(_PROBE, most)


@dataclass(slots=True)
class MeasuredPrices:
    """What decode steps cost, learnt from those so far: a line through their times (normalised least mean squares)."""

    step_s: float = 0.0
    """One token of every sequence."""
    token_s: float = 0.0
    """Each further token."""
    draft_ratio: float = 1.0
    """What a pass of drafts took, against what was expected of it."""
    has_drafted: bool = False

    def learn(self, step: DraftedStep, draft_share: float) -> None:
        """Take in a step; a pass of drafts was expected to take this share of a plain step."""
        further, seconds = step.num_tokens - step.num_sequences, step.wall_s - step.drafting_s
        if not self.step_s:
            self.step_s = seconds / (1 + _FIRST_TOKEN * further / step.num_sequences)
            self.token_s = _FIRST_TOKEN * self.step_s / step.num_sequences
        scaled = further / step.num_sequences
        expected = self.step_s + self.token_s * further
        # A step that another program held up is not to count for much.
        error = max(-0.5 * expected, min(0.5 * expected, seconds - expected)) / (1 + scaled * scaled)
        self.step_s = max(self.step_s + 0.2 * error, 0.1 * seconds)
        each_s = self.step_s / step.num_sequences
        self.token_s = max(self.token_s + 0.2 * error * scaled / step.num_sequences, _LEAST_TOKEN * each_s)
        if step.num_passes and draft_share:
            measured = step.drafting_s / step.num_passes / (self.step_s * draft_share)
            rate = 0.2 if self.has_drafted else 1.0
            self.draft_ratio += rate * (min(measured, 2 * self.draft_ratio) - self.draft_ratio)
            self.has_drafted = True


@dataclass(slots=True)
class _Sequence:
    """What is known of the drafts of one request."""

    text: TokenText = field(default_factory=TokenText)
    sources: dict[int, Acceptance] = field(default_factory=dict)
    source: int = BY_POLICY
    """Of the drafts that were proposed last."""

    def acceptance(self, source: int) -> Acceptance:
        """By source: `BY_POLICY`, or how many tokens were equal."""
        return self.sources.setdefault(source, Acceptance(1.6, 2.0) if source == BY_POLICY else Acceptance(1.0, 2.0))


class MeasuredSpeculator:
    """Drafts as far as they pay.

    Args:
        most: drafts of a request in one step.
        draft_share: what a pass in which the policy makes up a draft for every sequence takes now, as a share of a
            plain step; None: drafts come from the text alone.
    """

    def __init__(self, most: int, draft_share: Callable[[], float] | None = None) -> None:
        self._most = most
        self._draft_share = draft_share
        self._share = 0.0
        self._prices = MeasuredPrices()
        self._sequences: dict[str, _Sequence] = {}

    @property
    def most(self) -> int:
        """See `Speculator`."""
        return self._most

    def propose(self, requests: Iterable[Request]) -> None:
        """See `Speculator`."""
        requests = list(requests)
        self._share = 0.0 if self._draft_share is None else self._draft_share()
        for request in requests:
            request.num_drafts = 0
            request.draft_ids = list[int]()
            left = request.max_new_tokens - len(request.output_ids)
            most = min(self._most, left - 1)
            if most > 0 and self._prices.step_s and request.num_cached == len(request.token_ids) - 1:
                self._propose(request, most, len(requests))

    def learn(self, requests: Iterable[tuple[Request, int, int]], step: DraftedStep) -> None:
        """See `Speculator`."""
        for request, drafted, accepted in requests:
            if drafted:
                sequence = self._sequences[request.request_id]
                sequence.acceptance(sequence.source).learn(drafted, accepted)
        self._prices.learn(step, self._share)

    def forget(self, request_id: str) -> None:
        """See `Speculator`."""
        self._sequences.pop(request_id, None)

    def _propose(self, request: Request, most: int, num_sequences: int) -> None:
        sequence = self._sequences.setdefault(request.request_id, _Sequence())
        sequence.text.extend(request.token_ids)
        step_s, token_s = self._prices.step_s / num_sequences, self._prices.token_s
        sources: dict[int, StepPrices] = {}
        match = sequence.text.match()
        if match is not None:
            sources[match.num_equal] = StepPrices(step_s, token_s)
        if self._draft_share is not None:
            sources[BY_POLICY] = StepPrices(step_s, token_s, step_s * self._share * self._prices.draft_ratio)
        best_rate = 0.0
        for source, prices in sources.items():
            acceptance = sequence.acceptance(source)
            count = acceptance.length(prices, most)
            if count and (rate := prices.rate(acceptance.rate, count)) > best_rate:
                best_rate, sequence.source, request.num_drafts = rate, source, count
        if match is not None and sequence.source != BY_POLICY:
            request.draft_ids = sequence.text.following(match.start, request.num_drafts)
