"""What the tiers did since somebody last asked."""

from __future__ import annotations

from dataclasses import dataclass

from alisa.cache.offload.transfer import Transfers
from alisa.outputs import Traffic


@dataclass(slots=True)
class TrafficMeter:
    """Counts rows (one token of one layer each); see `Traffic` for what each number means."""

    transfers: Transfers
    fetched_rows: int = 0
    stored_rows: int = 0
    deleted_rows: int = 0
    rebuilt_rows: int = 0
    moved_bytes: int = 0
    lookups: int = 0
    hits: int = 0
    _wait_s: float = 0.0  # of the transfers, when they were last asked
    _busy_s: float = 0.0

    def fetched(self, num_rows: int, row_bytes: int) -> None:
        """Rows were read from a tier."""
        self.fetched_rows += num_rows
        self.moved_bytes += num_rows * row_bytes

    def stored(self, num_rows: int, row_bytes: int) -> None:
        """Rows, or hidden states, were written to a tier."""
        self.stored_rows += num_rows
        self.moved_bytes += num_rows * row_bytes

    def rebuilt(self, num_rows: int, hidden_bytes: int) -> None:
        """Hidden states of `hidden_bytes` each were read, to rebuild rows from."""
        self.rebuilt_rows += num_rows
        self.moved_bytes += num_rows * hidden_bytes

    def take(self) -> Traffic:
        """What was counted since the last call."""
        wait_s, busy_s = self.transfers.wait_s, self.transfers.busy_s
        traffic = Traffic(
            fetched_rows=self.fetched_rows,
            stored_rows=self.stored_rows,
            deleted_rows=self.deleted_rows,
            rebuilt_rows=self.rebuilt_rows,
            moved_bytes=self.moved_bytes,
            lookups=self.lookups,
            hits=self.hits,
            wait_s=wait_s - self._wait_s,
            busy_s=busy_s - self._busy_s,
        )
        self.fetched_rows = self.stored_rows = self.deleted_rows = self.rebuilt_rows = 0
        self.moved_bytes = self.lookups = self.hits = 0
        self._wait_s, self._busy_s = wait_s, busy_s
        return traffic
