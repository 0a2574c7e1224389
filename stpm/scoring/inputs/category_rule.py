"""How the category of an image is chosen if its table does not name one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from stpm.errors import ConfigError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class CategoryRule:
    """The category of every image, or a pattern that finds it in the image's path.

    Args:
        fixed: category of every image, or "".
        pattern: of the last parts of the path, such as `{category}/{date}/{name}`, or "".

    Raises:
        ConfigError: if the pattern names no category or has other braces than those of names, or both are given.
    """

    fixed: str = ""
    pattern: str = ""

    def __post_init__(self) -> None:
        if self.fixed and self.pattern:
            raise ConfigError("--category and --category-from are both given; give one")
        names, problem = _FIELD.findall(self.pattern), ""
        if invalid := [name for name in names if not name.isidentifier()]:
            problem = f"{{{invalid[0]}}} is not a name: begin it with a letter"
        elif re.search("[{}]", _FIELD.sub("", self.pattern)):
            problem = "a name in braces has only letters, digits and _"
        elif self.pattern and (names.count("category") != 1 or len(set(names)) < len(names)):
            problem = "use {category} exactly once, and every other name at most once"
        if problem:
            raise ConfigError(f"--category-from is {self.pattern!r}; {problem}, as in {{category}}/{{date}}/{{name}}")

    def category(self, path: str) -> str:
        """Return the category of the image at a path, or "" if the pattern does not match."""
        if not self.pattern:
            return self.fixed
        match = self._expression.search(path)
        return match["category"] if match else ""

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        parts = _FIELD.split(self.pattern.strip("/"))
        # Every second part is the name of a field.
        texts = (f"(?P<{part}>[^/]+)" if number % 2 else re.escape(part) for number, part in enumerate(parts))
        return re.compile(f"(?:^|/){''.join(texts)}$")
