"""What stands between the two products of an MLP: an activation, and in a gated MLP the product with the other half.

A token's result must not depend on the other tokens of a call. torch's own `silu` and `gelu` give the last elements of
a thread's share other last bits than the rest, so on a CPU they are native, or made here from functions that treat all
elements alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alisa.kernels.native import activation as native
from alisa.kernels.native import library
from alisa.spec import SWIGLU_ALPHA, SWIGLU_LIMIT, ActivationName

Activation = Callable[[Tensor], Tensor]
"""The up product `[..., F]`, or gate and up `[..., 2 F]` of a gated MLP -> `[..., F]`; it may be overwritten."""


def make_activation(name: ActivationName, *, gated: bool, device: torch.device) -> Activation:
    """The fastest form of an activation on this device."""
    if device.type == "cpu" and name in native.KINDS and library.available():
        return native.CpuActivation(name, gated=gated)
    return plain_activation(name, gated=gated)


def plain_activation(name: ActivationName, *, gated: bool) -> Activation:
    """The same in plain torch."""
    if name == "clamped_swiglu":
        assert gated, "it takes both halves"
        return _clamped_swiglu
    activate = _PLAIN[name]
    if not gated:
        return activate

    def multiply(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activate(gate).mul_(up)

    return multiply


def _silu(x: Tensor) -> Tensor:
    """X / (1 + exp(-x)). In 16 bits the difference of torch's own does not show (tried on every value)."""
    return x / x.neg().exp_().add_(1) if x.dtype == torch.float32 else F.silu(x)


def _gelu(x: Tensor) -> Tensor:
    """X / 2 (1 + erf(x / sqrt(2))); in 16 bits torch's own differs too."""
    wide = x.to(torch.float32)
    return (wide * math.sqrt(0.5)).erf_().add_(1).mul_(wide).mul_(0.5).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    """X / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    wide = x.to(torch.float32)
    power = (wide * wide).mul_(0.044715).add_(1).mul_(wide).mul_(-2 * math.sqrt(2 / math.pi))
    return (wide / power.exp_().add_(1)).to(x.dtype)


def _clamped_swiglu(x: Tensor) -> Tensor:
    """(up + 1) * gate / (1 + exp(-alpha gate)) of halves that are clamped: gate from above, up from both sides."""
    gate, up = x.to(torch.float32).chunk(2, dim=-1)
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (gate / (gate * -SWIGLU_ALPHA).exp_().add_(1)).mul_(up + 1).to(x.dtype)


_PLAIN: dict[ActivationName, Activation] = {
    # In place, on a product that nobody else holds: for a prompt, fresh pages for the results cost more than they do.
    "relu": torch.relu_,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
