"""The only wiring: from a loaded model and a configuration to an engine.

Sizes follow from the configuration (`max_model_len`, `max_num_seqs`, the caps), never from a list of prompts.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from alisa.attention.build import build_session
from alisa.attention.prefill import chunk_tokens
from alisa.attention.timing import StepTimer
from alisa.cache.offload.residency import Eviction
from alisa.config import EngineConfig, parse_bytes
from alisa.engine.costs import MeasuredCosts
from alisa.engine.engine import Engine
from alisa.engine.kv_cache import KVCacheConfig, build_kv_cache, plan_kv_cache
from alisa.engine.loaded import LoadedModel, kv_codec
from alisa.engine.prefix import build_prefix, prefix_share
from alisa.engine.prompt import PromptReader
from alisa.engine.report import EngineSetup
from alisa.engine.runner import ModelRunner
from alisa.engine.threads import make_governor
from alisa.errors import InputError
from alisa.machine import free_memory
from alisa.policy.registry import make_policy, reads_of
from alisa.scheduler.order import FirstCome, HighestResponseRatio
from alisa.scheduler.placement.base import PlacementPolicy
from alisa.scheduler.placement.file import load_schedule
from alisa.scheduler.scheduler import Scheduler

_LOG = logging.getLogger("alisa")

DEFAULT_KV_SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Share of the memory that is free after loading the model which may be used for what grows with tokens when no cap is
given. On a CPU the rest is for activations and for everybody else on the machine; on a GPU nobody else is expected."""

FREE_DISK_SHARE = 0.8
"""Share of the free disk that the disk tier may take when no cap is given."""


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
    host_bytes: int | None = None
    """Instead of what the configuration says: on a CPU too, where a host tier rehearses what a GPU does."""


def build_engine(
    model: LoadedModel, config: EngineConfig, options: CacheOptions = CacheOptions()
) -> tuple[Engine, EngineSetup]:
    """An engine, and what it was built as.

    Raises:
        InputError: an option does not go with another, or a directory cannot be used.
        CapacityError: the caps hold not even one token.
    """
    policy = make_policy(config.policy, config.sparsity)
    shape = model.spec.attention
    if config.policy != "dense" and shape.full_layers().num_layers == 0:
        _LOG.warning(
            "every layer of this model has a sliding window of %s tokens and reads it whole: --policy %s has no say; "
            "with a --max-model-len up to the window it chooses.",
            " or ".join(map(str, sorted(window for window in {*shape.windows} if window is not None))),
            config.policy,
        )
    codec = kv_codec(model, config)
    placement = options.placement
    if placement is None and config.schedule is not None:
        placement = load_schedule(config.schedule)
    device = model.decoder.device
    device_bytes, (host_bytes, disk_bytes) = device_cap(config, device), lower_caps(config, options, device)
    prefix_bytes = prefix_share(config, device_bytes if device.type == "cpu" else host_bytes)
    if device.type == "cpu":
        device_bytes -= prefix_bytes
    else:
        host_bytes -= prefix_bytes
    cache_config = plan_kv_cache(model, policy, codec, config, placement, device_bytes, host_bytes, disk_bytes)
    kv_dtype = codec.format.dtype
    prefix = rules = None
    if prefix_bytes:
        keeps_hidden = cache_config.limits.rebuildable > 0
        prefix, rules = build_prefix(model, config, kv_dtype, prefix_bytes, keeps_hidden=keeps_hidden)
    cache = build_kv_cache(
        model, codec, cache_config, disk_directory(config), options.eviction, overlap=options.overlap
    )
    timer = StepTimer()
    session = build_session(
        cache,
        policy,
        model.backend,
        shape,
        device,
        max_num_seqs=config.max_num_seqs,
        state_tokens=cache_config.state_tokens,
        max_len=cache_config.max_model_len,
        timer=timer,
        looks_ahead=options.prefetch and cache_config.placement.uses_tiers,
        prefix=prefix,
    )
    costs = MeasuredCosts(cache_config.token_bytes)
    scheduler = Scheduler(
        cache_config.limits,
        cache_config.placement,
        reads_of(config.policy, config.sparsity),
        costs,
        max_num_seqs=config.max_num_seqs,
        prefill_chunk=chunk_tokens(config.prefill_chunk, kv_dtype, model.decoder.dtype, whole_blocks=bool(prefix)),
        token_bytes=cache_config.token_bytes,
        order=HighestResponseRatio(costs, prefix) if config.schedule_policy == "hrrn" else FirstCome(),
        prefix=prefix,
    )
    engine = Engine(
        scheduler,
        ModelRunner(model.decoder, session, timer),
        costs,
        model.tokenizer,
        PromptReader(model.tokenizer, model.spec.vocab_size, cache_config.max_model_len),
        make_governor(),
        eos_ids=frozenset() if model.tokenizer is None else model.tokenizer.eos_ids,
        prefix_rules=rules,
    )
    return engine, _setup(model, config, cache_config, kv_dtype, prefix_bytes)


def device_cap(config: EngineConfig, device: torch.device) -> int:
    """Bytes on the device for everything that grows with tokens; by default a share of what is free now."""
    if config.kv_device_memory is not None:
        return parse_bytes(config.kv_device_memory)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return int(free * DEFAULT_KV_SHARE[device.type])


def lower_caps(config: EngineConfig, options: CacheOptions, device: torch.device) -> tuple[int, int]:
    """Bytes that the host tier and the disk tier may take.

    Raises:
        InputError: the directory of the disk tier does not exist.
    """
    host_bytes = host_cap(config, device) if options.host_bytes is None else options.host_bytes
    return host_bytes, disk_cap(config)


def host_cap(config: EngineConfig, device: torch.device) -> int:
    """Bytes of rows in main memory below a GPU; none where main memory is the device."""
    if device.type == "cpu":
        return 0
    if config.kv_host_memory is not None:
        return parse_bytes(config.kv_host_memory, least=0)
    return int(free_memory() * DEFAULT_KV_SHARE["cpu"])


def disk_directory(config: EngineConfig) -> Path:
    """Where the disk tier lies."""
    return config.kv_disk_path or Path(tempfile.gettempdir())


def disk_cap(config: EngineConfig) -> int:
    """Bytes that the disk tier may take; by default a share of what is free now.

    Raises:
        InputError: the directory does not exist.
    """
    if config.kv_disk_memory is not None:
        return parse_bytes(config.kv_disk_memory, least=0)
    directory = disk_directory(config)
    try:
        return int(shutil.disk_usage(directory).free * FREE_DISK_SHARE)
    except OSError as error:
        raise InputError(f"{directory} cannot hold the disk tier: {error.strerror}.") from error


def _setup(
    model: LoadedModel, config: EngineConfig, cache: KVCacheConfig, kv_dtype: str, prefix_bytes: int
) -> EngineSetup:
    return EngineSetup(
        spec=model.spec,
        policy=config.policy,
        sparsity=config.sparsity,
        dtype=model.dtype,
        weight_dtype=config.weight_dtype,
        kv_dtype=kv_dtype,
        placement=cache.placement,
        limits=cache.limits,
        device_bytes=cache.device_bytes,
        host_bytes=cache.host_bytes,
        disk_bytes=cache.disk_bytes,
        prefix_bytes=prefix_bytes,
    )
