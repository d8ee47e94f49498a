"""Drafts made up by the selection policy, to be verified by dense attention: the model is its own draft model.

The policy reads a small part of the rows, so that a draft takes a small part of the time where rows outweigh weights;
then one dense step reads every row once for all drafts of a sequence (Sun et al., TriForce, arXiv 2404.11912; Chen et
al., MagicDec, arXiv 2408.11049). Rows of drafts are taken back before it, so that none are left that a draft wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

from alisa.attention.session import StepTraffic
from alisa.engine.open_request import OpenRequest
from alisa.engine.runner import ModelRunner
from alisa.engine.sampler import SampledRow, sample
from alisa.outputs import Traffic
from alisa.scheduler.plan import ScheduledChunk, StepPlan
from alisa.scheduler.request import Request


class Drafts(NamedTuple):
    """What the passes before a step gave and took; the drafts are in the requests."""

    plan: StepPlan
    """The step that verifies them."""
    traffic: StepTraffic | None = None
    """Of all passes; None: there were none."""
    num_passes: int = 0
    seconds: float = 0.0


class PolicyDrafter:
    """Makes up the drafts that a plan has room for and no text gave.

    Args:
        runner: of an exact session: what drafts read is the policy's choice.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def draft(self, plan: StepPlan, requests: Sequence[Request], opened: Sequence[OpenRequest]) -> Drafts:
        """The plan with as many tokens as there are drafts now.

        Args:
            plan: of a decode step.
            requests: of its chunks.
            opened: the same requests.

        Raises:
            CapacityError: as `KVSession.begin`.
        """
        started = perf_counter()
        going = [n for n, (r, c) in enumerate(zip(requests, plan.chunks, strict=True)) if _asks(r, c)]
        traffic = StepTraffic((0,) * len(plan.chunks), Traffic(), {}) if going else None
        num_passes = 0
        asked = list(going)
        coming = plan
        while going:
            chunks = tuple(_next_token(requests[n], plan.chunks[n]) for n in going)
            result = self._runner.run(
                replace(coming, chunks=chunks, is_draft=True),
                [[(requests[n].draft_ids or requests[n].token_ids)[-1]] for n in going],
                [1] * len(going),
            )
            coming = replace(plan, moves=(), opened=(), closed=())
            assert traffic is not None, "there is a pass"
            traffic = _added(traffic, result.traffic, going)
            num_passes += 1
            rows = [_row(requests[n], opened[n]) for n in going]
            for n, token_id in zip(going, sample(result.logits, rows).token_ids, strict=True):
                if token_id is not None:
                    requests[n].draft_ids.append(token_id)
            # Nothing follows an end, nor logits that are no numbers.
            going = [
                n
                for n, row in zip(going, rows, strict=True)
                if len(requests[n].draft_ids) == row.num_output - len(requests[n].output_ids) + 1
                and requests[n].draft_ids[-1] not in row.end_ids
                and _asks(requests[n], plan.chunks[n])
            ]
        for n in asked:
            self._runner.session.truncate(plan.chunks[n].req_idx, plan.chunks[n].start)
        verified = tuple(
            replace(c, count=min(c.count, len(r.token_ids) + len(r.draft_ids) - c.start))
            for r, c in zip(requests, plan.chunks, strict=True)
        )
        return Drafts(replace(coming, chunks=verified), traffic, num_passes, perf_counter() - started)


def with_drafting(step: StepTraffic, drafting: StepTraffic | None) -> StepTraffic:
    """Of a step and the passes before it; what was covered is said of the step, whose tokens count."""
    return step if drafting is None else _added(drafting, step, range(len(drafting.tokens_attended)))


def _added(all_chunks: StepTraffic, some: StepTraffic, places: Sequence[int]) -> StepTraffic:
    attended = list(all_chunks.tokens_attended)
    for place, count in zip(places, some.tokens_attended, strict=True):
        attended[place] += count
    traffic, failed = all_chunks.traffic + some.traffic, {**all_chunks.failed, **some.failed}
    return StepTraffic(tuple(attended), traffic, failed, some.covered)


def _asks(request: Request, chunk: ScheduledChunk) -> bool:
    """Whether the plan has room for one more draft, and the policy is to make it up."""
    return len(request.token_ids) + len(request.draft_ids) < chunk.end and len(request.draft_ids) < request.num_drafts


def _next_token(request: Request, chunk: ScheduledChunk) -> ScheduledChunk:
    """The newest token, or the newest draft."""
    return ScheduledChunk(chunk.req_idx, chunk.start + len(request.draft_ids), 1)


def _row(request: Request, its: OpenRequest) -> SampledRow:
    """The draft is drawn with the random number of its place; a grammar is not asked, for it cannot go back."""
    drafts = request.draft_ids
    params = request.params if request.params.logprobs is None else replace(request.params, logprobs=None)
    return SampledRow(params, [*request.token_ids, *drafts], len(request.output_ids) + len(drafts), its.end_ids)
