"""From caps in bytes to a cache: what fits where, and the simplest store that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from alisa.budget import Reads
from alisa.cache.capacity import DeviceCapacity, StateMemory, device_capacity, resident_capacity
from alisa.cache.codec import make_codec
from alisa.cache.manager import CacheManager
from alisa.cache.offload.hidden import HiddenStateCache, hidden_format
from alisa.cache.offload.residency import Eviction
from alisa.cache.offload.store import TieredStore
from alisa.cache.offload.tiers import DiskTier, HostTier, LowerTier, require_disk
from alisa.cache.store import KVStore
from alisa.config import EngineConfig, format_bytes
from alisa.errors import CapacityError, InputError
from alisa.kernels.base import Codec, Rebuild
from alisa.kernels.choose import AttentionBackend
from alisa.outputs import Medium
from alisa.policy.base import SelectionPolicy
from alisa.policy.registry import POLICIES, reads_of
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import Limits, PlacementPolicy, Tier
from alisa.scheduler.placement.capacity import share_below
from alisa.scheduler.placement.three_phase import ThreePhase
from alisa.spec import AttentionShape, RowFormat


@dataclass(frozen=True, slots=True)
class Rebuilding:
    """What deleted rows are made from again."""

    hidden_size: int
    """C, of the layer inputs."""
    dtype: torch.dtype
    """What the model computes in."""
    rebuild: Rebuild
    """The model's projection."""

    @property
    def format(self) -> RowFormat:
        """Of a kept layer input."""
        return hidden_format(str(self.dtype).removeprefix("torch."), self.hidden_size)


@dataclass(frozen=True, slots=True)
class RowSource:
    """A model as its KV cache sees it."""

    shape: AttentionShape
    max_positions: int
    """Longest sequence that it can read."""
    device: torch.device
    backend: AttentionBackend
    rebuilding: Rebuilding | None
    """None: rows cannot be made again, so that none are deleted."""


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """What a cache is built as."""

    limits: Limits
    placement: PlacementPolicy
    capacity: DeviceCapacity
    max_num_seqs: int
    max_model_len: int
    token_bytes: int
    """Bytes of one token's rows over all layers."""
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    """Most bytes on disk, hidden states included; 0 without a disk tier."""
    reads: Reads
    """Of a step whose tokens count: all, where the policy only drafts."""

    @property
    def state_tokens(self) -> int:
        """Tokens that the selection policy's state has room for."""
        return self.capacity.state_tokens


