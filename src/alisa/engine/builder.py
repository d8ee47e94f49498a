"""The only wiring: from a loaded model and a configuration to an engine.

Sizes follow from the configuration (`max_model_len`, `max_num_seqs`, the caps), never from a list of prompts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial

import torch

from alisa.attention.build import build_session
from alisa.attention.caps import device_cap, disk_directory, lower_caps
from alisa.attention.kv_cache import KVCacheConfig, build_kv_cache, plan_kv_cache
from alisa.attention.prefill import chunk_tokens
from alisa.attention.sparse_prompts import QUERY_BLOCK_TOKENS, with_sparse_prompts
from alisa.attention.timing import StepTimer
from alisa.cache.offload.residency import Eviction
from alisa.config import EngineConfig
from alisa.engine.answers import ANSWER_CHUNK, AnswerReader
from alisa.engine.budgets import RequestBudgets
from alisa.engine.costs import MeasuredCosts
from alisa.engine.drafter import PolicyDrafter
from alisa.engine.engine import Engine
from alisa.engine.loaded import LoadedModel, kv_codec, layer_budgets
from alisa.engine.prefix import PrefixRules, build_prefix, prefix_share
from alisa.engine.prompt import PromptReader
from alisa.engine.report import EngineSetup
from alisa.engine.runner import ModelRunner
from alisa.engine.speculation import make_speculator
from alisa.engine.speculator import NoDrafts, Speculator
from alisa.engine.threads import make_governor
from alisa.errors import InputError
from alisa.kernels.native import prefill as cpu_prefill
from alisa.policy.registry import make_policy
from alisa.scheduler.fair import ServedTokens
from alisa.scheduler.order import FirstCome, HighestResponseRatio
from alisa.scheduler.placement.base import PlacementPolicy
from alisa.scheduler.placement.file import load_schedule
from alisa.scheduler.prefix import BLOCK_TOKENS
from alisa.scheduler.scheduler import Scheduler

_LOG = logging.getLogger("alisa")


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What benchmarks switch off to see what it is worth."""

    eviction: Eviction = "lru"
    """Who leaves the hot cache first."""
    overlap: bool = True
    """Whether rows move beside the arithmetic."""
    prefetch: bool = True
    """Whether the next step's rows are asked for where history decides them."""
    placement: PlacementPolicy | None = None
    """Instead of what the configuration's schedule file says."""
    speculator: Speculator | None = None
    """Instead of one that drafts as far as it pays."""
    host_bytes: int | None = None
    """Instead of what the configuration says: on a CPU too, where a host tier rehearses what a GPU does."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What makes steps, without what asks for them."""

    scheduler: Scheduler
    runner: ModelRunner
    costs: MeasuredCosts
    cache_config: KVCacheConfig
    kv_dtype: str
    """What rows are kept in."""
    prefix_rules: PrefixRules | None = None
    """Of the runner's prefix cache; None: it has none."""
    prefix_bytes: int = 0
    """Hard cap of the prefix cache."""
    answers: AnswerReader | None = None
    """Reads answers into the prefix cache; None: there is none."""
    speculator: Speculator = field(default_factory=NoDrafts)
    """Says which tokens a step tries."""


def build_engine(
    model: LoadedModel, config: EngineConfig, options: CacheOptions = CacheOptions()
) -> tuple[Engine, EngineSetup]:
    """An engine, and what it was built as.

    Raises:
        InputError: an option does not go with another, or a directory cannot be used.
        CapacityError: the caps hold not even one token.
    """
    parts = build_parts(model, config, options)
    engine = Engine(
        parts.scheduler,
        parts.runner,
        parts.costs,
        model.tokenizer,
        PromptReader(model.tokenizer, model.spec.vocab_size, parts.cache_config.max_model_len),
        make_governor(),
        RequestBudgets(config, on_cpu=model.decoder.device.type == "cpu"),
        eos_ids=frozenset() if model.tokenizer is None else model.tokenizer.eos_ids,
        prefix_rules=parts.prefix_rules,
        answers=parts.answers,
        speculator=parts.speculator,
        drafter=PolicyDrafter(parts.runner) if config.exact else None,
    )
    return engine, _setup(model, config, parts)


