"""The weights a decoder is made of: one table of our names and shapes, derived from the spec.

The decoder asks for these names, the family files say where a checkpoint keeps them, the random source fills them, and
the progress bar adds them up. Linear weights are `[out, in]`; K and V rows are one matrix, and so are gate and up.
"""

from __future__ import annotations

import math

from alisa.spec import LANES, SPAN, STEP_INPUTS, ModelSpec

Shape = tuple[int, ...]


def panel_bytes(name: str, num_out: int, num_in: int, parts: int = 1) -> int:
    """Bytes of a weight in panels and its scales, as `kernels.base.Panels` holds them; `name` is the format."""
    panels, spans = parts * -(-num_out // (parts * LANES)), -(-num_in // SPAN)
    inputs = spans * SPAN if name == "int4" else num_in
    codes = panels * -(-inputs // STEP_INPUTS[name]) * LANES * 4
    return codes + {"int8": 4 * num_out, "int4": panels * spans * 2 * LANES * 2}.get(name, 0)


def layer_name(layer: int, part: str) -> str:
    """Full name of a part of one layer: `layer_name(3, "q.weight")` is `layers.3.q.weight`."""
    return f"layers.{layer}.{part}"


def expert_name(number: int, part: str) -> str:
    """Name within a layer of a part of one expert: `expert_name(3, "up.weight")` is `experts.3.up.weight`."""
    return f"experts.{number}.{part}"


def norm_names(spec: ModelSpec) -> tuple[str, ...]:
    """The norms of a layer over the hidden size: before attention and MLP, after them, or both."""
    before = ("attn_norm", "mlp_norm")
    after = ("attn_post_norm", "mlp_post_norm")
    return {"before": before, "both": before + after, "after": after, "after_sum": before}[spec.norm_place]


def layer_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of every tensor of one layer."""
    shapes: dict[str, Shape] = {}

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (spec.hidden_size,)
        if spec.norm == "layernorm":
            shapes[f"{name}.bias"] = (spec.hidden_size,)

    def linear(name: str, num_out: int, num_in: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (num_out, num_in)
        if bias:
            shapes[f"{name}.bias"] = (num_out,)

    for name in norm_names(spec):
        norm(name)
    linear("q", spec.q_size, spec.hidden_size, spec.qkv_bias)
    linear("kv", 2 * spec.kv_size, spec.hidden_size, spec.qkv_bias)
    if spec.qk_norm:
        shapes["q_norm.weight"] = (spec.q_size if spec.qk_norm_joint else spec.head_dim,)
        shapes["k_norm.weight"] = (spec.kv_size if spec.qk_norm_joint else spec.head_dim,)
    linear("out", spec.hidden_size, spec.q_size, spec.out_bias)
    if spec.has_sinks:
        shapes["sinks"] = (spec.num_heads,)
    if spec.num_experts:
        linear("router", spec.num_experts, spec.hidden_size, spec.router_bias)
    for mlp in [expert_name(number, "") for number in range(spec.num_experts)] or [""]:
        linear(f"{mlp}up", (2 if spec.gated_mlp else 1) * spec.ffn_size, spec.hidden_size, spec.mlp_bias)
        linear(f"{mlp}down", spec.hidden_size, spec.ffn_size, spec.mlp_bias)
    return shapes


def model_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of every tensor outside the layers; `output.weight` only when it is not the embedding table."""
    shapes: dict[str, Shape] = {"embed.weight": (spec.vocab_size, spec.token_embed_dim)}
    if spec.rope is None:
        shapes["positions.weight"] = (spec.position_table_size, spec.hidden_size)
    if spec.token_embed_dim != spec.hidden_size:
        shapes["project_in.weight"] = (spec.hidden_size, spec.token_embed_dim)
        shapes["project_out.weight"] = (spec.token_embed_dim, spec.hidden_size)
    if spec.norm_place != "after_sum":
        shapes["final_norm.weight"] = (spec.hidden_size,)
        if spec.norm == "layernorm":
            shapes["final_norm.bias"] = (spec.hidden_size,)
    if not spec.tied_embeddings:
        shapes["output.weight"] = (spec.vocab_size, spec.token_embed_dim)
    return shapes


def stays_wide(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor is held in float32 whatever the model computes in."""
    return name.endswith(".sinks") or (spec.wide_norms and name.endswith("norm.weight"))


def weight_bytes(spec: ModelSpec, itemsize: int) -> int:
    """Bytes of all tensors of the two tables, `itemsize` for a number; the total of the progress of loading."""

    def of(shapes: dict[str, Shape]) -> int:
        return sum(math.prod(shape) * (4 if stays_wide(spec, name) else itemsize) for name, shape in shapes.items())

    return spec.num_layers * of(layer_shapes(spec)) + of(model_shapes(spec))
