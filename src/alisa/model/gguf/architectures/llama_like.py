"""The tensor names that LLaMA, Qwen and Gemma share, in GGUF and on the Hugging Face hub."""

from __future__ import annotations

MODEL_STEMS = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}

_ATTENTION = "layers.{layer}.self_attn"
_MLP = "layers.{layer}.mlp"

LAYER_STEMS = {
    "attn_norm": "layers.{layer}.input_layernorm",
    "attn_q": f"{_ATTENTION}.q_proj",
    "attn_k": f"{_ATTENTION}.k_proj",
    "attn_v": f"{_ATTENTION}.v_proj",
    "attn_output": f"{_ATTENTION}.o_proj",
    "ffn_norm": "layers.{layer}.post_attention_layernorm",
    "ffn_gate": f"{_MLP}.gate_proj",
    "ffn_up": f"{_MLP}.up_proj",
    "ffn_down": f"{_MLP}.down_proj",
}
QK_NORM_STEMS = {"attn_q_norm": f"{_ATTENTION}.q_norm", "attn_k_norm": f"{_ATTENTION}.k_norm"}
