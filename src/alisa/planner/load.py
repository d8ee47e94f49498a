"""What a step has to do, counted from its `StepPlan`: how many rows are read, from where, and how many move.

Which rows a policy picks is not known beforehand, so three assumptions stand here, and nowhere else:

- the older tokens that a sequence reads are spread evenly over those that it could read, so that a share of them lies
  below the device which is the share of the candidates that does;
- of the rows below that a layer reads, a share `churn` is not what it read in the step before; the others are still in
  the hot cache if that is large enough, and what else it holds is a random part of the rest;
- a selection larger than the hot cache is read past it, so that what does not fit is fetched in every step.

`RunConfig.hit_rate` replaces the second and third by a measured figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from alisa.budget import Reads
from alisa.config import PolicyName, WeightFormat
from alisa.outputs import Phase
from alisa.planner.sparse_reading import SparseReading, causal_pairs
from alisa.planner.speculation import DraftConfig
from alisa.policy.registry import POLICIES, reads_of
from alisa.scheduler.placement.base import Limits
from alisa.scheduler.plan import ScheduledChunk, StepPlan
from alisa.scheduler.simulate import PREFILL_CHUNK, lower_bounds

_KEPT_WHEN_SMALL = 0.5
"""Share of a hot cache smaller than the selection that is of use. Rows that are read past it do not enter it, while new
tokens take the room of those in it, until the next move makes hot rows of the device's own."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """How a model is run: all that decides the work except the schedule."""

    policy: PolicyName
    sparsity: float
    dtype: str
    """What the model computes in."""
    kv_dtype: str
    hit_rate: float | None = None
    """Share of the rows wanted from below that the hot cache holds, where it was measured."""
    weight_dtype: WeightFormat = "float"
    """What the linear layers are held in; `float`: `dtype`."""
    layers: tuple[float, ...] = ()
    """As in `alisa.budget.Budget`: every layer is counted as the one that reads most."""
    drafts: DraftConfig | None = None
    """None: a step tries one token of each sequence."""
    sparse: SparseReading | None = None
    """None: prompts are read densely."""

    @property
    def exact(self) -> bool:
        """Whether the policy only makes up drafts, and dense attention says which of them are right."""
        return self.drafts is not None and self.drafts.source == "policy"

    @property
    def reading_policy(self) -> PolicyName:
        """As `EngineConfig.reading_policy`: it says what a step reads whose tokens count."""
        return "dense" if self.exact else self.policy

    @property
    def products(self) -> str:
        """Which of `Hardware.gemm` its linear layers are priced with."""
        return self.dtype if self.weight_dtype == "float" else self.weight_dtype

    @property
    def reads(self) -> Reads:
        """Tokens a step reads whose tokens count."""
        return reads_of(self.reading_policy, self.sparsity, layers=self.layers)

    @property
    def churn(self) -> float:
        """As the policy's entry says."""
        return POLICIES[self.reading_policy].churn

    def pairs(self, length: int) -> float:
        """(query, key) pairs that a prompt of `length` tokens multiplies, in a layer without a window."""
        return causal_pairs(length) if self.sparse is None else self.sparse.pairs(length)


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of one step; rows and tokens are those of one layer, summed over sequences."""

    phase: Phase
    prefill: bool
    num_sequences: int
    num_tokens: int
    """Tokens that go through the model."""
    num_finished: int
    """Sequences whose logits are computed."""
    pairs: float
    """Prefill: (query, key) pairs of causal attention."""
    read_pairs: float
    """Of these, those that are multiplied where a layer has no window."""
    read: int
    """Rows that decode attention reads, the new ones included."""
    candidates: int
    """Earlier tokens, which a policy ranks."""
    wanted: float
    """Of the rows read, those that have left the device's own part."""
    fetched: float
    """Of these, rows that a lower tier must give."""
    rebuilt: float
    """Rows that are rebuilt from hidden states."""
    past: float
    """Of both, those that are read past a hot cache too small for them, through the staging buffers."""
    stored: float
    """Rows that are offloaded."""
    hidden_stored: int
    """Layer inputs that are written to a lower tier, in case their rows are deleted."""
    device_tokens: int
    """Tokens with rows on the device after the step, the hot cache filled."""
    below_tokens: int
    """Tokens with rows in lower tiers."""
    deleted_tokens: int
    hidden_tokens: int
    """Tokens whose layer inputs are kept."""
    queries: int = 1
    """Decode: tokens of a sequence that share the rows that are read."""


@dataclass(slots=True)
class _Seq:
    bounds: list[int]
    length: int = 0


