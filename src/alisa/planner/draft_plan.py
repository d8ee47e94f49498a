"""What a plan says of drafts: how many are tried, what they bring, and from which acceptance on they pay."""

from __future__ import annotations

from dataclasses import dataclass

from alisa.planner.draft_pricer import DraftPricer
from alisa.planner.hardware import Hardware
from alisa.planner.search import PlanCandidate
from alisa.planner.speculation import DraftSource
from alisa.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """The decode steps of a run that guesses ahead, against the same without drafts."""

    source: DraftSource
    acceptance: float
    """The chance that a draft is right, where those before it were."""
    most: int
    """Drafts of a sequence that a step may try."""
    drafts_per_step: float
    """Of a sequence, on average; 0: none pay, and none are tried."""
    tokens_per_step: float
    """That a sequence gets by a step that reads everything that counts."""
    factor: float
    """How much less decoding takes than without drafts."""
    plain_s: float
    """Decoding without drafts."""
    drafting_s: float
    """Passes in which the policy makes drafts up; 0 where they come from the text."""
    verifying_s: float
    """The steps that say which drafts are right."""
    pass_share: float
    """One such pass, as a share of a step without drafts: the last one."""
    token_share: float
    """One further token that is verified in a step, as the same share."""
    pays_from: float | None
    """The least acceptance, in hundredths, with which drafts pay in any step; None: not even if all are right."""


def plan_drafts(spec: ModelSpec, hardware: Hardware, best: PlanCandidate, *, overlap: bool) -> DraftPlan | None:
    """What drafts bring in the run that is planned; None where it has none.

    Args:
        spec: the model.
        hardware: where.
        best: the run.
        overlap: whether what can be hidden counts (False: the paper's sum).
    """
    drafts, steps = best.method.drafts, best.timeline.drafted
    if drafts is None or not steps:
        return None
    pricer = DraftPricer(spec, best.method, hardware, drafts, overlap=overlap)
    tiers = best.placement.uses_tiers
    weights = best.timeline.weights[-len(steps) :]
    counts = [weight / step.tokens for weight, step in zip(weights, steps, strict=True)]  # of steps like it
    num_steps = sum(counts)
    plain_s = sum(weight * pricer.seconds(step.plain) for weight, step in zip(weights, steps, strict=True))
    drafting_s = sum(count * pricer.seconds(step.drafting) for count, step in zip(counts, steps, strict=True))
    verifying_s = sum(count * pricer.seconds(step.verifying) for count, step in zip(counts, steps, strict=True))
    last = steps[-1]
    one_more = pricer.with_drafts(last, 1, 1 + drafts.acceptance, tiers=tiers)
    found = [least for step in steps if (least := pricer.pays_from(step, tiers=tiers)) is not None]
    return DraftPlan(
        source=drafts.source,
        acceptance=drafts.acceptance,
        most=drafts.most,
        drafts_per_step=sum(count * step.num_drafts for count, step in zip(counts, steps, strict=True)) / num_steps,
        tokens_per_step=sum(weights) / num_steps,
        factor=plain_s / (drafting_s + verifying_s),
        plain_s=best.waves * plain_s,
        drafting_s=best.waves * drafting_s,
        verifying_s=best.waves * verifying_s,
        pass_share=pricer.seconds(last.one_pass) / pricer.seconds(last.plain),
        token_share=pricer.seconds(one_more.verifying) / pricer.seconds(last.plain) - 1,
        pays_from=min(found, default=None),
    )
