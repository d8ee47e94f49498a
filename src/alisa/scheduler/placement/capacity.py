"""How memory is shared out: on the device, buffers beside rows; below, remnants of deleted rows beside rows."""

from __future__ import annotations

from typing import NamedTuple

from alisa.budget import STATE_BLOCK_TOKENS, Reads, state_tokens

_IN_FLIGHT_SHARE = 16
"""One part in this many of the device's cap is for rows on their way to lower tiers,"""
_MOST_IN_FLIGHT_BYTES = 1 << 26
"""and at most this much: enough for a disk to write one piece while the next is computed."""

_STAGING_SHARE = 16
"""One part in so many of the device cap is the most that the staging buffers take, and 256 rows each at the most: 2 MiB
of 8 KiB rows keep a disk busy while the other buffer is read."""

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
    """First tokens of every sequence that keep a remnant."""
    fits: bool
    """False: the remnants of what is planned to be deleted take more than there is."""


def share_below(
    num_bytes: int,
    token_bytes: int,
    remnant_bytes: int,
    *,
    device_tokens: int,
    host_tokens: int = 0,
    sizes: list[int],
    planned: int,
) -> Below:
    """Rows and remnants for sequences of these final lengths, of which the device holds `device_tokens` together.

    Args:
        num_bytes: of the tier.
        token_bytes: of a token's rows over all layers.
        remnant_bytes: of a token's layer inputs.
        device_tokens: tokens that stay on the device.
        host_tokens: tokens that a tier in between holds.
        sizes: tokens of every sequence in the end.
        planned: tokens of each that a schedule deletes; 0: as few as possible, and none where all rows fit.
    """
    count, wanted = len(sizes), sum(sizes)
    overflow = wanted - device_tokens - host_tokens
    kept = count * planned
    if planned == 0 and overflow * token_bytes > num_bytes and remnant_bytes < token_bytes:
        # So many tokens must be deleted that the others' rows and their remnants fit together.
        short = -(-(overflow * token_bytes - num_bytes) // (token_bytes - remnant_bytes))
        kept = min(short + count, overflow, num_bytes // remnant_bytes)
    rebuildable = kept // count
    taken = rebuildable * count * remnant_bytes
    return Below(min(wanted - host_tokens, max(num_bytes - taken, 0) // token_bytes), rebuildable, taken <= num_bytes)


class DeviceSplit(NamedTuple):
    """How the device's cap is divided."""

    device_tokens: int
    """R: tokens whose rows lie on the device at the same time."""
    state_tokens: int
    """Tokens that the selection policy's state has room for, wherever their rows lie; whole blocks."""
    staging_rows: int
    """Of each of two buffers; 0 where nothing moves."""
    in_flight_bytes: int
    """For rows on their way to lower tiers; 0 where nothing moves."""


def split_device(
    num_bytes: int,
    *,
    num_layers: int,
    row_bytes: int,
    state_token_bytes: int,
    state_sequence_bytes: int,
    reads: Reads,
    max_num_seqs: int,
    max_len: int,
    has_tiers: bool,
) -> DeviceSplit | None:
    """Rows, policy state and buffers under one cap; None where it does not hold a single token.

    The state of every token stays on the device, also when its row has left. With tiers it gets as much as all
    sequences may come to need, but no more than leaves room for the rows that one step reads of these tokens; without
    them as many tokens as there are rows, and what is lost by whole blocks.

    Args:
        num_bytes: the cap.
        num_layers: L.
        row_bytes: of one token of one layer.
        state_token_bytes: what the policy keeps of a token, over all layers.
        state_sequence_bytes: what it keeps of a sequence besides.
        reads: what a step reads.
        max_num_seqs: sequences that are open at the same time.
        max_len: longest sequence.
        has_tiers: whether rows may leave the device.
    """
    token_bytes = num_layers * row_bytes
    staging = staging_rows(num_bytes // row_bytes) if has_tiers else 0
    in_flight = min(num_bytes // _IN_FLIGHT_SHARE, _MOST_IN_FLIGHT_BYTES) if has_tiers else 0
    room = num_bytes - max_num_seqs * state_sequence_bytes - 2 * staging * row_bytes - in_flight
    wanted = max_num_seqs * state_tokens(max_len)
    if state_token_bytes == 0:
        known = wanted
    elif has_tiers:
        read_share = (1 + sum(reads(max_len - 1))) / max_len
        balanced = int(room / (state_token_bytes + read_share * token_bytes))
        known = max(min(wanted, balanced // STATE_BLOCK_TOKENS * STATE_BLOCK_TOKENS), state_tokens(max_len))
    else:
        both = token_bytes + state_token_bytes
        # A sequence's last block is half empty on average; a fifth of a small cap is the most that is spent on it.
        spare = min(max_num_seqs * STATE_BLOCK_TOKENS, max(room, 0) // (5 * both))
        rows = max(room - spare * state_token_bytes, 0) // both
        known = min(wanted, max(state_tokens(rows + spare), STATE_BLOCK_TOKENS))
    device_tokens = min((room - known * state_token_bytes) // token_bytes, max_num_seqs * max_len)
    if device_tokens < 1:
        return None
    return DeviceSplit(device_tokens, known, staging, in_flight)
