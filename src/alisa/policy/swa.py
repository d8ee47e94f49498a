"""Sparse Window Attention: the most recent tokens, and the older ones with the largest local attention sum.

ALISA, arXiv 2403.17312, section 4 and Algorithm 1; what the paper leaves open is listed in docs/algorithm.md.

The local sum of a position is the attention it received from the last k rows; a row holds weights for the tokens it
attended only. `swa` is the paper: one sum, over all heads, for each layer. `swa-head` keeps one for each KV head. The
rows of the window are kept in buckets of consecutive rows, so that rows which leave it can be subtracted: with one row
to a bucket the sum is exactly the paper's, with w rows it reaches up to w - 1 rows further back, and the state is w
times smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.budget import Budget
from alisa.kernels.base import Selection, SelectionKernels, StepBatch
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.policy.ranked import RankedStep
from alisa.policy.state_bytes import num_buckets
from alisa.policy.token_state import TokenState
from alisa.spec import AttentionShape


@dataclass(frozen=True)
class SparseWindow(SelectionPolicy):
    """k recent and k older tokens of highest local attention sum, for each layer (or KV head) and sequence."""

    per_head: bool = False
    """One index set for each KV head instead of one for each layer (Algorithm 1, line 2, sums over all heads)."""

    @property
    def uses_mass(self) -> bool:
        """The local sum is made of it."""
        return True

    def num_sets(self, shape: AttentionShape) -> int:
        """J: 1, or G with one set for each KV head."""
        return shape.num_kv_heads if self.per_head else 1

    def observation_window(self, prompt_len: int) -> int:
        """The k rows that the first decode step sums (docs/algorithm.md, A4)."""
        return min(self.budget.recent(prompt_len), prompt_len)

    def start(
        self,
        shape: AttentionShape,
        *,
        max_num_seqs: int,
        num_tokens: int,
        max_len: int,
        device: torch.device,
        kernels: SelectionKernels,
    ) -> PolicyState:
        """A state of `buckets + 2` floats for each token of each index set."""
        return SparseWindowState(
            self.budget,
            num_buckets(self.budget, max_len),
            kernels,
            shape.num_layers,
            self.num_sets(shape),
            max_num_seqs=max_num_seqs,
            num_tokens=num_tokens,
            device=device,
        )


class SparseWindowState(TokenState):
    """Local sums Float64[L, J, T], and the buckets of rows they are made of, Float32[L, buckets, J, T].

    A bucket holds one row while k <= 64, that is up to 640 tokens at sparsity 0.8 (the paper's 128 + 512): the sum is
    exact. As a sequence grows beyond, the rows of two neighbours are put together, so w = 2, 4, ... rows share a bucket
    and the window is at most 3.2 % longer. All this follows from the sequence's own length alone.
    """

    def __init__(
        self,
        budget: Budget,
        num_buckets: int,
        kernels: SelectionKernels,
        num_layers: int,
        num_sets: int,
        *,
        max_num_seqs: int,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__(max_num_seqs=max_num_seqs, num_tokens=num_tokens, device=device)
        self._budget = budget
        self._kernels = kernels
        self._num_sets = num_sets
        self._num_buckets = num_buckets
        # float64: rows are added and later subtracted thousands of times, and a forgotten token must come back to 0.
        self._sums = self._new_table((num_layers, num_sets), (), torch.float64, zeroed=True)
        self._buckets = self._new_table((num_layers, self._num_buckets, num_sets), (), torch.float32, zeroed=True)
        self._bucket_rows: dict[int, int] = {}  # req_idx -> w
        self._first_bucket: dict[int, int] = {}  # req_idx -> oldest bucket that still counts
        self._step: RankedStep | None = None
        self._sum_starts = self._bucket_starts = torch.empty(0)  # where each row of the step lies, flattened

    def open(self, req_idx: int, expected_tokens: int) -> None:
        """No bucket counts yet."""
        super().open(req_idx, expected_tokens)
        self._bucket_rows.pop(req_idx, None)
        self._first_bucket.pop(req_idx, None)

    def fork(self, source: int, req_idx: int) -> None:
        """The buckets too."""
        super().fork(source, req_idx)
        if source in self._bucket_rows:
            self._bucket_rows[req_idx] = self._bucket_rows[source]
            self._first_bucket[req_idx] = self._first_bucket[source]

    def observe_prompt(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Add prompt rows to the buckets they belong to."""
        num_rows, _, num_columns = mass.shape
        start += self._extents.start(req_idx)
        columns = slice(start, start + num_columns)
        if req_idx not in self._bucket_rows:  # the window of the prompt begins here, into whatever chunks it is cut
            self._bucket_rows[req_idx] = self._rows_for(self._window_from(first))
            self._first_bucket[req_idx] = first // self._bucket_rows[req_idx]
        shared_by = self._bucket_rows[req_idx]
        buckets = (torch.arange(first, first + num_rows, device=mass.device) // shared_by) % self._num_buckets
        self._buckets[layer, :, :, columns].index_add_(0, buckets, mass)
        # Row after row: whatever pieces the rows come in, they are added up in the same order.
        self._sums[layer, None, :, columns].index_add_(0, torch.zeros_like(buckets), mass.to(torch.float64))

    def begin(self, batch: StepBatch) -> None:
        """Drop the rows that have left each sequence's window, and lay out the step."""
        self._expire(batch)
        self._step = RankedStep.plan(batch, self._budget, self._num_sets)
        super().begin(batch)

    def select(self, layer: int, query: Tensor) -> Selection:
        """The recent window and the best older tokens (Algorithm 1, lines 3 to 5)."""
        step = self._step
        assert step is not None, "select comes after begin"
        positions = self._kernels.select(
            self._sums[layer].view(-1),
            self._sum_starts,
            step.older_ends,
            step.older_counts,
            step.row_counts,
            step.num_slots,
            step.width,
        )
        return step.selection(positions)

    def on_attended(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """Add this step's row to the local sums and to its bucket; tokens not attended get nothing (A5)."""
        step = self._step
        assert step is not None, "on_attended comes after begin"
        self._kernels.observe(
            self._sums[layer],
            self._buckets[layer],
            self._sum_starts,
            self._bucket_starts,
            selection.positions.flatten(0, 1),
            step.row_counts,
            mass.flatten(0, 1),
        )

    def _locate(self, batch: StepBatch, starts: Tensor) -> None:
        """Every row of the step in the sums and in the buckets of one layer."""
        sets = torch.arange(self._num_sets, device=starts.device)
        buckets = [
            ((length - 1) // self._bucket_rows[req_idx]) % self._num_buckets
            for req_idx, length in zip(batch.req_indices, batch.lengths, strict=True)
        ]
        rows = torch.tensor(buckets, device=starts.device)[:, None] * self._num_sets + sets
        self._sum_starts = (starts[:, None] + sets * self._num_tokens).view(-1)
        self._bucket_starts = (starts[:, None] + rows * self._num_tokens).view(-1)

    def _window_from(self, first: int) -> int:
        """Rows of the window that begins at this row: k of the shortest prompt for which it does."""
        window = self._budget.recent(first)
        while (longer := self._budget.recent(first + window)) > window:
            window = longer
        return window

    def _rows_for(self, window: int) -> int:
        """w: the power of two with which a window of so many rows fits the buckets."""
        return 1 << max(-(-window // (self._num_buckets - 2)) - 1, 0).bit_length()

    def _expire(self, batch: StepBatch) -> None:
        """Subtract the buckets whose rows have all left their sequence's window, for every layer at once."""
        for req_idx, length in zip(batch.req_indices, batch.lengths, strict=True):
            num_earlier = length - 1
            window = self._budget.recent(num_earlier)
            begin = max(num_earlier - window, 0)
            start = self._extents.start(req_idx)
            tokens = slice(start, start + num_earlier)
            if req_idx not in self._bucket_rows:
                self._bucket_rows[req_idx] = self._rows_for(window)
                self._first_bucket[req_idx] = begin // self._bucket_rows[req_idx]
            while self._bucket_rows[req_idx] < self._rows_for(window):
                self._merge_neighbours(req_idx, num_earlier, tokens)
            first_bucket = begin // self._bucket_rows[req_idx]
            for bucket in range(self._first_bucket[req_idx], first_bucket):
                rows = self._buckets[:, bucket % self._num_buckets, :, tokens]
                self._sums[:, :, tokens] -= rows
                rows.zero_()
            self._first_bucket[req_idx] = first_bucket

    def _merge_neighbours(self, req_idx: int, num_earlier: int, tokens: slice) -> None:
        """Each bucket of the sequence holds twice as many rows, for every layer at once."""
        first, end = self._first_bucket[req_idx], (num_earlier - 1) // self._bucket_rows[req_idx] + 1
        device = self._buckets.device
        old = torch.arange(first, end, device=device)
        mine = self._buckets[:, :, :, tokens]
        rows = mine[:, old % self._num_buckets]
        mine.zero_()
        mine.index_add_(1, old // 2 % self._num_buckets, rows)
        self._bucket_rows[req_idx] *= 2
        self._first_bucket[req_idx] = first // 2