def loads(
    plans: Iterable[StepPlan],
    limits: Limits,
    method: RunConfig,
    *,
    prompt_lens: dict[int, int] | int | None,
    copies: int = 1,
    stride: int = 1,
) -> Iterator[StepWork]:
    """The work of every plan, in order.

    Args:
        plans: of one batch, as `rollout` gives them.
        limits: what they were made for.
        method: how the model is run.
        prompt_lens: of every request index, or of all alike; None: unknown, a piece shorter than a pass ends its
            prompt.
        copies: sequences that each request index stands for; `limits` are then the share of one.
        stride: decode steps that each decode plan stands for: its moves are those of all of them.
    """
    sequences: dict[int, _Seq] = {}
    reads = method.reads
    for plan in plans:
        for chunk in plan.chunks:
            if chunk.start == 0:  # a new sequence, or one that reads its prompt again
                sequences[chunk.req_idx] = _Seq([0] * (len(limits.tiers) + 1))
        stored = 0
        for move in plan.moves:
            lower_bounds(sequences[move.req_idx].bounds, move, limits)
            stored += move.num_tokens if move.target is not None else 0
        pairs = num_read = candidates = finished = hidden_stored = 0
        read_pairs = wanted = deleted = population = 0.0
        for chunk in plan.chunks:
            sequence = sequences[chunk.req_idx]
            sequence.length = chunk.end
            hidden_stored += max(min(chunk.end, limits.rebuildable) - chunk.start, 0)
            if plan.prefill:
                pairs += causal_pairs(chunk.end) - causal_pairs(chunk.start)
                read_pairs += method.pairs(chunk.end) - method.pairs(chunk.start)
                finished += _ends_prompt(chunk, prompt_lens)
                continue
            finished += chunk.count
            earlier = chunk.end - 1
            recent, older = reads(earlier)
            num_read += recent + older + 1
            candidates += earlier
            below, gone = sequence.bounds[0], sequence.bounds[-1]
            open_to_choice = earlier - recent
            if below and open_to_choice:
                share = min(below, open_to_choice) / open_to_choice
                wanted += older * share + max(below - open_to_choice, 0)
                deleted += older * min(gone, open_to_choice) / open_to_choice
                population += below
        # Whoever takes no part in a decode step has finished, or is swapped.
        there = sequences.values() if plan.prefill else [sequences[chunk.req_idx] for chunk in plan.chunks]
        own = sum(sequence.length - sequence.bounds[0] for sequence in there)
        hot = max(limits.device_tokens - own, 0)
        missing = _missing(method, wanted, population, hot)
        rebuilt = missing * deleted / wanted if wanted else 0.0
        yield StepWork(
            phase=plan.phase,
            prefill=plan.prefill,
            num_sequences=copies * len(plan.chunks),
            num_tokens=copies * plan.num_tokens,
            num_finished=copies * finished,
            pairs=copies * pairs,
            read_pairs=copies * read_pairs,
            read=copies * num_read,
            candidates=copies * candidates,
            wanted=copies * wanted,
            fetched=copies * (missing - rebuilt),
            rebuilt=copies * rebuilt,
            past=copies * missing if hot < wanted else 0.0,
            stored=copies * stored / (1 if plan.prefill else stride),
            hidden_stored=copies * hidden_stored,
            device_tokens=copies * int(own + min(hot, population)),
            below_tokens=copies * sum(sequence.bounds[0] - sequence.bounds[-1] for sequence in there),
            deleted_tokens=copies * sum(sequence.bounds[-1] for sequence in there),
            hidden_tokens=copies * sum(min(sequence.length, limits.rebuildable) for sequence in there),
        )


def _ends_prompt(chunk: ScheduledChunk, prompt_lens: dict[int, int] | int | None) -> bool:
    if prompt_lens is None:
        return chunk.count < PREFILL_CHUNK
    return chunk.end == (prompt_lens if isinstance(prompt_lens, int) else prompt_lens[chunk.req_idx])


def _missing(method: RunConfig, wanted: float, population: float, hot: float) -> float:
    """Of the rows wanted from below, those that the hot cache does not hold."""
    if wanted <= 0:
        return 0.0
    if method.hit_rate is not None:
        return wanted * (1 - method.hit_rate)
    if hot < wanted:
        return wanted - (1 - method.churn) * _KEPT_WHEN_SMALL * hot
    if population <= wanted:
        return 0.0
    return method.churn * wanted * max(0.0, 1 - (hot - wanted) / (population - wanted))
