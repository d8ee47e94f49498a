"""Reads a Hugging Face config and collects every complaint, so that one error names everything that is in the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alisa.errors import ModelError
from alisa.spec import ActivationName, Rope, RopeScaling

# gelu_fast and gelu_pytorch_tanh are other ways to write the same tanh formula as gelu_new.
_ACTIVATIONS: dict[str, ActivationName] = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ROPE_KINDS = ("default", "linear", "llama3")


class ConfigReader:
    """Typed access to one config; problems are remembered and raised together by `finish`.

    Getters return a harmless value after a problem, so reading can go on; call `finish` before using any of them.
    """

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self._config = config
        self._family = family
        self._problems: list[str] = []
        quantisation = config.get("quantization_config")
        if isinstance(quantisation, Mapping):
            method = quantisation.get("quant_method", "unknown")
            self.refuse(f"its weights are quantised ({method}), only float weights can be read")

    def refuse(self, problem: str) -> None:
        """Remember a reason why this model cannot run."""
        self._problems.append(problem)

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number; without a default it must be there."""
        value = self._config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(f"{name} is {value!r}, a positive whole number is needed")
            return 1
        return value

    def optional_integer(self, name: str) -> int | None:
        """A positive whole number, or None when absent or null."""
        return None if self._config.get(name) is None else self.integer(name)

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        return self._positive(self._config, name, default)

    def flag(self, name: str, default: bool) -> bool:
        """A switch."""
        value = self._config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(f"{name} is {value!r}, true or false is needed")
            return default
        return value

    def fixed(self, name: str, required: bool) -> None:
        """Refuse a switch that stands the other way; absent means as required."""
        if self.flag(name, required) != required:
            self.refuse(f"{name} is {not required}, supported is {required} only")

    def activation(self, name: str, default: str) -> ActivationName:
        """The activation function in our spelling."""
        value = self._config.get(name) or default
        if value not in _ACTIVATIONS:
            self.refuse(f"{name} is {value!r}, supported are {', '.join(_ACTIVATIONS)}")
            return "relu"
        return _ACTIVATIONS[value]

    def heads(self, *, hidden_size: int, num_heads: int) -> int:
        """Head dim when it follows from the hidden size."""
        if hidden_size % num_heads:
            self.refuse(f"hidden size {hidden_size} is not a multiple of {num_heads} attention heads")
            return 1
        return hidden_size // num_heads

    def kv_heads(self, name: str, default: int | None, *, num_heads: int) -> int:
        """KV heads; without a default, absent means one for each query head."""
        num_kv_heads = self.integer(name, num_heads if default is None else default)
        if num_heads % num_kv_heads:
            self.refuse(f"{num_heads} attention heads are not a multiple of {name} {num_kv_heads}")
            return num_heads
        return num_kv_heads

    def rope(self, head_dim: int, *, theta_name: str, part_name: str, part: float) -> Rope:
        """Rotary embedding from either layout of the config.

        `rope_parameters` (transformers 5) holds base, part and scaling together; before, base and part were fields of
        the config and `rope_scaling` held the rest, its kind under `rope_type` or, older still, `type`.

        Args:
            head_dim: D.
            theta_name: the field of the base in the older layout.
            part_name: the field of the rotated share of each head in the older layout.
            part: that share when no field gives it.
        """
        new = self._config.get("rope_parameters")
        scaling = new if isinstance(new, Mapping) else self._config.get("rope_scaling")
        scaling = scaling if isinstance(scaling, Mapping) else {}
        old = {"rope_theta": self._config.get(theta_name), "partial_rotary_factor": self._config.get(part_name)}
        fields = old | dict(scaling)
        theta = self._positive(fields, "rope_theta", 10000.0)
        rotary_part = self._positive(fields, "partial_rotary_factor", part)
        rotary_dim = int(head_dim * rotary_part)
        if rotary_part > 1 or rotary_dim % 2 or rotary_dim < 2:
            self.refuse(f"rotating {rotary_part} of head dim {head_dim} is not an even number of values")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in _ROPE_KINDS:
            self.refuse(f"its position encoding is {kind!r}, supported are {', '.join(_ROPE_KINDS)}")
        if kind == "linear":
            return Rope(theta, rotary_dim, RopeScaling("linear", self._positive(scaling, "factor", None)))
        if kind == "llama3":
            return Rope(theta, rotary_dim, self._llama3(scaling))
        return Rope(theta, rotary_dim)

    def finish(self) -> None:
        """Return only when the config is usable.

        Raises:
            ModelError: with all problems met so far.
        """
        if self._problems:
            raise ModelError(f"This {self._family} model cannot run here: {'; '.join(self._problems)}.")

    def _llama3(self, scaling: Mapping[str, Any]) -> RopeScaling:
        original = scaling.get("original_max_position_embeddings")
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            self.refuse(f"original_max_position_embeddings is {original!r}, a positive whole number is needed")
            original = 1
        low = self._positive(scaling, "low_freq_factor", None)
        high = self._positive(scaling, "high_freq_factor", None)
        if high <= low and not self._problems:
            self.refuse(f"high_freq_factor {high} must be above low_freq_factor {low}")
        return RopeScaling("llama3", self._positive(scaling, "factor", None), low, high, original)

    def _positive(self, fields: Mapping[str, Any], name: str, default: float | None) -> float:
        value = fields.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.refuse(f"{name} is {value!r}, a positive number is needed")
            return 1.0
        return float(value)
