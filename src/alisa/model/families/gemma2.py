"""Gemma 2 (2408.00118): scores and logits below a cap, and a sliding window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family
from alisa.model.families.gemma import GEMMA_LAYER_PARTS, GEMMA_MODEL_PARTS
from alisa.model.families.llama_like import PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec

_SIZES = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Gemma 2 config."""
    reader = ConfigReader(config, "gemma2")
    num_layers = reader.integer("num_hidden_layers", _SIZES["num_hidden_layers"])
    windows = reader.windows(num_layers, reader.window(4096), lambda layer: layer % 2 == 0)
    bias = reader.flag("attention_bias", False)
    query_scale = reader.number("query_pre_attn_scalar", 256.0) ** -0.5
    caps = [reader.cap("attn_logit_softcapping", 50.0), reader.cap("final_logit_softcapping", 30.0)]
    reader.fixed("use_bidirectional_attention", False)
    reader.ignore("hidden_act", "sliding_window_size")  # hidden_activation counts
    variant = LlamaVariant(
        "gemma2",
        max_positions=8192,
        head_dim=256,
        num_kv_heads=4,
        sizes=_SIZES,
        activation="gelu_pytorch_tanh",
        activation_name="hidden_activation",
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        norm_place="both",
    )
    spec = read_spec(reader, variant)
    return replace(
        spec,
        wide_norms=True,
        embed_scale=spec.hidden_size**0.5,
        query_scale=query_scale,
        softcap=caps[0],
        logit_softcap=caps[1],
        windows=windows,
    )


FAMILY = Family("gemma2", to_spec, GEMMA_MODEL_PARTS, GEMMA_LAYER_PARTS, PREFIXES, aliases={})
