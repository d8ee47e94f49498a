"""Policies by the name users type, and all that is known of them without torch.

The command line lists them, the planner prices them and the scheduler counts with them from here; the class itself is
imported when a model is about to run. A new policy is a file and an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from alisa.budget import Budget, Reads, state_tokens
from alisa.policy.state_bytes import KeyBits, StateBytes, StateSize, no_state, sketch_state, sums_state, window_state
from alisa.spec import AttentionShape

if TYPE_CHECKING:
    from alisa.policy.base import SelectionPolicy


def _no_window(budget: Budget, prompt_len: int) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class PolicyEntry:
    """One policy: what it reads and costs, and where its class is.

    The defaults are those of a pattern of positions: it reads the budget and keeps nothing.
    """

    help: str
    """What it reads, for `--help`."""
    policy_class: str
    """`module:class`; called with the budget and the options."""
    options: Mapping[str, Any] = field(default_factory=dict)
    query_aware: bool = False
    """As `SelectionPolicy.query_aware`; so are the next three."""
    can_truncate: bool = True
    reads: Callable[[Budget, int], tuple[int, int]] = Budget.split
    observation_window: Callable[[Budget, int], int] = _no_window
    state: StateSize = no_state
    """Bytes of its state."""
    churn: float = 0.0
    """Share of the older selection that changes from one step to the next."""
    priced_as: Literal["none", "ranked", "sketch-keys", "sketch"] = "none"
    """Which measured selection it costs as much as: `planner.hardware.Hardware.selection`."""
    covers: bool = False
    """Whether weights may decide how many tokens a step reads: `Budget.coverage`."""
    mixes: bool = True
    """Whether the sequences of a batch may have budgets of their own: nothing that is kept depends on the budget."""
    by_layer: bool = False
    """Whether layers may read different numbers of tokens: `Budget.layers`."""
    edition: int = 1
    """Counts up when the name comes to mean other numbers: what was measured of an earlier edition is measured anew."""

    def usable_prefix(self, sparsity: float, prompt_len: int) -> int:
        """Tokens at the start of a prompt whose rows may come from a cache.

        The rows of the observation window have to be computed: the policy wants to see what they attend to.
        """
        return prompt_len - self.observation_window(Budget(sparsity), prompt_len)

    def state_bytes(self, shape: AttentionShape, sparsity: float, max_len: int) -> StateBytes:
        """Memory of the state for each token, and for each sequence on top, none longer than `max_len`.

        Layers with a sliding window have none: they read it, and nothing is chosen.
        """
        return self.state(shape.full_layers(), Budget(sparsity), max_len)

    def total_state_bytes(self, shape: AttentionShape, sparsity: float, num_seqs: int, length: int) -> int:
        """As `PolicyState.nbytes` when `num_seqs` sequences of this length are open, none ever longer."""
        found = self.state_bytes(shape, sparsity, length)
        return num_seqs * (state_tokens(length) * found.per_token + found.per_sequence)


_HISTORY_CHURN, _QUERY_CHURN = 0.004, 0.33
"""From benchmarks/results/eviction.jsonl (the embedded model on prose, caps of 25 and 40 %): the hot cache holds 99.6
to 99.8 % of what swa wants, because history changes slowly, and 72 to 74 % of what sketch wants."""


def _window(help_text: str, *, per_head: bool) -> PolicyEntry:
    return PolicyEntry(
        help=help_text,
        policy_class="alisa.policy.swa:SparseWindow",
        options={"per_head": per_head},
        can_truncate=False,
        observation_window=lambda budget, prompt_len: min(budget.recent(prompt_len), prompt_len),
        state=window_state(per_head=per_head),
        churn=_HISTORY_CHURN,
        priced_as="ranked",
        mixes=False,
    )


def _sketch(
    help_text: str,
    *,
    completion: Literal["values", "mean", "none"],
    bits: KeyBits | None = 4,
    per_head: bool = False,
    edition: int = 1,
) -> PolicyEntry:
    return PolicyEntry(
        help=help_text,
        policy_class="alisa.policy.sketch:KeySketch",
        options={"bits": bits, "per_head": per_head, "completion": completion},
        query_aware=True,
        can_truncate=completion != "mean",
        state=sketch_state(bits=bits, uses_values=completion == "values", uses_mean=completion == "mean"),
        churn=_QUERY_CHURN,
        priced_as="sketch" if completion == "values" else "sketch-keys",
        covers=bits is not None,
        by_layer=True,
        edition=edition,
    )


POLICIES: Mapping[str, PolicyEntry] = MappingProxyType(
    {
        "dense": PolicyEntry(
            help="all",
            policy_class="alisa.policy.dense:Dense",
            reads=lambda budget, num_earlier: (0, num_earlier),
            mixes=False,
        ),
        "local": PolicyEntry(
            help="the most recent",
            policy_class="alisa.policy.pattern:Local",
            reads=lambda budget, num_earlier: (sum(budget.split(num_earlier)), 0),
        ),
        "strided": PolicyEntry(
            help="the recent ones, and older ones at equal distances",
            policy_class="alisa.policy.pattern:Strided",
            churn=0.5,
        ),
        "streaming": PolicyEntry(help="the first four and the recent", policy_class="alisa.policy.pattern:Streaming"),
        "h2o": PolicyEntry(
            help="the recent ones, and those most attended since the beginning",
            policy_class="alisa.policy.h2o:HeavyHitters",
            can_truncate=False,
            observation_window=lambda budget, prompt_len: prompt_len,
            state=sums_state,
            churn=_HISTORY_CHURN,
            priced_as="ranked",
        ),
        "swa": _window("the recent ones, and those most attended lately (ALISA)", per_head=False),
        "swa-head": _window("the same for each KV head", per_head=True),
        "sketch": _sketch(
            "the recent ones, and those that a 4-bit copy of all keys (8 bits in heads of more than 128 values) finds "
            "best for this query; a 2-bit copy of the values stands in for the rest",
            completion="values",
            bits="auto",
            edition=2,
        ),
        "sketch-head": _sketch("the same for each KV head", completion="values", bits="auto", per_head=True, edition=2),
        "sketch-mean": _sketch("as sketch, with the mean of all values for the rest", completion="mean"),
        "sketch-mean-head": _sketch("the same for each KV head", completion="mean", per_head=True),
        "sketch-2bit": _sketch("sketch-mean with 2 bits", completion="mean", bits=2),
        "sketch-8bit": _sketch("with 8 bits", completion="mean", bits=8),
        "sketch-plain": _sketch("sketch with nothing for the rest", completion="none"),
        "oracle": _sketch("sketch-mean with exact keys, for comparison", completion="mean", bits=None),
    }
)


def reads_of(name: str, sparsity: float, layers: tuple[float, ...] = ()) -> Reads:
    """What `SelectionPolicy.reads` of the policy with this name says, the most; the others are fields of `Budget`."""
    reads, budget = POLICIES[name].reads, Budget(sparsity, layers=layers)
    return lambda num_earlier: reads(budget, num_earlier)


def can_truncate_names() -> str:
    """The policies that can take tokens back."""
    return ", ".join(name for name, entry in POLICIES.items() if entry.can_truncate)


def observes_prompts(name: str) -> bool:
    """Whether the policy looks at what some rows of a prompt attend to."""
    return POLICIES[name].observation_window is not _no_window


def policies_help() -> str:
    """One sentence for each policy."""
    return " ".join(f"{name}: {entry.help}." for name, entry in POLICIES.items())


def make_policy(
    name: str, sparsity: float, coverage: float | None = None, layers: tuple[float, ...] = ()
) -> SelectionPolicy:
    """The policy of this name; the others become its `Budget`."""
    entry = POLICIES[name]
    module, class_name = entry.policy_class.split(":")
    return getattr(import_module(module), class_name)(Budget(sparsity, coverage, layers), **entry.options)