def build_parts(model: LoadedModel, config: EngineConfig, options: CacheOptions = CacheOptions()) -> EngineParts:
    """A scheduler and a runner, for a loop of one's own.

    Raises:
        InputError: an option does not go with another, or a directory cannot be used.
        CapacityError: the caps hold not even one token.
    """
    device = model.decoder.device
    if config.sparse_prompts is not None:
        check_sparse_prompts(device, model.decoder.dtype)
    policy = make_policy(config.policy, config.sparsity, config.coverage, layer_budgets(model, config))
    shape = model.spec.attention
    if config.policy != "dense" and shape.full_layers().num_layers == 0:
        _LOG.warning(
            "every layer of this model has a sliding window of %s tokens and reads it whole: --policy %s has no say; "
            "with a --max-model-len up to the window it chooses.",
            " or ".join(map(str, sorted(window for window in {*shape.windows} if window is not None))),
            config.policy,
        )
    codec = kv_codec(model, config)
    model = model.for_rows(codec.format.dtype)
    placement = options.placement
    if placement is None and config.schedule is not None:
        placement = load_schedule(config.schedule)
    device_bytes, (host_bytes, disk_bytes) = device_cap(config, device), lower_caps(config, device, options.host_bytes)
    prefix_bytes = prefix_share(config, device_bytes if device.type == "cpu" else host_bytes)
    if device.type == "cpu":
        device_bytes -= prefix_bytes
    else:
        host_bytes -= prefix_bytes
    cache_config = plan_kv_cache(
        model.row_source, policy, codec, config, placement, device_bytes, host_bytes, disk_bytes
    )
    kv_dtype = codec.format.dtype
    prefix = rules = None
    if prefix_bytes:
        keeps_hidden = cache_config.limits.rebuildable > 0
        prefix, rules = build_prefix(model, config, kv_dtype, prefix_bytes, keeps_hidden=keeps_hidden)
    cache = build_kv_cache(
        model.row_source, codec, cache_config, disk_directory(config), options.eviction, overlap=options.overlap
    )
    timer = StepTimer()
    session = build_session(
        cache,
        policy,
        with_sparse_prompts(model.backend, config.sparse_prompts),
        shape,
        device,
        max_num_seqs=config.max_num_seqs,
        state_tokens=cache_config.state_tokens,
        max_len=cache_config.max_model_len,
        timer=timer,
        sinks=model.decoder.sinks,
        looks_ahead=options.prefetch and cache_config.placement.uses_tiers,
        exact=config.exact,
        prefix=prefix,
    )
    costs = MeasuredCosts(cache_config.token_bytes)
    blocks = BLOCK_TOKENS if prefix is not None else 1
    unit = blocks if config.sparse_prompts is None else QUERY_BLOCK_TOKENS
    chunk_size = partial(chunk_tokens, row_dtype=kv_dtype, dtype=model.decoder.dtype, unit=unit)
    speculator = options.speculator or make_speculator(model, config, policy, cache, cache_config.token_bytes)
    scheduler = Scheduler(
        cache_config.limits,
        cache_config.placement,
        cache_config.reads,
        costs,
        max_num_seqs=config.max_num_seqs,
        step_tokens=1 + speculator.most,
        prefill_chunk=chunk_size(config.prefill_chunk),
        shared_chunk=None if config.max_step_tokens is None else chunk_size(config.max_step_tokens),
        token_bytes=cache_config.token_bytes,
        fair=ServedTokens() if config.fair else None,
        order=HighestResponseRatio(costs, prefix) if config.schedule_policy == "hrrn" else FirstCome(),
        prefix=prefix,
    )
    runner = ModelRunner(model.decoder, session, timer)
    answers = None
    if prefix is not None and rules is not None:
        answers = AnswerReader(scheduler, runner, prefix, rules, chunk_size(ANSWER_CHUNK))
    return EngineParts(scheduler, runner, costs, cache_config, kv_dtype, rules, prefix_bytes, answers, speculator)


def check_sparse_prompts(device: torch.device, dtype: torch.dtype) -> None:
    """Prompts can be read sparsely by a model on this device; where it would not save time, a warning says so.

    Raises:
        InputError: they cannot.
    """
    if device.type != "cpu":
        raise InputError("--sparse-prompts runs on a CPU only: a GPU reads prompts densely; leave it out.")
    if dtype != torch.bfloat16 or not cpu_prefill.available():
        _LOG.warning(
            "--sparse-prompts saves time where the native prefill kernels run (bfloat16, a CPU with AVX2 and "
            "without AMX): here prompts are read more slowly with it."
        )


def _setup(model: LoadedModel, config: EngineConfig, parts: EngineParts) -> EngineSetup:
    cache = parts.cache_config
    return EngineSetup(
        spec=model.spec,
        policy=config.policy,
        sparsity=config.sparsity,
        dtype=model.dtype,
        weight_format=model.weight_format,
        kv_dtype=parts.kv_dtype,
        placement=cache.placement,
        limits=cache.limits,
        device_bytes=cache.device_bytes,
        host_bytes=cache.host_bytes,
        disk_bytes=cache.disk_bytes,
        prefix_bytes=parts.prefix_bytes,
    )
