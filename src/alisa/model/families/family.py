"""What a model family is: a reading of its config and a map of its weight names; data, no forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from alisa.spec import ModelSpec

_EXPERT = re.compile(r"experts\.(\d+)")


@dataclass(frozen=True, slots=True)
class WeightPiece:
    """A piece of one of our tensors: a checkpoint tensor, or some rows of it."""

    name: str
    """Name in the checkpoint without its prefix; `{layer}` and `{expert}` stand for their numbers."""
    take: Callable[[Tensor, ModelSpec], Tensor] | None = None
    """Cuts our rows `[out, in]` (or `[out]`) out of the checkpoint tensor; None: it is used as it is.

    Of a matrix it takes whole rows: the numbers of the rows `[out]` come out as the rows do."""
    of_all_experts: bool = False
    """The tensor holds those of all experts, one after the other."""
    expert: int | None = None
    """Which of them is meant; `Family.layer_pieces` says so."""


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of Hugging Face configs."""

    model_type: str
    to_spec: Callable[[Mapping[str, Any]], ModelSpec]
    """Reads a config; raises ModelError with every reason at once."""
    model_parts: Mapping[str, tuple[WeightPiece, ...]]
    """Our names outside the layers -> pieces, joined along the rows."""
    layer_parts: Mapping[str, tuple[WeightPiece, ...]]
    """Our names inside a layer -> pieces, joined along the rows; `experts.{expert}.up.weight` for all experts."""
    prefixes: tuple[str, ...]
    """Prefixes that repositories of different ages put before the names, longest first."""
    aliases: Mapping[str, str]
    """Other names of the same tensor -> the name used in the parts."""
    ignored: tuple[str, ...] = ()
    """What the names of tensors begin with that are no part of the language model (as stored)."""

    def layer_pieces(self, part: str, layer: int) -> tuple[WeightPiece, ...]:
        """Where one of our tensors inside a layer is, `experts.3.up.weight` for example."""
        expert = _EXPERT.match(part)
        number = expert[1] if expert else ""
        key = part if expert is None else f"experts.{{expert}}{part[expert.end() :]}"
        pieces = self.layer_parts[key]
        return tuple(
            replace(
                piece,
                name=piece.name.format(layer=layer, expert=number),
                expert=int(number) if piece.of_all_experts else None,
            )
            for piece in pieces
        )

    def canonical(self, name: str) -> str:
        """A checkpoint name without its prefix, in the spelling that the parts use."""
        for prefix in self.prefixes:
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        return self.aliases.get(name, name)


def same(**names: str) -> dict[str, tuple[WeightPiece, ...]]:
    """Parts for linear layers and norms that are stored as they are: weight and bias under one stem."""
    parts: dict[str, tuple[WeightPiece, ...]] = {}
    for ours, theirs in names.items():
        parts[f"{ours}.weight"] = (WeightPiece(f"{theirs}.weight"),)
        parts[f"{ours}.bias"] = (WeightPiece(f"{theirs}.bias"),)
    return parts


def joined(ours: str, *theirs: str) -> dict[str, tuple[WeightPiece, ...]]:
    """Parts for one of our linear layers that is several in the checkpoint, in row order."""
    return {f"{ours}.{kind}": tuple(WeightPiece(f"{name}.{kind}") for name in theirs) for kind in ("weight", "bias")}
