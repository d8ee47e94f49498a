"""Policies by the name users type."""

from __future__ import annotations

from alisa.budget import Budget
from alisa.config import PolicyName
from alisa.policy.base import SelectionPolicy
from alisa.policy.dense import Dense
from alisa.policy.h2o import HeavyHitters
from alisa.policy.pattern import Pattern
from alisa.policy.sketch import KeySketch
from alisa.policy.swa import SparseWindow


def make_policy(name: PolicyName, sparsity: float) -> SelectionPolicy:
    """The policy of this name; `sparsity` becomes its budget where it has one."""
    budget = Budget(sparsity)
    match name:
        case "dense":
            return Dense()
        case "swa":
            return SparseWindow(budget)
        case "swa-head":
            return SparseWindow(budget, per_head=True)
        case "h2o":
            return HeavyHitters(budget)
        case "sketch":
            return KeySketch(budget)
        case "sketch-2bit":
            return KeySketch(budget, bits=2)
        case "sketch-8bit":
            return KeySketch(budget, bits=8)
        case "sketch-head":
            return KeySketch(budget, per_head=True)
        case "sketch-plain":
            return KeySketch(budget, completes=False)
        case "oracle":
            return KeySketch(budget, bits=None)
        case "local" | "strided" | "streaming":
            return Pattern(name, budget)
