"""Reads a Hugging Face config and collects every complaint, so that one error names everything that is in the way.

A field that nobody asks for and that `harmless.py` does not list is a complaint too: what the decoder does not
implement is refused by its name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alisa.errors import ModelError
from alisa.model.families.harmless import is_harmless
from alisa.model.families.rope_fields import ROPE_FIELDS, read_rope, rope_fields
from alisa.spec import ActivationName, Rope

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

SLIDING, FULL = "sliding_attention", "full_attention"
"""The kinds of attention that `layer_types` may name here."""


class ConfigReader:
    """Typed access to one config; problems are remembered and raised together by `finish`.

    Getters return a harmless value after a problem, so reading can go on; call `finish` before using any of them.

    Args:
        config: the fields of config.json.
        family: for messages.
        part: the field that holds the config of the language model, where the config of a multimodal one has it.
        quantised: the methods of quantisation whose weights can be read.
    """

    def __init__(
        self, config: Mapping[str, Any], family: str, *, part: str | None = None, quantised: tuple[str, ...] = ()
    ) -> None:
        quantisation = config.get("quantization_config")
        inner = None if part is None else config.get(part)
        self._config = config if not isinstance(inner, Mapping) else inner
        self._family = family
        self._problems: list[str] = []
        self._asked: set[str] = {"quantization_config"}
        quantisation = quantisation or self._config.get("quantization_config")
        if isinstance(quantisation, Mapping):
            method = quantisation.get("quant_method", "unknown")
            # "gguf" is what transformers leaves in the config of a file that it has loaded; it saves such weights as
            # floats, or not at all.
            if method not in (*quantised, "gguf"):
                self.refuse(f"its weights are quantised ({method}), only float weights can be read")
        packed = self.value("quantization")
        if isinstance(packed, Mapping):
            self.refuse(f"its weights are quantised (MLX, {packed.get('bits')} bits), only float weights can be read")

    def refuse(self, problem: str) -> None:
        """Remember a reason why this model cannot run."""
        if problem not in self._problems:  # a field may be read twice
            self._problems.append(problem)

    def value(self, name: str) -> object:
        """The field as it is; None where it is absent."""
        self._asked.add(name)
        return self._config.get(name)

    def has(self, name: str) -> bool:
        """Whether the config has the field, be it null."""
        self._asked.add(name)
        return name in self._config

    def ignore(self, *names: str) -> None:
        """These fields have no influence on this family."""
        self._asked.update(names)

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number from `least` on; without a default it must be there."""
        value = self.value(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            wanted = "a positive whole number" if least == 1 else f"a whole number from {least} on"
            self.refuse(f"{name} is {value!r}, {wanted} is needed")
            return max(least, 1)
        return value

    def optional_integer(self, name: str) -> int | None:
        """A positive whole number, or None when absent or null."""
        return None if self.value(name) is None else self.integer(name)

    def number(self, name: str, default: float | None) -> float:
        """A positive number; without a default it must be there."""
        return self.positive({name: self.value(name)}, name, default)

    def optional_number(self, name: str) -> float | None:
        """A positive number, or None when absent or null."""
        return None if self.value(name) is None else self.number(name, None)

    def cap(self, name: str, default: float) -> float | None:
        """A positive number; null means that there is none, absent the default."""
        return self.optional_number(name) if self.has(name) else default

    def flag(self, name: str, default: bool) -> bool:
        """A switch."""
        value = self.value(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(f"{name} is {value!r}, true or false is needed")
            return default
        return value

    def fixed(self, name: str, required: bool | float | list[int] | None) -> None:
        """Refuse a field of another value; absent and null mean as required."""
        value = self.value(name)
        if value is not None and value != required:
            self.refuse(f"{name} is {value!r}, supported is {required!r} only")

    def activation(self, name: str, default: str) -> ActivationName:
        """The activation function in our spelling."""
        value = self.value(name) or default
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

    def window(self, default: int | None) -> int | None:
        """`sliding_window`: null means that there is none, absent what the family says."""
        return self.optional_integer("sliding_window") if self.has("sliding_window") else default

    def experts(self, count: int, per_token: int) -> tuple[int, int]:
        """How many experts there are and how many a token goes through, from their fields or these defaults."""
        name = "num_experts" if self.has("num_experts") else "num_local_experts"  # transformers takes either
        num_experts, chosen = self.integer(name, count), self.integer("num_experts_per_tok", per_token)
        if chosen > num_experts:
            self.refuse(f"num_experts_per_tok {chosen} is more than {name} {num_experts}")
        return num_experts, chosen

    def windows(
        self, num_layers: int, window: int | None, slides: Callable[[int], bool] = lambda layer: True
    ) -> tuple[int | None, ...]:
        """The sliding window of each layer; empty where no layer has one.

        Args:
            num_layers: L.
            window: tokens, None: none is set, and all layers are full.
            slides: whether a layer has it, where `layer_types` does not say.
        """
        kinds = self.value("layer_types")
        if kinds is None:
            sliding: Sequence[bool] = [slides(layer) for layer in range(num_layers)]
        elif not isinstance(kinds, list) or len(kinds) != num_layers:
            self.refuse(f"layer_types is {kinds!r}, a list of {num_layers} kinds is needed")
            return ()
        else:
            unknown = sorted({str(kind) for kind in kinds} - {SLIDING, FULL})
            if unknown:
                self.refuse(f"layer_types has {', '.join(unknown)}, supported are {FULL} and {SLIDING}")
            sliding = [kind == SLIDING for kind in kinds]
        windows = tuple(window if is_sliding else None for is_sliding in sliding)
        return windows if any(windows) else ()

    def rope(
        self,
        head_dim: int,
        max_positions: int,
        *,
        theta: float = 10000.0,
        theta_name: str = "rope_theta",
        part_name: str = "partial_rotary_factor",
        part: float = 1.0,
        kind: str | None = None,
    ) -> Rope:
        """Rotary embedding from either layout of the config; see `rope_fields`.

        Args:
            head_dim: D.
            max_positions: what scaled kinds take for the original length where nothing else says it.
            theta: the base when no field gives it.
            theta_name: the field of the base in the older layout.
            part_name: the field of the rotated share of each head in the older layout.
            part: that share when no field gives it.
            kind: of `layer_types`, where the fields are given for each.
        """
        self._asked.update((*ROPE_FIELDS, theta_name, part_name))
        fields = rope_fields(self._config, theta_name, part_name, kind)
        return read_rope(self, fields, head_dim, max_positions, theta=theta, part=part)

    def finish(self) -> None:
        """Return only when the config is usable.

        Raises:
            ModelError: with all problems met so far.
        """
        unknown = [
            name for name in self._config if name not in self._asked and not is_harmless(name, self._config[name])
        ]
        if unknown:
            shown = ", ".join(f"{name} ({_short(self._config[name])})" for name in sorted(unknown))
            self.refuse(f"its config.json has fields that are not known here and may change what it computes: {shown}")
        if self._problems:
            raise ModelError(f"This {self._family} model cannot run here: {'; '.join(self._problems)}.")

    def positive(self, fields: Mapping[str, Any], name: str, default: float | None) -> float:
        """A positive number among some fields; without a default it must be there."""
        value = fields.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.refuse(f"{name} is {value!r}, a positive number is needed")
            return 1.0
        return float(value)


def _short(value: object) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
