"""Which linear layers a model is built with: as precise as its arithmetic, or in fewer bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from alisa.config import WeightDtypeName, WeightFormat
from alisa.errors import InputError
from alisa.kernels.base import Panels
from alisa.kernels.native import library
from alisa.kernels.native.product import CpuProducts
from alisa.model.coded import CodedWeight
from alisa.model.linear import CodedLayer, FrameworkLinears, Linear, LinearMaker
from alisa.model.linear_int4 import coded_panels, int4_panels
from alisa.model.linear_int8 import int8_panels
from alisa.model.linear_panels import PanelLinear, float_panels

Pack = Callable[[Tensor, int], Panels]
"""A weight `[out, in]` of so many parts, laid out."""

PackCoded = Callable[[CodedWeight, int], Panels]
"""The same of a weight in 4 bits as a file has it."""

_LOG = logging.getLogger("alisa")


class PanelLinears:
    """See `LinearMaker`: weights in panels, all with the same products and so the same working memory.

    Args:
        pack: lays out the weights of layers.
        pack_head: and that of the projection to the vocabulary.
        products: do the arithmetic; None: plain torch does.
        exact: makes what is never rounded.
        pack_coded: lays out weights in 4 bits as files have them; None: layers are in another format.
    """

    def __init__(
        self,
        pack: Pack,
        pack_head: Pack,
        products: CpuProducts | None,
        exact: LinearMaker | None,
        pack_coded: PackCoded | None = None,
    ) -> None:
        self._pack = pack
        self._pack_head = pack_head
        self._products = products
        self._exact = exact
        self._pack_coded = pack_coded

    @property
    def coded_layer(self) -> CodedLayer | None:
        """With its bias in float32; None: layers are in another format."""
        pack = self._pack_coded
        if pack is None:
            return None
        return lambda weight, bias, parts: PanelLinear(pack(weight, parts), bias, self._products)

    def layer(self, weight: Tensor, bias: Tensor | None, parts: int = 1) -> Linear:
        """With its bias in float32."""
        return PanelLinear(self._pack(weight, parts), bias, self._products)

    def head(self, weight: Tensor) -> Linear:
        """Without a bias, and with scores in float32: 8 bits of bfloat16 do not tell likely tokens apart."""
        return PanelLinear(self._pack_head(weight, 1), None, self._products, torch.float32)

    def exact(self, weight: Tensor) -> Linear:
        """In the weight's own dtype."""
        return self.layer(weight, None) if self._exact is None else self._exact.exact(weight)


def resolve_weight_dtype(asked: WeightDtypeName, stored: WeightFormat, device: torch.device) -> WeightFormat:
    """What layers are kept in when the user leaves it open: the format of their file, where it is fast here.

    A file in 4 bits is then run as llama.cpp runs it, inputs of products rounded to 8 bits; `float` is what
    transformers makes of it.

    Args:
        asked: `auto` or the answer.
        stored: `StoredModel.weight_format`.
        device: where the model will run.
    """
    if asked != "auto":
        return asked
    return stored if device.type == "cpu" and library.available() else "float"


def choose_linear(weight_dtype: WeightFormat, dtype: torch.dtype, device: torch.device) -> LinearMaker:
    """What turns weights into layers for this device.

    Args:
        weight_dtype: what layers are kept in. With int4 the projection to the vocabulary has 8 bits: a token's score
            comes from one of its rows alone, and no later layer mends it.
        dtype: what the model computes in.
        device: where it runs.

    Raises:
        InputError: weights in fewer bits on another device than a CPU.
    """
    exact = _exact_linears(dtype, device)
    if weight_dtype == "float":
        return exact
    if device.type != "cpu":
        raise InputError(
            f"weight_dtype {weight_dtype} is for a CPU, and the model runs on {device.type}; use --device cpu, or "
            "--weight-dtype float."
        )
    if not library.available():
        _warn_once(library.unavailable_reason())
    products = CpuProducts() if library.available() else None
    if weight_dtype == "int8":
        return PanelLinears(int8_panels, int8_panels, products, exact)
    return PanelLinears(int4_panels, int8_panels, products, exact, pack_coded=coded_panels)


def has_fast_panels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether native products are the fastest for weights in this dtype: not where a matrix unit takes bfloat16."""
    if device.type != "cpu" or not library.available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    # Private to torch, as in kernels/native/prefill.py.
    return dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()


def _exact_linears(dtype: torch.dtype, device: torch.device) -> LinearMaker:
    if not has_fast_panels(dtype, device):
        return FrameworkLinears(device)
    return PanelLinears(float_panels, float_panels, CpuProducts(), None)


@cache
def _warn_once(reason: str) -> None:
    _LOG.warning("products with weights in fewer bits run in plain torch, many times slower: %s.", reason)
