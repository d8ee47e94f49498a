"""Seconds of a step: the work that its plan asks for, priced with the numbers of a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from alisa.budget import Budget
from alisa.model.names import expert_name, layer_shapes
from alisa.planner.footprint import hidden_row_bytes, row_bytes
from alisa.planner.hardware import Hardware, SelectionPrices
from alisa.planner.load import RunConfig, StepWork
from alisa.policy.registry import POLICIES
from alisa.scheduler.placement.capacity import staging_rows
from alisa.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step, or of many, by part; the first six are named as in `StepRecord`."""

    linear_s: float = 0.0
    """Linear layers, norms, activations, logits."""
    attention_s: float = 0.0
    selection_s: float = 0.0
    lookup_s: float = 0.0
    """Finding rows and making room, where some may lie below: never hidden."""
    fetch_s: float = 0.0
    store_s: float = 0.0
    rebuild_s: float = 0.0
    sampling_s: float = 0.0
    other_s: float = 0.0
    hidden_s: float = 0.0
    """Of fetching and storing, what can run while the arithmetic runs."""

    @property
    def serial_s(self) -> float:
        """The sum: load, compute and store one after the other, as the paper counts."""
        arithmetic_s = self.linear_s + self.attention_s + self.selection_s + self.sampling_s + self.other_s
        return arithmetic_s + self.lookup_s + self.fetch_s + self.store_s + self.rebuild_s

    @property
    def overlapped_s(self) -> float:
        """The sum without what is hidden."""
        return self.serial_s - self.hidden_s

    @property
    def transfer_s(self) -> float:
        """What `StepRecord.transfer_s` measures: looking up, moving and rebuilding, as far as it is waited for."""
        return self.lookup_s + self.fetch_s + self.store_s + self.rebuild_s - self.hidden_s

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: float) -> StepCost:
        """This many such steps."""
        return StepCost(*(getattr(self, f.name) * count for f in fields(self)))


