"""What a GGUF architecture is: how its metadata become a config, and its tensors those of a family; data only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alisa.model.gguf.fields import ArchitectureFields
from alisa.spec import ModelSpec

Restore = Callable[[Tensor, ModelSpec], Tensor]
"""A tensor as GGUF has it -> as the checkpoints of its family have it.

Of a matrix it moves whole rows: the numbers of the rows `[out]` come out as the rows do. (Where it turns the matrix,
the family turns it back.)"""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One value of `general.architecture`."""

    name: str
    read_config: Callable[[ArchitectureFields], dict[str, Any]]
    """The config that the model has on the Hugging Face hub; `model_type` in it names the family."""
    model_stems: Mapping[str, str]
    """Tensors outside the layers, without `.weight` and `.bias`: name in GGUF -> name in the family's checkpoints."""
    layer_stems: Mapping[str, str]
    """The same of a layer: `attn_q` for `blk.3.attn_q.weight`; `{layer}` stands for the layer's number, and `{expert}`
    for the number of a part where GGUF has one tensor for all experts."""
    restore: Mapping[str, Restore] = field(default_factory=dict)
    """What is done to the weight or the bias of a stem of GGUF; nothing to those that are not named."""
    metadata_tensors: tuple[str, ...] = ()
    """Tensors that `read_config` reads: they are no weights."""


def common_config(fields: ArchitectureFields) -> dict[str, Any]:
    """What nearly all architectures say, under the names of LLaMA's config.

    What the file leaves open is left out, so that the family's own default counts.
    """
    heads = fields.get("attention.head_count")
    if fields.get("attention.value_length") not in (None, _head_dim(fields)):
        fields.refuse("attention.value_length", f"the length of a key, {_head_dim(fields)}, is supported")
    return without_none(
        num_hidden_layers=fields.get("block_count"),
        hidden_size=fields.get("embedding_length"),
        intermediate_size=fields.get("feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("attention.head_count_kv") or heads,
        head_dim=fields.get("attention.key_length"),
        max_position_embeddings=fields.get("context_length"),
        vocab_size=fields.num_rows("token_embd.weight"),
        tie_word_embeddings=not fields.has_tensor("output.weight"),
    )


def rms_norm_config(fields: ArchitectureFields) -> dict[str, Any]:
    """`common_config` with RMS norms and rotary positions: what LLaMA, Qwen and Gemma say."""
    return common_config(fields) | without_none(
        rms_norm_eps=fields.get("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.get("rope.freq_base"),
        rope_scaling=rope_scaling(fields),
        partial_rotary_factor=rotary_part(fields),
    )


def without_none(**config: Any) -> dict[str, Any]:  # noqa: ANN401 - the fields of a config
    """The fields that have a value."""
    return {name: value for name, value in config.items() if value is not None}


def rotary_part(fields: ArchitectureFields) -> float | None:
    """The share of a head that is rotated; None: all of it, or the file leaves it open."""
    num_rotated, head_dim = fields.get("rope.dimension_count"), _head_dim(fields)
    if not num_rotated or not head_dim or num_rotated == head_dim:
        return None
    part = num_rotated / head_dim
    # The family multiplies it with the head dim again and cuts the rest off.
    return part if int(head_dim * part) == num_rotated else math.nextafter(part, 1.0)


def rope_scaling(fields: ArchitectureFields) -> dict[str, Any] | None:
    """The scaling of the positions in the form of a Hugging Face config; the family says which kinds it knows."""
    kind, factor = fields.get("rope.scaling.type"), fields.get("rope.scaling.factor")
    if kind is None:
        # Files of 2023 name no type, because there was one.
        factor = factor or fields.get("rope.scale_linear")
        kind = "linear" if factor not in (None, 1.0) else "none"
    if kind == "none":
        return None
    if fields.get("rope.scaling.attn_factor") not in (None, 1.0):
        fields.refuse("rope.scaling.attn_factor", "1 is supported")
    return without_none(
        rope_type=kind,
        factor=factor,
        original_max_position_embeddings=fields.get("rope.scaling.original_context_length"),
        beta_fast=fields.get("rope.scaling.yarn_beta_fast"),
        beta_slow=fields.get("rope.scaling.yarn_beta_slow"),
    )


def _head_dim(fields: ArchitectureFields) -> int | None:
    """Values of a key of one head; None: the file leaves it open."""
    width, heads = fields.get("embedding_length"), fields.get("attention.head_count")
    return fields.get("attention.key_length") or (width // heads if width and heads else None)
