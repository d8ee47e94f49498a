"""How Ray Serve picks a replica for a call.

Serve imports this by name; it is the one module that needs Ray to be imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import RequestRouter

from alisa.dist.routing import ranked


class PrefixRouter(RequestRouter):
    """The first replica in the order of the call that has room; any, where the call has no key.

    The key is the first argument of the call (`EngineReplica.forward`).
    """

    async def choose_replicas(
        self,
        candidate_replicas: Sequence[Any],
        pending_request: Any = None,  # noqa: ANN401 - of Ray
    ) -> list[list[Any]]:
        """One rank for each replica."""
        key = pending_request.args[0] if pending_request is not None and pending_request.args else ""
        if not key:
            return [[*candidate_replicas]]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in ranked(key, [*by_name])]
