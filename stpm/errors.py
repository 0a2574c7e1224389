"""The errors a user can meet. Each says what was wrong, with which value, where, and what to do."""


class StpmError(Exception):
    """Base of every error that is shown to the user as one line, without a traceback."""


class ConfigError(StpmError):
    """An option, a preset or a combination of them that cannot be run."""


class DataError(StpmError):
    """A data set, a folder or a mask that is not as its layout demands."""


class ModelError(StpmError):
    """A model, a teacher or a store that is missing, foreign or damaged."""


class UndefinedMetricError(StpmError):
    """A metric that the labels or the scores do not define."""


class CutOffError(StpmError):
    """Work that storage, a node or Ray ended before its time. What was done is kept, and another run goes on."""


class ImageError(StpmError):
    """One image that cannot be read.

    Args:
        kind: one of `stpm.images.ERROR_KINDS`.
        message: what was wrong with it, in words.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.kind, str(self))
