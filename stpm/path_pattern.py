"""A pattern that finds a field, such as the category, in the path of an image."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from stpm.errors import ConfigError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PathPattern:
    """A pattern of the last parts of a path, such as `{category}/{date}/{name}`.

    Args:
        field: the name in braces whose text is found.
        option: on the command line, for messages.

    Raises:
        ConfigError: if the pattern does not have the field once, or has other braces than those of names.
    """

    pattern: str
    field: str
    option: str

    def __post_init__(self) -> None:
        names, problem = _FIELD.findall(self.pattern), ""
        if invalid := [name for name in names if not name.isidentifier()]:
            problem = f"{{{invalid[0]}}} is not a name: begin it with a letter"
        elif re.search("[{}]", _FIELD.sub("", self.pattern)):
            problem = "a name in braces has only letters, digits and _"
        elif names.count(self.field) != 1 or len(set(names)) < len(names):
            problem = f"use {{{self.field}}} exactly once, and every other name at most once"
        if problem:
            raise ConfigError(f"{self.option} is {self.pattern!r}; {problem}, as in {{{self.field}}}/{{date}}/{{name}}")

    def find(self, path: str) -> str:
        """Return the field's text in a path, or "" if the pattern does not match."""
        match = self._expression.search(path)
        return match[self.field] if match else ""

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        parts = _FIELD.split(self.pattern.strip("/"))
        # Every second part is the name of a field.
        texts = (f"(?P<{part}>[^/]+)" if number % 2 else re.escape(part) for number, part in enumerate(parts))
        return re.compile(f"(?:^|/){''.join(texts)}$")
