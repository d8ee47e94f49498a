"""From caps in bytes to a store: what fits where, and which store and scheduler that takes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alisa.config import format_bytes
from alisa.engine.kernels import Kernels
from alisa.errors import CapacityError, InputError
from alisa.kv.base import RowStore
from alisa.kv.codec import make_codec
from alisa.kv.remnant import Remnants, remnant_format
from alisa.kv.residency import Eviction
from alisa.kv.store import KVStore
from alisa.kv.tiered import TieredStore
from alisa.kv.tiers import DiskTier, HostTier, LowerTier
from alisa.machine import free_memory
from alisa.model.decoder import Decoder
from alisa.policy.base import SelectionPolicy
from alisa.schedule.all_device import AllDevice
from alisa.schedule.base import Limits, Scheduler, Tier
from alisa.schedule.share import share_below, staging_rows
from alisa.schedule.three_phase import ThreePhase
from alisa.types import Codec

DEFAULT_KV_SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Share of the memory that is free after loading the model which KV rows may take when no cap is given. On a CPU the
rest is for activations and for everybody else on the machine; on a GPU nobody else is expected."""

FREE_DISK_SHARE = 0.8
"""Share of the free disk that the disk tier may take when no cap is given."""


def default_kv_memory(device: torch.device) -> int:
    """Bytes of rows that `device` may hold when no cap is given, as things stand now."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return int(free * DEFAULT_KV_SHARE[device.type])


@dataclass(frozen=True, slots=True)
class Caps:
    """Hard caps in bytes."""

    device_bytes: int
    host_bytes: int
    """Of main memory below a GPU; 0 when main memory is the device."""
    disk_bytes: int | None
    """None: what is needed, within the free room."""
    disk_path: Path | None
    eviction: Eviction = "lru"
    """Who leaves the hot cache first."""
    overlap: bool = True
    """Whether rows move beside the arithmetic; benchmarks switch it off to see what it is worth."""

    @property
    def directory(self) -> Path:
        """Where the disk tier lies."""
        return self.disk_path or Path(tempfile.gettempdir())

    @property
    def most_disk_bytes(self) -> int:
        """What the disk tier may take.

        Raises:
            InputError: the directory does not exist.
        """
        if self.disk_bytes is not None:
            return self.disk_bytes
        try:
            return int(shutil.disk_usage(self.directory).free * FREE_DISK_SHARE)
        except OSError as error:
            raise InputError(f"{self.directory} cannot hold the disk tier: {error.strerror}.") from error


@dataclass(frozen=True, slots=True)
class Memory:
    """A store with everything that decides about it."""

    store: RowStore
    scheduler: Scheduler
    limits: Limits
    host_bytes: int
    """Size of the host tier; 0 without one."""
    disk_bytes: int
    """Size of the disk tier, remnants included; 0 without one."""


def make_memory(
    decoder: Decoder,
    policy: SelectionPolicy,
    codec: Codec,
    kernels: Kernels,
    sizes: Sequence[int],
    caps: Caps,
    scheduler: Scheduler | None,
    num_lanes: int,
) -> Memory:
    """The simplest store that can hold sequences of these sizes: one arena if they fit, tiers below it if not.

    Args:
        decoder: the model; rebuilds deleted rows.
        policy: one with an index set for each head needs everything on the device.
        codec: of the rows.
        kernels: the append kernel, if there is one.
        sizes: rows that every request may come to need.
        caps: in bytes.
        scheduler: what a schedule file asks for; None: whatever the caps demand.
        num_lanes: sequences that run together at the most.

    Raises:
        CapacityError: not even a token fits, or the disk is too full.
        InputError: tiers are asked for and cannot be had.
    """
    spec, device = decoder.spec, decoder.device
    token_bytes = spec.num_layers * codec.format.row_bytes
    largest = sorted(sizes, reverse=True)[:num_lanes]
    wanted, max_length = sum(largest), largest[0]
    num_rows = min(wanted, caps.device_bytes // token_bytes)
    can_tier = policy.num_sets(spec) == 1
    if scheduler is not None and scheduler.uses_tiers and not can_tier:
        raise InputError(
            f"the schedule {scheduler.name} moves rows, and {policy.name} chooses other rows for every head; use "
            "another --policy, such as swa."
        )
    needs_tiers = num_rows < wanted if scheduler is None else scheduler.uses_tiers
    if not (needs_tiers and can_tier and caps.host_bytes + caps.most_disk_bytes >= token_bytes):
        if num_rows == 0:
            raise CapacityError(
                f"A KV cap of {format_bytes(caps.device_bytes)} holds not even one token of "
                f"{format_bytes(token_bytes)}; raise --kv-device-memory."
            )
        store = KVStore(
            num_layers=spec.num_layers,
            codec=codec,
            num_rows=num_rows,
            num_lanes=num_lanes,
            max_length=max_length,
            device=device,
            append=kernels.append,
        )
        return Memory(store, AllDevice(), Limits(num_rows), 0, 0)
    return _tiered(decoder, codec, kernels, largest, caps, scheduler or ThreePhase())


def _tiered(
    decoder: Decoder,
    codec: Codec,
    kernels: Kernels,
    largest: Sequence[int],
    caps: Caps,
    scheduler: Scheduler,
) -> Memory:
    spec = decoder.spec
    num_layers, row_bytes = spec.num_layers, codec.format.row_bytes
    token_bytes = num_layers * row_bytes
    piece = min(kernels.attend.piece_columns(codec.format, spec.num_heads), largest[0])
    # A piece of a selection is read at once, whatever the cap: two buffers where it allows, or else one.
    staging = max(2 * staging_rows(caps.device_bytes // row_bytes), piece)
    num_rows = min((caps.device_bytes - staging * row_bytes) // token_bytes, sum(largest))
    if num_rows < 1:
        least = token_bytes + staging * row_bytes
        raise CapacityError(
            f"A KV cap of {format_bytes(caps.device_bytes)} is less than the {format_bytes(least)} of one token and "
            "the buffer to read others through; raise --kv-device-memory."
        )
    dtype_name = str(decoder.dtype).removeprefix("torch.")
    remnant_codec = make_codec(remnant_format(dtype_name, spec.hidden_size))
    remnant_bytes = num_layers * remnant_codec.format.row_bytes
    disk_bytes = caps.most_disk_bytes
    host_rows = min(caps.host_bytes // token_bytes, sum(largest))
    planned = scheduler.most_deleted(largest[0])
    below, rebuildable, fits = share_below(
        disk_bytes,
        token_bytes,
        remnant_bytes,
        device_tokens=num_rows,
        host_tokens=host_rows,
        sizes=list(largest),
        planned=planned,
    )
    kept = rebuildable * len(largest)
    if not fits:
        raise CapacityError(
            f"The schedule deletes up to {planned} tokens of each of {len(largest)} sequences, and what they are "
            f"rebuilt from takes {format_bytes(kept * remnant_bytes)} of the {format_bytes(disk_bytes)} on disk; raise "
            "--kv-disk-memory."
        )
    tiers: list[LowerTier] = []
    if host_rows:
        tiers.append(HostTier(num_layers, host_rows, row_bytes))
    if below or not tiers:
        tiers.append(_disk(caps, num_layers, below, row_bytes, kernels))
    remnants = None
    if kept:
        tier = _disk(caps, num_layers, kept, remnant_codec.format.row_bytes, kernels)
        remnants = Remnants(tier, remnant_codec, decoder.project_kv, decoder.dtype)
    store = TieredStore(
        num_layers=num_layers,
        codec=codec,
        num_rows=num_rows,
        num_lanes=len(largest),
        max_length=largest[0],
        tiers=tiers,
        remnants=remnants,
        rebuildable=rebuildable,
        eviction=caps.eviction,
        overlap=caps.overlap,
        staging_rows=staging,
        piece_columns=piece,
        device=decoder.device,
        append=kernels.append,
    )
    limits = Limits(num_rows, tuple(Tier(tier.medium, tier.num_rows) for tier in tiers), rebuildable)
    return Memory(store, scheduler, limits, host_rows * token_bytes, below * token_bytes + kept * remnant_bytes)


def _disk(caps: Caps, num_layers: int, num_rows: int, row_bytes: int, kernels: Kernels) -> DiskTier:
    return DiskTier(caps.directory, num_layers, num_rows, row_bytes, kernels.move_rows)
