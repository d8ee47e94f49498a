"""How many tokens a step tries of each request before it is known whether they come, and which.

A draft changes no token: each is chosen from the logits of its place as it would be without drafts, and rows of drafts
that did not come are taken back. So what is decided here decides only how long it takes, and may follow the clock.

Drafts come from the text itself (`alisa.engine.lookup`); in exact mode the selection policy makes them up where the
text has none (`alisa.engine.drafter`). How far to guess follows from what was measured: how often the guesses of this
request came true, and what steps cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from alisa.engine.lookup import Match, TokenText
from alisa.engine.step_prices import BatchPrices, DraftedStep
from alisa.planner.speculation import StepPrices
from alisa.scheduler.request import Request

BY_POLICY = 0
"""Instead of a number of equal tokens: the source of a draft that no match gave."""

_FIRST_PAUSE, _LAST_PAUSE = 8, 512
"""Steps after which drafts that did not pay are tried again; twice as many each time."""

_PROBE = 2
"""Drafts of such a try."""


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
class _Sequence:
    """What is known of the drafts of one request."""

    text: TokenText = field(default_factory=TokenText)
    sources: dict[int, Acceptance] = field(default_factory=dict)
    source: int = BY_POLICY
    """Of the drafts that were proposed last."""

    def acceptance(self, source: int) -> Acceptance:
        """By source: `BY_POLICY`, or how many tokens were equal."""
        return self.sources.setdefault(source, Acceptance(1.6, 2.0) if source == BY_POLICY else Acceptance(1.0, 2.0))


class _Turn(NamedTuple):
    """A request that could use drafts in the next step."""

    request: Request
    sequence: _Sequence
    match: Match | None
    most: int

    def drafts(self, source: int, prices: StepPrices) -> int:
        """As many as seem to pay."""
        return prices.draft_length(self.sequence.acceptance(source).rate, self.most)


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
        self._prices: dict[int, BatchPrices] = {}  # by the bits of the number of sequences
        self._sequences: dict[str, _Sequence] = {}

    @property
    def most(self) -> int:
        """See `Speculator`."""
        return self._most

    def propose(self, requests: Iterable[Request]) -> None:
        """See `Speculator`."""
        requests = list(requests)
        self._share = 0.0 if self._draft_share is None else self._draft_share()
        prices = self._prices_of(len(requests))
        turns: list[_Turn] = []
        for request in requests:
            request.num_drafts = 0
            request.draft_ids = list[int]()
            most = min(self._most, request.max_new_tokens - len(request.output_ids) - 1)
            if most > 0 and not prices.wants_plain and request.num_cached == len(request.token_ids) - 1:
                turns.append(self._turn(request, most, prices))
        if turns:
            pass_s = prices.plain_s * self._share * prices.pass_ratio
            self._draft(turns, prices.of_sequence(len(requests)), pass_s, by_policy=not prices.by_policy.left)

    def learn(self, requests: Iterable[tuple[Request, int, int]], step: DraftedStep) -> None:
        """See `Speculator`."""
        for request, drafted, accepted in requests:
            if drafted:
                sequence = self._sequences[request.request_id]
                sequence.acceptance(sequence.source).learn(drafted, accepted)
        self._prices_of(step.num_sequences).learn(step, self._share)

    def forget(self, request_id: str) -> None:
        """See `Speculator`."""
        self._sequences.pop(request_id, None)

    def _prices_of(self, num_sequences: int) -> BatchPrices:
        return self._prices.setdefault(num_sequences.bit_length(), BatchPrices())

    def _turn(self, request: Request, most: int, prices: BatchPrices) -> _Turn:
        sequence = self._sequences.setdefault(request.request_id, _Sequence())
        sequence.text.extend(request.token_ids)
        return _Turn(request, sequence, None if prices.from_text.left else sequence.text.match(), most)

    def _draft(self, turns: Sequence[_Turn], plain: StepPrices, pass_s: float, *, by_policy: bool) -> None:
        """Each gets the drafts that promise most, if any do: from its text, or from passes that are shared."""
        by_policy = by_policy and self._draft_share is not None
        drafting = len(turns)
        if by_policy:
            shared = replace(plain, draft_s=pass_s / drafting)
            drafting = sum(bool(turn.drafts(BY_POLICY, shared)) for turn in turns)
        for turn in turns:
            sources = {} if turn.match is None else {turn.match.num_equal: plain}
            if by_policy:
                sources[BY_POLICY] = replace(plain, draft_s=pass_s / max(drafting, 1))
            best_rate = 0.0
            for source, prices in sources.items():
                acceptance = turn.sequence.acceptance(source)
                count = acceptance.length(prices, turn.most)
                if count and (rate := prices.rate(acceptance.rate, count)) > best_rate:
                    best_rate, turn.sequence.source, turn.request.num_drafts = rate, source, count
            if turn.match is not None and turn.sequence.source != BY_POLICY:
                turn.request.draft_ids = turn.sequence.text.following(turn.match.start, turn.request.num_drafts)
