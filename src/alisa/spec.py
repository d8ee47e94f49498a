"""What a model is, as plain numbers: the one description that every other part reads.

A `ModelSpec` is made once, by a family file in `alisa.model.families`, from a Hugging Face config. After that nobody
asks the config again. There is no torch here, so that the planner and the simulator can price a model they never load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

ActivationName = Literal["relu", "silu", "gelu", "gelu_tanh", "clamped_swiglu"]
"""Functions between the two products of an MLP; gelu is exact, gelu_tanh its approximation by tanh, clamped_swiglu a
gated one that takes both halves (GPT-OSS)."""

SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0
"""Numbers of clamped_swiglu."""

LANES = 64
"""Output channels that lie together in a weight; as `kLanes` in kernels/native/csrc/model/matrix.h."""
QUAD = 4
"""Inputs that lie together in a weight of 8 bits."""
SPAN = 32
"""Inputs that share a scale and a minimum in a weight of 4 bits; as `kSpan`."""
PADDING = 16
"""What rows of a matrix that native code reads in vectors are padded to; as `kPad` in csrc/attend/task.h."""
STEP_INPUTS = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}
"""By the format of a weight, inputs that lie together: four bytes of each output channel."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a rotary embedding is stretched beyond the length it was trained for; `alisa.model.rope` has the formulas.

    Each kind reads the fields that its comment names, and `factor`.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope", "divisors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    """llama3; so is the next."""
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    """All but linear."""
    attention_factor: float | None = None
    """yarn, longrope: what sine and cosine are multiplied with; None: what follows from the factor."""
    beta_fast: float = 32.0
    """yarn; so are the next four."""
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    """longrope: of each rotated pair, for sequences up to the original length."""
    long_factors: tuple[float, ...] = ()
    """The same for longer ones."""
    divisors: tuple[float, ...] = ()
    """divisors: what the frequency of each rotated pair is divided by; all that a GGUF file keeps of llama3."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding in the half-split (rotate-half) order over the first `rotary_dim` of each head."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long the whole sequence may become, and not on positions alone."""
        return self.scaling is not None and self.scaling.kind in ("dynamic", "longrope")


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
    windows: tuple[int | None, ...] = ()
    """Of each layer: tokens that a sliding window lets each query see, itself included; None: all. Empty: no layer has
    a window."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap); None: they stay as they are."""
    has_sinks: bool = False
    """Each head has a logit that joins the denominator of its softmax and reads nothing (GPT-OSS)."""

    @property
    def kv_size(self) -> int:
        """G * D: values in K (or V) of one token of one layer."""
        return self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """The window of a layer; None: it sees all tokens."""
        return self.windows[layer] if self.windows else None

    def among_full(self, layer: int) -> int:
        """The number of a layer among those without a window."""
        return self.windows[:layer].count(None) if self.windows else layer

    def full_layers(self) -> AttentionShape:
        """The layers without a window alone: in these a policy chooses, and of these its state knows."""
        if not self.windows:
            return self
        return replace(self, num_layers=self.windows.count(None), windows=())

    def dense_reads(self, length: int) -> int:
        """Tokens that a step of dense attention reads, summed over the layers; `length` counts the new one."""
        if not self.windows:
            return self.num_layers * length
        return sum(length if window is None else min(length, window) for window in self.windows)


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
    """Width of the MLP, or of each expert where there are experts."""
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
    num_experts: int = 0
    """MLPs of a layer, of which each token goes through a few; 0: one MLP for all tokens."""
    experts_per_token: int = 0
    renormalises_experts: bool = True
    """Whether the weights of a token's experts are made to sum to 1."""
    router_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each head of q and k before the rotation (Qwen3)."""
    qk_norm_joint: bool = False
    """That norm is one over all heads together instead (OLMo 2)."""
    parallel_residual: bool = False
    """Attention and MLP read the same input and are added together (GPT-NeoX)."""
    norm_place: Literal["before", "both", "after", "after_sum"] = "before"
    """Where attention and MLP are normalised: `before`: their input; `after`: their output, before it is added to the
    residual (OLMo 2); `both` (Gemma 2 and 3); `after_sum`: the sum, and there is no final norm (OPT-350M)."""
    wide_norms: bool = False
    """The weights of norms stay in float32, and their products are rounded once (Gemma)."""
    embed_scale: float = 1.0
    """What token embeddings are multiplied with, rounded to the model's dtype."""
    residual_scale: float = 1.0
    """What the outputs of attention and MLP are multiplied with before they are added to the residual (Granite)."""
    logit_scale: float = 1.0
    """What logits are multiplied with."""
    query_scale: float | None = None
    """What scores q . k are multiplied with; None: 1 / sqrt(D)."""
    windows: tuple[int | None, ...] = ()
    """As in `AttentionShape`."""
    softcap: float | None = None
    """As in `AttentionShape`."""
    has_sinks: bool = False
    """As in `AttentionShape`."""
    logit_softcap: float | None = None
    """Logits l become logit_softcap * tanh(l / logit_softcap)."""
    layer_ropes: tuple[Rope | None, ...] = ()
    """Of each layer, where they differ; None: its q and k are not rotated. Empty: `rope` in all layers."""
    position_offset: int = 0
    """First row of the learned position table that position 0 uses (2 for OPT)."""
    embed_dim: int | None = None
    """Width of the token embedding when it differs from C (OPT-350M: 512, projected in and out)."""
    tied_embeddings: bool = True

    def __post_init__(self) -> None:
        for per_layer in (self.windows, self.layer_ropes):
            assert len(per_layer) in (0, self.num_layers), "one entry for each layer, or none"
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} KV heads")

    def within(self, max_len: int) -> ModelSpec:
        """The same model for sequences of at most so many tokens: a window that none of them outgrows is none."""
        return replace(self, windows=self._windows_within(max_len))

    def _windows_within(self, max_len: int) -> tuple[int | None, ...]:
        windows = tuple(None if window is None or window >= max_len else window for window in self.windows)
        return windows if any(windows) else ()

    @property
    def attention(self) -> AttentionShape:
        """The part that attention, the KV cache and selection policies work with.

        The scale is 1 / sqrt(D): where a model has another, the decoder hands over queries that make up for it. A
        window that no sequence outgrows is none.
        """
        return AttentionShape(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            windows=self._windows_within(self.max_positions),
            softcap=self.softcap,
            has_sinks=self.has_sinks,
        )

    @property
    def query_factor(self) -> float:
        """What queries are multiplied with so that scores over sqrt(D) are those of the model."""
        return 1.0 if self.query_scale is None else self.query_scale * self.head_dim**0.5

    @property
    def rotates_by_length(self) -> bool:
        """Whether a layer rotates by the length of the sequence: see `Rope.by_length`."""
        return any(rope is not None and rope.by_length for rope in (self.rope, *self.layer_ropes))

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
    def mlp_weights(self) -> int:
        """Weights of one MLP, or of one expert."""
        return self.hidden_size * self.ffn_size * (3 if self.gated_mlp else 2)

    @property
    def layer_weights(self) -> int:
        """Weights (no biases, no norms) of one layer that one token's pass reads: of the experts, its own."""
        mlps = self.experts_per_token if self.num_experts else 1
        return self._attention_weights + mlps * self.mlp_weights

    @property
    def _attention_weights(self) -> int:
        """Weights of a layer that every token reads."""
        router = self.num_experts * self.hidden_size
        return self.hidden_size * (2 * self.q_size + 2 * self.kv_size) + router

    @property
    def step_weights(self) -> int:
        """Weights that one decode step reads at the least: every layer and the output projection.

        With experts, those of one token; tokens that go through others read more.
        """
        return self.num_layers * self.layer_weights + self.vocab_size * self.token_embed_dim

    @property
    def num_parameters(self) -> int:
        """Parameters of the linear layers and tables; biases and norms (under 0.1 %) are left out."""
        tables = 1 if self.tied_embeddings else 2
        positions = 0 if self.rope else self.position_table_size * self.hidden_size
        layer = self._attention_weights + max(self.num_experts, 1) * self.mlp_weights
        return self.num_layers * layer + tables * self.vocab_size * self.token_embed_dim + positions

    def step_weight_bytes(self, dtype: str) -> int:
        """Bytes of weights that a decode step must read, whatever the batch: the floor of its time times bandwidth."""
        return self.step_weights * DTYPE_BYTES[dtype]

    def linear_flops(self, num_tokens: int) -> int:
        """Multiply-adds times two of all linear layers for `num_tokens` tokens, logits for each of them included."""
        return 2 * num_tokens * self.step_weights

    def kv_token_bytes(self, dtype: str) -> int:
        """Bytes of K and V of one token over all layers, unquantised (paper: 4*l*h in FP16 without shared heads)."""
        return 2 * self.kv_size * self.num_layers * DTYPE_BYTES[dtype]


