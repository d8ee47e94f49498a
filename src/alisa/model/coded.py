"""Weights in 4 bits as files hold them, on the way into layers that take them over as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.model.pages import page_tensor
from alisa.spec import SPAN


class Spans(NamedTuple):
    """Weights in 4 bits, every `SPAN` of them with a range: `minimum + scale * level`."""

    levels: Tensor
    """UInt8[..., spans, SPAN], 0 to 15."""
    scales: Tensor
    """Float16[..., spans]; may be negative."""
    minima: Tensor
    """Float16[..., spans]"""


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows of a weight in the bytes of its file, decoded a few at a time."""

    blocks: Tensor
    """UInt8[out, blocks of a row, bytes of a block]"""
    decode: Callable[[Tensor], Spans]
    """Blocks UInt8[N, bytes of a block] -> the spans of each, `[N, spans of a block]`."""
    num_in: int

    @property
    def shape(self) -> tuple[int, int]:
        """As that of a tensor, `[out, in]`."""
        return len(self.blocks), self.num_in

    def spans(self, first: int, last: int) -> Spans:
        """Rows `[first, last)`, `[rows, spans]`."""
        levels, scales, minima = self.decode(self.blocks[first:last].flatten(0, 1))
        rows = last - first
        return Spans(levels.view(rows, -1, SPAN), scales.view(rows, -1), minima.view(rows, -1))

    def moved(self, order: Tensor) -> CodedRows:
        """The rows with these numbers, Int64[rows], in this order."""
        blocks = page_tensor((len(order), *self.blocks.shape[1:]), torch.uint8)
        return replace(self, blocks=torch.index_select(self.blocks, 0, order, out=blocks))


CodedWeight = tuple[CodedRows | Tensor, ...]
"""Pieces of a weight, joined along the rows; those that their file has in other formats as numbers `[out, in]`."""
