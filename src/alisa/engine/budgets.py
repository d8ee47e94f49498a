"""How much the decode steps of one request may read, where it asks for less than the engine's options allow."""

from __future__ import annotations

from dataclasses import dataclass

from alisa.budget import Budget
from alisa.config import EngineConfig
from alisa.errors import InputError
from alisa.policy.registry import POLICIES


@dataclass(frozen=True, slots=True)
class ReadingParams:
    """What a request asks for; None: as the engine has it."""

    sparsity: float | None = None
    """Share of the earlier tokens that a decode step does not read; not below that of the engine."""
    coverage: float | None = None
    """As few of the others as have this part of the attention weight; 1: all."""


AS_CONFIGURED = ReadingParams()


@dataclass(frozen=True, slots=True)
class RequestBudgets:
    """What requests may ask for. Memory is set aside for what the engine's own budget reads: that is the most.

    A batch may have sequences of many budgets: how many tokens a step reads is a number of each sequence.
    """

    config: EngineConfig
    on_cpu: bool
    """A GPU would have to be asked in each layer how many tokens have a coverage."""

    def budget(self, asked: ReadingParams) -> Budget | None:
        """The budget of a request; None: that of the engine.

        Raises:
            InputError: it asks for what this engine cannot read.
        """
        config = self.config
        sparsity = config.sparsity if asked.sparsity is None else asked.sparsity
        coverage = config.coverage if asked.coverage is None else asked.coverage
        if (sparsity, coverage) == (config.sparsity, config.coverage):
            return None
        what = f"coverage is {coverage}" if sparsity == config.sparsity else f"sparsity is {sparsity}"
        if problem := self._problem(sparsity, coverage):
            raise InputError(f"{what}, and {problem}.")
        return Budget(sparsity, coverage)

    def _problem(self, sparsity: float, coverage: float | None) -> str:
        """Why this cannot be had, and the way out; empty: it can."""
        config, entry = self.config, POLICIES[self.config.policy]
        if config.exact:
            return "this engine is exact: each step reads everything; leave it out"
        if not entry.mixes:
            return (
                f"with the policy {config.policy} all requests are read alike; leave it out, or start the engine with "
                "another --policy, such as sketch"
            )
        if not config.sparsity <= sparsity < 1:
            return (
                f"this engine has memory for what {config.sparsity} reads; ask for {config.sparsity} up to but not 1, "
                "or start it with a lower --sparsity"
            )
        if coverage is None or coverage == config.coverage:
            return ""
        if not 0 < coverage <= 1:
            return "allowed is above 0 up to 1"
        if not entry.covers:
            return (
                f"{config.policy} does not know the weight of what it does not read; leave it out, or start the engine "
                "with another --policy, such as sketch"
            )
        return "" if self.on_cpu else "on a GPU there is none; leave it out, or ask for a higher sparsity"