CODE_BITS: dict[str, tuple[int, int]] = {"int8": (8, 8), "int4": (4, 4), "k8v4": (8, 4)}
"""Bits of one value of K and of V in an integer row."""

PART_LEN = 64
"""Values of a head that share a range at the most, where 4 bits have to do: in a row, and in a sketch of a long head
(`alisa.policy.state_bytes`)."""


@dataclass(frozen=True)
class RowFormat:
    """What the bytes of one row mean: K then V of one token of one layer, `[2, G, D]` of `dtype`.

        float             [ K: G x D values   ][ V: G x D values   ]
        int8, int4, k8v4  [ K: G x P x codes  ][ V: G x P x codes  ][ (scale, minimum) float16: G x P of K, G x P of V ]

    A head is in P equal parts with a range each. A part of N values has N bytes of codes of 8 bits, or ceil(N / 2) of
    4: then byte i holds code i (low half) and code i + ceil(N / 2) (high half). k8v4 has K in 8 bits and V in 4; the
    pairs begin at an even byte.
    """

    dtype: str
    num_kv_heads: int
    """G"""
    head_dim: int
    """D"""

    @property
    def num_parts(self) -> int:
        """P: parts of `PART_LEN` values where there are codes of 4 bits and D is a multiple of it, else one.

        One range is too coarse for a long head in 4 bits: with heads of 256 (Gemma 3 270M) int4 lost 5.5 % of
        perplexity (docs/accuracy.md).
        """
        divides = self.head_dim % PART_LEN == 0 and 4 in CODE_BITS.get(self.dtype, ())
        return self.head_dim // PART_LEN if divides else 1

    @property
    def part_shape(self) -> tuple[int, int]:
        """G * P and D / P: K or V of a token, each part as a head of its own."""
        return self.num_kv_heads * self.num_parts, self.head_dim // self.num_parts

    @property
    def head_bytes(self) -> tuple[int, int]:
        """Bytes of the values or codes of one head of K, and of one of V."""
        if self.dtype in CODE_BITS:
            # A head in several parts has an even number of values in each.
            of_k, of_v = (-(-self.head_dim * bits // 8) for bits in CODE_BITS[self.dtype])
            return of_k, of_v
        return (self.head_dim * DTYPE_BYTES[self.dtype],) * 2

    @property
    def pairs_at(self) -> int:
        """Where the scales and minima of an integer row begin; the end of another."""
        num_bytes = self.num_kv_heads * sum(self.head_bytes)
        return num_bytes + num_bytes % 2

    @cached_property  # asked for in every layer of every step
    def row_bytes(self) -> int:
        """Bytes of one token of one layer."""
        return self.pairs_at + (8 * self.num_kv_heads * self.num_parts if self.dtype in CODE_BITS else 0)
