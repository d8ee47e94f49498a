"""The shapes that a benchmark may name: those of the planner, and two on which everything is tried in seconds."""

from __future__ import annotations

from dataclasses import replace

from alisa.planner.shapes import SHAPES as PLANNED
from alisa.spec import ModelSpec, Rope

_TINY = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_heads": 4,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_positions": 512,
}

SHAPES: dict[str, ModelSpec] = PLANNED | {
    "opt-tiny": replace(PLANNED["opt-1.3b"], **_TINY, num_kv_heads=4, ffn_size=512),
    "llama-tiny": replace(PLANNED["llama-1.1b"], **_TINY, num_kv_heads=2, ffn_size=384, rope=Rope(10000.0, 32)),
}
"""By name."""
