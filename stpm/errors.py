"""The errors a user can meet. Each says what was wrong, with which value, where, and what to do."""

from collections.abc import Sequence

# Some storage answers with whole pages.
_LONGEST_MESSAGE = 1000


class StpmError(Exception):
    """Base of every error that is shown to the user as one line, without a traceback."""


class ConfigError(StpmError):
    """An option, a preset or a combination of them that cannot be run."""


class UriError(ConfigError):
    """A URI that no storage can have: of an unknown scheme, or with a character that no name may hold."""


class DataError(StpmError):
    """A data set, a folder or a mask that is not as its layout demands."""


class TooLongError(DataError):
    """An object that has more bytes than may be read of it."""


class ModelError(StpmError):
    """A model, a teacher or a store that is missing, foreign or damaged."""


class NoModelError(ModelError):
    """A category that has no model."""


class ModelUnreadableError(ModelError):
    """A model that storage did not give: it may be there, and be as it should."""


class UndefinedMetricError(StpmError):
    """A metric that the labels or the scores do not define."""


class CutOffError(StpmError):
    """Work that storage, a node or Ray ended before its time. What was done is kept, and another run goes on."""


class ImageError(StpmError):
    """One image that has no score.

    Args:
        kind: one of `stpm.data.images.ERROR_KINDS`.
        message: why, in words. What a text file or a table could not hold of it is escaped, and a long one is cut.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message[:_LONGEST_MESSAGE].encode(errors="backslashreplace").decode())
        self.kind = kind

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.kind, str(self))


def join_first(items: Sequence[str], limit: int = 5, separator: str = "; ") -> str:
    """Join the first items, and say how many more there are.

    >>> join_first(["a", "b", "c", "d"], limit=2)
    'a; b; and 2 more'
    """
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])
