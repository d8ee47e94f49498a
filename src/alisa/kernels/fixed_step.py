"""A decode step that reads the same tokens in every layer, known before the first runs: what a kernel for it is given.

Layer by layer it is `AppendKernel` and `DecodeKernel`, with the same results to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from alisa.spec import RowFormat

if TYPE_CHECKING:
    from alisa.kernels import _native


class FixedSlots(NamedTuple):
    """Where the rows of such a step are."""

    new: Tensor
    """Int64[B]: where the new tokens go."""
    read: Tensor
    """Int32[S, J, K]: what is read, the new tokens included."""
    counts: Tensor
    """Int32[B]: how many of these each new token reads."""
    entries: Tensor | None
    """Int32[B]: which of the S each new token reads; None: one after the other."""


class FixedStepKernel(Protocol):
    """Makes the attention of all layers."""

    def in_all_layers(
        self,
        layers: Sequence[Tensor],
        row_format: RowFormat,
        slots: FixedSlots,
        softcap: float | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> _native.FixedAttention:
        """Attention of all layers of a step, whose q, k and v will be here one layer after the other.

        Args:
            layers: rows UInt8[R, row_bytes] of each.
            row_format: of all of them.
            slots: what is written and read; the tensors live as long as the result.
            softcap: of the logits, or None.
            q: `[B, 1, H, D]`, contiguous.
            k: `[B, 1, G, D]`, each token's values in one run.
            v: the same.

        Raises:
            TypeError: dtypes are not those that rows are made of.
            ValueError: shapes do not fit each other.
        """
        ...
