"""All layers of a decoder but for attention, native: from what attention found in one layer to q, k and v of the next.

`alisa.model.decoder` has the same operator by operator, in plain torch, for GPUs and wherever a layer has parts that
are not native.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alisa.kernels.base import Attend, AttendAll
from alisa.kernels.native import library
from alisa.kernels.native.activation import KINDS
from alisa.kernels.native.product import model_isa_names
from alisa.model.experts import Experts
from alisa.model.layer import Layer, Norm
from alisa.model.linear import Linear
from alisa.model.linear_panels import PanelLinear
from alisa.model.rope import Rotation
from alisa.spec import ModelSpec

if TYPE_CHECKING:
    from alisa.kernels import _native


class LayerStack:
    """The layers of one model as native code sees them, with their working memory.

    Args:
        spec: shape and wiring.
        layers: with weights in panels.
        final_norm: after the last layer, or None.
        rope_of_layer: which of a step's rotations each layer applies.
        dtype: what the model computes in.
        isa: one of `model_isa_names()`; by default the fastest.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: Sequence[Layer],
        final_norm: Norm | None,
        rope_of_layer: Sequence[int | None],
        dtype: torch.dtype,
        isa: str | None = None,
    ) -> None:
        native = library.native()
        self._make_step = native.StackStep
        self._make_table = native.RotationTable
        self._team = library.Team()
        self._num_layers = len(layers)
        self._num_heads, self._num_kv_heads, self._head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._has_experts = bool(spec.num_experts)
        self._norms: list[Tensor] = []
        shape = native.StackShape(
            dtype=library.VALUE_CODES[dtype],
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            ffn_size=spec.ffn_size,
            activation=0 if self._has_experts else KINDS[spec.activation],  # experts have their own, in torch
            norms_after_sum=spec.norm_place == "after_sum",
            parallel_residual=spec.parallel_residual,
            residual_scale=spec.residual_scale,
            query_factor=spec.query_factor,
            final_norm=self._norm(final_norm),
        )
        self._layers = layers  # native code has their addresses
        weights = [
            self._weights(layer, -1 if rope is None else rope)
            for layer, rope in zip(layers, rope_of_layer, strict=True)
        ]
        self._native = native.Stack(isa or model_isa_names()[0], shape, weights)

    def forward(
        self,
        x: Tensor,
        rotations: Sequence[Rotation],
        attend: Attend,
        experts: Callable[[int, Tensor], Tensor],
        attend_all: AttendAll | None = None,
    ) -> Tensor:
        """Hidden states `[B, T, C]` after the final norm.

        Args:
            x: embeddings `[B, T, C]`, contiguous; they are overwritten.
            rotations: of the step.
            attend: the seam; called once per layer, in order.
            experts: the MLP of a layer that has many; number of the layer, and its input `[B, T, C]`.
            attend_all: the seam of all layers together, taken where they have no experts.
        """
        batch, length, _ = x.shape
        q = x.new_empty(batch, length, self._num_heads, self._head_dim)
        kv = x.new_empty(batch, length, 2, self._num_kv_heads, self._head_dim)
        k, v = kv.unbind(2)
        normed = torch.empty_like(x)
        step = self._make_step(
            num_tokens=batch * length,
            x=x.data_ptr(),
            normed=normed.data_ptr(),
            q=q.data_ptr(),
            kv=kv.data_ptr(),
            rotations=[self._table(rotation) for rotation in rotations],
        )
        run, threads = self._native.run, self._team.threads()
        if attend_all is not None and not self._has_experts:
            with attend_all(q, k, v) as attention:
                self._native.run_all(threads, step, attention)
            return normed
        run(threads, step, -1, 0, 0)
        for layer in range(self._num_layers):
            attended = attend(layer, q, k, v, normed)
            if not attended.is_contiguous():
                attended = attended.contiguous()
            run(threads, step, layer, attended.data_ptr(), 0)
            if self._has_experts:
                out = experts(layer, normed).contiguous()
                run(threads, step, layer, 0, out.data_ptr())
        return normed

    def project_kv(self, layer: int, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """See `Decoder.project_kv`; `rotation` is that of the tokens' positions, if the layer has one."""
        hidden = hidden.contiguous()
        kv = hidden.new_empty(len(hidden), 2, self._num_kv_heads, self._head_dim)
        self._native.project_kv(
            threads=self._team.threads(),
            layer=layer,
            hidden=hidden.data_ptr(),
            rotation=None if rotation is None else self._table(rotation),
            num_tokens=len(hidden),
            kv=kv.data_ptr(),
        )
        k, v = kv.unbind(1)
        return k, v

    def _table(self, rotation: Rotation) -> _native.RotationTable:
        cos, sin = rotation.cos, rotation.sin
        return self._make_table(cos.data_ptr(), sin.data_ptr(), cos.shape[-1])

    def _norm(self, norm: Norm | None) -> _native.Norm:
        if norm is None:
            return library.native().Norm(0, 0, 0, 0.0)
        weight = norm.weight.to(torch.float32).contiguous()
        bias = None if norm.bias is None else norm.bias.to(torch.float32).contiguous()
        self._norms += (weight,) if bias is None else (weight, bias)
        return library.native().Norm(weight.data_ptr(), 0 if bias is None else bias.data_ptr(), len(weight), norm.eps)

    def _weights(self, layer: Layer, rotation: int) -> _native.LayerWeights:
        mlp = None if isinstance(layer.mlp, Experts) else layer.mlp
        return library.native().LayerWeights(
            attn_norm=self._norm(layer.attn_norm),
            attn_post_norm=self._norm(layer.attn_post_norm),
            mlp_norm=self._norm(layer.mlp_norm),
            mlp_post_norm=self._norm(layer.mlp_post_norm),
            q_norm=self._norm(layer.q_norm),
            k_norm=self._norm(layer.k_norm),
            q=_matrix(layer.q),
            kv=_matrix(layer.kv),
            out=_matrix(layer.out),
            up=None if mlp is None else _matrix(mlp.up),
            down=None if mlp is None else _matrix(mlp.down),
            rotation=rotation,
        )


def can_stack(layers: Sequence[Layer]) -> bool:
    """Whether all products of these layers are native."""
    for layer in layers:
        mlp = () if isinstance(layer.mlp, Experts) else (layer.mlp.up, layer.mlp.down)
        linears = (layer.q, layer.kv, layer.out, *mlp)
        if not all(isinstance(linear, PanelLinear) and linear.matrix is not None for linear in linears):
            return False
    return True


def _matrix(linear: Linear) -> _native.Matrix:
    assert isinstance(linear, PanelLinear), "see can_stack"
    assert linear.matrix is not None, "see can_stack"
    return linear.matrix
