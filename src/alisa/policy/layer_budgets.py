"""Budgets of single layers: found by `alisa tune` in one pass over a text, read by `--budgets FILE`.

Layers differ in how much is lost when they read less. Of the tokens that a sparsity allows all layers together, more go
to those that need them; the sum stays the same. A file has the sparsity of each layer for some sparsities of all:

    {"kind": "layer-budgets", "model": {"family": "llama", ...}, "policy": "sketch", "edition": 2,
     "budgets": [{"sparsity": 0.95, "layers": [0.88, 0.95, 0.97, ...]}], "found": {...}}

A layer with a sliding window, which reads exactly that, has null.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from alisa.errors import InputError
from alisa.policy.registry import POLICIES
from alisa.records.document import read_json
from alisa.records.structure import structure
from alisa.spec import ModelSpec

STEPS = (0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.88, 0.8, 0.7, 0.5)
"""Sparsities that a layer may get; few, because a step of decoding is laid out once for each that is in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetedModel:
    """What a model must have in common with the one that budgets were found on: fields of `ModelSpec`."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, spec: ModelSpec) -> BudgetedModel:
        """That of a model."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        return (
            f"{self.family} of {self.num_layers} layers, {self.num_heads} heads ({self.num_kv_heads} of keys) of "
            f"{self.head_dim} values, {self.hidden_size} wide, {self.vocab_size} tokens"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBudget:
    """The tokens of one sparsity, shared out among the layers."""

    sparsity: float
    """Of all of them: the mean."""
    layers: tuple[float | None, ...]
    """Of each layer; None: it has a sliding window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBudgets:
    """What a file of budgets holds."""

    kind: Literal["layer-budgets"] = "layer-budgets"
    version: Literal[1] = 1
    """Of the file's form."""
    model: BudgetedModel
    policy: str
    edition: int
    """Of the policy: `PolicyEntry.edition`."""
    budgets: tuple[LayerBudget, ...]
    found: dict[str, Any]
    """On which text, when, by which version; for people."""

    def of(self, spec: ModelSpec, policy: str, sparsity: float) -> tuple[float, ...]:
        """The sparsity of each layer without a sliding window, for `Budget.layers`.

        Raises:
            InputError: they were found for another model, policy or sparsity.
        """
        own = BudgetedModel.of(spec)
        if own != self.model:
            raise InputError(f"they are of another model ({self.model}) than this ({own}); `alisa tune` finds its own.")
        if (policy, POLICIES[policy].edition) != (self.policy, self.edition):
            raise InputError(f"they are for {self.policy} (edition {self.edition}), not for {policy}.")
        found = next((budget for budget in self.budgets if budget.sparsity == sparsity), None)
        if found is None:
            known = ", ".join(f"{budget.sparsity:g}" for budget in self.budgets)
            raise InputError(
                f"they are for a sparsity of {known}, not of {sparsity:g}; choose one of these, or "
                f"`alisa tune --sparsity {sparsity:g}`."
            )
        windows = spec.attention.windows or (None,) * spec.num_layers
        own_layers = tuple(layer for layer, window in zip(found.layers, windows, strict=True) if window is None)
        chosen = tuple(layer for layer in own_layers if layer is not None)
        if len(chosen) < len(own_layers):
            raise InputError(
                "layers that had a sliding window when they were found have none under this --max-model-len; give "
                "`alisa tune` the same one."
            )
        return chosen


def load_layer_budgets(path: Path) -> LayerBudgets:
    """The budgets that a file holds.

    Raises:
        InputError: it is missing, or holds something else.
    """
    values = read_json(path)
    try:
        budgets = structure(LayerBudgets, values)
    except InputError as error:
        raise InputError(f"{path} holds no budgets of layers ({error}); `alisa tune` writes such a file.") from error
    for budget in budgets.budgets:
        wrong = [layer for layer in budget.layers if layer is not None and not 0 <= layer < 1]
        if wrong or len(budget.layers) != budgets.model.num_layers or budgets.policy not in POLICIES:
            raise InputError(f"{path} does not have a sparsity from 0 up to but not 1 for every layer of its model.")
    return budgets


def layer_sparsities(path: Path | None, spec: ModelSpec, policy: str, sparsity: float) -> tuple[float, ...]:
    """`LayerBudgets.of` of a file; empty without one.

    Raises:
        InputError: the file is missing, or for something else.
    """
    if path is None:
        return ()
    budgets = load_layer_budgets(path)
    try:
        return budgets.of(spec, policy, sparsity)
    except InputError as error:
        raise InputError(f"The budgets {path} cannot be used: {error}") from error


def share_out(losses: Sequence[Sequence[float]], sparsities: Sequence[float], sparsity: float) -> tuple[float, ...]:
    """The sparsity of each layer, so that their losses add up to little; the mean is at least `sparsity`.

    Greedy water-filling: every layer begins with the highest sparsity, and the next tokens go to the layer whose loss
    falls most for each of them, by one step or several.

    Args:
        losses: of each layer, at each of the sparsities.
        sparsities: the steps, falling.
        sparsity: what all layers together may read.
    """
    kept = [1 - step for step in sparsities]
    left = len(losses) * (1 - sparsity - kept[0]) + 1e-9
    steps = [0] * len(losses)

    def best(layer: int) -> tuple[float, int, int, int]:
        """(minus the fall for each token, layer, from, to): a concave hull, so that no later step is a better one."""
        at = steps[layer]
        falls = [
            ((losses[layer][at] - losses[layer][to]) / (kept[to] - kept[at]), to) for to in range(at + 1, len(kept))
        ]
        fall, to = max(falls, default=(0.0, at))
        return -fall, layer, at, to

    queue = [best(layer) for layer in range(len(losses))]
    heapq.heapify(queue)
    while queue:
        _, layer, at, to = heapq.heappop(queue)
        while to > at and kept[to] - kept[at] > left:
            to -= 1
        if to > at:
            left -= kept[to] - kept[at]
            steps[layer] = to
            heapq.heappush(queue, best(layer))
    return tuple(sparsities[step] for step in steps)
