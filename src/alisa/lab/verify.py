"""`--verify`: how far a policy's next-token distributions are from those of dense attention, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from alisa.kernels.base import Codec
from alisa.lab.scoring import ScoredItem, Scorer, groups
from alisa.llm import LLM
from alisa.outputs import RequestOutput
from alisa.policy.base import SelectionPolicy
from alisa.policy.registry import make_policy

KEPT_BYTES = 1 << 28
"""Most memory for the distributions of the first pass, which wait for those of the second."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How a policy's answers compare with dense attention on the same tokens (teacher-forced)."""

    num_requests: int
    num_tokens: int
    top1_agreement: float
    """Share of tokens for which both pick the same most likely token."""
    mean_kl: float
    """Kullback-Leibler divergence KL(dense || policy) in nats per token."""
    lost_mass: float
    """Share of the attention weight on tokens that the policy did not read; 0 for dense."""


def verify_outputs(llm: LLM, outputs: Sequence[RequestOutput], num_samples: int = 4) -> VerifyReport:
    """Re-run a spread sample of outputs densely, on the same tokens, and compare the distributions.

    Only outputs whose rows fit the device cap are taken: scoring does not use the tiers.

    Raises:
        CapacityError: none of them fits.
    """
    scorer, dense = Scorer.of(llm), make_policy("dense", 0.0)
    items = [ScoredItem(output.prompt_ids, output.token_ids) for output in outputs]
    fitting = [item for item in items if scorer.fits(item, llm.codec, llm.policy)] or items
    stride = max(1, len(fitting) // num_samples)
    reading = scorer.with_sparse_prompts(llm.config.sparse_prompts)
    return verify(scorer, llm.policy, dense, llm.codec, fitting[::stride][:num_samples], reading)


def verify(
    scorer: Scorer,
    policy: SelectionPolicy,
    dense: SelectionPolicy,
    codec: Codec,
    items: Sequence[ScoredItem],
    reading: Scorer | None = None,
) -> VerifyReport:
    """Run the items under the policy, then densely, and compare every next-token distribution.

    One pass follows the other, so that rows are held once and within the cap. The distributions of the first pass are
    kept for the second: an output whose distributions would take more than `KEPT_BYTES` is compared up to there. The
    policy reads prompts as `reading` does; None: densely.

    Raises:
        CapacityError: an item does not fit the cap alone; nothing has been run.
    """
    most_tokens = max(1, KEPT_BYTES // (4 * scorer.decoder.spec.vocab_size))
    items = [ScoredItem(item.prompt_ids, item.output_ids[:most_tokens]) for item in items]
    agreed, divergence, lost_mass, num_tokens, num_decoded = 0, 0.0, 0.0, 0, 0
    for batch in list(scorer.batches(items, codec, policy)):
        sizes = [len(items[index].output_ids) for index in batch]
        for part in groups(batch, sizes, most_tokens, len(batch)):
            sample = [items[index] for index in part]
            waiting: list[Tensor] = []
            for step in (reading or scorer).steps(policy, codec, sample, measure_lost_mass=True):
                waiting.append(step.logits.log_softmax(dim=-1))
                if step.lost_mass is not None:
                    lost_mass += step.lost_mass * len(step.items)
                    num_decoded += len(step.items)
            for step in scorer.steps(dense, codec, sample):
                actual, expected = waiting[step.step], step.logits.log_softmax(dim=-1)
                agreed += int((expected.argmax(dim=-1) == actual.argmax(dim=-1)).sum())
                divergence += float((expected.exp() * (expected - actual)).sum())
                num_tokens += len(step.items)
    return VerifyReport(
        num_requests=len(items),
        num_tokens=num_tokens,
        top1_agreement=agreed / num_tokens,
        mean_kl=divergence / num_tokens,
        lost_mass=lost_mass / max(1, num_decoded),
    )
