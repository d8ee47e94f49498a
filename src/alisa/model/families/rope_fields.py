"""The fields of a rotary embedding, in the two layouts that configs have them in.

`rope_parameters` (transformers 5) holds base, part and scaling together, all layers' or one entry for each kind of
layer. Before, base and part were fields of the config and `rope_scaling` held the rest, its kind under `rope_type` or,
older still, `type`. A `rope_scaling` that is not empty replaces `rope_parameters`, as in transformers: users add it to
either layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from alisa.spec import Rope, RopeScaling

ROPE_FIELDS = ("rope_parameters", "rope_scaling", "original_max_position_embeddings")
"""Fields of a config that this file reads, beside those of the base and of the rotated part."""

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_SCALED_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}


class Reader(Protocol):
    """What `ConfigReader` gives this file."""

    def refuse(self, problem: str) -> None:
        """Remember a reason why this model cannot run."""
        ...

    def positive(self, fields: Mapping[str, Any], name: str, default: float | None) -> float:
        """A positive number among some fields."""
        ...


def rope_fields(config: Mapping[str, Any], theta_name: str, part_name: str, kind: str | None) -> dict[str, Any]:
    """The fields of one rotary embedding from either layout.

    Args:
        config: the whole config.
        theta_name: the field of the base in the older layout.
        part_name: the field of the rotated share of each head in the older layout.
        kind: of `layer_types`, where `rope_parameters` has an entry for each.
    """
    parameters, scaling = (_mapping(config.get(name)) for name in ("rope_parameters", "rope_scaling"))
    if kind is None:
        found = scaling or parameters
    else:  # the older layout scales the full layers only (Gemma 3)
        found = _mapping(parameters.get(kind)) | (scaling if kind == "full_attention" else {})
    fields = {"rope_theta": config.get(theta_name), "partial_rotary_factor": config.get(part_name)} | found
    # A field of the config itself comes first (Phi-3).
    original = config.get("original_max_position_embeddings")
    return fields if original is None else fields | {"original_max_position_embeddings": original}


def read_rope(
    reader: Reader, fields: Mapping[str, Any], head_dim: int, max_positions: int, *, theta: float, part: float
) -> Rope:
    """The rotary embedding that these fields describe.

    Args:
        reader: takes the complaints.
        fields: as `rope_fields` gives them.
        head_dim: D.
        max_positions: `max_position_embeddings` of the config.
        theta: the base when no field gives it.
        part: the rotated share of each head when no field gives it.
    """
    base = reader.positive(fields, "rope_theta", theta)
    rotary_part = reader.positive(fields, "partial_rotary_factor", part)
    rotary_dim = int(head_dim * rotary_part)
    if rotary_part > 1 or rotary_dim % 2 or rotary_dim < 2:
        reader.refuse(f"rotating {rotary_part} of head dim {head_dim} is not an even number of values")
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in _KINDS:
        reader.refuse(f"its position encoding is {kind!r}, supported are {', '.join(_KINDS)}")
        return Rope(base, rotary_dim)
    known = ("rope_theta", "partial_rotary_factor", "rope_type", "type", "original_max_position_embeddings")
    others = [name for name, value in fields.items() if value and name not in (*known, *_SCALED_FIELDS[kind])]
    if others:
        reader.refuse(f"its position encoding {kind!r} has {', '.join(sorted(others))}, which is not known here")
    if kind == "default":
        return Rope(base, rotary_dim)
    return Rope(base, rotary_dim, _scaling(reader, kind, fields, rotary_dim, max_positions))


def longest(rope: Rope, max_positions: int) -> int:
    """The longest sequence: kinds that users add to a config stretch the length that it was written with."""
    scaling = rope.scaling
    if scaling is None or scaling.kind not in ("dynamic", "yarn"):
        return max_positions
    return max(max_positions, int(scaling.factor * scaling.original_max_positions))


def _scaling(
    reader: Reader, kind: str, fields: Mapping[str, Any], rotary_dim: int, max_positions: int
) -> RopeScaling | None:
    original = fields.get("original_max_position_embeddings")
    original = max_positions if original is None or kind == "dynamic" else original
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        reader.refuse(f"original_max_position_embeddings is {original!r}, a positive whole number is needed")
        return None
    ratio = max_positions / original if kind in ("yarn", "longrope") else None
    factor = reader.positive(fields, "factor", ratio)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "dynamic":
        return RopeScaling("dynamic", factor, original_max_positions=original)
    if kind == "llama3":
        low = reader.positive(fields, "low_freq_factor", None)
        high = reader.positive(fields, "high_freq_factor", None)
        if high <= low:
            reader.refuse(f"high_freq_factor {high} must be above low_freq_factor {low}")
            return None
        return RopeScaling("llama3", factor, low, high, original)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            original_max_positions=original,
            attention_factor=_optional(reader, fields, "attention_factor"),
            beta_fast=reader.positive(fields, "beta_fast", 32.0),
            beta_slow=reader.positive(fields, "beta_slow", 1.0),
            mscale=_optional(reader, fields, "mscale"),
            mscale_all_dim=_optional(reader, fields, "mscale_all_dim"),
            truncate=fields.get("truncate") is not False,
        )
    short, long = (_factors(reader, fields, name, rotary_dim // 2) for name in ("short_factor", "long_factor"))
    return RopeScaling(
        "longrope",
        factor,
        original_max_positions=original,
        attention_factor=_optional(reader, fields, "attention_factor"),
        short_factors=short,
        long_factors=long,
    )


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _optional(reader: Reader, fields: Mapping[str, Any], name: str) -> float | None:
    return None if fields.get(name) is None else reader.positive(fields, name, None)


def _factors(reader: Reader, fields: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    """One number for each rotated pair."""
    found = fields.get(name)
    numbers = found if isinstance(found, list) else []
    if len(numbers) != count or not all(
        isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in numbers
    ):
        reader.refuse(
            f"{name} needs {count} positive numbers, one for each rotated pair, and has {len(numbers)} values"
        )
        return (1.0,) * count
    return tuple(float(number) for number in numbers)
