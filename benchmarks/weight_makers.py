"""The formats of weights that benchmarks compare on real models, and the models that must be there for it."""

from __future__ import annotations

import sys

import torch
from real_models import REAL_MODELS, RealModel

from alisa.kernels.native.product import CpuProducts
from alisa.model.choose_linear import PanelLinears, choose_linear
from alisa.model.linear import LinearMaker
from alisa.model.linear_int4 import int4_panels
from alisa.model.linear_int8 import int8_panels

CPU = torch.device("cpu")
FORMATS = ("bfloat16", "int8", "int4", "int4 again")
"""The first has the file's own numbers. `int4` takes the blocks of the file over where they have 4 bits, `int4 again`
decodes them and rounds the numbers, as it must be done with any other checkpoint."""


def maker(name: str) -> LinearMaker:
    """What makes the layers of one of these formats."""
    if name == "int4 again":
        return PanelLinears(int4_panels, int8_panels, CpuProducts(), maker("bfloat16"))
    return choose_linear("int8" if name == "int8" else "int4" if name == "int4" else "float", torch.bfloat16, CPU)


def fetched_models() -> tuple[RealModel, ...]:
    """The real models; the program ends where one was not fetched."""
    for model in REAL_MODELS:
        if not model.path.is_file():
            sys.exit(f"{model.path} is not there; `make models` fetches it.")
    return REAL_MODELS
