"""How a cap of the device's memory is shared out: rows, the selection policy's state, buffers, and tables.

Integers only, so that a planner can ask without a store. A store's `table_bytes` never exceed what is set aside here.
"""

from __future__ import annotations

from typing import NamedTuple

from alisa.budget import STATE_BLOCK_TOKENS, state_tokens
from alisa.cache.offload.residency import SLOT_BYTES
from alisa.cache.row_ids import BLOCK_TOKENS, grown_size
from alisa.scheduler.placement.capacity import staging_rows

_IN_FLIGHT_SHARE = 16
"""One part in this many of the cap is for rows and hidden states on their way, 64 MiB at most: more hides nothing."""

_MOST_IN_FLIGHT_BYTES = 1 << 26

_TABLE_SHARE = 4
"""One part in this many of the cap is the most that tables for tokens below the device take, unless one sequence needs
more."""


class StateMemory(NamedTuple):
    """What the selection policy keeps on the device, in bytes; it keeps it for every token, wherever its row lies."""

    token_bytes: int = 0
    """Over all layers."""
    sequence_bytes: int = 0
    """Of every sequence, in addition."""
    read_share: float = 1.0
    """Share of a long sequence's tokens that one step reads."""
    wants_all: bool = False
    """Whether tokens of all sequences come first, and rows have what is left: where no sequence waits for another."""


NO_STATE = StateMemory()


class DeviceCapacity(NamedTuple):
    """What a store is made with, so that everything stays under its cap."""

    num_rows: int
    """Tokens of the pool; 0 or less: the cap is too small."""
    state_tokens: int
    """Tokens that the policy's state has room for: whole blocks."""
    staging_rows: int = 0
    """Through which a selection larger than the pool is read."""
    in_flight_bytes: int = 0
    lower_tokens: int = 0
    """Tokens in the lower tiers, deleted ones included, that the tables have room for."""
    table_bytes: int = 0
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
    piece_columns: int,
    holds_tables: bool,
    state: StateMemory = NO_STATE,
) -> DeviceCapacity:
    """Share out a cap of `num_bytes` for a `TieredStore`.

    The policy's state gets as many tokens as all sequences may come to have, but no more than leaves room for the rows
    that one step reads of half of them (the others may be swapped; where they may not, for rows at all). Both it and
    the tables have room for at least one sequence of the greatest length.

    Args:
        num_bytes: the cap.
        num_layers: L.
        row_bytes: of one token of one layer.
        max_num_seqs: sequences that can be open at the same time.
        max_length: longest sequence, in tokens.
        lower_tokens: tokens that are wanted in the lower tiers together, deleted ones included.
        num_tiers: lower tiers, the one of hidden states included.
        piece_columns: columns of the smallest piece that the decode kernel takes: it is read at once, whatever the cap.
        holds_tables: whether the device is main memory, where tables and rows on their way lie.
        state: what the selection policy keeps.
    """
    staging = max(2 * staging_rows(num_bytes // row_bytes), min(piece_columns, max_length))
    in_flight = min(num_bytes // _IN_FLIGHT_SHARE, _MOST_IN_FLIGHT_BYTES)
    left = num_bytes - staging * row_bytes - max_num_seqs * state.sequence_bytes
    id_bytes = slot_bytes = fixed_bytes = 0
    if holds_tables:
        # Of each row id: its slot in every layer and whether it is safe, its slot in every tier and that slot's place
        # in the list of free ones, its share of its block; and a quarter more, because tables grow by a quarter.
        id_bytes = -(-5 * (4 * num_layers + 1 + 8 * num_tiers + 1) // 4)
        slot_bytes = SLOT_BYTES
        fixed_bytes = max_num_seqs * (BLOCK_TOKENS * id_bytes + 4 * -(-max_length // BLOCK_TOKENS)) + id_bytes
        left -= in_flight + fixed_bytes
    token_bytes = num_layers * (row_bytes + slot_bytes) + id_bytes
    wanted = max_num_seqs * state_tokens(max_length)
    known = wanted
    if state.token_bytes:
        balanced = max(int(left / (state.token_bytes + id_bytes + state.read_share * token_bytes / 2)), 0)
        if not (state.wants_all and wanted * (state.token_bytes + id_bytes) + token_bytes <= left):
            known = max(min(wanted, balanced // STATE_BLOCK_TOKENS * STATE_BLOCK_TOKENS), state_tokens(max_length))
        left -= known * state.token_bytes
    lower_tokens = min(lower_tokens, known)
    if holds_tables:
        lower_tokens = min(lower_tokens, max((num_bytes // _TABLE_SHARE - fixed_bytes) // id_bytes, max_length))
    num_rows = min((left - lower_tokens * id_bytes) // token_bytes, max_num_seqs * max_length)
    table_bytes = fixed_bytes + (lower_tokens + num_rows) * id_bytes + num_rows * num_layers * slot_bytes
    return DeviceCapacity(num_rows, known, staging, in_flight, lower_tokens, table_bytes)


def resident_capacity(
    num_bytes: int,
    *,
    num_layers: int,
    row_bytes: int,
    max_num_seqs: int,
    max_length: int,
    state: StateMemory = NO_STATE,
) -> DeviceCapacity:
    """Share out a cap of `num_bytes` for a `KVStore`; arguments as in `device_capacity`.

    The policy's state has room for as many tokens as there are rows, and for what sequences lose by whole blocks; where
    it keeps nothing of a token, for all that sequences may come to, which may share rows.
    """
    wanted = max_num_seqs * max_length
    token_bytes = num_layers * row_bytes + state.token_bytes + 8
    left = num_bytes - max_num_seqs * state.sequence_bytes
    left -= resident_table_bytes(0, max_num_seqs, min(max_length, max(left, 0) // token_bytes))
    # A sequence's last block is half empty on average; a fifth of a small cap is the most that is spent on it.
    spare = min(max_num_seqs * STATE_BLOCK_TOKENS, max(left, 0) // (5 * token_bytes))
    num_rows = min((left - (spare + STATE_BLOCK_TOKENS) * state.token_bytes) // token_bytes, wanted)
    known = state_tokens(max(num_rows, 0) + spare) if state.token_bytes else max_num_seqs * state_tokens(max_length)
    return DeviceCapacity(num_rows, known, table_bytes=resident_table_bytes(num_rows, max_num_seqs, max_length))


def resident_table_bytes(num_rows: int, max_num_seqs: int, max_length: int) -> int:
    """The most that the tables of a `KVStore` take, of which the larger part lies on the device."""
    length = min(max_length, num_rows)
    width = min(max_length, grown_size(length, length))
    return 4 * max_num_seqs * (2 * width + length) + 8 * num_rows
