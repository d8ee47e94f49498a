"""Puts a session together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alisa.attention.session import KVSession
from alisa.attention.timing import StepTimer
from alisa.cache.manager import CacheManager
from alisa.cache.prefix.cache import PrefixCache
from alisa.errors import InputError
from alisa.kernels.choose import AttentionBackend
from alisa.policy.base import SelectionPolicy
from alisa.spec import AttentionShape


def build_session(
    cache: CacheManager,
    policy: SelectionPolicy,
    backend: AttentionBackend,
    shape: AttentionShape,
    device: torch.device,
    *,
    max_num_seqs: int,
    state_tokens: int,
    max_len: int,
    timer: StepTimer | None = None,
    looks_ahead: bool = False,
    sinks: Sequence[Tensor] | None = None,
    exact: bool = False,
    prefix: PrefixCache | None = None,
) -> KVSession:
    """A session with a fresh policy state, of the layers without a sliding window.

    Args:
        cache: where rows lie.
        policy: which tokens are read.
        backend: the kernels; they own working memory, so that each engine should have its own.
        shape: of the attention.
        device: of the model.
        max_num_seqs: sequences that are open at the same time.
        state_tokens: tokens that the policy's state has room for, over all of them.
        max_len: longest sequence.
        timer: told where the time goes; None: nobody asks.
        looks_ahead: see `KVSession`; so are the sinks, `exact` and the prefix cache.
        sinks: `Decoder.sinks`.
        exact: the policy only drafts.
        prefix: None: nobody keeps K and V of prompts.

    Raises:
        InputError: the policy has a coverage, and the device is no CPU.
    """
    if policy.budget.coverage is not None and device.type != "cpu":
        raise InputError(
            "--coverage runs on a CPU only: how many tokens each layer reads would have to be asked of the GPU; leave "
            "it out, and choose a higher --sparsity."
        )
    state = policy.start(
        shape.full_layers(),
        max_num_seqs=max_num_seqs,
        num_tokens=state_tokens,
        max_len=max_len,
        device=device,
        kernels=backend.selection,
    )
    return KVSession(
        cache,
        policy,
        state,
        backend,
        shape,
        device,
        timer or StepTimer(),
        looks_ahead=looks_ahead,
        exact=exact,
        prefix=prefix,
        sinks=sinks,
    )
