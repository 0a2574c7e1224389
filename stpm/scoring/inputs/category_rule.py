"""How the category of an image is chosen if its table does not name one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from stpm.errors import ConfigError
from stpm.path_pattern import PathPattern


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
        if self.pattern:
            self._compiled  # noqa: B018

    def category(self, path: str) -> str:
        """Return the category of the image at a path, or "" if the pattern does not match."""
        return self._compiled.find(path) if self.pattern else self.fixed

    @cached_property
    def _compiled(self) -> PathPattern:
        return PathPattern(self.pattern, "category", "--category-from")
