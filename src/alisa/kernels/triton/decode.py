# Kernels are launched by a syntax that type checkers do not know.
# pyrefly: ignore-errors
"""Decode attention in three launches: splits, their merge, and the mass.

Flash decoding (Dao et al., pytorch.org/blog/flash-decoding, 2023) over rows addressed by slot. Deterministic: nothing
is added up in an order that depends on timing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alisa.kernels.base import Attended
from alisa.kernels.checks import check_decode, check_piece
from alisa.kernels.reference.entries import own_slots, own_span
from alisa.kernels.triton.attend_group import attend_group
from alisa.kernels.triton.attend_single import attend_single
from alisa.kernels.triton.launch import launch, num_pieces
from alisa.kernels.triton.mass import launch_mass
from alisa.kernels.triton.merge import merge_splits
from alisa.kernels.triton.rows import RowView
from alisa.kernels.triton.settings import attend_settings, power_of_two, tile_rows
from alisa.spec import RowFormat


class Decoding:
    """Decode attention of `[B, H, D]` queries on one selection, as in `AttentionPieces`; each split is read once.

    Scratch: a float32 score for each head and slot, and D + 2 float32 for each head and split.

    Args:
        q: `[B, H, D]`, contiguous.
        row_format: of the rows.
        counts: Int32[B], contiguous.
        num_sets: J, 1 or G.
        num_slots: K.
        softcap: as in `AttentionShape`.
        entries: as in `Selection`.
    """

    def __init__(
        self,
        q: Tensor,
        row_format: RowFormat,
        counts: Tensor,
        num_sets: int,
        num_slots: int,
        softcap: float | None,
        entries: Tensor | None = None,
    ) -> None:
        self._softcap = softcap
        self._entries = entries
        num_seqs, num_heads, head_dim = q.shape
        self._q = q
        self._format = row_format
        self._counts = counts
        self._num_slots = num_slots
        self._settings = attend_settings(row_format, num_heads // row_format.num_kv_heads)
        num_splits = num_pieces(num_slots, self._settings.split_len)
        self._scores = q.new_empty(num_seqs, num_heads, num_slots, dtype=torch.float32)
        self._outs = q.new_empty(num_seqs, num_heads, num_splits, head_dim, dtype=torch.float32)
        self._tops, self._totals = q.new_empty(2, num_seqs, num_heads, num_splits, dtype=torch.float32).unbind()
        self._mass = q.new_empty(num_seqs, num_sets, num_slots, dtype=torch.float32)

    def add_all(self, rows: Tensor, slots: Tensor) -> None:
        """All of slots Int32[B, J, K], contiguous, have been attended to."""
        self._launch(rows, slots, self._counts, self._counts, in_pieces=0)

    def add(self, rows: Tensor, slots: Tensor, begins: Tensor, ends: Tensor) -> None:
        """See `AttentionPieces`; a piece is a whole number of splits."""
        check_decode(self._q, rows, self._format, slots, self._counts, self._entries)
        check_piece(begins, ends, slots)
        slots = own_slots(slots, self._entries)
        begins, ends = own_span(begins, ends, self._counts, self._entries)
        self._launch(rows, slots.contiguous(), begins.contiguous(), ends.contiguous(), in_pieces=1)

    def finish(self) -> Attended:
        """See `AttentionPieces`."""
        q = self._q
        num_seqs, num_heads, head_dim = q.shape
        log_sum_exp, best, inverse = q.new_empty(3, num_seqs, num_heads, dtype=torch.float32).unbind()
        out = torch.empty_like(q)
        width = power_of_two(head_dim)
        launch(merge_splits, (num_heads, num_seqs))(
            self._outs,
            self._tops,
            self._totals,
            self._counts,
            out,
            log_sum_exp,
            best,
            inverse,
            self._settings.split_len,
            self._tops.shape[2],
            HEAD_DIM=head_dim,
            WIDTH=width,
            BLOCK=min(32, tile_rows(width)),
        )
        launch_mass(self._scores, best, inverse, self._counts, self._mass)
        return Attended(out, self._mass, log_sum_exp)

    def _launch(self, rows: Tensor, slots: Tensor, begins: Tensor, ends: Tensor, *, in_pieces: int) -> None:
        q, settings = self._q, self._settings
        num_seqs, num_heads, head_dim = q.shape
        num_kv_heads = self._format.num_kv_heads
        group = num_heads // num_kv_heads
        view = RowView.of(rows, self._format)
        kernel = attend_single if group == 1 else attend_group
        launch(kernel, (self._tops.shape[2], num_kv_heads, num_seqs))(
            q,
            view.values,
            view.pairs,
            slots,
            begins,
            ends,
            self._scores,
            self._outs,
            self._tops,
            self._totals,
            view.values.stride(0),
            view.pairs.stride(0),
            self._num_slots,
            in_pieces,
            settings.split_len,
            head_dim**-0.5 * math.log2(math.e),
            (self._softcap or 0.0) * math.log2(math.e),
            CAPPED=self._softcap is not None,
            NUM_HEADS=num_heads,
            GROUP=group,
            PADDED=max(16, power_of_two(group)),
            PER_HEAD=slots.shape[1] > 1,
            HEAD_DIM=head_dim,
            K_LEN=view.k_len,
            V_LEN=view.v_len,
            K_PLANES=view.k_planes,
            V_PLANES=view.v_planes,
            PAIRS_AT=view.pairs_at,
            ONE_RANGE=view.coded and view.parts == 1,
            PARTS=view.parts,
            K_WIDTH=max(16, power_of_two(view.k_len)),
            V_WIDTH=max(16, power_of_two(view.v_len)),
            BLOCK=settings.block,
            num_warps=settings.num_warps,
        )
