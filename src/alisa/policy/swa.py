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
from typing import Literal

import torch
from torch import Tensor

from alisa.budget import Budget
from alisa.kernels.base import Attended, Selection, SelectionKernels, StepBatch
from alisa.policy.ranked import RankedStep
from alisa.spec import ModelSpec


@dataclass(frozen=True)
class SparseWindow:
    """k recent and k older tokens of highest local attention sum, for each layer (or KV head) and sequence."""

    budget: Budget
    per_head: bool = False
    """One index set for each KV head instead of one for each layer (Algorithm 1, line 2, sums over all heads)."""
    max_buckets: int = 64
    """Buckets of rows that the local sum is kept in.

    Exact while k <= 64, that is up to 640 tokens at sparsity 0.8 (the paper's 128 + 512); beyond, w = k / 64 rows share
    a bucket and the window is at most 1.6 % longer.
    """
    timing: Literal["ahead", "in_layer"] = "ahead"

    @property
    def name(self) -> str:
        """`swa` or `swa-head`."""
        return "swa-head" if self.per_head else "swa"

    @property
    def keeps_mass(self) -> bool:
        """The local sum is made of it."""
        return True

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """The budget."""
        return self.budget.split(num_earlier)

    def num_sets(self, spec: ModelSpec) -> int:
        """J: 1, or G with one set for each KV head."""
        return spec.num_kv_heads if self.per_head else 1

    def seed_rows(self, prompt_len: int) -> int:
        """The k rows that the first decode step sums (docs/algorithm.md, A4)."""
        return min(self.budget.recent(prompt_len), prompt_len)

    def start(
        self,
        spec: ModelSpec,
        max_num_seqs: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None = None,
    ) -> SparseWindowState:
        """A state of `buckets + 2` floats per position, index set and sequence."""
        return SparseWindowState(self, spec.num_layers, self.num_sets(spec), max_num_seqs, capacity, device, kernels)


class SparseWindowState:
    """Local sums `[L, req_indices*J, capacity]`, and the buckets of rows they are made of."""

    def __init__(
        self,
        policy: SparseWindow,
        num_layers: int,
        num_sets: int,
        max_num_seqs: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None,
    ) -> None:
        self._kernels = kernels
        self._budget = policy.budget
        self._num_sets = num_sets
        widest = policy.budget.recent(capacity)
        self._bucket_rows = -(-widest // policy.max_buckets)
        # One bucket more than the window covers when it begins inside a bucket, and one for the row being added.
        self._num_buckets = -(-widest // self._bucket_rows) + 2
        self._capacity = capacity
        # float64: rows are added and later subtracted thousands of times, and a forgotten token must come back to 0.
        num_rows = max_num_seqs * num_sets
        self._sums = torch.zeros(num_layers, num_rows, capacity, dtype=torch.float64, device=device)
        self._buckets = torch.empty(num_layers, self._num_buckets, num_rows, capacity, device=device)
        self._first_bucket: dict[int, int] = {}  # req_idx -> oldest bucket that still counts
        self._step: RankedStep | None = None
        self._sum_starts = self._bucket_starts = torch.empty(0)  # where each row of the step lies, flattened

    @property
    def nbytes(self) -> int:
        """Sums and buckets."""
        return self._sums.nbytes + self._buckets.nbytes

    def open(self, req_idx: int, num_tokens: int) -> None:
        """Clear the request index."""
        rows = self._rows(req_idx)
        self._sums[:, rows, :num_tokens].zero_()
        self._buckets[:, :, rows, :num_tokens].zero_()
        self._first_bucket.pop(req_idx, None)

    def seed(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Add prompt rows to the buckets they belong to."""
        num_rows = len(mass)
        columns = slice(start, start + mass.shape[2])
        self._first_bucket.setdefault(req_idx, first // self._bucket_rows)
        buckets = (torch.arange(first, first + num_rows, device=mass.device) // self._bucket_rows) % self._num_buckets
        self._buckets[layer, :, self._rows(req_idx), columns].index_add_(0, buckets, mass)
        self._sums[layer, self._rows(req_idx), columns] += mass.sum(dim=0, dtype=torch.float64)

    def remember(self, layer: int, req_index: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys decide nothing here."""

    def complete(self, layer: int, attended: Attended) -> Tensor:
        """Attention, as it is."""
        return attended.out

    def begin(self, batch: StepBatch) -> None:
        """Drop the rows that have left each sequence's window, and lay out the step."""
        self._expire(batch)
        step = RankedStep.plan(batch, self._budget, self._num_sets, self._kernels)
        buckets = [((length - 1) // self._bucket_rows) % self._num_buckets for length in batch.lengths]
        bucket_ids = torch.tensor(buckets, device=step.rows.device).repeat_interleave(self._num_sets)
        self._sum_starts = step.rows * self._capacity
        self._bucket_starts = (bucket_ids * self._sums.shape[1] + step.rows) * self._capacity
        self._step = step

    def select(self, layer: int, query: Tensor) -> Selection:
        """The recent window and the best older tokens (Algorithm 1, lines 3 to 5)."""
        assert self._step is not None, "select comes after begin"
        return self._step.select(self._sums[layer], self._step.rows)

    def observe(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """Add this step's row to the local sums and to its bucket; tokens not attended get nothing (A5)."""
        assert self._step is not None, "observe comes after begin"
        positions, rows = selection.positions.flatten(0, 1), mass.flatten(0, 1)
        sums, buckets = self._sums[layer], self._buckets[layer]
        if self._kernels is not None:
            counts = self._step.row_counts
            self._kernels.observe(sums, buckets, self._sum_starts, self._bucket_starts, positions, counts, rows)
            return
        for table, starts in ((sums, self._sum_starts), (buckets, self._bucket_starts)):
            table.view(-1).index_add_(0, (starts[:, None] + positions).view(-1), rows.reshape(-1).to(table.dtype))

    def _rows(self, req_idx: int) -> slice:
        """Rows of the tables that belong to a request index."""
        return slice(req_idx * self._num_sets, (req_idx + 1) * self._num_sets)

    def _expire(self, batch: StepBatch) -> None:
        """Subtract the buckets whose rows have all left their sequence's window, for every layer at once."""
        buckets: list[int] = []
        rows: list[int] = []
        for req_idx, length in zip(batch.req_indices, batch.lengths, strict=True):
            num_earlier = length - 1
            first_bucket = max(num_earlier - self._budget.recent(num_earlier), 0) // self._bucket_rows
            for bucket in range(self._first_bucket.get(req_idx, first_bucket), first_bucket):
                buckets += [bucket % self._num_buckets] * self._num_sets
                rows += range(req_idx * self._num_sets, (req_idx + 1) * self._num_sets)
            self._first_bucket[req_idx] = first_bucket
        if not rows:
            return
        width = max(batch.lengths) - 1
        row_ids = torch.tensor(rows, device=self._sums.device)
        places = (slice(None), torch.tensor(buckets, device=self._sums.device), row_ids, slice(width))
        self._sums[:, :, :width].index_add_(1, row_ids, self._buckets[places].double(), alpha=-1)
        self._buckets[places] = 0.0
