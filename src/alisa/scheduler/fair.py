"""How much every client has been served, so that one who floods the queue keeps nobody else waiting.

Virtual token counters: Sheng et al., Fairness in Serving Large Language Models (VTC, arXiv 2401.00588, Algorithm 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alisa.scheduler.request import Request

OUTPUT_WEIGHT = 2
"""A token that is said counts as this many that are read, as in the paper."""


@dataclass(slots=True)
class _Counted:
    """A request, and how much of it is in the counter of its client."""

    request: Request
    client: str
    cost: int = 0


class ServedTokens:
    """A counter for each client; of those who wait, the one with the least goes first.

    A prompt counts when its request is admitted, less what came from the prefix cache, and the output as it grows. Who
    comes back after a pause starts no lower than those who wait now: nobody saves up. So of two clients who both have
    requests waiting, none is ever ahead by more than a whole batch of the longest requests (the paper's bound).
    """

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._counted: dict[str, _Counted] = {}
        """By request id, those that were admitted and have not left."""
        self._last_admitted: str | None = None

    def arrive(self, request: Request, waiting: Sequence[Request]) -> None:
        """The request comes to wait with these others."""
        self._catch_up()
        others = {other.client for other in waiting if other.client is not None}
        if request.client is None or request.client in others:
            return
        if others:
            least = min(self._served[client] for client in others)
        else:
            least = 0 if self._last_admitted is None else self._served[self._last_admitted]
        self._served[request.client] = max(self._served.get(request.client, 0), least)

    def admit(self, request: Request) -> None:
        """The request runs, for the first time or once more."""
        if request.client is None:
            return
        self._last_admitted = request.client
        self._counted.setdefault(request.request_id, _Counted(request, request.client))

    def leave(self, request: Request) -> None:
        """The request is over, whatever it was doing."""
        self._catch_up()
        self._counted.pop(request.request_id, None)

    def least_served(self, waiting: Sequence[Request]) -> Sequence[Request]:
        """Those of the client who has got the least, in the order given; of equal clients the one whose is first."""
        self._catch_up()
        chosen = min((request.client for request in waiting), key=lambda client: self._served.get(client or "", 0))
        return [request for request in waiting if request.client == chosen]

    def served(self, client: str) -> int:
        """What the counter of a client says; 0 for one who has never come."""
        self._catch_up()
        return self._served.get(client, 0)

    def _catch_up(self) -> None:
        """What requests have got since the last time is counted."""
        for counted in self._counted.values():
            request = counted.request
            cost = request.prompt_len - request.cached_tokens + OUTPUT_WEIGHT * len(request.output_ids)
            self._served[counted.client] += cost - counted.cost
            counted.cost = cost
