"""StarCoder 2 (2402.19173): LLaMA with layer norms, biases and a plain MLP; and a sliding window in some sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family, same
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec

_SIZES = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a StarCoder 2 config."""
    reader = ConfigReader(config, "starcoder2")
    num_layers = reader.integer("num_hidden_layers", _SIZES["num_hidden_layers"])
    windows = reader.windows(num_layers, reader.window(None))
    bias = reader.flag("use_bias", True)
    reader.fixed("scale_attn_weights", True)
    # There is one kind of norm and of MLP; hidden_act and norm_epsilon count.
    reader.ignore("norm_type", "mlp_type", "activation_function", "layer_norm_epsilon")
    variant = LlamaVariant(
        "starcoder2",
        max_positions=4096,
        num_kv_heads=2,
        sizes=_SIZES,
        activation="gelu_pytorch_tanh",
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm_eps=1e-5,
        norm_eps_name="norm_epsilon",
    )
    return replace(read_spec(reader, variant), norm="layernorm", gated_mlp=False, windows=windows)


_PARTS = LAYER_PARTS | same(up="layers.{layer}.mlp.c_fc", down="layers.{layer}.mlp.c_proj")

FAMILY = Family("starcoder2", to_spec, MODEL_PARTS | same(final_norm="norm"), _PARTS, PREFIXES, aliases={})
