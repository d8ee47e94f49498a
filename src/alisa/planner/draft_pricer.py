"""Decode steps that try drafts: what they cost and give, and how many drafts are best, by the engine's own rule.

Assumed, because it cannot be known before the run: every draft is right with the same chance, where those before it
were; in exact mode the text gives none; a policy reads below the device in a pass what it would in a step of its own.
The steps without drafts by which an engine measures, one in 17, are left out.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from alisa.planner.cost import CostModel, StepCost
from alisa.planner.hardware import Hardware
from alisa.planner.load import RunConfig, StepWork
from alisa.planner.speculation import DraftConfig, StepPrices, further_token_s, tokens_of_step
from alisa.spec import ModelSpec

_FINEST = 100
"""Acceptances that are told apart: hundredths."""


@dataclass(frozen=True, slots=True)
class PricedStep:
    """A decode step of a batch with so many drafts of each sequence, or with none."""

    work: StepWork
    """Of the step without drafts."""
    work_of_pass: StepWork
    """Of the same step if the policy alone made it."""
    plain: StepCost
    """The step without drafts."""
    one_pass: StepCost
    """In which the policy makes up a draft of each sequence; nothing where drafts come from the text."""
    verifying: StepCost
    """The step itself."""
    num_drafts: int = 0
    """Of each sequence."""
    tokens: float = 1.0
    """That each sequence gets on average."""

    @property
    def drafting(self) -> StepCost:
        """Of all passes."""
        return self.one_pass.times(self.num_drafts)

    @property
    def token(self) -> StepCost:
        """Of one more token of each sequence."""
        return (self.drafting + self.verifying).times(1 / self.tokens)


class DraftPricer:
    """Prices decode steps of a run that guesses ahead.

    Args:
        spec: the model.
        method: how it is run, drafts included.
        hardware: where.
        drafts: how it guesses.
        overlap: whether what can be hidden counts (False: the paper's sum).
    """

    def __init__(
        self, spec: ModelSpec, method: RunConfig, hardware: Hardware, drafts: DraftConfig, *, overlap: bool = True
    ) -> None:
        self._verifying = CostModel(spec, method, hardware)
        self._method = method
        self._drafts = drafts
        self.drafting = replace(method, drafts=None)
        """How the passes that make drafts up are run."""
        self._passes = CostModel(spec, self.drafting, hardware)
        self._overlap = overlap

    def step(
        self, load: StepWork, of_pass: StepWork, *, tiers: bool = True, acceptance: float | None = None
    ) -> PricedStep:
        """The step with the most tokens a second; without drafts where none promise enough more.

        Args:
            load: its work without drafts.
            of_pass: the work of the same step if the policy alone made it.
            tiers: as in `CostModel.step`.
            acceptance: None: as it is configured.
        """
        acceptance = self._drafts.acceptance if acceptance is None else acceptance
        plain, one_pass = self._verifying.step(load, tiers=tiers), StepCost()
        if self._method.exact:
            # What moves does so once, and is counted in the step that verifies.
            one_pass = self._passes.step(replace(of_pass, stored=0.0, hidden_stored=0), tiers=tiers)
        without = PricedStep(load, of_pass, plain, one_pass, plain)
        tried = [
            self.with_drafts(without, count, tokens_of_step(acceptance, count), tiers=tiers)
            for count in range(1, self._drafts.most + 1)
        ]
        best = max((without, *tried), key=lambda step: self.prices(step).rate(acceptance, step.num_drafts))
        return best if self.prices(best).pays(acceptance, best.num_drafts) else without

    def with_drafts(self, step: PricedStep, count: int, tokens: float, *, tiers: bool = True) -> PricedStep:
        """The same step with `count` drafts of each sequence, by which it gets `tokens`."""
        verifying = self._verifying.step(self._verified(step.work, count, tokens), tiers=tiers)
        return replace(step, verifying=verifying, num_drafts=count, tokens=tokens)

    def prices(self, step: PricedStep) -> StepPrices:
        """As the engine would measure them; of the whole batch, for a sequence's share does not change what is best."""
        plain_s = self.seconds(step.plain)
        further_s = (self.seconds(step.verifying) - plain_s) / max(step.num_drafts, 1)
        return StepPrices(plain_s, further_token_s(further_s, plain_s), self.seconds(step.one_pass))

    def pays_from(self, step: PricedStep, *, tiers: bool = True) -> float | None:
        """The least acceptance, in hundredths, with which drafts pay in this step; None: not even if all are right."""

        def pays(hundredths: int) -> bool:
            found = self.step(step.work, step.work_of_pass, tiers=tiers, acceptance=hundredths / _FINEST)
            return found.num_drafts > 0

        least = bisect_left(range(_FINEST + 1), True, key=pays)
        return least / _FINEST if least <= _FINEST else None

    def seconds(self, cost: StepCost) -> float:
        """What counts."""
        return cost.overlapped_s if self._overlap else cost.serial_s

    def _verified(self, load: StepWork, count: int, tokens: float) -> StepWork:
        """The same step with `count` drafts of each sequence, which gets `tokens` by it."""
        each = count + 1
        # Dense attention reads the same rows for all tokens of a sequence, once; a policy chooses for each of them.
        queries, choices = (each, 1) if self._method.reading_policy == "dense" else (1, each)
        return replace(
            load,
            num_sequences=choices * load.num_sequences,
            num_tokens=each * load.num_tokens,
            num_finished=each * load.num_finished,
            read=choices * load.read + (queries - 1) * load.num_sequences,
            candidates=choices * load.candidates,
            wanted=choices * load.wanted,
            fetched=choices * load.fetched,
            rebuilt=choices * load.rebuilt,
            past=choices * load.past,
            stored=tokens * load.stored,
            hidden_stored=round(tokens * load.hidden_stored),
            queries=queries,
        )
