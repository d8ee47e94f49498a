"""The model families this library runs: one data file each, named as the `model_type` in config.json.

To add one, write its file (`to_spec` and the weight names) and enter it in `FAMILIES`; there is no forward pass in it.
"""

from __future__ import annotations

import difflib

from alisa.errors import ModelError
from alisa.model.families import (
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    ministral,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from alisa.model.families.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        gemma2.FAMILY,
        gemma3.FAMILY,
        gemma3.SEEING_FAMILY,
        gpt2.FAMILY,
        gpt_neox.FAMILY,
        gpt_oss.FAMILY,
        granite.FAMILY,
        llama.FAMILY,
        ministral.FAMILY,
        mistral.FAMILY,
        mixtral.FAMILY,
        olmo2.FAMILY,
        opt.FAMILY,
        phi3.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        qwen3_moe.FAMILY,
        smollm3.FAMILY,
        stablelm.FAMILY,
        starcoder2.FAMILY,
    )
}


def find_family(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ModelError: it is not known; the message lists the known ones and the nearest name.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f" The nearest is {near[0]}, whose weights are not interchangeable with it." if near else ""
    raise ModelError(f"Models of type {model_type!r} are not supported; supported are {', '.join(FAMILIES)}.{hint}")
