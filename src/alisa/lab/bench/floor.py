"""The physical floor of a workload: what reading memory and multiplying matrices take, with nothing in between.

Reading is counted by the planner's arithmetic and priced with the read bandwidth; products are those of the engine's
own packed layers, run one after the other, in the batch of a decode step and in a prompt's pass. A floor is the fastest
that the machine was seen to be: a virtual one may be half as fast a minute later, so it is measured before and after a
run.

    python -m alisa.lab.bench.floor < {"shape": ..., "dtype": ..., "weight_dtype": ..., "batch": ..., "pass_rows": ...,
                                   "threads": ...}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter

import torch

from alisa.config import WeightFormat
from alisa.lab.bench.engines import Reading
from alisa.model.choose_linear import choose_linear
from alisa.model.linear import Linear
from alisa.model.names import layer_shapes
from alisa.planner.footprint import row_bytes
from alisa.records.schema import Floor
from alisa.records.structure import structure
from alisa.scheduler.simulate import PREFILL_CHUNK
from alisa.spec import DTYPE_BYTES, ModelSpec

_READ_BYTES = 1 << 28
_LAYERS = 4
"""So many are multiplied with in turn: more than a cache holds."""
_WEIGHT_BYTES = {"int8": (1.0, 1.0), "int4": (0.625, 1.0)}
"""Of a weight of the layers and of the head; 4 bits with a scale and a minimum in float16 for 32, as in Q4_1."""
_LEAST_ROUNDS = 7
_LEAST_S = 1.0
"""Of each measurement: a moment in which others were busy must not be all there is."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """What this machine can do."""

    read_bytes_per_s: float
    decode_gemm_s: float
    """All linear layers of the model and its logits, for the batch of a decode step."""
    prefill_gemm_s: float
    """All linear layers, without logits, for the tokens of a prompt's pass."""
    weight_dtype: WeightFormat = "float"
    """What the layers of both products hold; `float`: the dtype of the arithmetic."""

    def fastest(self, other: Speeds) -> Speeds:
        """The better of both in each, of the same weights."""
        return Speeds(
            max(self.read_bytes_per_s, other.read_bytes_per_s),
            min(self.decode_gemm_s, other.decode_gemm_s),
            min(self.prefill_gemm_s, other.prefill_gemm_s),
            self.weight_dtype,
        )

    def reading(self, other: Speeds) -> Speeds:
        """The same products, with the better of both in reading: the other's weights may be others."""
        return replace(self, read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s))


def floor_of(
    spec: ModelSpec,
    dtype: str,
    reading: Reading,
    speeds: Speeds,
    *,
    prompt_lens: Sequence[int],
    output_len: int,
    batch: int,
    known: int = 0,
) -> Floor:
    """The floor of these prompts, `batch` at a time.

    Args:
        spec: the model.
        dtype: of the arithmetic.
        reading: what the engine reads.
        speeds: of this machine, for such a batch and such a pass.
        prompt_lens: of every prompt.
        output_len: tokens that each gets; the first of them comes from the prompt's own pass.
        batch: most sequences that run together.
        known: tokens of these prompts that need not be read, because they were said before.
    """
    together = min(batch, len(prompt_lens))
    steps = len(prompt_lens) * (output_len - 1) / together
    head = spec.vocab_size * spec.token_embed_dim
    layer_bytes, head_bytes = _WEIGHT_BYTES.get(reading.weights, (DTYPE_BYTES[dtype],) * 2)
    weight_bytes = (spec.step_weights - head) * layer_bytes + head * head_bytes
    tokens = sum(reading.tokens(length + step) for length in prompt_lens for step in range(output_len - 1))
    read_bytes = tokens * spec.num_layers * row_bytes(spec, reading.rows)
    return Floor(
        weights_s=steps * weight_bytes / speeds.read_bytes_per_s,
        rows_s=read_bytes / speeds.read_bytes_per_s,
        gemm_s=steps * speeds.decode_gemm_s if speeds.weight_dtype == reading.weights else None,
        prefill_s=(sum(prompt_lens) - known) / pass_rows(prompt_lens) * speeds.prefill_gemm_s,
        read_bytes_per_s=speeds.read_bytes_per_s,
    )


def pass_rows(prompt_lens: Sequence[int]) -> int:
    """Tokens of a prompt's pass through the model."""
    return min(PREFILL_CHUNK, sum(prompt_lens))


def measure_speeds(
    spec: ModelSpec, dtype: torch.dtype, *, batch: int, rows: int, weight_dtype: WeightFormat = "float"
) -> Speeds:
    """Speeds of this machine, on one to two gigabytes of random numbers.

    Args:
        spec: whose layers are multiplied with.
        dtype: of the arithmetic.
        batch: sequences of a decode step.
        rows: tokens of a prompt's pass.
        weight_dtype: what the layers hold.
    """
    layers = _Layers(spec, dtype, weight_dtype)
    decode_s = layers.seconds(batch) + layers.logits_seconds(batch)
    return Speeds(read_bandwidth(), decode_s, layers.seconds(rows), weight_dtype)


def read_bandwidth() -> float:
    """Bytes per second of summing a buffer much larger than any cache; the fastest of many."""
    buffer = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    return buffer.nbytes / _fastest(buffer.sum)


class _Layers:
    """Linear layers of a model with random weights, as the decoder packs them."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, weight_dtype: WeightFormat) -> None:
        self._spec, self._dtype = spec, dtype
        self._device = torch.device("cpu")
        self._linears = choose_linear(weight_dtype, dtype, self._device)
        shapes = [shape for name, shape in layer_shapes(spec).items() if len(shape) == 2 and name.endswith("weight")]
        self._sizes = [shape[1] for shape in shapes] * _LAYERS
        self._layers = [self._linear(*shape) for shape in shapes * _LAYERS]
        self._logits = self._linear(spec.vocab_size, spec.token_embed_dim)

    def seconds(self, rows: int) -> float:
        """All layers, one after the other."""
        inputs = [torch.randn(rows, size, dtype=self._dtype) for size in self._sizes]

        def work() -> None:
            for layer, x in zip(self._layers, inputs, strict=True):
                layer(x)

        return _fastest(work) * self._spec.num_layers / _LAYERS

    def logits_seconds(self, rows: int) -> float:
        """The projection to the vocabulary."""
        hidden = torch.randn(rows, self._spec.token_embed_dim, dtype=self._dtype)
        return _fastest(lambda: self._logits(hidden))

    def _linear(self, num_out: int, num_in: int) -> Linear:
        return self._linears.layer(torch.randn(num_out, num_in, dtype=self._dtype), None)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of many calls, the first not counted."""
    work()
    times: list[float] = []
    begun = perf_counter()
    while len(times) < _LEAST_ROUNDS or perf_counter() - begun < _LEAST_S:
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)


def _main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    spec, dtype = structure(ModelSpec, job["shape"]), getattr(torch, job["dtype"])
    found = measure_speeds(spec, dtype, batch=job["batch"], rows=job["pass_rows"], weight_dtype=job["weight_dtype"])
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    _main()