class CostModel:
    """Prices steps of one model, run in one way, on one machine.

    Args:
        spec: the model.
        method: how it is run.
        hardware: where.
    """

    def __init__(self, spec: ModelSpec, method: RunConfig, hardware: Hardware) -> None:
        self._spec = spec
        self.method = method
        self._policy = POLICIES[method.reading_policy]
        self._hardware = hardware
        self._gemm = hardware.gemm[method.products]
        self._attention = hardware.attention[method.kv_dtype]
        self._row_bytes = row_bytes(spec, method.kv_dtype)
        self._hidden_bytes = hidden_row_bytes(spec, method.dtype)
        shapes = {name: shape for name, shape in layer_shapes(spec).items() if len(shape) == 2}
        self._layer_weights = [math.prod(shape) for name, shape in shapes.items() if not name.startswith("experts.")]
        first = expert_name(0, "")
        self._expert_weights = [math.prod(shape) for name, shape in shapes.items() if name.startswith(first)]
        self._layer_s = hardware.layer_s + (hardware.rope_s if spec.rope else 0.0)
        mlp_values = spec.ffn_size * (4 if spec.gated_mlp else 2)
        self._values = 6 * spec.hidden_size + 2 * spec.q_size + mlp_values * max(spec.experts_per_token, 1)
        self._windows = [window for window in spec.attention.windows if window is not None]
        self._linear: dict[int, float] = {}

    def step(self, load: StepWork, *, tiers: bool = True) -> StepCost:
        """Seconds of a step.

        Args:
            load: its work.
            tiers: whether the store has lower tiers, so that every row has to be looked for.
        """
        spec, hardware = self._spec, self._hardware
        layers, full = spec.num_layers, spec.num_layers - len(self._windows)
        attention_s = layers * (self._attention.append_call_s + load.num_tokens * self._attention.append_row_s)
        attention_s += full * self._attending_s(load, None)
        attention_s += sum(self._attending_s(load, window) for window in self._windows)
        if load.prefill:
            selection_s = load.pairs * spec.q_size * hardware.observed_value_s * self._observed_share(load)
        else:
            selection_s = self._selection_s(load)
        lookup_s = self._lookup_s(load) if tiers else 0.0
        # What a window reads is new, and lies on the device.
        fetch_s = full * hardware.read.seconds(load.fetched, self._row_bytes, self.waits(load))
        store_s = layers * hardware.write.seconds(load.stored, self._row_bytes)
        store_s += layers * hardware.write.seconds(load.hidden_stored, self._hidden_bytes)
        write_overlap = hardware.overlap if load.prefill else hardware.write_overlap
        linear_s = self._linear_s(load.num_tokens) + self._logits_s(load.num_finished)
        return StepCost(
            linear_s=linear_s,
            attention_s=attention_s,
            selection_s=full * selection_s + (0.0 if load.prefill else self._chooser.step_s),
            lookup_s=layers * lookup_s,
            fetch_s=fetch_s,
            store_s=store_s,
            rebuild_s=full * self._rebuild_s(load.rebuilt),
            sampling_s=load.num_finished * spec.vocab_size * hardware.logit_s,
            other_s=hardware.step_s,
            hidden_s=min(hardware.overlap * fetch_s + write_overlap * store_s, linear_s + attention_s),
        )

    @property
    def chooser(self) -> str:
        """Which of `Hardware.selection` the policy is priced with."""
        return self._policy.priced_as

    def waits(self, load: StepWork) -> float:
        """Times that one layer waits for rows: less than once if most steps lack none.

        Rows that are read past the hot cache are waited for once for every filled buffer.
        """
        missing = load.fetched + load.rebuilt
        return min(missing, max(1.0, load.past / staging_rows(load.device_tokens * self._spec.num_layers)))

    @property
    def _chooser(self) -> SelectionPrices:
        return self._hardware.selection[self.chooser]

    @property
    def pass_s(self) -> float:
        """What one more pass over the same tokens costs: launching every layer again."""
        return self._hardware.step_s + self._spec.num_layers * (
            self._layer_s + (len(self._layer_weights) + 2 * self._spec.experts_per_token) * self._gemm.call_s
        )

    def _linear_s(self, num_tokens: int) -> float:
        """All layers; remembered, because a rollout asks for few different numbers."""
        if num_tokens not in self._linear:
            products = sum(self._gemm.seconds(num_tokens, weights) for weights in self._layer_weights)
            products += self._experts_s(num_tokens)
            other = self._layer_s + num_tokens * self._values * self._hardware.value_s
            self._linear[num_tokens] = self._spec.num_layers * (products + other)
        return self._linear[num_tokens]

    def _experts_s(self, num_tokens: int) -> float:
        """One layer: a product for each expert that has tokens, as if the router chose at random."""
        count, chosen = self._spec.num_experts, self._spec.experts_per_token
        if not count or not num_tokens:
            return 0.0
        busy = count * (1 - (1 - chosen / count) ** num_tokens)
        rows = num_tokens * chosen / busy
        return busy * sum(self._gemm.seconds(rows, weights) for weights in self._expert_weights)

    def _logits_s(self, num_rows: int) -> float:
        if num_rows == 0:
            return 0.0
        spec = self._spec
        return self._gemm.seconds(num_rows, spec.vocab_size * spec.token_embed_dim)

    def _attending_s(self, load: StepWork, window: int | None) -> float:
        """Attention of one layer; through a window, as if all sequences of the step were equally long."""
        spec, hardware = self._spec, self._hardware
        if load.prefill:
            mean = load.pairs / load.num_tokens
            pairs = load.read_pairs if window is None else min(mean, window) * load.num_tokens
            return pairs * spec.q_size * hardware.prefill_value_s
        length = load.candidates // load.num_sequences + 1
        read = load.read if window is None else min(length, window) * load.num_sequences
        return self._attention.seconds(read, self._row_bytes, load.queries * spec.q_size)

    def _selection_s(self, load: StepWork) -> float:
        chooser = self._chooser
        scored = load.candidates * self._spec.q_size
        return (
            chooser.call_s
            + load.num_sequences * chooser.row_s
            + load.candidates * chooser.candidate_s
            + load.read * chooser.read_s
            + scored * chooser.value_s
        )

    def _observed_share(self, load: StepWork) -> float:
        """Part of the prompt's rows whose weights the policy observes."""
        per_sequence = load.num_tokens // load.num_sequences
        window = self._policy.observation_window(Budget(self.method.sparsity), per_sequence)
        return min(1.0, 2 * window / per_sequence)  # the last rows see all of the prompt, the average row half of it

    def _lookup_s(self, load: StepWork) -> float:
        hardware = self._hardware
        if load.prefill:
            return hardware.place_s
        # A policy that decides by history is asked a step ahead, and its rows are looked for then, too.
        times = 1 if self._policy.query_aware else 2
        return times * (hardware.lookup_call_s + load.read * hardware.lookup_row_s) + hardware.place_s

    def _rebuild_s(self, rows: float) -> float:
        """One layer: fetch the hidden states, multiply with W_K and W_V, encode."""
        if rows <= 0:
            return 0.0
        spec, hardware = self._spec, self._hardware
        product = self._gemm.seconds(max(rows, 1), 2 * spec.kv_size * spec.hidden_size)
        fetch = hardware.read.seconds(rows, self._hidden_bytes)
        return min(rows, 1) * (hardware.rebuild_call_s + product) + rows * hardware.rebuild_row_s + fetch
