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
from alisa.policy.state_bytes import MAX_BUCKETS, Buckets
from alisa.policy.token_state import TokenState
from alisa.spec import AttentionShape


@dataclass(frozen=True)
class SparseWindow(SelectionPolicy):
    """k recent and k older tokens of highest local attention sum, for each layer (or KV head) and sequence."""

    per_head: bool = False
    """One index set for each KV head instead of one for each layer (Algorithm 1, line 2, sums over all heads)."""
    max_buckets: int = MAX_BUCKETS
    """Buckets of rows that the local sum is kept in.

    Exact while k <= 64, that is up to 640 tokens at sparsity 0.8 (the paper's 128 + 512); beyond, w = k / 64 rows share
    a bucket and the window is at most 1.6 % longer. The k is that of the longest sequence allowed.
    """

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
            Buckets.plan(self.budget, max_len, self.max_buckets),
            kernels,
            shape.num_layers,
            self.num_sets(shape),
            max_num_seqs=max_num_seqs,
            num_tokens=num_tokens,
            device=device,
        )


class SparseWindowState(TokenState):
    """Local sums Float64[L, J, T], and the buckets of rows they are made of, Float32[L, buckets, J, T]."""

    def __init__(
        self,
        budget: Budget,
        buckets: Buckets,
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
        self._bucket_rows, self._num_buckets = buckets
        # float64: rows are added and later subtracted thousands of times, and a forgotten token must come back to 0.
        self._sums = self._new_table((num_layers, num_sets), (), torch.float64, zeroed=True)
        self._buckets = self._new_table((num_layers, self._num_buckets, num_sets), (), torch.float32, zeroed=True)
        self._first_bucket: dict[int, int] = {}  # req_idx -> oldest bucket that still counts
        self._step: RankedStep | None = None
        self._sum_starts = self._bucket_starts = torch.empty(0)  # where each row of the step lies, flattened

    def open(self, req_idx: int) -> None:
        """No bucket counts yet."""
        super().open(req_idx)
        self._first_bucket.pop(req_idx, None)

    def observe_prompt(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Add prompt rows to the buckets they belong to."""
        num_rows, _, num_columns = mass.shape
        start += self._extents.start(req_idx)
        columns = slice(start, start + num_columns)
        self._first_bucket.setdefault(req_idx, first // self._bucket_rows)
        buckets = (torch.arange(first, first + num_rows, device=mass.device) // self._bucket_rows) % self._num_buckets
        self._buckets[layer, :, :, columns].index_add_(0, buckets, mass)
        self._sums[layer, :, columns] += mass.sum(dim=0, dtype=torch.float64)

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
        buckets = [((length - 1) // self._bucket_rows) % self._num_buckets for length in batch.lengths]
        rows = torch.tensor(buckets, device=starts.device)[:, None] * self._num_sets + sets
        self._sum_starts = (starts[:, None] + sets * self._num_tokens).view(-1)
        self._bucket_starts = (starts[:, None] + rows * self._num_tokens).view(-1)

    def _expire(self, batch: StepBatch) -> None:
        """Subtract the buckets whose rows have all left their sequence's window, for every layer at once."""
        for req_idx, length in zip(batch.req_indices, batch.lengths, strict=True):
            num_earlier = length - 1
            first_bucket = max(num_earlier - self._budget.recent(num_earlier), 0) // self._bucket_rows
            start = self._extents.start(req_idx)
            tokens = slice(start, start + num_earlier)
            for bucket in range(self._first_bucket.get(req_idx, first_bucket), first_bucket):
                rows = self._buckets[:, bucket % self._num_buckets, :, tokens]
                self._sums[:, :, tokens] -= rows
                rows.zero_()
            self._first_bucket[req_idx] = first_bucket
