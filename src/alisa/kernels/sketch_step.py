"""A layer's part of a decode step that reads by a sketch, in one call: what a kernel that has it is given, and gives.

Row by row it is `AppendKernel`, `SelectionKernels.sketch_append` (keys, values), `sketch_complete`, a look-up of slots,
`DecodeKernel` and `rest_blend`, with the same results to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from alisa.kernels.base import Ranking, Sketch
from alisa.spec import RowFormat

if TYPE_CHECKING:
    from alisa.kernels import _native


class LayerRows(NamedTuple):
    """One layer's rows on the device, and what a policy keeps of their keys and values."""

    rows: Tensor
    """UInt8[R, row_bytes]"""
    keys: Sketch
    values: Sketch


class StepSlots(NamedTuple):
    """Where the rows of a decode step are."""

    new: Tensor
    """Int64[B]: where the new tokens go."""
    table: Tensor
    """Int32[S, W]: slots of all positions of S sequences."""
    table_rows: Tensor | None
    """Int64[B]: which of them each new token belongs to; None: one after the other."""


class RunningSketchStep(Protocol):
    """One step, of all layers that choose equally many tokens."""

    @property
    def positions(self) -> Tensor:
        """Int32[B * J, K], what the last layer read, ascending; each layer writes over the former one's."""
        ...

    @property
    def shares(self) -> Tensor:
        """Float32[B, H], the part of each head's weight that lies on them; each layer writes over the former one's."""
        ...

    @property
    def choosing(self) -> float:
        """The part of the last layer's time that went into choosing and into what stands for the rest."""
        ...

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output `[B, 1, H, D]` of new tokens with q `[B, 1, H, D]`, k and v `[B, 1, G, D]`, which are kept.

        `layer` counts those that were bound. Each layer writes its output over the former one's.

        Raises:
            TypeError: dtypes are not those that rows and sketches are made of.
            ValueError: shapes do not fit each other.
        """
        ...

    def native(self, q: Tensor, k: Tensor, v: Tensor) -> _native.SketchStep:
        """What runs the layers whose new tokens are like these in shape and dtype; it lives as long as this step.

        Raises:
            TypeError, ValueError: as a call.
        """
        ...


class BoundSketchSteps(Protocol):
    """Makes steps of the same layers."""

    def begin(self, slots: StepSlots, ranking: Ranking, ids: Tensor) -> RunningSketchStep:
        """A step that chooses by this ranking, which asks for no coverage.

        Args:
            slots: of its rows.
            ranking: what is chosen.
            ids: Int64[B], where in the sketches the new tokens go.
        """
        ...

    def in_all_layers(
        self, running: Sequence[RunningSketchStep], of_layer: Sequence[int], q: Tensor, k: Tensor, v: Tensor
    ) -> _native.SketchAttention:
        """Attention of all layers of a step, whose q, k and v will be here one layer after the other.

        Args:
            running: the steps that layers belong to.
            of_layer: which of them each layer belongs to.
            q: `[B, 1, H, D]`, contiguous.
            k: `[B, 1, G, D]`, each token's values in one run.
            v: the same.

        Raises:
            TypeError, ValueError: as a layer's call.
        """
        ...


class SketchStepKernel(Protocol):
    """Knows layers by their addresses."""

    def bind(self, layers: Sequence[LayerRows], row_format: RowFormat, num_heads: int) -> BoundSketchSteps:
        """Steps of these layers, which stay where they are; H query heads."""
        ...
