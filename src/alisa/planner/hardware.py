"""What a machine can do, as numbers: fitted by `alisa profile` or written down for one that is not here.

Every part of a step has the same few forms: seconds for a call, for a row, for a byte. A profile and a preset differ in
where the numbers come from only; `alisa.planner.saved` reads both from JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import exp, log


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """A matrix product with a weight that is read from memory."""

    call_s: float
    curves: tuple[tuple[float, tuple[tuple[float, float], ...]], ...]
    """(numbers in the weight, points), ascending; a point is (rows, seconds for each number of the weight).

    In between, the logarithms are interpolated; smaller and larger weights take the first and the last curve.
    """

    def seconds(self, rows: float, num_weights: float) -> float:
        """Time for `rows` rows and a weight of `num_weights` numbers."""
        sizes = tuple((size, interpolate(points, max(rows, 1))) for size, points in self.curves)
        return self.call_s + num_weights * interpolate(sizes, min(num_weights, sizes[-1][0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Decode attention of one layer, and writing the new rows."""

    call_s: float
    byte_s: float
    """For a byte of a row that is read."""
    value_s: float
    """For a value of a query head and a row that it reads: H * D of them a row."""
    append_call_s: float
    append_row_s: float

    def seconds(self, rows: float, row_bytes: int, q_size: int) -> float:
        """Time to read `rows` rows."""
        return self.call_s + rows * (row_bytes * self.byte_s + q_size * self.value_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionPrices:
    """Choosing tokens in one layer and keeping the scores."""

    step_s: float
    """Once a step: the work that does not depend on the layer."""
    call_s: float
    row_s: float = 0.0
    """For each sequence."""
    candidate_s: float = 0.0
    """For each token that is ranked."""
    read_s: float = 0.0
    """For each token that is chosen."""
    value_s: float = 0.0
    """For each value of a query head and a token that is scored: H * D a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between the device and a lower tier."""

    call_s: float
    """For one layer of one step, or for one filled buffer."""
    row_s: float
    bytes_per_s: float

    def seconds(self, rows: float, row_bytes: float, calls: float = 1) -> float:
        """Time for this many rows, fewer than one if there are none in most steps."""
        return min(calls, rows) * self.call_s + rows * (self.row_s + row_bytes / self.bytes_per_s) if rows > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine."""

    name: str
    where: str
    """Where the numbers come from: a stamp, or the assumptions of a preset."""
    device_bytes: int
    """Memory that holds weights, activations and the device's rows."""
    below: str
    """The tier below: `host` or `disk`."""
    below_bytes: int
    packs_tied: bool
    """Whether an output projection that is tied to the embedding is held a second time, packed."""
    gemm: dict[str, Gemm]
    """By dtype of the weights; `int8` where the arithmetic between the products is in the first of the others."""
    attention: dict[str, Attention]
    """By dtype of the rows."""
    selection: dict[str, SelectionPrices]
    """`none`, `ranked` (swa, h2o), `sketch-keys` (those without a sketch of the values), `sketch`."""
    read: Link
    write: Link
    lookup_call_s: float
    """Finding the rows of one layer when some may lie below."""
    lookup_row_s: float
    place_s: float
    """Making room and starting moves, for one layer of one step with tiers."""
    rebuild_call_s: float
    rebuild_row_s: float
    """Decoding a hidden state and encoding its row, without the product."""
    prefill_value_s: float
    """Causal attention of a prompt: for each pair of positions and value of a query head."""
    observed_value_s: float
    """Explicit weights of the prompt's last rows, counted the same way."""
    layer_s: float
    """What else a layer costs: launching and interpreting."""
    rope_s: float
    """And what it costs more when it rotates queries and keys."""
    value_s: float
    """Norms, residual sums and activations: for each value that passes through a layer."""
    step_s: float
    logit_s: float
    """Choosing a token: for each number of the logits."""
    overlap: float
    """Share of the transfers that can overlap with the arithmetic: 1 with a copy engine, 0 where the cores copy."""
    write_overlap: float
    """The same for rows that are offloaded while others decode, which nobody waits for."""


def interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """The value at x between points of positive numbers, linear in logarithms; proportional to x beyond the last."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            share = log(x / x0) / log(x1 / x0)
            return exp(log(y0) + share * log(y1 / y0))
    return points[-1][1] * x / points[-1][0]