def plan_kv_cache(
    source: RowSource,
    policy: SelectionPolicy,
    codec: Codec,
    config: EngineConfig,
    placement: PlacementPolicy | None,
    device_bytes: int,
    host_bytes: int,
    disk_bytes: int,
    *,
    runs_all: bool = False,
) -> KVCacheConfig:
    """Capacities of a cache under these caps.

    Args:
        source: the model.
        policy: one with an index set for each head needs every row on the device.
        codec: of the rows.
        config: sizes.
        placement: what a schedule file asks for; None: whatever the caps demand.
        device_bytes: hard cap.
        host_bytes: hard cap of rows in main memory below a GPU.
        disk_bytes: hard cap.
        runs_all: whether every open sequence takes part in every step, so that none can be swapped.

    Raises:
        CapacityError: not even a token fits, or the disk is too small for the schedule.
        InputError: tiers are asked for and cannot be had.
    """
    shape = source.shape
    max_len = min(config.max_model_len or source.max_positions, source.max_positions)
    token_bytes = shape.num_layers * codec.format.row_bytes
    can_tier = policy.num_sets(shape) == 1 and host_bytes + disk_bytes >= token_bytes
    if placement is not None and placement.uses_tiers and policy.num_sets(shape) > 1:
        raise InputError(
            f"the schedule {placement.name} moves rows, and {config.policy} chooses other rows for every head; use "
            "another --policy, such as swa."
        )
    has_tiers = can_tier if placement is None else placement.uses_tiers
    found = POLICIES[config.policy].state_bytes(shape, config.sparsity, max_len)
    reads = reads_of("dense", 0.0) if config.exact else policy.reads
    read_share = (1 + sum(reads(max_len - 1))) / max_len
    state = StateMemory(found.per_token, found.per_sequence, read_share, runs_all)
    if not has_tiers:
        capacity = resident_capacity(
            device_bytes,
            num_layers=shape.num_layers,
            row_bytes=codec.format.row_bytes,
            max_num_seqs=config.max_num_seqs,
            max_length=max_len,
            state=state,
        )
        _check_room(capacity, device_bytes, token_bytes, state, config, max_len)
        return KVCacheConfig(
            limits=Limits(capacity.num_rows, state_tokens=capacity.state_tokens),
            placement=placement or AllDevice(),
            capacity=capacity,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_len,
            token_bytes=token_bytes,
            device_bytes=device_bytes,
            host_bytes=0,
            disk_bytes=0,
            reads=reads,
        )
    placement = placement or ThreePhase()
    wanted = config.max_num_seqs * max_len
    host_tokens = min(host_bytes // token_bytes, wanted)
    capacity = device_capacity(
        device_bytes,
        num_layers=shape.num_layers,
        row_bytes=codec.format.row_bytes,
        max_num_seqs=config.max_num_seqs,
        max_length=max_len,
        lower_tokens=wanted,
        num_tiers=1 + (host_tokens > 0) + (config.kv_disk_memory is not None or placement.most_deleted(max_len) > 0),
        piece_columns=source.backend.attend.piece_columns(codec.format, shape.num_heads),
        holds_tables=source.device.type == "cpu",
        state=state,
    )
    _check_room(capacity, device_bytes, token_bytes, state, config, max_len)
    rebuilding = source.rebuilding
    hidden_bytes = shape.num_layers * rebuilding.format.row_bytes if rebuilding else token_bytes
    planned = placement.most_deleted(max_len)
    # Rows are deleted because a schedule says so, or because the disk was given less than it takes. A disk that merely
    # has less room than the greatest work of all would need is no reason to keep a hidden state of every token.
    is_capped = config.kv_disk_memory is not None
    if planned and rebuilding is None:
        raise InputError(
            f"the schedule {placement.name} deletes up to {planned} tokens of a sequence, and the keys of this model "
            "cannot be rebuilt: they are rotated by the length of the sequence; use a schedule that deletes none."
        )
    below, rebuildable, fits = share_below(
        disk_bytes if is_capped or planned else max(disk_bytes, wanted * token_bytes),
        token_bytes,
        hidden_bytes,
        device_tokens=capacity.num_rows,
        host_tokens=host_tokens,
        sizes=[max_len] * config.max_num_seqs,
        planned=planned,
    )
    if rebuilding is None:
        below, rebuildable = disk_bytes // token_bytes, 0
    kept = rebuildable * config.max_num_seqs
    if not fits:
        raise CapacityError(
            f"The schedule deletes up to {planned} tokens of each of {config.max_num_seqs} sequences, and what they "
            f"are rebuilt from takes {format_bytes(kept * hidden_bytes)} of {format_bytes(disk_bytes)} on disk; raise "
            "--kv-disk-memory, or lower --max-num-seqs or --max-model-len."
        )
    host_tokens = min(host_tokens, capacity.lower_tokens)
    disk_tokens = min(below, (disk_bytes - kept * hidden_bytes) // token_bytes, capacity.lower_tokens - host_tokens)
    tiers = [Tier(Medium.HOST, host_tokens)] if host_tokens else []
    if disk_tokens or not tiers:
        tiers.append(Tier(Medium.DISK, disk_tokens))
    return KVCacheConfig(
        limits=Limits(capacity.num_rows, tuple(tiers), rebuildable, capacity.state_tokens),
        placement=placement,
        capacity=capacity,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_len,
        token_bytes=token_bytes,
        device_bytes=device_bytes,
        host_bytes=host_tokens * token_bytes,
        disk_bytes=disk_tokens * token_bytes + kept * hidden_bytes,
        reads=reads,
    )


def _check_room(
    capacity: DeviceCapacity,
    device_bytes: int,
    token_bytes: int,
    state: StateMemory,
    config: EngineConfig,
    max_len: int,
) -> None:
    """Raise CapacityError where not even one row has room."""
    if capacity.num_rows < 1:
        of_state = f" and {format_bytes(state.token_bytes)} a token for {config.policy}" if state.token_bytes else ""
        raise CapacityError(
            f"A KV cap of {format_bytes(device_bytes)} holds not even one token of {format_bytes(token_bytes)} beside "
            f"what {config.max_num_seqs} sequences of up to {max_len} tokens need: buffers, tables{of_state}; raise "
            "--kv-device-memory, or lower --max-model-len or --max-num-seqs."
        )


def build_kv_cache(
    source: RowSource, codec: Codec, config: KVCacheConfig, directory: Path, eviction: Eviction, *, overlap: bool
) -> CacheManager:
    """A flat pool, and the tiers below it as soon as something has to move.

    Args:
        source: the model.
        codec: of the rows.
        config: sizes.
        directory: its disk takes the disk tier.
        eviction: who leaves the hot cache first.
        overlap: whether rows move beside the arithmetic.

    Raises:
        CapacityError: the pool is larger than the memory, or the disk is too full.
        InputError: the directory cannot hold files.
    """
    shape, backend, rebuilding = source.shape, source.backend, source.rebuilding
    row_bytes, limits = codec.format.row_bytes, config.limits
    flat = KVStore(
        num_layers=shape.num_layers,
        codec=codec,
        num_rows=limits.device_tokens,
        max_num_seqs=config.max_num_seqs,
        max_length=config.max_model_len,
        device=source.device,
        append=backend.append,
        spare_rows=config.capacity.staging_rows,
    )
    if not limits.tiers:
        return CacheManager(flat)
    kept = limits.rebuildable * config.max_num_seqs
    if config.disk_bytes:
        require_disk(directory, config.disk_bytes)

    def make_tiers(flat: KVStore) -> TieredStore:
        tiers: list[LowerTier] = [
            HostTier(shape.num_layers, tier.num_tokens, row_bytes)
            if tier.medium is Medium.HOST
            else DiskTier(directory, shape.num_layers, tier.num_tokens, row_bytes, backend.move_rows)
            for tier in limits.tiers
        ]
        hidden = None
        if kept and rebuilding is not None:
            hidden_codec = make_codec(rebuilding.format)
            hidden_row = hidden_codec.format.row_bytes
            tier = DiskTier(directory, shape.num_layers, kept, hidden_row, backend.move_rows)
            hidden = HiddenStateCache(tier, hidden_codec, rebuilding.rebuild, rebuilding.dtype)
        return TieredStore.over(
            flat,
            tiers=tiers,
            hidden=hidden,
            rebuildable=limits.rebuildable,
            eviction=eviction,
            overlap=overlap,
            piece_columns=backend.attend.piece_columns(codec.format, shape.num_heads),
            in_flight_bytes=config.capacity.in_flight_bytes,
        )

    return CacheManager(flat, num_tiers=len(limits.tiers), make_tiers=make_tiers, starts_tiered=kept > 0)
