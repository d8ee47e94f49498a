"""SmolLM3: LLaMA that does not rotate q and k in every fourth layer (NoPE, 2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec

_NUM_LAYERS = 36
_SIZES = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": _NUM_LAYERS,
    "num_attention_heads": 16,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a SmolLM3 config."""
    reader = ConfigReader(config, "smollm3")
    num_layers = reader.integer("num_hidden_layers", _NUM_LAYERS)
    reader.ignore("max_window_layers")  # layer_types counts
    rotates = _rotating(reader, num_layers)
    is_on, window = reader.flag("use_sliding_window", False), reader.window(None)
    windows = reader.windows(num_layers, window if is_on else None, lambda layer: not rotates[layer])
    bias = reader.flag("attention_bias", False)
    variant = LlamaVariant(
        "smollm3",
        max_positions=32768,
        num_kv_heads=4,
        sizes=_SIZES,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
    )
    spec = read_spec(reader, variant)
    ropes = tuple(spec.rope if is_rotated else None for is_rotated in rotates)
    return replace(spec, windows=windows, layer_ropes=() if all(rotates) else ropes)


def _rotating(reader: ConfigReader, num_layers: int) -> list[bool]:
    """Which layers rotate: `no_rope_layers`, whose ones are those that do, or else all but every so many."""
    every = reader.integer("no_rope_layer_interval", 4)
    listed = reader.value("no_rope_layers")
    if listed is None:
        return [(layer + 1) % every != 0 for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) != num_layers or not all(one in (0, 1) for one in listed):
        reader.refuse(f"no_rope_layers is {listed!r}, a list of {num_layers} zeros and ones is needed")
        return [True] * num_layers
    return [one == 1 for one in listed]


FAMILY = Family("smollm3", to_spec, MODEL_PARTS, LAYER_PARTS, PREFIXES, aliases={})
