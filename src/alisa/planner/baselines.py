"""How long other ways to run the same model take on the same machine: prices from the same numbers, no code of theirs.

All read every cached token (dense attention) in the dtype of the arithmetic, with the same matrix products and the same
attention speed. What is particular to each is named in its docstring; versions and settings of the systems that the
paper compared with are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from alisa.outputs import Phase
from alisa.planner.cost import CostModel, StepCost
from alisa.planner.footprint import kv_token_bytes, row_bytes
from alisa.planner.hardware import Hardware
from alisa.planner.load import RunConfig, StepWork
from alisa.planner.simulate import UniformWorkload, room_for
from alisa.spec import ModelSpec

BLOCK_TOKENS = 16
"""vLLM's default block."""

_PRICED_STEPS = 64


@dataclass(frozen=True, slots=True)
class Baseline:
    """What one way takes."""

    name: str
    seconds: float | None
    """None: it does not fit."""
    note: str
    cost: StepCost = field(default_factory=StepCost)


class Baselines:
    """The ways of others to do a workload.

    Args:
        spec: the model.
        dtype: of arithmetic and rows.
        hardware: where.
        workload: all of the work.
        overlap: whether transfers overlap with the arithmetic where a system does that.
    """

    def __init__(
        self, spec: ModelSpec, dtype: str, hardware: Hardware, workload: UniformWorkload, *, overlap: bool = True
    ) -> None:
        self._spec = spec
        self._hardware = hardware
        self._workload = workload
        self._overlap = overlap
        self._method = RunConfig("dense", 0.0, dtype, dtype)
        self._cost = CostModel(spec, self._method, hardware)
        self._token_bytes = kv_token_bytes(spec, dtype)
        self._row_bytes = row_bytes(spec, dtype)

    def all(self) -> list[Baseline]:
        """Every one of them."""
        return [
            self.all_device(),
            self.static_split(),
            self.block_paging("recompute"),
            self.block_paging("swap"),
            self.whole_layers(),
        ]

    def all_device(self) -> Baseline:
        """Everything on the device; what does not fit together runs in waves (as this library without tiers)."""
        fits = self._together(self._workload.num_rows)
        if fits == 0:
            return Baseline("all-device", None, "not even one sequence fits")
        batch = min(fits, self._workload.batch)
        waves = -(-self._workload.batch // batch)
        cost = self._run(batch).times(waves)
        note = "everything fits" if waves == 1 else f"{batch} sequences at a time, {waves} waves"
        return Baseline("all-device", self._seconds(cost), note, cost)

    def static_split(self) -> Baseline:
        """As FlexGen: a fixed share of every sequence lies below and is read in every step, while the arithmetic runs.

        The best share is the smallest that fits, because FlexGen allocates its store for the final length; attention
        runs on the device. The whole batch runs in one wave.
        """
        rows, batch = self._workload.num_rows, self._workload.batch
        on_device = self._room(batch) // self._token_bytes
        share = max(0.0, 1 - on_device / (batch * rows))
        below_bytes = int(share * batch * rows) * self._token_bytes
        if on_device < batch or below_bytes > self._hardware.below_bytes:
            return Baseline("static split (FlexGen-like)", None, "what lies below does not fit")
        cost = self._run(batch, lambda length: share * length, stored=share)
        return Baseline("static split (FlexGen-like)", self._seconds(cost), f"{1 - share:.0%} on the device", cost)

    def whole_layers(self) -> Baseline:
        """As Accelerate and transformers' offloaded cache: the rows of all layers but two lie below.

        Every layer's come up whole in every step, during the arithmetic of the layer before.
        """
        rows, batch = self._workload.num_rows, self._workload.batch
        needed = batch * rows * self._token_bytes
        if self._room(batch) < 2 * needed // self._spec.num_layers or needed > self._hardware.below_bytes:
            return Baseline("whole layers (Accelerate-like)", None, "two layers of rows do not fit the device")
        cost = self._run(batch, lambda length: float(length), stored=1.0)
        return Baseline("whole layers (Accelerate-like)", self._seconds(cost), "all rows below", cost)

    def block_paging(self, way: Literal["recompute", "swap"]) -> Baseline:
        """As vLLM: blocks of 16 tokens, and as many sequences at a time as have blocks.

        The newest is preempted when they run out, and restored by reading its tokens again (recompute) or by copying
        its blocks back (swap).
        """
        name = f"block paging, {way} (vLLM-like)"
        blocks = max(self._room(self._workload.batch), 0) // (self._token_bytes * BLOCK_TOKENS)
        if blocks * BLOCK_TOKENS < self._workload.num_rows:
            return Baseline(name, None, "not even one sequence fits")
        cost, num_preempted = self._paged(blocks, way)
        note = "everything fits" if num_preempted == 0 else f"{num_preempted} times a sequence was preempted"
        return Baseline(name, self._seconds(cost), note, cost)

    def _paged(self, blocks: int, way: str) -> tuple[StepCost, int]:
        """Continuous batching in integers: decode steps of those who run, prompts of those who join."""
        work = self._workload
        waiting = [(work.prompt_len, True)] * work.batch  # tokens of each when it joins, and whether for the first time
        running: list[int] = []
        total, num_preempted = StepCost(), 0
        while waiting or running:
            while waiting and sum(map(_blocks, running)) + _blocks(waiting[0][0] + 1) <= blocks:
                length, is_new = waiting.pop(0)
                if is_new or way == "recompute":
                    total += self._cost.step(self._prefill(1, length), tiers=False)
                else:
                    total += StepCost(fetch_s=2 * self._spec.num_layers * self._link_s(length))
                running.append(length)
            while sum(_blocks(length + 1) for length in running) > blocks:
                waiting.insert(0, (running.pop(), False))
                num_preempted += 1
            # All run on unchanged until the next needs a block that is not there, or one is finished.
            count = self._steps_until_change(running, blocks)
            load = self._decode(len(running), sum(running) / len(running) + (count + 1) / 2)
            total += self._cost.step(load, tiers=False).times(count)
            running = [length + count for length in running]
            running = [length for length in running if length < work.num_rows]
        return total, num_preempted

    def _steps_until_change(self, running: list[int], blocks: int) -> int:
        last = min(self._workload.num_rows - length for length in running)
        count = 1
        while count < min(last, BLOCK_TOKENS) and sum(_blocks(length + count + 1) for length in running) <= blocks:
            count += 1
        return count

    def _run(self, batch: int, below: Callable[[int], float] | None = None, *, stored: float = 0.0) -> StepCost:
        """One wave: prompts, then every step; `below` says how much of a sequence is read from the tier below."""
        work = self._workload
        total = StepCost()
        for count in _passes(batch, work.prompt_len):
            load = replace(self._prefill(count, work.prompt_len), stored=stored * count * work.prompt_len)
            total += self._cost.step(load, tiers=False)
        stride = max(1, work.output_len // _PRICED_STEPS)
        for length in range(work.prompt_len + 1, work.num_rows + 1, stride):
            weight = min(stride, work.num_rows + 1 - length)
            load = self._decode(batch, length)
            if below is not None:
                load = replace(load, fetched=batch * below(length), stored=batch * stored)
            total += self._cost.step(load, tiers=False).times(weight)
        return total

    def _prefill(self, count: int, length: int) -> StepWork:
        return _load(prefill=True, sequences=count, tokens=count * length, pairs=count * length * (length + 1) / 2)

    def _decode(self, batch: int, length: float) -> StepWork:
        return _load(prefill=False, sequences=batch, tokens=batch, read=round(batch * length))

    def _room(self, batch: int) -> int:
        return room_for(self._spec, self._method, self._hardware, replace(self._workload, batch=batch)).device_bytes

    def _together(self, num_rows: int) -> int:
        """How many sequences of this final length fit the device."""
        sizes = range(self._workload.batch, 0, -1)
        return next((batch for batch in sizes if batch * num_rows * self._token_bytes <= self._room(batch)), 0)

    def _link_s(self, rows: float) -> float:
        return self._hardware.read.seconds(rows, self._row_bytes)

    def _seconds(self, cost: StepCost) -> float:
        return cost.overlapped_s if self._overlap else cost.serial_s


def _blocks(length: int) -> int:
    return -(-length // BLOCK_TOKENS)


def _passes(batch: int, prompt_len: int) -> Iterator[int]:
    """Prompts in each pass of at most a thousand tokens, as everywhere here."""
    per_pass = max(1, 1024 // prompt_len)
    while batch > 0:
        yield min(per_pass, batch)
        batch -= per_pass


def _load(*, prefill: bool, sequences: int, tokens: int, pairs: float = 0.0, read: int = 0) -> StepWork:
    return StepWork(
        phase=Phase.DEVICE,
        prefill=prefill,
        num_sequences=sequences,
        num_tokens=tokens,
        num_finished=sequences,
        pairs=pairs,
        read_pairs=pairs,
        read=read,
        candidates=read,
        wanted=0.0,
        fetched=0.0,
        rebuilt=0.0,
        past=0.0,
        stored=0.0,
        hidden_stored=0,
        device_tokens=0,
        below_tokens=0,
        deleted_tokens=0,
        hidden_tokens=0,
    )
