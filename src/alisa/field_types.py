"""Fields of options dataclasses: brought to their declared types, or described in the words of a user."""

from __future__ import annotations

import types
from contextlib import suppress
from dataclasses import Field, fields
from functools import cache
from itertools import repeat
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints


class DataclassInstance(Protocol):
    """An object of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def settle(options: DataclassInstance, *, none_is_default: bool = False) -> list[str]:
    """Bring every field to its declared type where that loses nothing; returns what is wrong with the others.

    A wrong field gets its default, so that the checks of ranges that follow can look at all of them.
    """
    wrong = []
    hints = _hints(type(options))
    for field in fields(options):
        name, kind, given = field.name, hints[field.name], getattr(options, field.name)
        if given is None and none_is_default:
            value = field.default
        else:
            try:
                value = _fitted(given, kind)
            except TypeError as problem:
                wrong.append(f"{name} {problem}")
                value = field.default
        object.__setattr__(options, name, value)
    return wrong


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    tuple[str, ...]: "a string or a list of strings",
    tuple[int, ...]: "a list of whole numbers",
    tuple[tuple[int, float], ...]: "a mapping of token ids to numbers",
}
"""Types of options, as messages call them."""


def _fitted(value: object, kind: Any) -> Any:  # noqa: ANN401 - annotations are values here
    """`value` as the annotation `kind` wants it.

    Raises:
        TypeError: it is of another type; the message goes on where the option's name ends.
    """
    parts = get_args(kind)
    match get_origin(kind):
        case origin if origin in (types.UnionType, Union):
            for part in parts:
                with suppress(TypeError):
                    return _fitted(value, part)
            for part in parts:
                if get_origin(part) is Literal:
                    return _fitted(value, part)  # its names are more to say than a type is
        case origin if origin is Literal:
            if value in parts:
                return value
            raise TypeError(f"{value!r} is unknown, there is {', '.join(parts)}")
        case origin if origin is tuple:
            # A string is one element, never its letters.
            elements = (value,) if isinstance(value, str) and parts[0] is str else value
            if isinstance(elements, (list, tuple, set, frozenset)):
                kinds = repeat(parts[0]) if parts[1:] == (...,) else parts
                with suppress(TypeError, ValueError):
                    return tuple(_fitted(*pair) for pair in zip(elements, kinds, strict=parts[1:] != (...,)))
        case _:
            if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
                return int(value)
            if kind is float and isinstance(value, Real) and not isinstance(value, bool):
                return float(value)
            if kind is Path and isinstance(value, str | Path):
                return Path(value)
            if kind in (bool, str, type(None)) and isinstance(value, kind):
                return value
    wanted = " or ".join(_KINDS[part] for part in ((kind,) if kind in _KINDS else parts) if part in _KINDS)
    raise TypeError(f"is {value!r}, {wanted} is needed")
