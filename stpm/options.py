"""Fields of option dataclasses: their help texts, and the list types that they use."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

T = TypeVar("T")


class Integers(tuple[int, ...]):
    """Integers, written `0,1,2` on the command line and as a list in YAML."""

    __slots__ = ()


class Names(tuple[str, ...]):
    """Names, written `a,b` on the command line and as a list in YAML."""

    __slots__ = ()


def option(default: T, text: str) -> T:
    """A dataclass field with its help text; write the unit into the text."""
    field: T = dataclasses.field(default=default, metadata={"help": text})
    return field
