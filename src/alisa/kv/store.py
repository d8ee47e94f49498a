"""The KV store: which sequence has which rows, and where they lie.

Rows are bytes, one token of one layer each, in an arena `[L, R, row_bytes]`; a row is written once and never changes,
so a copy anywhere is never stale. A sequence has a lane (a small integer that also indexes the policy's state); its
tokens map to slots of the arena through a table. The store knows nothing of heads, policies or batches of requests.

Every sequence reserves the rows it may need when it is opened, so a running sequence can never meet a full arena: the
cap decides who waits at the door, not who fails in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.config import format_bytes
from alisa.errors import CapacityError
from alisa.types import Codec, Medium, Segment


@dataclass(slots=True)
class _Lane:
    """Bookkeeping of one open sequence: its slots, and how many of them hold rows."""

    slots: list[int]
    length: int = 0


class KVStore:
    """A capped arena of rows on one device, addressed by (lane, position).

    Args:
        num_layers: L.
        codec: writes and reads rows; fixes `row_bytes`.
        num_rows: R, tokens that the arena holds over all layers.
        num_lanes: sequences that can be open at the same time.
        max_length: longest sequence that can be opened, in tokens.
        device: where the arena lies.
    """

    def __init__(
        self, *, num_layers: int, codec: Codec, num_rows: int, num_lanes: int, max_length: int, device: torch.device
    ) -> None:
        self.codec = codec
        self.num_rows = num_rows
        self.num_lanes = num_lanes
        self.device = device
        self.token_bytes = num_layers * codec.format.row_bytes
        # empty, not zeros: on a CPU the operating system hands out pages as rows are written, so a generous cap
        # costs nothing until it is used.
        self._arena = torch.empty(num_layers, num_rows, codec.format.row_bytes, dtype=torch.uint8, device=device)
        self._table = torch.empty(num_lanes, max_length, dtype=torch.int32, device=device)
        self._max_length = max_length
        self._free_slots = list(range(num_rows - 1, -1, -1))
        self._free_lanes = list(range(num_lanes - 1, -1, -1))
        self._open: dict[int, _Lane] = {}

    def can_open(self, num_tokens: int) -> bool:
        """Whether `open(num_tokens)` would succeed now."""
        return bool(self._free_lanes) and num_tokens <= len(self._free_slots)

    def open(self, num_tokens: int) -> int:
        """Reserve rows for a sequence of up to `num_tokens` tokens and return its lane.

        Raises:
            CapacityError: no lane or not enough rows are free; nothing has changed.
        """
        if num_tokens > self._max_length or not self.can_open(num_tokens):
            raise CapacityError(
                f"A sequence of {num_tokens} tokens needs {format_bytes(num_tokens * self.token_bytes)} of KV rows; "
                f"{len(self._free_slots)} of {self.num_rows} rows and {len(self._free_lanes)} of {self.num_lanes} "
                f"lanes are free, and a sequence may have {self._max_length} tokens."
            )
        lane = self._free_lanes.pop()
        split = len(self._free_slots) - num_tokens
        slots = self._free_slots[split:][::-1]
        del self._free_slots[split:]
        self._open[lane] = _Lane(slots)
        self._table[lane, :num_tokens] = torch.tensor(slots, dtype=torch.int32, device=self.device)
        return lane

    def release(self, lane: int) -> None:
        """Give back every row of a sequence; its lane and slots may be reused at once."""
        self._free_slots.extend(reversed(self._open.pop(lane).slots))
        self._free_lanes.append(lane)

    def extend(self, segments: Sequence[Segment]) -> RowWriter:
        """Make room for the new tokens of this step; each layer then writes its rows through the returned writer.

        Raises:
            CapacityError: a segment does not continue its sequence or passes its reservation; nothing has changed.
        """
        for segment in segments:
            lane = self._open[segment.lane]
            if segment.start != lane.length or segment.end > len(lane.slots):
                raise CapacityError(
                    f"Lane {segment.lane} has {lane.length} of {len(lane.slots)} reserved rows; positions "
                    f"{segment.start} to {segment.end - 1} do not continue it."
                )
        slots: list[int] = []
        for segment in segments:
            lane = self._open[segment.lane]
            slots += lane.slots[segment.start : segment.end]
            lane.length = segment.end
        return RowWriter(self._arena, self.codec, torch.tensor(slots, dtype=torch.int64, device=self.device))

    def rows(self, layer: int) -> Tensor:
        """The arena of one layer, `UInt8[R, row_bytes]`; kernels read it in place by slot."""
        return self._arena[layer]

    def slot_table(self, lane_ids: Tensor, length: int) -> Tensor:
        """Slots of the first `length` positions of the given lanes, Int32[B, length]: a small copy, once a step."""
        return self._table[:, :length].index_select(0, lane_ids)

    def read(self, layer: int, lane: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V `[end, G, D]` of positions [0, end) of one lane, decoded; for prefill over cached tokens."""
        return self.codec.decode(self._arena[layer].index_select(0, self._table[lane, :end]))

    def length(self, lane: int) -> int:
        """Tokens stored for an open sequence."""
        return self._open[lane].length

    @property
    def used_rows(self) -> int:
        """Tokens that hold rows now; reserved but unwritten rows are not counted."""
        return sum(lane.length for lane in self._open.values())

    @property
    def reserved_rows(self) -> int:
        """Tokens that open sequences may grow to."""
        return self.num_rows - len(self._free_slots)

    def nbytes(self, medium: Medium) -> int:
        """Bytes of rows held in one medium."""
        return self.used_rows * self.token_bytes if medium is Medium.DEVICE else 0

    def check(self) -> None:
        """Assert that every slot and lane is free or owned exactly once; callable whenever no step is running."""
        owned = [slot for lane in self._open.values() for slot in lane.slots]
        assert sorted(owned + self._free_slots) == list(range(self.num_rows)), "a slot is lost or owned twice"
        assert sorted([*self._open, *self._free_lanes]) == list(range(self.num_lanes)), "a lane is lost or owned twice"
        for index, lane in self._open.items():
            assert lane.length <= len(lane.slots), f"lane {index} is longer than its reservation"
            assert self._table[index, : len(lane.slots)].tolist() == lane.slots, f"lane {index}: table and slots differ"


@dataclass(frozen=True, slots=True)
class RowWriter:
    """The new rows of one step: the slots are decided once, then every layer writes its rows there."""

    arena: Tensor
    codec: Codec
    slots: Tensor
    """Int64[N]"""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write K and V `[N, G, D]` of one layer, tokens in the order of the step's segments."""
        self.arena[layer].index_copy_(0, self.slots, self.codec.encode(k, v))
