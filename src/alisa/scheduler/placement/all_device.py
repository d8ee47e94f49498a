"""Everything stays on the device: the baseline, and what runs while everything fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alisa.outputs import Phase
from alisa.scheduler.placement.base import Limits, PlacementDecision, SeqView


@dataclass(frozen=True)
class AllDevice:
    """Nothing ever moves; sequences that do not fit have to wait."""

    name: Literal["all-device"] = "all-device"

    @property
    def uses_tiers(self) -> bool:
        """Nothing moves."""
        return False

    def most_deleted(self, num_tokens: int) -> int:
        """Nothing is deleted."""
        return 0

    @property
    def avoids_oversubscription(self) -> bool:
        """There is nowhere else to read from."""
        return False

    def plan(self, sequences: Sequence[SeqView], limits: Limits) -> PlacementDecision | None:
        """See `PlacementPolicy.plan`."""
        fits = sum(view.length - view.num_shared for view in sequences) <= limits.device_tokens
        return PlacementDecision(Phase.DEVICE, ()) if fits else None
