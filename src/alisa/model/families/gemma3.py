"""Gemma 3 (2503.19786): sliding windows in five of six layers, a base of the rotation for each kind, norms of q and k.

`gemma3_text` is a text model; `gemma3` one that also sees, of which the text part runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family
from alisa.model.families.gemma import GEMMA_LAYER_PARTS, GEMMA_MODEL_PARTS
from alisa.model.families.llama_like import LlamaVariant, read_spec
from alisa.model.families.reading import FULL, SLIDING, ConfigReader
from alisa.spec import ModelSpec

_SIZES = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Gemma 3 config, or the text part of one."""
    reader = ConfigReader(config, "gemma3", part="text_config")
    num_layers = reader.integer("num_hidden_layers", _SIZES["num_hidden_layers"])
    every = reader.integer("sliding_window_pattern", 6)
    # What transformers writes beside layer_types; and hidden_activation counts.
    reader.ignore("_sliding_window_pattern", "hidden_act")
    windows = reader.windows(num_layers, reader.window(4096), lambda layer: (layer + 1) % every != 0)
    bias = reader.flag("attention_bias", False)
    query_scale = reader.number("query_pre_attn_scalar", 256.0) ** -0.5
    logit_softcap = reader.optional_number("final_logit_softcapping")
    reader.fixed("attn_logit_softcapping", None)
    reader.fixed("use_bidirectional_attention", False)
    head_dim = reader.integer("head_dim", 256)
    max_positions = reader.integer("max_position_embeddings", 131072)
    local = reader.rope(head_dim, max_positions, theta_name="rope_local_base_freq", kind=SLIDING)
    variant = LlamaVariant(
        "gemma3_text",
        max_positions=131072,
        head_dim=256,
        num_kv_heads=4,
        sizes=_SIZES,
        activation="gelu_pytorch_tanh",
        activation_name="hidden_activation",
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        norm_place="both",
        rope_kind=FULL,
        theta=1e6,
    )
    spec = read_spec(reader, variant)
    return replace(
        spec,
        wide_norms=True,
        embed_scale=spec.hidden_size**0.5,
        query_scale=query_scale,
        logit_softcap=logit_softcap,
        windows=windows,
        layer_ropes=tuple(spec.rope if window is None else local for window in windows or (None,) * num_layers),
    )


_PREFIXES = ("model.language_model.", "model.")
_OTHERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

FAMILY = Family("gemma3_text", to_spec, GEMMA_MODEL_PARTS, GEMMA_LAYER_PARTS, _PREFIXES, aliases={})
SEEING_FAMILY = Family("gemma3", to_spec, GEMMA_MODEL_PARTS, GEMMA_LAYER_PARTS, _PREFIXES, aliases={}, ignored=_OTHERS)
