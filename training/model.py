"""The LLaMA architecture in plain torch, and its structured start.

Written out rather than taken from transformers because a short model compiles and trains faster
on two cores; export.py proves that transformers computes the same logits.

The start ("mimetic" initialisation) places an induction circuit in the weights, inside the plain
architecture, because a few tens of millions of tokens are too few for one to form by itself at
distances of a thousand tokens. All weights stay trainable.

The residual stream starts out divided: token identity [0, 128), the token before [128, 192), the
token two before [192, 255), and one constant direction, 255, the same in every embedding.
Layer 0 has heads that look one and two tokens back (a constant query and key turned by rope peak at
one relative distance). Layers 1 and 2 match the current token against the token before every other
position, the token before against the token two before, and both at once, in those rotary
dimensions that hardly turn over the whole context; what they find they add to the token identity,
which the tied embedding reads out.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IDENTITY, BEFORE, TWO_BEFORE, CONSTANT = slice(0, 128), slice(128, 192), slice(192, 255), 255


@dataclass(frozen=True)
class ModelConfig:
    """The [model] table of config.toml, and the vocabulary size."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    max_position_embeddings: int
    rms_norm_eps: float


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per token of each rotary pair, float32 as transformers computes them."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    return 1.0 / (config.rope_theta**exponent)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope in the rotate-half order."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query causal attention with rope."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv * dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] to what the heads add to them."""
        batch, length, _ = x.shape
        config = self.config
        q = self.q_proj(x).view(batch, length, config.num_heads, config.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, config.num_kv_heads, config.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, config.num_kv_heads, config.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = config.num_heads // config.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states to what the network adds to them."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm block; names as in transformers, so that the export is a plain copy."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states to hidden states."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids [B, T] to logits [B, T, V]; the embedding is tied to the output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), rope_frequencies(config))
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids to logits."""
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def _head(weight: Tensor, head: int, dim: int) -> Tensor:
    """The rows of one head in a q, k or v projection (a view)."""
    return weight[head * dim : (head + 1) * dim]


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows, [rows, columns] with rows <= columns."""
    q, _ = torch.linalg.qr(torch.randn(columns, rows, generator=generator))
    return q.T.contiguous()


def _still_dims(config: ModelConfig) -> Tensor:
    """Head dimensions whose rotary pair turns by less than half a radian over 1024 tokens."""
    pairs = torch.nonzero(rope_frequencies(config) * 1024 < 0.5).flatten()
    return torch.cat((pairs, pairs + config.head_dim // 2))


@torch.no_grad()
def initialise(model: Llama, init: dict, seed: int) -> None:
    """Small random weights everywhere, then the induction circuit over them."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    scale, dim = init["embedding_scale"], config.head_dim
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, 0.02, generator=generator)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1.0 / math.sqrt(2 * config.num_layers) * scale)
    model.norm.weight.fill_(init["output_scale"])
    table = model.embed_tokens.weight
    table.zero_()
    table[:, IDENTITY] = torch.randn(config.vocab_size, 128, generator=generator) * scale
    table[:, CONSTANT] = init["constant_scale"]

    # Layer 0: kv head 0 carries half of the identity; query heads 0 and 1 look 1 and 2 back.
    attn = model.layers[0].self_attn
    energy = 128 * scale**2 + init["constant_scale"] ** 2
    gain = math.sqrt(config.hidden_size / energy)
    constant, identity = init["constant_scale"] * gain, gain  # what RMSNorm makes of them
    frequencies = rope_frequencies(config)[:6]
    pair = torch.arange(6)
    size = math.sqrt(init["offset_sharpness"] * math.sqrt(dim)) / constant
    key = _head(attn.k_proj.weight, 0, dim)
    key[pair, CONSTANT] = size
    for head, offset, target in ((0, 1, BEFORE), (1, 2, TWO_BEFORE)):
        query = _head(attn.q_proj.weight, head, dim)
        query.mul_(0.1)
        query[pair, CONSTANT] = size * torch.cos(-offset * frequencies)
        query[pair + dim // 2, CONSTANT] = size * torch.sin(-offset * frequencies)
        width = target.stop - target.start
        rows = torch.arange(width)
        attn.o_proj.weight[target, head * dim : (head + 1) * dim] = 0.0
        attn.o_proj.weight[target.start + rows, head * dim + rows] = 1.0 / identity
    key[:, :CONSTANT].mul_(0.1)
    value = _head(attn.v_proj.weight, 0, dim)
    value.zero_()
    sketch = _orthonormal(dim, 128, generator)
    value[:, IDENTITY] = sketch

    # Layers 1 and 2: match in the still dimensions, copy the identity.
    still = _still_dims(config)
    energy += 127 * scale**2
    gain = math.sqrt(config.hidden_size / energy) * scale
    size = math.sqrt(init["match_sharpness"]) / gain * 0.9
    for layer, copied in ((1, (0, 64)), (2, (64, 0))):
        attn = model.layers[layer].self_attn
        for weight in (attn.q_proj.weight, attn.k_proj.weight):
            weight.mul_(0.25)
        # Keys hold the token before and the token two before in superposition. Queries bring the
        # current token (head 0: plain induction), the token before (head 2: finds the value of
        # "key is value" and "key? value" whatever stands between), or both (heads 1 and 3).
        for kv in (0, 1):
            one = _orthonormal(dim, dim, generator)[: len(still)]
            two = _orthonormal(dim, dim, generator)[: len(still)]
            key = _head(attn.k_proj.weight, kv, dim)
            key[still, BEFORE] = size * one
            key[still, TWO_BEFORE] = size * two[:, :63]
            current, before = size * (one @ sketch), size * two
            single, both = 2 * kv, 2 * kv + 1
            query = _head(attn.q_proj.weight, single, dim)
            if kv == 0:
                query[still, IDENTITY] = current
            else:
                query[still, BEFORE] = before
            query = _head(attn.q_proj.weight, both, dim)
            query[still, IDENTITY], query[still, BEFORE] = current, before
        for kv, start in enumerate(copied):
            value = _head(attn.v_proj.weight, kv, dim)
            value[:, IDENTITY] = 0.0
            rows = torch.arange(dim)
            value[rows, start + rows] = 1.0
            for head in (2 * kv, 2 * kv + 1):
                attn.o_proj.weight[start + rows, head * dim + rows] = init["copy_gain"] * scale / gain / 2
