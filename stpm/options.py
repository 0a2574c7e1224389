"""Fields of option dataclasses: their help texts, and the types of their values."""

from __future__ import annotations

import dataclasses
import re
from typing import TypeVar

T = TypeVar("T")

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")
_AUTO = "auto"


class Integers(tuple[int, ...]):
    """Integers, written `0,1,2` on the command line and as a list in YAML."""

    __slots__ = ()


class Names(tuple[str, ...]):
    """Names, written `a,b` on the command line and as a list in YAML."""

    __slots__ = ()


class Size(str):
    """Height and width in pixels, written `640x256`, or `256` for a square; or `auto`: yet to be chosen.

    Raises:
        ValueError: if it is written otherwise.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Size:
        if text == _AUTO:
            return super().__new__(cls, text)
        match = _SIZE.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a size; give HEIGHTxWIDTH, one number for a square, or auto")
        height, width = int(match[1]), int(match[2] or match[1])
        return super().__new__(cls, f"{height}x{width}")

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width; None for `auto`."""
        if self == _AUTO:
            return None
        height, width = self.split("x")
        return int(height), int(width)


def option(default: T, text: str) -> T:
    """A dataclass field with its help text; write the unit into the text."""
    field: T = dataclasses.field(default=default, metadata={"help": text})
    return field
