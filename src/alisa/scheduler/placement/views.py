"""How many sequences belong together: how one looks to a scheduler, and when there are too many of them."""

from __future__ import annotations

from collections.abc import Iterable

from alisa.budget import Reads
from alisa.scheduler.placement.base import Limits, PlacementPolicy, SeqView

HEADROOM_TOKENS = 32
"""Tokens that every running sequence must be able to grow by before another one is admitted: fewer, and the newest is
thrown out again before it has paid for its prompt."""


def seq_view(
    req_idx: int, prompt_len: int, length: int, bounds: tuple[int, ...], rebuildable: int, reads: Reads, *, active: bool
) -> SeqView:
    """A sequence before a step after which it has `length` tokens, of which a policy reads what `reads` says."""
    recent, older = reads(max(length - 1, 0))
    return SeqView(
        req_idx=req_idx,
        prompt_len=prompt_len,
        length=length,
        bounds=bounds,
        window=min(recent + 1, length),
        older=older,
        rebuildable=rebuildable,
        active=active,
    )


def fresh_view(num_tokens: int, limits: Limits, reads: Reads) -> SeqView:
    """A sequence of `num_tokens` tokens that has no request index yet."""
    bounds = (0,) * (len(limits.tiers) + 1)
    return seq_view(-1, num_tokens, num_tokens, bounds, limits.rebuildable, reads, active=True)


def is_oversubscribed(scheduler: PlacementPolicy, views: Iterable[SeqView], limits: Limits) -> bool:
    """Whether what the active sequences read in one layer is more than the device holds, and some had better wait."""
    read = sum(min(view.window + view.older, view.length) for view in views if view.active)
    return bool(limits.tiers) and scheduler.avoids_oversubscription and read > limits.device_tokens
