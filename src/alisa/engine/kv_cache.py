"""From caps in bytes to a cache: what fits where, and the simplest store that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alisa.cache.capacity import DeviceCapacity, StateMemory, device_capacity, resident_capacity
from alisa.cache.codec import make_codec
from alisa.cache.manager import CacheManager
from alisa.cache.offload.hidden import HiddenStateCache, hidden_format
from alisa.cache.offload.residency import Eviction
from alisa.cache.offload.store import TieredStore
from alisa.cache.offload.tiers import DiskTier, HostTier, LowerTier, require_disk
from alisa.cache.store import KVStore
from alisa.config import EngineConfig, format_bytes
from alisa.engine.loaded import LoadedModel
from alisa.errors import CapacityError, InputError
from alisa.kernels.base import Codec
from alisa.outputs import Medium
from alisa.policy.base import SelectionPolicy
from alisa.policy.registry import POLICIES, reads_of
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import Limits, PlacementPolicy, Tier
from alisa.scheduler.placement.capacity import share_below
from alisa.scheduler.placement.three_phase import ThreePhase


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """What an engine's cache is built as."""

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

    @property
    def state_tokens(self) -> int:
        """Tokens that the selection policy's state has room for."""
        return self.capacity.state_tokens


def plan_kv_cache(
    model: LoadedModel,
    policy: SelectionPolicy,
    codec: Codec,
    config: EngineConfig,
    placement: PlacementPolicy | None,
    device_bytes: int,
    host_bytes: int,
    disk_bytes: int,
) -> KVCacheConfig:
    """Capacities of a cache under these caps.

    Args:
        model: its shape, and what its rows are rebuilt from.
        policy: one with an index set for each head needs every row on the device.
        codec: of the rows.
        config: sizes.
        placement: what a schedule file asks for; None: whatever the caps demand.
        device_bytes: hard cap.
        host_bytes: hard cap of rows in main memory below a GPU.
        disk_bytes: hard cap.

    Raises:
        CapacityError: not even a token fits, or the disk is too small for the schedule.
        InputError: tiers are asked for and cannot be had.
    """
    spec = model.spec
    max_len = min(config.max_model_len or spec.max_positions, spec.max_positions)
    token_bytes = spec.num_layers * codec.format.row_bytes
    can_tier = policy.num_sets(spec.attention) == 1 and host_bytes + disk_bytes >= token_bytes
    if placement is not None and placement.uses_tiers and policy.num_sets(spec.attention) > 1:
        raise InputError(
            f"the schedule {placement.name} moves rows, and {config.policy} chooses other rows for every head; use "
            "another --policy, such as swa."
        )
    has_tiers = can_tier if placement is None else placement.uses_tiers
    found = POLICIES[config.policy].state_bytes(spec.attention, config.sparsity, max_len)
    read_share = (1 + sum(reads_of(config.policy, config.sparsity)(max_len - 1))) / max_len
    state = StateMemory(found.per_token, found.per_sequence, read_share)
    if not has_tiers:
        capacity = resident_capacity(
            device_bytes,
            num_layers=spec.num_layers,
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
        )
    placement = placement or ThreePhase()
    wanted = config.max_num_seqs * max_len
    host_tokens = min(host_bytes // token_bytes, wanted)
    capacity = device_capacity(
        device_bytes,
        num_layers=spec.num_layers,
        row_bytes=codec.format.row_bytes,
        max_num_seqs=config.max_num_seqs,
        max_length=max_len,
        lower_tokens=wanted,
        num_tiers=1 + (host_tokens > 0) + (config.kv_disk_memory is not None or placement.most_deleted(max_len) > 0),
        piece_columns=model.backend.attend.piece_columns(codec.format, spec.num_heads),
        holds_tables=model.decoder.device.type == "cpu",
        state=state,
    )
    _check_room(capacity, device_bytes, token_bytes, state, config, max_len)
    hidden_bytes = spec.num_layers * hidden_format(model.dtype, spec.hidden_size).row_bytes
    planned = placement.most_deleted(max_len)
    # Rows are deleted because a schedule says so, or because the disk was given less than it takes. A disk that merely
    # has less room than the greatest work of all would need is no reason to keep a hidden state of every token.
    is_capped = config.kv_disk_memory is not None
    if planned and spec.rotates_by_length:
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
    if spec.rotates_by_length:
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
    model: LoadedModel, codec: Codec, config: KVCacheConfig, directory: Path, eviction: Eviction, *, overlap: bool
) -> CacheManager:
    """The cache of an engine: a flat pool, and the tiers below it as soon as something has to move.

    Args:
        model: rebuilds deleted rows.
        codec: of the rows.
        config: sizes.
        directory: its disk takes the disk tier.
        eviction: who leaves the hot cache first.
        overlap: whether rows move beside the arithmetic.

    Raises:
        CapacityError: the pool is larger than the memory, or the disk is too full.
        InputError: the directory cannot hold files.
    """
    spec, backend, device = model.spec, model.backend, model.decoder.device
    row_bytes, limits = codec.format.row_bytes, config.limits
    flat = KVStore(
        num_layers=spec.num_layers,
        codec=codec,
        num_rows=limits.device_tokens,
        max_num_seqs=config.max_num_seqs,
        max_length=config.max_model_len,
        device=device,
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
            HostTier(spec.num_layers, tier.num_tokens, row_bytes)
            if tier.medium is Medium.HOST
            else DiskTier(directory, spec.num_layers, tier.num_tokens, row_bytes, backend.move_rows)
            for tier in limits.tiers
        ]
        hidden = None
        if kept:
            hidden_codec = make_codec(hidden_format(model.dtype, spec.hidden_size))
            hidden_row = hidden_codec.format.row_bytes
            tier = DiskTier(directory, spec.num_layers, kept, hidden_row, backend.move_rows)
            hidden = HiddenStateCache(tier, hidden_codec, model.decoder.project_kv, model.decoder.dtype)
        return TieredStore.over(
            flat,
            tiers=tiers,
            hidden=hidden,
            rebuildable=limits.rebuildable,
            eviction=eviction,
            overlap=overlap,
            piece_columns=backend.attend.piece_columns(codec.format, spec.num_heads),
            in_flight_bytes=config.capacity.in_flight_bytes,
        )

    return CacheManager(flat, num_tiers=len(limits.tiers), make_tiers=make_tiers, starts_tiered=kept > 0)
