"""The one forward pass of every family: what differs between them is data in `ModelSpec`.

The decoder never knows the cache. It calls `attend(layer, q, k, v, hidden)` once per layer and uses what comes back, so
dense, sparse and tiered attention are functions passed in. It reads positions from its argument only: the caller may
pack sequences of different lengths as B = 1. A plain class, inference only (no weight asks for a gradient): on a CPU a
small model's step is mostly Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from alisa.basis.calibration import find_row_basis
from alisa.basis.row_basis import RowBasis
from alisa.kernels.base import Attend, AttendAll
from alisa.kernels.reference.softcap import softcapped
from alisa.model.activation import make_activation
from alisa.model.experts import Experts
from alisa.model.layer import Builder, Layer, Norm, Progress
from alisa.model.linear import LinearMaker, PlainLinear
from alisa.model.rope import Rotation, attention_factor, frequencies_by_length, inverse_frequencies
from alisa.model.source import WeightSource
from alisa.model.stack import LayerStack, can_stack
from alisa.spec import ModelSpec


class Decoder:
    """A decoder-only transformer, driven by its spec.

    Args:
        spec: shape and wiring.
        source: where the weights come from; asked for every tensor exactly once.
        dtype: what the model computes in.
        device: where it runs.
        progress: told after each tensor.
        linears: turn weights into linear layers; None: exact ones that are fast here.

    Raises:
        ModelError: from the source, when a tensor is missing, damaged or of another shape.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        linears: LinearMaker | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        build = Builder(spec, source, dtype=dtype, device=device, progress=progress, linears=linears)
        self._embed = build.tensor("embed.weight")
        self._positions = build.tensor("positions.weight") if spec.rope is None else None
        layer_ropes = spec.layer_ropes or (spec.rope,) * spec.num_layers
        # Each rope once, and its number for each layer: to hash one in every layer takes longer than to turn a head.
        self._ropes = [rope for rope in dict.fromkeys(layer_ropes) if rope is not None]
        self._rope_of_layer = [None if rope is None else self._ropes.index(rope) for rope in layer_ropes]
        self._frequencies = [None if rope.by_length else inverse_frequencies(rope, device) for rope in self._ropes]
        self._embed_scale = torch.tensor(spec.embed_scale, dtype=dtype, device=device)
        projected = spec.token_embed_dim != spec.hidden_size
        self._project_in = build.linear("project_in") if projected else None
        self._layers = [build.layer(layer) for layer in range(spec.num_layers)]
        self._final_norm = build.norm("final_norm")
        self._project_out = build.linear("project_out") if projected else None
        # Tied embeddings: the packed copy on a CPU costs V * C more memory than sharing the table, and is 2 to 5 times
        # faster to multiply with; a plain linear (CUDA) shares the table and costs nothing.
        tied = spec.tied_embeddings
        self._output = build.head(self._embed if tied else build.tensor("output.weight"))
        self._shares_table = tied and isinstance(self._output, PlainLinear)
        self._activation = make_activation(spec.activation, gated=spec.gated_mlp, device=device)
        # All between attention and attention in one call, where it is native.
        stacks = can_stack(self._layers)
        self._stack = LayerStack(spec, self._layers, self._final_norm, self._rope_of_layer, dtype) if stacks else None
        self._row_basis: RowBasis | None = None
        self._bases: dict[str, RowBasis | None] = {}
        self._whole: Decoder | None = None

    def within(self, max_len: int) -> Self:
        """The same weights, for sequences of at most so many tokens; see `ModelSpec.within`."""
        limited = copy(self)
        limited.spec = self.spec.within(max_len)
        limited._whole = self._whole or self
        return limited

    def for_rows(self, kv_dtype: str) -> Decoder:
        """The same model for rows of this format: what they hold in 4 bits comes in a basis that suits it.

        Found in one pass over some random tokens when it is first asked for; see `alisa.basis.row_basis`. It is that of
        the model without a limit, so that no limit changes a token. `project_kv` gives what `attend` gets.
        """
        if self._row_basis is not None:
            return self
        if kv_dtype not in self._bases:
            whole = self._whole or self
            shape, device = whole.spec.attention, self.device
            self._bases[kv_dtype] = find_row_basis(
                kv_dtype, shape, whole.spec.vocab_size, whole.spec.max_positions, whole.forward, device, self.sinks
            )
        basis = self._bases[kv_dtype]  # which all copies share
        if basis is None:
            return self
        turned = copy(self)
        turned._row_basis = basis
        return turned

    @property
    def sinks(self) -> tuple[Tensor, ...] | None:
        """Of each layer, the logits Float32[H] that join its softmax; None: the model has none."""
        found = tuple(layer.sinks for layer in self._layers if layer.sinks is not None)
        return found or None

    @property
    def can_rebuild(self) -> bool:
        """Whether `project_kv` gives rows again: not where keys are rotated by the length of their sequence."""
        return not self.spec.rotates_by_length

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; a tied table that is also packed for the logits counts twice, a shared one once."""
        output = None if self._shares_table else self._output
        parts = [*self._layers, self._final_norm, self._project_in, self._project_out, output]
        tables = self._embed.nbytes + (0 if self._positions is None else self._positions.nbytes)
        return tables + sum(part.nbytes for part in parts if part is not None)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        lengths: Tensor | None = None,
        attend_all: AttendAll | None = None,
    ) -> Tensor:
        """Hidden states `[B, T, E]` after the final norm (and the output projection of OPT-350M), ready for `logits`.

        Args:
            tokens: Int64[B, T].
            positions: Int64[B, T], logical positions from 0; packed sequences may repeat or jump.
            attend: the seam; called once per layer, in order.
            lengths: Int64[B, T], how long the sequence of each token may become; asked for by models that rotate by
                length (`ModelSpec.rotates_by_length`) alone.
            attend_all: the seam of all layers together, used in place of `attend` where the layers are native and rows
                are in no basis of their own.
        """
        spec = self.spec
        x = F.embedding(tokens, self._embed)
        if spec.embed_scale != 1.0:
            x = x * self._embed_scale
        if self._project_in is not None:
            x = self._project_in(x)
        rotations = [self._rotation(rope, positions, lengths) for rope in range(len(self._ropes))]
        if self._positions is not None:
            x = x + F.embedding(positions + spec.position_offset, self._positions)
        attend, attend_all = self._seam(attend), attend_all if self._row_basis is None else None
        if self._stack is not None:
            x = self._stack.forward(x, rotations, attend, self._experts, attend_all)
        else:
            x = self._through_layers(x, rotations, attend)
        return x if self._project_out is None else self._project_out(x)

    def _through_layers(self, x: Tensor, rotations: Sequence[Rotation], attend: Attend) -> Tensor:
        """Hidden states after the final norm, of embeddings `[B, T, C]`: what `LayerStack.forward` does, in torch."""
        spec = self.spec
        batch, length, _ = x.shape
        query_factor = spec.query_factor
        q_shape = (batch, length, spec.num_heads, spec.head_dim)
        kv_shape = (batch, length, 2, spec.num_kv_heads, spec.head_dim)
        out_shape = (batch, length, spec.q_size)
        for index, layer in enumerate(self._layers):
            norm = layer.attn_norm
            normed = x if norm is None or spec.norm_place == "after_sum" else norm(x)
            q = layer.q(normed).view(q_shape)
            k, v = layer.kv(normed).view(kv_shape).unbind(2)
            if layer.q_norm is not None:
                q, k = self._head_normed(layer.q_norm, q), self._head_normed(layer.k_norm, k)
            rope = self._rope_of_layer[index]
            if rope is not None:
                rotate = rotations[rope]
                q, k = rotate(q), rotate(k)
            if query_factor != 1.0:
                q = q * query_factor
            attended = layer.out(attend(index, q, k, v, normed).reshape(out_shape))
            x = self._residual(layer, x, attended)
        return x if self._final_norm is None else self._final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores Float32[N, V] of the next token for the rows `[N, E]` of what `forward` returned."""
        logits = self._output(hidden).to(torch.float32)
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else softcapped(logits, cap)

    def project_kv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """K and V `[N, G, D]` of tokens whose layer input is known: what `attend` saw for them, rebuilt.

        Args:
            layer: which layer.
            hidden: `[N, C]`, exactly what W_K and W_V read: after the layer's norm (or the bare input when the model
                normalises after the residual sum).
            positions: Int64[N], the original positions. They are not enough for models that rotate by length.
        """
        weights = self._layers[layer]
        rope = self._rope_of_layer[layer]
        rotation = None if rope is None else self._rotation(rope, positions, None)
        if self._stack is not None:
            k, v = self._stack.project_kv(layer, hidden, rotation)
        else:
            shape = (hidden.shape[0], 2, self.spec.num_kv_heads, self.spec.head_dim)
            k, v = weights.kv(hidden).view(shape).unbind(1)
            k = self._head_normed(weights.k_norm, k)
            k = k if rotation is None else rotation(k)
        return (k, v) if self._row_basis is None else self._row_basis.rows(layer, k, v)

    def _seam(self, attend: Attend) -> Attend:
        """What a forward pass calls for an `attend` that sees rows in their basis."""
        return attend if self._row_basis is None else self._row_basis.around(attend)

    def _rotation(self, number: int, positions: Tensor, lengths: Tensor | None) -> Rotation:
        """The rotation of tokens at these positions, for the layers that have this embedding."""
        rope, frequencies = self._ropes[number], self._frequencies[number]
        if frequencies is not None:
            return Rotation(positions, frequencies, attention_factor(rope))
        assert lengths is not None, "this model rotates by length"
        return Rotation(positions, frequencies_by_length(rope, lengths), attention_factor(rope))

    def _head_normed(self, norm: Norm | None, heads: Tensor) -> Tensor:
        """Q or k `[..., heads, D]` through the norm that some models have for each head, or for all together."""
        if norm is None:
            return heads
        return norm(heads.flatten(-2)).view_as(heads) if self.spec.qk_norm_joint else norm(heads)

    def _residual(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """What leaves a layer, `[B, T, C]`, from what entered it and what its attention found.

        Written out, without a function for a norm that may not be there: in a small model each call shows.
        """
        spec = self.spec
        if spec.norm_place == "after_sum":
            x = _normed(layer.attn_norm, x + attended)
            return _normed(layer.mlp_norm, x + self._mlp(layer, x))
        scale = spec.residual_scale
        if layer.attn_post_norm is not None:
            attended = layer.attn_post_norm(attended)
        if scale != 1.0:
            attended = attended * scale
        entered = x
        x = x + attended
        if spec.parallel_residual:
            return x + self._mlp(layer, _normed(layer.mlp_norm, entered))
        out = self._mlp(layer, x if layer.mlp_norm is None else layer.mlp_norm(x))
        if layer.mlp_post_norm is not None:
            out = layer.mlp_post_norm(out)
        return x + (out if scale == 1.0 else out * scale)

    def _experts(self, layer: int, x: Tensor) -> Tensor:
        """The feed-forward part of a layer with experts."""
        return self._mlp(self._layers[layer], x)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """The feed-forward part of one layer, `[B, T, C] -> [B, T, C]`."""
        if isinstance(layer.mlp, Experts):
            return layer.mlp(x, self._activation)
        return layer.mlp.down(self._activation(layer.mlp.up(x)))


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    """`x [B, T, C]` through a norm that not every model has."""
    return x if norm is None else norm(x)
