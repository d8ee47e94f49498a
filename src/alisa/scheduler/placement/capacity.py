"""How memory is divided: on the device, between rows and buffers; below it, between rows and hidden states."""

from __future__ import annotations

from typing import NamedTuple

_STAGING_SHARE = 16
"""The staging buffers together take at most one part in 16 of the device cap, and at most 256 rows each: 2 MiB of 8 KiB
rows keep a disk busy while the other buffer is read."""

_MOST_STAGING_ROWS = 256


def staging_rows(num_rows: int) -> int:
    """Rows of each of the two buffers through which a selection larger than the hot cache is read.

    Args:
        num_rows: of one layer each, that the device cap holds.
    """
    return max(1, min(_MOST_STAGING_ROWS, num_rows // (2 * _STAGING_SHARE)))


class Below(NamedTuple):
    """What the lowest tier holds."""

    num_tokens: int
    """Tokens with rows."""
    rebuildable: int
    """First tokens of every sequence whose hidden states are kept."""
    fits: bool
    """False: the hidden states of what is planned to be deleted take more than there is."""


def share_below(
    num_bytes: int,
    token_bytes: int,
    hidden_bytes: int,
    *,
    device_tokens: int,
    host_tokens: int = 0,
    sizes: list[int],
    planned: int,
) -> Below:
    """Rows and hidden states for sequences of these final lengths, of which the device holds `device_tokens` together.

    Args:
        num_bytes: of the tier.
        token_bytes: of a token's rows over all layers.
        hidden_bytes: of a token's layer inputs.
        device_tokens: tokens that stay on the device.
        host_tokens: tokens that a tier in between holds.
        sizes: tokens of every sequence in the end.
        planned: tokens of each that a schedule deletes; 0: as few as possible, and none where all rows fit.
    """
    count, wanted = len(sizes), sum(sizes)
    overflow = wanted - device_tokens - host_tokens
    kept = count * planned
    if planned == 0 and overflow * token_bytes > num_bytes and hidden_bytes < token_bytes:
        # As many tokens must be deleted as it takes for the others' rows and their hidden states to fit together.
        short = -(-(overflow * token_bytes - num_bytes) // (token_bytes - hidden_bytes))
        kept = min(short + count, overflow, num_bytes // hidden_bytes)
    rebuildable = kept // count
    taken = rebuildable * count * hidden_bytes
    return Below(min(wanted - host_tokens, max(num_bytes - taken, 0) // token_bytes), rebuildable, taken <= num_bytes)
