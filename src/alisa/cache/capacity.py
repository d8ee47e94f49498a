"""How a cap of the device's memory is shared out: rows, buffers, and the tables that say where rows lie.

Integers only, so that a planner can ask without a store. A store's `table_bytes` never exceed what is set aside here.
"""

from __future__ import annotations

from typing import NamedTuple

from alisa.cache.offload.residency import SLOT_BYTES
from alisa.cache.row_ids import BLOCK_TOKENS, grown_size
from alisa.scheduler.placement.capacity import staging_rows

_IN_FLIGHT_SHARE = 16
"""One part in so many of the cap is for rows and hidden states on their way, 64 MiB at most: more hides nothing."""

_MOST_IN_FLIGHT_BYTES = 1 << 26

_TABLE_SHARE = 4
"""One part in so many of the cap is the most that tables for tokens below the device take; more tokens have to wait."""


class DeviceCapacity(NamedTuple):
    """What a `TieredStore` is made with, so that it stays under its cap."""

    num_rows: int
    """Tokens of the pool; 0 or less: the cap is too small."""
    staging_rows: int
    in_flight_bytes: int
    lower_tokens: int
    """Tokens in the lower tiers, deleted ones included, that the tables have room for."""
    table_bytes: int
    """The most that the tables take."""


def device_capacity(
    num_bytes: int,
    *,
    num_layers: int,
    row_bytes: int,
    max_num_seqs: int,
    max_length: int,
    lower_tokens: int,
    num_tiers: int,
    holds_tables: bool,
) -> DeviceCapacity:
    """Share out a cap of `num_bytes`.

    Args:
        num_bytes: the cap.
        num_layers: L.
        row_bytes: of one token of one layer.
        max_num_seqs: sequences that can be open at the same time.
        max_length: longest sequence, in tokens.
        lower_tokens: tokens that are wanted in the lower tiers together, deleted ones included.
        num_tiers: lower tiers, the one of hidden states included.
        holds_tables: whether the device is main memory, where tables and rows on their way lie.
    """
    staging = staging_rows(num_bytes // row_bytes)
    left = num_bytes - 2 * staging * row_bytes
    in_flight = min(num_bytes // _IN_FLIGHT_SHARE, _MOST_IN_FLIGHT_BYTES)
    if not holds_tables:
        return DeviceCapacity(left // (num_layers * row_bytes), staging, in_flight, lower_tokens, 0)
    # Of each row id: its slot in every layer and whether it is safe, its slot in every tier and that slot's place in
    # the list of free ones, its share of its block; and a quarter more, because tables grow by a quarter.
    id_bytes = -(-5 * (4 * num_layers + 1 + 8 * num_tiers + 1) // 4)
    fixed_bytes = max_num_seqs * (BLOCK_TOKENS * id_bytes + 4 * -(-max_length // BLOCK_TOKENS)) + id_bytes
    lower_tokens = max(min(lower_tokens, (num_bytes // _TABLE_SHARE - fixed_bytes) // id_bytes), 0)
    left -= in_flight + fixed_bytes + lower_tokens * id_bytes
    num_rows = left // (num_layers * (row_bytes + SLOT_BYTES) + id_bytes)
    table_bytes = fixed_bytes + (lower_tokens + num_rows) * id_bytes + num_rows * num_layers * SLOT_BYTES
    return DeviceCapacity(num_rows, staging, in_flight, lower_tokens, table_bytes)


def resident_table_bytes(num_rows: int, max_num_seqs: int, max_length: int) -> int:
    """The most that the tables of a `KVStore` take, of which the larger part lies on the device."""
    length = min(max_length, num_rows)
    width = min(max_length, grown_size(length, length))
    return 4 * max_num_seqs * (2 * width + length) + 8 * num_rows
