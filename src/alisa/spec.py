"""What a model is, as plain numbers: the one description that every other part reads.

A `ModelSpec` is made once, by a family file in `alisa.model.families`, from a Hugging Face config. After that nobody
asks the config again. There is no torch here, so that the planner and the simulator can price a model they never load.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

ActivationName = Literal["relu", "silu", "gelu", "gelu_tanh"]
"""Functions between the two products of an MLP; gelu is exact, gelu_tanh its approximation by tanh."""

LANES = 64
"""Output channels that lie together in a weight of 8 bits; as `kLanes` in kernels/native/product.h."""
QUAD = 4
"""Inputs that lie together in it; as `kQuad`."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """LLaMA 3's frequency scaling (`rope_type: llama3`), or plain `linear` scaling when only `factor` matters."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding in the half-split (rotate-half) order over the first `rotary_dim` of each head."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention is, without the model around it: all that policies, codecs and kernels need to know of it.

    Letters as in `ModelSpec`.
    """

    num_layers: int
    """L"""
    num_heads: int
    """H, query heads."""
    num_kv_heads: int
    """G"""
    head_dim: int
    """D"""
    scale: float
    """What scores q . k are multiplied with before the softmax."""
    window: int | None = None
    """Tokens that a sliding window lets each query see, itself included; None: all."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap); None: they stay as they are."""

    @property
    def kv_size(self) -> int:
        """G * D: values in K (or V) of one token of one layer."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and wiring of one decoder-only transformer.

    Letters (used in every shape comment): H query heads, G KV heads, D head dim, C hidden, L layers, V vocabulary.
    """

    family: str
    num_layers: int
    """L"""
    hidden_size: int
    """C; h in the paper."""
    num_heads: int
    """H"""
    num_kv_heads: int
    """G; equal to `num_heads` for multi-head attention."""
    head_dim: int
    """D"""
    ffn_size: int
    vocab_size: int
    """V"""
    max_positions: int
    """Longest sequence (prompt and output together) the position encoding allows."""
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    activation: ActivationName
    gated_mlp: bool
    """True: down(act(gate(x)) * up(x)); False: down(act(up(x)))."""
    rope: Rope | None
    """None: learned absolute positions."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each head of q and k before the rotation (Qwen3)."""
    parallel_residual: bool = False
    """Attention and MLP read the same input and are added together (GPT-NeoX)."""
    norm_first: bool = True
    """False: normalise after the residual sum, and no final norm (OPT-350M)."""
    position_offset: int = 0
    """First row of the learned position table that position 0 uses (2 for OPT)."""
    embed_dim: int | None = None
    """Width of the token embedding when it differs from C (OPT-350M: 512, projected in and out)."""
    tied_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} KV heads")

    @property
    def attention(self) -> AttentionShape:
        """The part that attention, the KV cache and selection policies work with; the scale is 1 / sqrt(D)."""
        return AttentionShape(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
        )

    @property
    def q_size(self) -> int:
        """H * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """G * D: values in K (or V) of one token of one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def token_embed_dim(self) -> int:
        """Width of one row of the token embedding table."""
        return self.hidden_size if self.embed_dim is None else self.embed_dim

    @property
    def position_table_size(self) -> int:
        """Rows of the learned position table (OPT keeps two unused ones in front)."""
        return self.max_positions + self.position_offset

    @property
    def layer_weights(self) -> int:
        """Weights (no biases, no norms) that one token's pass through one layer reads."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        mlp = self.hidden_size * self.ffn_size * (3 if self.gated_mlp else 2)
        return attention + mlp

    @property
    def step_weights(self) -> int:
        """Weights that one decode step reads: every layer and the output projection."""
        return self.num_layers * self.layer_weights + self.vocab_size * self.token_embed_dim

    @property
    def num_parameters(self) -> int:
        """Parameters of the linear layers and tables; biases and norms (under 0.1 %) are left out."""
        tables = 1 if self.tied_embeddings else 2
        positions = 0 if self.rope else self.position_table_size * self.hidden_size
        return self.num_layers * self.layer_weights + tables * self.vocab_size * self.token_embed_dim + positions

    def step_weight_bytes(self, dtype: str) -> int:
        """Bytes of weights that a decode step must read, whatever the batch: the floor of its time times bandwidth."""
        return self.step_weights * DTYPE_BYTES[dtype]

    def linear_flops(self, num_tokens: int) -> int:
        """Multiply-adds times two of all linear layers for `num_tokens` tokens, logits for each of them included."""
        return 2 * num_tokens * self.step_weights

    def kv_token_bytes(self, dtype: str) -> int:
        """Bytes of K and V of one token over all layers, unquantised (paper: 4*l*h in FP16 without shared heads)."""
        return 2 * self.kv_size * self.num_layers * DTYPE_BYTES[dtype]


CODE_BITS: dict[str, int] = {"int8": 8, "int4": 4}
"""Bits of one value in an integer row."""


@dataclass(frozen=True)
class RowFormat:
    """What the bytes of one row mean: K then V of one token of one layer, `[2, G, D]` of `dtype`.

        float       [ K: G x D values        ][ V: G x D values        ]
        int8, int4  [ K: G x head_bytes codes ][ V: G x head_bytes codes ][ (scale, minimum) float16: G of K, G of V ]

    A head of int4 codes has ceil(D / 2) bytes; byte i holds code i (low half) and code i + ceil(D / 2) (high half).
    """

    dtype: str
    num_kv_heads: int
    """G"""
    head_dim: int
    """D"""

    @property
    def head_bytes(self) -> int:
        """Bytes of the values or codes of one head of K or of V."""
        if self.dtype in CODE_BITS:
            return -(-self.head_dim * CODE_BITS[self.dtype] // 8)
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @cached_property  # asked for in every layer of every step
    def row_bytes(self) -> int:
        """Bytes of one token of one layer."""
        scale_bytes = 4 if self.dtype in CODE_BITS else 0
        return 2 * self.num_kv_heads * (self.head_bytes + scale_bytes)
