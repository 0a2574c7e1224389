"""The errors that a user can meet. Each message says what is wrong, with which value, where, and what to do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# The kinds of an `ImageError`. An image itself causes final ones. Storage, a model or a device causes the others: the
# next run tries the image again.
FINAL_ERRORS = (
    "not_allowed",
    "bad_name",
    "missing",
    "empty",
    "not_an_image",
    "damaged",
    "too_large",
    "decode_timeout",
    "unsupported",
    "other_size",
    "unforeseen",
    "no_model",
)
RETRIED_ERRORS = (
    "unreadable",
    "fetch_timeout",
    "out_of_memory",
    "model_unreadable",
    "model_damaged",
    "forward_failed",
)
# If many images in a row have these errors, something else is broken: unmounted storage looks like missing files.
EXTERNAL_ERRORS = frozenset((*RETRIED_ERRORS, "missing"))

# How a message ends about work that the next run continues.
HOW_TO_CONTINUE = "finished work is kept; run the same command again to continue"

# In characters. Some storage answers with whole pages.
_MAX_MESSAGE = 1000


class StpmError(Exception):
    """Base class of every error that is shown as one line, without a traceback."""


class ConfigError(StpmError):
    """An option, or a combination of options, is not valid."""


class OtherRunError(ConfigError):
    """A folder holds a run other than the one asked for, or a file that no run wrote. `with_remedy` says what to do."""


class UriError(ConfigError):
    """A URI has an unknown scheme, or a character that no name can hold."""


class DataError(StpmError):
    """A data set, a folder or a mask does not have the required layout."""


class RunDamagedError(DataError):
    """Files of a run are missing or damaged; the run must start over. `with_remedy` says how."""


class NoImagesError(DataError):
    """A source has no image."""


class TooLongError(DataError):
    """An object has more bytes than the limit for reading it."""


class ModelError(StpmError):
    """A model, a teacher or a model store is missing, damaged, or not of this package."""


class ModelDamagedError(ModelError):
    """A model or its record is missing, damaged, or of another version: it must be fitted again."""


class NoModelError(ModelDamagedError):
    """A category has no model."""


class ModelUnreadableError(ModelError):
    """Storage failed while a model was read: the model may exist, and be intact."""


class DivergedError(StpmError):
    """The loss is NaN or infinite."""


class UndefinedMetricError(StpmError):
    """A metric is undefined for these labels or scores."""


class WebhookError(StpmError):
    """A webhook did not accept a message."""


class RunInterruptedError(StpmError):
    """Storage, a node or Ray interrupted the work. What was done is kept, and the next run continues."""


class DeviceError(RunInterruptedError):
    """Torch cannot use the GPU that Ray assigned to a process."""


class ImageError(StpmError):
    """An image cannot be scored.

    Args:
        kind: one of FINAL_ERRORS or RETRIED_ERRORS.
        message: the reason. Characters that UTF-8 cannot hold are escaped, and a long message is cut.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message[:_MAX_MESSAGE].encode(errors="backslashreplace").decode())
        self.kind = kind

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.kind, str(self))


@contextmanager
def with_remedy(remedy: str) -> Iterator[None]:
    """Add to a RunDamagedError or an OtherRunError how to start the run over, which only the job knows."""
    try:
        yield
    except RunDamagedError as error:
        raise RunDamagedError(f"{error}; restore the files, or {remedy}") from error
    except OtherRunError as error:
        raise OtherRunError(f"{error}; {remedy}") from error


def one_line(error: Exception) -> str:
    """Return an error's type and message in one line; CUDA's messages have several.

    >>> one_line(RuntimeError("CUDA error: out of memory\\nCompile with ..."))
    'RuntimeError: CUDA error: out of memory Compile with ...'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def last_line(error: Exception) -> str:
    """Return the last line of an error's message, or its type if it has no message.

    Ray's message about an error in a task is a traceback, which ends with the error's own line.

    >>> last_line(ValueError("Traceback\\n  line 1\\nOSError: no such file\\n"))
    'OSError: no such file'

    Around an error of a stage, Ray Data puts one of its own, which advises to change Ray's options.

    >>> last_line(ValueError("OSError: no such file\\n\\nThe above exception was\\nUserCodeException\\nTo change"))
    'OSError: no such file'
    """
    text = str(error)
    if "UserCodeException" in text:
        text = text.rpartition("\n\nThe above exception was")[0] or text
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[-1]


def join_first(items: Sequence[str], limit: int = 5, separator: str = "; ") -> str:
    """Join the first items, and add the number of the others.

    >>> join_first(["a", "b", "c", "d"], limit=2)
    'a; b; and 2 more'
    """
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])
