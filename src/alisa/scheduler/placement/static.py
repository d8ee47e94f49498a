"""A fixed split of every sequence between the device and the tier below: the baseline that ALISA is compared with.

FlexGen (arXiv 2303.06865) decides once, offline, which percentage of the KV cache lies where, and keeps to it from the
first token on, whether the device is full or empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alisa.scheduler.placement.base import Limits, PlacementDecision, SeqView, latest_phase, moves_down, phase_of
from alisa.scheduler.placement.three_phase import CHUNK_TOKENS


@dataclass(frozen=True)
class StaticSplit:
    """The oldest `offload_ratio` of every sequence lies below the device, always."""

    offload_ratio: float
    chunk: int = CHUNK_TOKENS
    name: Literal["static"] = "static"

    @property
    def uses_tiers(self) -> bool:
        """From the first token on."""
        return True

    def most_deleted(self, num_tokens: int) -> int:
        """Nothing is deleted."""
        return 0

    @property
    def avoids_oversubscription(self) -> bool:
        """The split is what is wanted, whatever it costs."""
        return False

    def plan(self, sequences: Sequence[SeqView], limits: Limits) -> PlacementDecision | None:
        """See `PlacementPolicy.plan`."""
        bounds = [list(view.bounds) for view in sequences]
        resident = 0
        for view, ends in zip(sequences, bounds, strict=True):
            # Rounded up to whole chunks: the split must hold between two moves, too. What it asks of the device does
            # not count the rounding: a sequence that fits must have fitted at every length before.
            wanted = int(self.offload_ratio * view.length)
            most = max(ends[0], view.length - view.num_new)
            resident += view.length - min(wanted, most)
            ends[0] = max(ends[0], min(-(-wanted // self.chunk) * self.chunk, most))
        below = sum(ends[0] for ends in bounds)
        if resident > limits.device_tokens or below > sum(tier.num_tokens for tier in limits.tiers[:1]):
            return None
        return PlacementDecision(
            latest_phase([phase_of(ends) for ends in bounds]), moves_down(sequences, bounds, limits)
        )
