"""What will happen: every step of a batch with its work and its price, before any of it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alisa.outputs import Medium
from alisa.planner.cost import CostModel, StepCost
from alisa.planner.draft_pricer import DraftPricer, PricedStep
from alisa.planner.footprint import activation_bytes, hidden_row_bytes, kv_token_bytes, policy_bytes, weight_bytes
from alisa.planner.hardware import Hardware
from alisa.planner.load import RunConfig, StepWork, loads
from alisa.scheduler.placement.base import Limits, PlacementPolicy, Tier, seq_view
from alisa.scheduler.placement.capacity import share_below
from alisa.scheduler.plan import ScheduledChunk, StepPlan
from alisa.scheduler.simulate import PREFILL_CHUNK, lower_bounds, rollout
from alisa.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class UniformWorkload:
    """Prompts of one length that all get as many tokens."""

    batch: int
    prompt_len: int
    output_len: int

    @property
    def num_rows(self) -> int:
        """Tokens of a sequence that are cached in the end: the last one is returned, never fed."""
        return self.prompt_len + self.output_len - 1

    @property
    def output_tokens(self) -> int:
        """Tokens that are generated."""
        return self.batch * self.output_len


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes for rows."""

    device_bytes: int
    """On the device, in addition to weights, activations and what the policy keeps; below 0: not even they fit."""
    below_bytes: int

    def limits(
        self, spec: ModelSpec, method: RunConfig, placement: PlacementPolicy, workload: UniformWorkload
    ) -> Limits:
        """Capacities in tokens, as the engine works them out; no tiers where even the hidden states do not fit."""
        token_bytes = kv_token_bytes(spec, method.kv_dtype)
        sizes = [workload.num_rows] * workload.batch
        device = min(max(self.device_bytes, 0) // token_bytes, sum(sizes))
        below = share_below(
            self.below_bytes,
            token_bytes,
            spec.num_layers * hidden_row_bytes(spec, method.dtype),
            device_tokens=device,
            sizes=sizes,
            planned=placement.most_deleted(workload.num_rows),
        )
        if not placement.uses_tiers or not below.fits:
            return Limits(device)
        return Limits(device, (Tier(Medium.DISK, below.num_tokens),), below.rebuildable)


def room_for(spec: ModelSpec, method: RunConfig, hardware: Hardware, workload: UniformWorkload) -> MemoryBudget:
    """What weights, activations and policy leave."""
    pass_tokens = min(PREFILL_CHUNK, workload.batch * workload.prompt_len)
    taken = weight_bytes(spec, method.dtype, packs_tied=hardware.packs_tied, weight_dtype=method.weight_dtype)
    taken += activation_bytes(spec, method.dtype, workload.batch, pass_tokens)
    taken += policy_bytes(spec, method.policy, method.sparsity, workload.batch, workload.num_rows)
    return MemoryBudget(hardware.device_bytes - taken, hardware.below_bytes)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Steps in order; each stands for `weight` steps like it."""

    loads: tuple[StepWork, ...]
    costs: tuple[StepCost, ...]
    weights: tuple[float, ...]
    drafted: tuple[PricedStep, ...] = ()
    """What stands behind the decode steps of a run that guesses ahead, whose costs are those of a token."""

    def total(self, *, prefill: bool | None = None) -> StepCost:
        """The sum of all steps, or of those that read prompts or do not."""
        total = StepCost()
        for load, cost, weight in zip(self.loads, self.costs, self.weights, strict=True):
            if prefill is None or load.prefill == prefill:
                total += cost if weight == 1 else cost.times(weight)
        return total


def simulate(
    cost: CostModel,
    method: RunConfig,
    placement: PlacementPolicy,
    limits: Limits,
    prompt_lens: Sequence[int],
    output_len: int,
    *,
    max_num_seqs: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Timeline:
    """Every step that the engine will make.

    Raises:
        CapacityError: a sequence does not fit even alone.
    """
    plans = list(
        rollout(
            placement,
            limits,
            prompt_lens,
            output_len,
            method.reads,
            max_num_seqs=max_num_seqs,
            prefill_chunk=prefill_chunk,
        )
    )
    uniform = len(set(prompt_lens)) == 1
    lengths: dict[int, int] | int = prompt_lens[0] if uniform else _first_owners(plans, prompt_lens)
    found = tuple(loads(plans, limits, method, prompt_lens=lengths))
    tiers = placement.uses_tiers
    return Timeline(found, tuple(cost.step(load, tiers=tiers) for load in found), (1.0,) * len(found))


def price_run(
    spec: ModelSpec, method: RunConfig, hardware: Hardware, plans: Sequence[StepPlan], limits: Limits, *, tiers: bool
) -> Timeline:
    """What the steps of a run should have cost, from the plans that were executed.

    Args:
        spec: the model.
        method: how it was run.
        hardware: where.
        plans: of all its steps.
        limits: what there was room for.
        tiers: whether its store had lower tiers.
    """
    cost = CostModel(spec, method, hardware)
    found = tuple(loads(plans, limits, method, prompt_lens=None))
    return Timeline(found, tuple(cost.step(load, tiers=tiers) for load in found), (1.0,) * len(found))


def simulate_uniform(
    cost: CostModel,
    method: RunConfig,
    placement: PlacementPolicy,
    limits: Limits,
    workload: UniformWorkload,
    *,
    stride: int = 1,
    drafts: DraftPricer | None = None,
) -> Timeline | None:
    """The steps of a batch of equal sequences that all run together, from one that has its share of everything.

    Args:
        cost: prices.
        method: how the model is run.
        placement: decides.
        limits: of the whole batch.
        workload: the batch.
        stride: decode steps from one that is priced to the next, which stands for all in between.
        drafts: prices the decode steps of a run that guesses ahead.

    Returns:
        None when they do not fit.
    """
    batch = workload.batch
    tiers = tuple(Tier(tier.medium, tier.num_tokens // batch) for tier in limits.tiers)
    share = Limits(limits.device_tokens // batch, tiers, limits.rebuildable)
    plans = list(_plans_of_one(placement, share, method, workload, stride))
    if not plans or plans[-1] is None:
        return None
    steps = [plan for plan in plans if plan is not None]

    def work(way: RunConfig) -> tuple[StepWork, ...]:
        return tuple(loads(steps, share, way, prompt_lens=workload.prompt_len, copies=batch, stride=stride))

    found = work(method)
    of_passes = found if drafts is None else work(drafts.drafting)
    per_pass = max(1, PREFILL_CHUNK // workload.prompt_len)
    costs: list[StepCost] = []
    weights: list[float] = []
    drafted: list[PricedStep] = []
    ends = [*(plan.chunks[0].end for plan in steps[1:]), workload.num_rows + 1]
    for load, of_pass, plan, end in zip(found, of_passes, steps, ends, strict=True):
        if drafts is None or plan.prefill:
            costs.append(cost.step(load, tiers=placement.uses_tiers))
        else:
            drafted.append(drafts.step(load, of_pass, tiers=placement.uses_tiers))
            costs.append(drafted[-1].token)
        weights.append(1.0 if plan.prefill else float(end - plan.chunks[0].end))
        if plan.prefill and batch > per_pass:  # the passes are as small as the engine makes them
            passes = batch / per_pass
            costs[-1] = costs[-1] + StepCost(other_s=(passes - 1) * cost.pass_s)
    return Timeline(found, tuple(costs), tuple(weights), tuple(drafted))


def _plans_of_one(
    placement: PlacementPolicy, limits: Limits, method: RunConfig, workload: UniformWorkload, stride: int
) -> Iterator[StepPlan | None]:
    bounds = [0] * (len(limits.tiers) + 1)
    reads = method.reads
    rebuildable = min(limits.rebuildable, workload.num_rows)
    lengths = [workload.prompt_len, *range(workload.prompt_len + 1, workload.num_rows + 1, stride)]
    for step, length in enumerate(lengths):
        view = seq_view(0, workload.prompt_len, length, tuple(bounds), rebuildable, reads, active=True)
        decision = placement.plan([view], limits)
        if decision is None:
            yield None
            return
        for move in decision.moves:
            lower_bounds(bounds, move, limits)
        chunk = ScheduledChunk(0, length - 1, 1) if step else ScheduledChunk(0, 0, length)
        yield StepPlan(step, decision.phase, step == 0, (chunk,), decision.moves)


def _first_owners(plans: Sequence[StepPlan], prompt_lens: Sequence[int]) -> dict[int, int]:
    """Prompt length by request index, handed out in the order of the prompts; later owners are taken to be alike."""
    owners: dict[int, int] = {}
    waiting = iter(prompt_lens)
    for plan in plans:
        for chunk in plan.chunks:
            if chunk.start == 0 and chunk.req_idx not in owners:
                owners[chunk.req_idx] = next(waiting, prompt_lens[-1])
    return owners
