"""What is said of a request that can never run."""

from __future__ import annotations

from alisa.config import format_bytes
from alisa.scheduler.placement.base import Limits
from alisa.scheduler.request import Request


def refusal(request: Request, limits: Limits, token_bytes: int | None) -> str:
    """What it needs, what there is, and what would help.

    Args:
        request: the one that does not fit, even alone.
        limits: what there is room for.
        token_bytes: bytes of one token's rows; None: tokens are counted.
    """
    asked = f"A request of {request.prompt_len} prompt and up to {request.max_new_tokens} new tokens needs"
    if not limits.has_state_room([request.num_rows]):
        return (
            f"{asked} room for {request.num_rows} tokens in the state of the selection policy, and the cap leaves "
            f"room for {limits.state_tokens}; raise --kv-device-memory, or lower --max-tokens."
        )
    sizes = [request.num_rows, limits.device_tokens, *(tier.num_tokens for tier in limits.tiers)]
    needed, *caps = [f"{n} tokens" if token_bytes is None else format_bytes(n * token_bytes) for n in sizes]
    each = "" if token_bytes is None else f" ({format_bytes(token_bytes)} a token)"
    places = ["the device", *(tier.medium for tier in limits.tiers)]
    room = " and ".join(f"{cap} on {place}" for cap, place in zip(caps, places, strict=True))
    return (
        f"{asked} {needed} of KV memory{each} and the cap is {room}; raise --kv-device-memory or --kv-disk-memory, "
        "or lower --max-tokens."
    )
