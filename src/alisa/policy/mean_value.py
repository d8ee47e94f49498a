"""What stands in for the tokens that a step does not read: the mean of all values, at the weight these tokens have.

    out = share * out(read) + (1 - share) * mean(V)

The share is the part of a head's attention weight that lies on the tokens read. Attention that is spread thinly over
many tokens is close to their mean, and no choice of a few holds it. The correction is that of SparQ (arXiv 2312.04985).
"""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.base import SelectionKernels
from alisa.spec import ModelSpec


class MeanValues:
    """The sum of the values of every sequence, Float64[L, req_indices, G, D].

    In double precision, so that neither the length of a text nor how its tokens came in shows in the mean.
    """

    def __init__(
        self, spec: ModelSpec, max_num_seqs: int, device: torch.device, kernels: SelectionKernels | None
    ) -> None:
        shape = (spec.num_layers, max_num_seqs, spec.num_kv_heads, spec.head_dim)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._add = mean_add if kernels is None else kernels.mean_add
        self._blend = mean_blend if kernels is None else kernels.mean_blend

    @property
    def nbytes(self) -> int:
        """Memory of the sums."""
        return self._sums.nbytes

    def open(self, req_idx: int) -> None:
        """Nothing of the request index's former owner remains."""
        self._sums[:, req_idx].zero_()

    def add(self, layer: int, req_index: Tensor, values: Tensor) -> None:
        """New tokens of req_indices Int64[N] have these values `[N, G, D]`."""
        self._add(self._sums[layer], req_index, values)

    def blend(self, layer: int, req_index: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> Tensor:
        """Output `[B, H, D]` of the tokens read, and the mean for what is missing of each head's weight.

        Args:
            layer: whose sums.
            req_index: Int64[B].
            lengths: Int32[B], tokens of each sequence.
            out: `[B, H, D]`.
            shares: Float32[B, H]: the part of the weight that was read.
        """
        return self._blend(self._sums[layer], req_index, lengths, out, shares)


def mean_add(sums: Tensor, req_index: Tensor, values: Tensor) -> None:
    """The reference of `SelectionKernels.mean_add`."""
    sums.index_add_(0, req_index, values.to(torch.float64))


def mean_blend(sums: Tensor, req_index: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> Tensor:
    """The reference of `SelectionKernels.mean_blend`."""
    means = (sums.index_select(0, req_index) / lengths[:, None, None]).float().unsqueeze(2)  # [B, G, 1, D]
    of_groups = (len(out), sums.shape[1], -1)
    read, share = out.float().view(*of_groups, out.shape[-1]), shares.view(*of_groups, 1)
    return torch.lerp(means, read, share).view(out.shape).to(out.dtype)
