"""How the category of an image is chosen if its table does not name one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from stpm.errors import ConfigError

_FIELD = re.compile(r"\{(\w+)\}")
_EXAMPLE = "as in {category}/{date}/{name}"


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
        names = _FIELD.findall(self.pattern)
        if invalid := [name for name in names if not name.isidentifier()]:
            raise ConfigError(
                f"--category-from is {self.pattern!r}; {{{invalid[0]}}} is not a name: begin it with a letter, "
                f"{_EXAMPLE}"
            )
        if re.search("[{}]", _FIELD.sub("", self.pattern)):
            raise ConfigError(
                f"--category-from is {self.pattern!r}; a name in braces has only letters, digits and _, {_EXAMPLE}"
            )
        if self.pattern and (names.count("category") != 1 or len(set(names)) < len(names)):
            raise ConfigError(
                f"--category-from is {self.pattern!r}; use {{category}} exactly once, and every other name at most "
                f"once, {_EXAMPLE}"
            )

    def category(self, path: str) -> str:
        """Return the category of the image at a path, or "" if the pattern does not match."""
        if not self.pattern:
            return self.fixed
        match = self._expression.search(path)
        return match["category"] if match else ""

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        parts = _FIELD.split(self.pattern.strip("/"))
        literal, names = parts[::2], parts[1::2]
        text = re.escape(literal[0])
        for name, after in zip(names, literal[1:], strict=True):
            text += f"(?P<{name}>[^/]+)" + re.escape(after)
        return re.compile(f"(?:^|/){text}$")
