"""The weights of one layer, and how every weight gets from a source to where the decoder reads it.

Loading holds one tensor at a time: read, cast, moved or packed, dropped. Checkpoints, random weights and tests all go
through the same `Builder`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.model.choose_linear import choose_linear
from alisa.model.experts import Expert, Experts
from alisa.model.linear import Linear, LinearMaker
from alisa.model.names import expert_name, layer_name, layer_shapes, model_shapes, stays_wide, weight_bytes
from alisa.model.source import WeightSource
from alisa.spec import ModelSpec

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total) while weights are read."""


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer norm with a bias, or RMS norm without, over the last dimension; both compute in float32 inside torch.

    A weight in float32 (`ModelSpec.wide_norms`) is multiplied with before the result is rounded to the dtype of x.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised `x [..., C]`, same shape and dtype."""
        if self.bias is None:
            if self.weight.dtype is x.dtype:
                return torch.rms_norm(x, self.weight.shape, self.weight, self.eps)
            wide = x.to(self.weight.dtype)
            return torch.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one transformer layer, packed for the device."""

    attn_norm: Norm | None
    q: Linear
    kv: Linear
    """K rows then V rows, apart from `q`: `project_kv` needs them alone to rebuild a deleted row."""
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    sinks: Tensor | None
    """Float32[H]: what each head's softmax has in its denominator besides the tokens (GPT-OSS)."""
    attn_post_norm: Norm | None
    """Of the output of attention; the names of the norms are those of `names.norm_names`."""
    mlp_norm: Norm | None
    mlp: Expert | Experts
    """One for all tokens, or many of which each token goes through a few."""
    mlp_post_norm: Norm | None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        norms = (self.attn_norm, self.attn_post_norm, self.q_norm, self.k_norm, self.mlp_norm, self.mlp_post_norm)
        parts = (*norms, self.q, self.kv, self.out, self.sinks, self.mlp)
        return sum(part.nbytes for part in parts if part is not None)


class Builder:
    """Turns a source of tensors into norms, linear layers and tables on the device.

    Args:
        spec: fixes which tensors exist and their shapes.
        source: read once for each tensor.
        dtype: what the model computes in.
        device: where the weights go.
        progress: told after each tensor; None: nobody asks.
        linears: turn weights into layers; None: exact ones that are fast here.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None,
        linears: LinearMaker | None,
    ) -> None:
        self._spec = spec
        self._source = source
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._linears = linears or choose_linear("float", dtype, device)
        self._shapes = model_shapes(spec)
        for layer in range(spec.num_layers):
            self._shapes |= {layer_name(layer, part): shape for part, shape in layer_shapes(spec).items()}
        self._done_bytes = 0
        self._total_bytes = weight_bytes(spec, dtype.itemsize)

    def tensor(self, name: str) -> Tensor:
        """The named tensor in the model's dtype, or in float32 where the spec says so, on its device."""
        dtype = torch.float32 if stays_wide(self._spec, name) else self._dtype
        tensor = self._source.read(name, self._shapes[name]).to(device=self._device, dtype=dtype)
        self._tell(tensor.nbytes)
        return tensor

    def _tell(self, num_bytes: int) -> None:
        """More of the weights are read, in bytes of the model's dtype."""
        self._done_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)

    def norm(self, name: str) -> Norm | None:
        """The named norm, or None where the spec has none; the head norms of q and k never have a bias."""
        if f"{name}.weight" not in self._shapes:
            return None
        has_bias = f"{name}.bias" in self._shapes
        weight = self.tensor(f"{name}.weight")
        return Norm(weight, self.tensor(f"{name}.bias") if has_bias else None, self._spec.norm_eps)

    def linear(self, name: str, parts: int = 1) -> Linear:
        """The named linear layer with its bias if the spec gives it one, packed for the device."""
        has_bias = f"{name}.bias" in self._shapes
        shape, coded_layer = self._shapes[f"{name}.weight"], self._linears.coded_layer
        codes = None if coded_layer is None else self._source.read_codes(f"{name}.weight", shape)
        if coded_layer is None or codes is None:
            weight = self.tensor(f"{name}.weight")
            return self._linears.layer(weight, self.tensor(f"{name}.bias") if has_bias else None, parts)
        self._tell(math.prod(shape) * self._dtype.itemsize)
        return coded_layer(codes, self.tensor(f"{name}.bias") if has_bias else None, parts)

    def head(self, table: Tensor) -> Linear:
        """The projection to the vocabulary by the table of the embeddings `[V, C]`."""
        return self._linears.head(table)

    def _mlp(self, index: int) -> Expert | Experts:
        spec = self._spec
        names = [expert_name(number, "") for number in range(spec.num_experts)] or [""]
        parts = 2 if spec.gated_mlp else 1
        mlps = [
            Expert(self.linear(layer_name(index, f"{name}up"), parts), self.linear(layer_name(index, f"{name}down")))
            for name in names
        ]
        if not spec.num_experts:
            return mlps[0]
        # The router is never rounded to fewer bits: it is small, and a token that goes elsewhere is another token.
        router = self._linears.exact(self.tensor(layer_name(index, "router.weight")))
        bias = self.tensor(layer_name(index, "router.bias")) if spec.router_bias else None
        return Experts(router, bias, mlps, per_token=spec.experts_per_token, renormalises=spec.renormalises_experts)

    def layer(self, index: int) -> Layer:
        """All weights of one layer."""
        return Layer(
            attn_norm=self.norm(layer_name(index, "attn_norm")),
            q=self.linear(layer_name(index, "q")),
            kv=self.linear(layer_name(index, "kv")),
            q_norm=self.norm(layer_name(index, "q_norm")),
            k_norm=self.norm(layer_name(index, "k_norm")),
            out=self.linear(layer_name(index, "out")),
            sinks=self.tensor(layer_name(index, "sinks")) if self._spec.has_sinks else None,
            attn_post_norm=self.norm(layer_name(index, "attn_post_norm")),
            mlp_norm=self.norm(layer_name(index, "mlp_norm")),
            mlp=self._mlp(index),
            mlp_post_norm=self.norm(layer_name(index, "mlp_post_norm")),
        )
