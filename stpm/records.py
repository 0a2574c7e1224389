"""Dataclasses as JSON files: written, and read back only if every field is there with a value of its type."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from reprlib import repr as shorten
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from stpm.errors import ConfigError, join_first
from stpm.options import Integers, Size

T = TypeVar("T")

# Of an integer of 64 bits, with its sign.
_MAX_DIGITS = 20


def to_json(value: Any, *, indent: int | None = 2) -> bytes:
    """Write a dataclass as JSON; without indentation in one line, which is several times as fast."""
    return json.dumps(dataclasses.asdict(value), indent=indent).encode()


def from_json(kind: type[T], data: bytes) -> T:
    """Read a dataclass from JSON.

    Raises:
        ValueError: in one line, if the bytes are not JSON, or a field is missing, unknown or of another type.
    """
    value: T = convert(kind, parse_json(data), kind.__name__)
    return value


def parse_json(data: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if the bytes are not JSON, nested too deeply, or hold what could not be written again: NaN, a number
            beyond 64 bits, or text that is not UTF-8.
    """
    try:
        value = json.loads(data, parse_constant=_refuse, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if b"\\ud" in data.lower():
        # UnicodeEncodeError, of half a surrogate pair, is a ValueError.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def convert(kind: Any, value: Any, name: str) -> Any:
    """Convert a value of JSON to `kind`: a dataclass, or the type of a field of one. `name` is for the error.

    A NamedTuple is a list in JSON, and a number as a key is text.

    Raises:
        ValueError: in one line, if the value is of another type.
    """
    try:
        return _convert(kind, value, name)
    except (ConfigError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _convert(kind: Any, value: Any, name: str) -> Any:  # noqa: PLR0911  a value for each kind
    # First the common case: a summary has a hundred thousand numbers.
    if type(value) is kind or kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    match value:
        case dict() | list() if origin is UnionType:
            # One type, or None.
            return _convert(arguments[0], value, name)
        case dict() if origin is dict:
            return {arguments[0](key): _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
        case dict() if hasattr(kind, "__dataclass_fields__"):
            hints = _hints(kind)
            if differ := value.keys() ^ hints.keys():
                raise ValueError(f"{name} has missing or unknown fields: {join_first(sorted(differ), separator=', ')}")
            return kind(**{key: _convert(hints[key], item, f"{name}.{key}") for key, item in value.items()})
        case list() if origin in (list, tuple):
            return origin(_convert(arguments[0], item, name) for item in value)
        case list() if kind is Integers:
            return Integers(_convert(int, item, name) for item in value)
        case list() if len(value) == len(getattr(kind, "_fields", ())) > 0:
            return kind(*(_convert(of, item, name) for of, item in zip(_hints(kind).values(), value, strict=True)))
        case str() if kind is Size:
            return Size(value)
        case None | bool() | int() | float() | str():
            choices = arguments if origin in (UnionType, Literal) else (kind,)
            if value in choices or type(value) in choices or (float in choices and type(value) is int):
                return value
    raise ValueError(f"{name} is {shorten(value)}, not of type {getattr(kind, '__name__', kind)}")
