"""Values that a file held become a dataclass, or one sentence that says what is wrong where.

    structure(Workload, {"name": "b16", "batch": "16"})
    InputError: batch is '16', a whole number is needed; output_len is missing

Nothing is converted: a number in quotes is no number, and a name that the dataclass does not have is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from cattrs import BaseValidationError, Converter
from cattrs.cols import homogenous_tuple_structure_factory, list_structure_factory, mapping_structure_factory
from cattrs.errors import AttributeValidationNote, ForbiddenExtraKeysError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn, make_hetero_tuple_structure_fn

from alisa.errors import InputError

T = TypeVar("T")

Hook = Callable[[Any, Any], Any]
"""What cattrs calls with the values and the type that is wanted."""


class _WrongValue(ValueError):
    """One value is not what its field takes; the message follows the name of the field."""


def structure(kind: type[T], values: object, where: str = "") -> T:
    """The dataclass of this type that these values, as JSON or TOML gave them, describe.

    Args:
        kind: the dataclass.
        values: a mapping from the names of its fields.
        where: path of the values in their file, which fields are named after.

    Raises:
        InputError: all that is wrong with them, each with the path of its field, in a sentence without its full stop.
    """
    return _structured(_STRICT, kind, values, where)


def structure_record(kind: type[T], record: Mapping[str, object]) -> T:
    """The same for a line that a program wrote: a newer version may have put more into it, which is left out.

    Raises:
        InputError: as for `structure`.
    """
    return _structured(_LENIENT, kind, record, "")


def _structured(converter: Converter, kind: type[T], values: object, where: str) -> T:
    try:
        return converter.structure(values, kind)
    except (BaseValidationError, _WrongValue) as error:
        raise InputError("; ".join(_problems(error, where))) from error


def _converter(*, forbid_extra_keys: bool) -> Converter:
    converter = Converter(forbid_extra_keys=forbid_extra_keys)
    converter.register_structure_hook_factory(is_dataclass, _dataclass_hook)
    converter.register_structure_hook_factory(_is_origin(dict, Mapping), _mapping_hook)
    converter.register_structure_hook_factory(_is_origin(tuple), _tuple_hook)
    converter.register_structure_hook_factory(_is_origin(list), _list_hook)
    converter.register_structure_hook_factory(_is_origin(Literal), _choice_hook)
    converter.register_structure_hook_factory(_is_origin(Union, UnionType), _union_hook)
    for plain, needed in (
        (bool, "true or false is needed"),
        (int, "a whole number is needed"),
        (float, "a number is needed"),
        (str, "a text is needed"),
    ):
        converter.register_structure_hook(plain, _plain_hook(plain, needed))
    return converter


def _is_origin(*origins: object) -> Callable[[object], bool]:
    return lambda kind: get_origin(kind) in origins or kind in origins


def _plain_hook(plain: type, needed: str) -> Hook:
    """A value that is of this type already; a whole number may stand where any number may."""

    def hook(value: object, _: object) -> object:
        if plain is float and type(value) is int:
            return float(value)
        if type(value) is not plain:
            raise _WrongValue(f"is {value!r}, {needed}")
        return value

    return hook


def _dataclass_hook(kind: type[Any], converter: Converter) -> Hook:
    inner = make_dict_structure_fn(kind, converter)

    def hook(value: object, wanted: object) -> object:
        if not isinstance(value, Mapping):
            raise _WrongValue(f"is {value!r}, a table is needed")
        return inner(value, wanted)

    return hook


def _container_hook(inner: Hook, held: type | tuple[type, ...], needed: str) -> Hook:
    """`inner` for what is such a container; cattrs would take a text for a list of its letters."""

    def hook(value: object, wanted: object) -> object:
        if not isinstance(value, held):
            raise _WrongValue(f"is {value!r}, {needed} is needed")
        return inner(value, wanted)

    return hook


def _mapping_hook(kind: type[Any], converter: Converter) -> Hook:
    return _container_hook(mapping_structure_factory(kind, converter), Mapping, "a table")


def _list_hook(kind: type[Any], converter: Converter) -> Hook:
    return _container_hook(list_structure_factory(kind, converter), (list, tuple), "a list")


def _tuple_hook(kind: type[Any], converter: Converter) -> Hook:
    parts = get_args(kind)
    if parts[-1] is Ellipsis:
        return _container_hook(homogenous_tuple_structure_factory(kind, converter), (list, tuple), "a list")
    inner = make_hetero_tuple_structure_fn(kind, converter)

    def hook(value: object, wanted: object) -> object:
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            raise _WrongValue(f"is {value!r}, a list of {len(parts)} is needed")
        return inner(value, wanted)

    return hook


def _choice_hook(kind: type[Any], converter: Converter) -> Hook:
    choices = get_args(kind)

    def hook(value: object, _: object) -> object:
        if value not in choices:
            raise _WrongValue(f"is {value!r}, there is {', '.join(map(str, choices))}")
        return value

    return hook


def _union_hook(kind: type[Any], converter: Converter) -> Hook:
    """The first member that takes the value; `None` where it is one."""
    members = [member for member in get_args(kind) if member is not type(None)]
    hooks = [(member, converter.get_structure_hook(member)) for member in members]

    def hook(value: object, _: object) -> object:
        if value is None and len(members) < len(get_args(kind)):
            return None
        for member, inner in hooks[:-1]:
            try:
                return inner(value, member)
            except (BaseValidationError, _WrongValue):
                continue
        member, inner = hooks[-1]
        return inner(value, member)

    return hook


def _problems(error: BaseException, where: str) -> Iterator[str]:
    """Every fault in a group of errors, with the path of its field."""
    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            yield from _problems(inner, _path(where, inner))
    elif isinstance(error, _WrongValue):
        yield f"{where or 'it'} {error}"
    elif isinstance(error, ForbiddenExtraKeysError):
        known = [field.name for field in fields(error.cl)]
        inside = f"{where} " if where else ""
        yield f"{inside}does not know {', '.join(_with_near(name, known) for name in sorted(error.extra_fields))}"
    elif isinstance(error, KeyError):
        yield f"{where} is missing"
    else:  # what the dataclass itself says
        yield str(error).removesuffix(".")


def _path(where: str, error: BaseException) -> str:
    """The path of what an error is about: `gemm.float32.curves[0]`."""
    for note in getattr(error, "__notes__", ()):
        match note:
            case AttributeValidationNote(name=name):
                return f"{where}.{name}" if where else name
            case IterableValidationNote(index=int() as index):
                return f"{where}[{index}]"
            case IterableValidationNote(index=index):
                return f"{where}.{index}" if where else str(index)
    return where


def _with_near(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"{name} (is {near[0]} meant?)" if near else name


_STRICT = _converter(forbid_extra_keys=True)
_LENIENT = _converter(forbid_extra_keys=False)
