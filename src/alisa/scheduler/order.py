"""Which of the waiting requests of one priority is admitted next. The order never changes a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol

from alisa.scheduler.lengths import LengthPredictor
from alisa.scheduler.prefix import BLOCK_TOKENS, PrefixView
from alisa.scheduler.request import Request

NEUTRAL_REQUESTS = 100
"""Until so many have ended, lengths are not guessed: the first to come is the first to run."""


class QueueOrder(Protocol):
    """Chooses, and learns from what has ended."""

    def choose(self, waiting: Sequence[Request]) -> Request:
        """The next one of these, which are in the order of their arrival; there is at least one."""
        ...

    def learn(self, request: Request) -> None:
        """This request has got its last token."""
        ...


class RunCosts(Protocol):
    """What a request takes when it runs."""

    def run_s(self, prompt_tokens: int, output_tokens: float) -> float:
        """Seconds to read so many tokens of a prompt and to say so many; above 0."""
        ...


class FirstCome:
    """The first to come is the first to run."""

    def choose(self, waiting: Sequence[Request]) -> Request:
        """See `QueueOrder.choose`."""
        return waiting[0]

    def learn(self, request: Request) -> None:
        """Nothing to learn."""


class HighestResponseRatio:
    """The one whose waiting is longest against what it takes: (waited + cost) / cost.

    Short requests go before long ones that have waited as long, and every request overtakes all that come later in the
    end, whatever it takes. The cost is that of the tokens that the prefix cache does not know and of the predicted
    length of the output. A predictor that says the same for all leaves the order of arrival.

    Args:
        costs: seconds for tokens.
        prefix: what is known of prompts; None: nothing.
        now: the clock of `Request.arrival_s`.
    """

    def __init__(
        self, costs: RunCosts, prefix: PrefixView | None = None, now: Callable[[], float] = perf_counter
    ) -> None:
        self._costs = costs
        self._prefix = prefix
        self._now = now
        self._predictor = LengthPredictor()

    def choose(self, waiting: Sequence[Request]) -> Request:
        """See `QueueOrder.choose`."""
        is_known = self._predictor.num_learnt >= NEUTRAL_REQUESTS or all(r.params.ignore_eos for r in waiting)
        if len(waiting) == 1 or not is_known:
            return waiting[0]
        now = self._now()
        # The first of equals is the one that came first.
        return max(waiting, key=lambda request: (now - request.arrival_s) / self._cost_s(request))

    def learn(self, request: Request) -> None:
        """Take its length as an example; one that had to go on to the end of its room is none."""
        if not request.params.ignore_eos:
            self._predictor.learn(
                request.prompt_ids,
                request.max_new_tokens,
                len(request.output_ids),
                was_cut=request.finish_reason == "length",
            )

    def _cost_s(self, request: Request) -> float:
        if request.predicted_len is None:
            most = request.max_new_tokens
            exact = request.params.ignore_eos
            request.predicted_len = most if exact else self._predictor.predict(request.prompt_ids, most)
        known = 0
        if self._prefix is not None:
            known = min(self._prefix.known(request.block_names) * BLOCK_TOKENS, request.max_restored)
        return self._costs.run_s(request.prompt_len - known, request.predicted_len)
