"""How a model wants to be sampled from, as its generation_config.json says: some must not be run greedily."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alisa.config import SamplingParams
from alisa.errors import ModelError

_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_SAMPLED = {"temperature": 1.0, "top_k": 50}
"""What transformers takes where a config says `do_sample` and no more."""


def read_sampling(directory: Path) -> dict[str, float]:
    """Fields of `SamplingParams` that the model's files set; empty where they ask for nothing special.

    Raises:
        ModelError: the file is no JSON object.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not readable JSON ({error}); download it again.") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} holds a {type(fields).__name__} instead of a JSON object; download it again.")
    found = {name: fields[name] for name in _FIELDS if isinstance(fields.get(name), int | float)}
    if fields.get("do_sample") is True:
        return _SAMPLED | found
    # Without do_sample the most likely token is taken; a penalty counts all the same.
    return {name: value for name, value in found.items() if name == "repetition_penalty"}


def with_own_sampling(params: SamplingParams, own: Mapping[str, float]) -> SamplingParams:
    """Parameters with the model's own choices where they are at their default.

    Raises:
        InputError: the model's files name a value that is out of range.
    """
    default = SamplingParams()
    taken: dict[str, Any] = {n: value for n, value in own.items() if getattr(params, n) == getattr(default, n)}
    return replace(params, **taken)
