"""Which category an image has: from the command line, or from its path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from stpm.errors import ConfigError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Categories:
    """Which category an image has, where its manifest does not say.

    Args:
        everywhere: the one of every image, or "".
        pattern: over the last parts of the path, such as `{category}/{date}/{name}`, or "".

    Raises:
        ConfigError: if the pattern names no category, or both are given.
    """

    everywhere: str = ""
    pattern: str = ""

    def __post_init__(self) -> None:
        if self.everywhere and self.pattern:
            raise ConfigError("--category and --category-from are both given; give one")
        names = _FIELD.findall(self.pattern)
        if unfit := [name for name in names if not name.isidentifier()]:
            raise ConfigError(
                f"category-from is {self.pattern!r}; {{{unfit[0]}}} is no name, which begins with a letter, as in "
                "{category}/{date}/{name}"
            )
        if self.pattern and (names.count("category") != 1 or len(set(names)) < len(names)):
            raise ConfigError(
                f"category-from is {self.pattern!r}; name {{category}} once, and no name twice, as in "
                "{category}/{date}/{name}"
            )

    def of(self, uri: str) -> str:
        """The category of an image, or "" if the pattern does not match its path."""
        if not self.pattern:
            return self.everywhere
        found = self._expression.search(uri)
        return found["category"] if found else ""

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        parts = _FIELD.split(self.pattern.strip("/"))
        literal, names = parts[::2], parts[1::2]
        text = re.escape(literal[0])
        for name, after in zip(names, literal[1:], strict=True):
            text += f"(?P<{name}>[^/]+)" + re.escape(after)
        return re.compile(f"(?:^|/){text}$")
