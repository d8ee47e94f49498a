"""Which speculator an engine gets."""

from __future__ import annotations

from alisa.cache.manager import CacheManager
from alisa.config import EngineConfig
from alisa.engine.loaded import LoadedModel
from alisa.engine.speculator import MeasuredSpeculator, NoDrafts, Speculator
from alisa.outputs import Medium
from alisa.planner.speculation import DraftWork
from alisa.policy.base import SelectionPolicy
from alisa.policy.registry import POLICIES


def make_speculator(
    model: LoadedModel, config: EngineConfig, policy: SelectionPolicy, cache: CacheManager, token_bytes: int
) -> Speculator:
    """Drafts from the text, and in exact mode from the policy; none where neither is asked for.

    Args:
        model: whose weights a draft reads, too.
        config: what is asked for.
        policy: chooses what a draft reads.
        cache: knows how much there is to read.
        token_bytes: of one token's rows over all layers.
    """
    if config.exact:
        max_len = config.max_model_len or model.spec.max_positions
        read = sum(policy.reads(max_len - 1)) / max_len
        entry = POLICIES[config.policy]
        state_share = entry.state_bytes(model.spec.attention, config.sparsity, max_len).per_token / token_bytes
        work = DraftWork(model.decoder.weight_bytes, token_bytes, read, state_share, entry.churn)

        def draft_share() -> float:
            below = (cache.nbytes(Medium.HOST) + cache.nbytes(Medium.DISK)) // token_bytes
            return work.share(cache.store.used_rows - below, below)

        return MeasuredSpeculator(config.num_speculative_tokens, draft_share)
    return MeasuredSpeculator(config.num_speculative_tokens) if config.speculative == "lookup" else NoDrafts()
