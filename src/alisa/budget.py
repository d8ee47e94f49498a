"""How many tokens a step may read: pure integers, shared by the policies that choose them and the planner that prices.

Which tokens are read is a policy's business (`alisa.policy`); how many follows from the sparsity alone, so that a plan
needs neither weights nor torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property

Reads = Callable[[int], tuple[int, int]]
"""n earlier tokens -> (recent, older): the recent ones that every layer reads, and how many of the others."""

STATE_BLOCK_TOKENS = 64
"""The state of a selection policy is handed out in multiples of this many tokens."""

DENSE_TOKENS = 2048
"""The first tokens of a prompt that is read sparsely (`EngineConfig.sparse_prompts`), which are read densely: there is
little to save, and everything after them reads of them.

Whole sections, so that a place and not a length decides: a prompt's rows are those of a longer one that begins so.
"""


def state_tokens(num_tokens: int) -> int:
    """Tokens of policy state that a sequence of `num_tokens` tokens takes: whole blocks."""
    return -(-num_tokens // STATE_BLOCK_TOKENS) * STATE_BLOCK_TOKENS


@cache
def _ratio(sparsity: float) -> Fraction:
    """Share of the tokens that is read, as the decimal fraction that was typed."""
    return 1 - Fraction(str(sparsity))


@dataclass(frozen=True)
class Budget:
    """How many tokens a step may read: the one place where a sparsity becomes a count.

    With n earlier tokens and r = 1 - sparsity (the paper's caching ratio), k = round(n * r / 2): k recent tokens, k
    older ones, and the new token itself (Algorithm 1, line 1; docs/algorithm.md). Ties round up, so that sparsity 0 is
    dense for odd n too, and the ratio is kept as a fraction, so that 0.8 means 4/5 and not the nearest binary float.
    """

    sparsity: float
    coverage: float | None = None
    """Where the weights of a step decide how many tokens it reads, `split` is the most, and this the part of the weight
    that they are to have (Twilight, arXiv 2502.02770). Then the recent window, which is read in any case, is a quarter
    of the usual one."""
    layers: tuple[float, ...] = ()
    """The sparsity of each layer that a policy knows (`alisa.policy.layer_budgets`); empty: all have the same. Where
    they differ `split` is for the planner: what every layer reads, and the most that one reads."""
    dense_until: int = 16
    """Up to this many earlier tokens everything is read: k would be 1 or 2, and there is nothing to save."""

    def recent(self, num_earlier: int) -> int:
        """K for n earlier tokens; at least 1."""
        ratio = _ratio(self.sparsity)
        return max(1, (num_earlier * ratio.numerator + ratio.denominator) // (2 * ratio.denominator))

    def of_layer(self, layer: int) -> Budget:
        """The budget of one layer."""
        return replace(self, sparsity=self.layers[layer], layers=()) if self.layers else self

    @cached_property
    def _of_layers(self) -> tuple[Budget, ...]:
        """Every budget that a layer has, once."""
        return tuple(replace(self, sparsity=sparsity, layers=()) for sparsity in {*self.layers})

    def split(self, num_earlier: int) -> tuple[int, int]:
        """(recent, older) earlier tokens to read; their sum never passes n."""
        if self.layers:
            splits = [budget.split(num_earlier) for budget in self._of_layers]
            recent = min(recent for recent, _ in splits)
            return recent, max(map(sum, splits)) - recent
        if num_earlier <= self.dense_until:
            return num_earlier, 0
        recent = min(self.recent(num_earlier), num_earlier)
        older = min(recent, num_earlier - recent)
        if self.coverage is None:
            return recent, older
        always = -(-recent // 4)
        return always, older + recent - always
