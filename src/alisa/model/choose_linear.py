"""Which linear layers a model is built with: as precise as its arithmetic, or in 8 bits."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from alisa.config import WeightDtypeName
from alisa.errors import InputError
from alisa.kernels.native import library
from alisa.kernels.native import product as cpu_product
from alisa.model.linear import Linear, MakeLinear, make_linear
from alisa.model.linear_int8 import QuantisedLinear, multiply_int8

_LOG = logging.getLogger("alisa")


def choose_linear(weight_dtype: WeightDtypeName, device: torch.device) -> MakeLinear:
    """What turns weights into layers for this device; layers of one maker share their working memory.

    Raises:
        InputError: weights in 8 bits on another device than a CPU.
    """
    if weight_dtype == "auto":
        return make_linear
    if device.type != "cpu":
        raise InputError(
            f"weight_dtype {weight_dtype} is for a CPU, and the model runs on {device.type}; use --device cpu, or "
            "--weight-dtype auto."
        )
    if library.available():
        multiply = cpu_product.CpuProducts()
    else:
        _warn_once(library.unavailable_reason())
        multiply = multiply_int8

    def make(weight: Tensor, bias: Tensor | None, device: torch.device) -> Linear:
        return QuantisedLinear(weight, bias, multiply)

    return make


@cache
def _warn_once(reason: str) -> None:
    _LOG.warning("products with 8-bit weights run in plain torch, many times slower: %s.", reason)
