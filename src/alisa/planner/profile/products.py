"""Matrix products and what lies between them: packed linear layers by rows, norms and activations, a bare decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from alisa.model.linear import LinearMaker
from alisa.model.loader import random_decoder
from alisa.planner.hardware import Gemm
from alisa.planner.profile.clock import seconds
from alisa.planner.shapes import opt_shape
from alisa.spec import ModelSpec, Rope

_ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
_SIZES = ((768, 768, 60), (1024, 4096, 12), (4096, 4096, 3))
"""(out, in, copies): together larger than caches, so that weights come from memory as they do in a step."""

_CPU = torch.device("cpu")


def measure_gemm(dtype: torch.dtype, linears: LinearMaker) -> Gemm:
    """Products with inputs of this dtype, of layers made so."""
    tiny = linears.layer(torch.randn(64, 64).to(dtype), None)
    row = torch.randn(1, 64).to(dtype)
    call_s = seconds(lambda: [tiny(row) for _ in range(200)]) / 200
    curves = []
    for num_out, num_in, copies in _SIZES:
        layers = [linears.layer(torch.randn(num_out, num_in).to(dtype), None) for _ in range(copies)]
        points = []
        for rows in _ROWS:
            x = torch.randn(rows, num_in).to(dtype)
            taken = seconds(lambda x=x, layers=layers: [layer(x) for layer in layers]) / copies
            points.append((float(rows), max(taken - call_s, 1e-9) / (num_out * num_in)))
        curves.append((float(num_out * num_in), _rising(points)))
    return Gemm(call_s=call_s, curves=tuple(curves))


def _rising(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The same without what disturbed a measurement: fewer rows never take longer than more."""
    return tuple((rows, min(taken for _, taken in points[index:])) for index, (rows, _) in enumerate(points))


def measure_values(dtype: torch.dtype) -> float:
    """Seconds for each value of norms, residual sums and an activation, without their calls."""
    rows, width = 256, 2048
    x, wide = torch.randn(rows, width).to(dtype), torch.randn(rows, 4 * width).to(dtype)
    weight, bias = torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)

    def layer() -> None:
        F.layer_norm(x, (width,), weight, bias, 1e-5)
        F.layer_norm(x, (width,), weight, bias, 1e-5)
        x + x
        x + x
        F.relu(wide)

    # What `CostModel` counts for such a layer: 6 C and 2 q of width, and the widened values twice.
    return seconds(layer) / (rows * (8 * width + 2 * 4 * width))


class LayerPrices(NamedTuple):
    """Seconds of interpreting and calling."""

    layer_s: float
    """A layer without its products and values."""
    rope_s: float
    """More for one that rotates queries and keys."""
    step_s: float
    """The rest of a step."""


def measure_layer(dtype: torch.dtype, gemm: Gemm) -> LayerPrices:
    """On tiny models, which have next to nothing to compute."""

    def taken(spec: ModelSpec) -> float:
        decoder = random_decoder(spec, dtype, _CPU)
        tokens = torch.zeros(1, 1, dtype=torch.int64)
        with torch.inference_mode():
            return seconds(
                lambda: decoder.logits(decoder.forward(tokens, tokens, lambda layer, q, k, v, hidden: q)[:, 0]),
                repeats=50,
            )

    few = taken(_tiny(2))
    each, rotating = ((taken(_tiny(18, rope)) - taken(_tiny(2, rope))) / 16 for rope in (None, Rope(10000.0, 16)))
    return LayerPrices(max(each - 5 * gemm.call_s, 0.0), max(rotating - each, 0.0), max(few - 2 * each, 0.0))


def _tiny(num_layers: int, rope: Rope | None = None) -> ModelSpec:
    return replace(opt_shape(num_layers, 64, 4, vocab_size=64), rope=rope)


def measure_logits() -> float:
    """Seconds for each number of the logits: to float32, and the largest of each row."""
    logits = torch.randn(16, 50272, dtype=torch.bfloat16)
    return seconds(lambda: logits.to(torch.float32).argmax(dim=-1).tolist()) / logits.numel()
