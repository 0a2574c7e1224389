"""Requests to remote storage, which at times answers 500, 503 or nothing: retried, and several at a time."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import tenacity

from stpm.errors import one_line
from stpm.storage.uris import is_local

# Seconds after which a store that does not answer is taken to be down.
MAX_SECONDS = 60.0
MAX_PAUSE_SECONDS = 10.0
# Requests at a time.
THREADS = 16

# Packages that raise exceptions of their own, no OSError, when a connection breaks.
_CLIENTS = ("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3")
# Their exceptions that no retry mends.
_LASTING = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "ParamValidationError",
    "ProfileNotFound",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "TokenRetrievalError",
)

# Failures that callers handle, each in its own words.
_SPECIFIC = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

T = TypeVar("T")
Result = TypeVar("Result")


def with_retries(uri: str, act: Callable[[], T]) -> T:
    """Call a function that asks the storage of a URI; retry a temporary failure, with growing pauses.

    Raises:
        FileNotFoundError: if the object, or its bucket, does not exist.
        OSError: if a failure lasts, also where the cloud's client raises an exception of its own. It names the URI,
            unless it is one of the exceptions that callers handle.
    """
    if is_local(uri):
        return act()
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_temporary),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=MAX_PAUSE_SECONDS),
        stop=tenacity.stop_after_delay(MAX_SECONDS),
        reraise=True,
    )
    try:
        with as_os_errors():
            return retry(act)
    except OSError as error:
        if isinstance(error, _SPECIFIC) or uri in str(error):
            raise
        named = OSError(f"{uri}: {error}")
        named.errno = error.errno
        raise named from error


def in_parallel(function: Callable[[T], Result], items: Iterable[T], threads: int = THREADS) -> list[Result]:
    """Call a function on each item, in threads, and return the results in the order of the items.

    Raises:
        Exception: the first that the function raised, in the order of the items.
    """
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Raise exceptions that clouds' clients define as FileNotFoundError or OSError, in one line."""
    try:
        yield
    except Exception as error:
        if _is_client_error(error):
            kind = FileNotFoundError if _is_missing(error) else OSError
            raise kind(one_line(error)) from error
        raise


def _is_temporary(error: BaseException) -> bool:
    lasts = isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError) or _is_missing(error)
    lasts |= isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ENOSYS)
    lasts |= type(error).__name__ in _LASTING
    return (isinstance(error, OSError) or _is_client_error(error)) and not lasts


def _is_missing(error: BaseException) -> bool:
    # Azure's client raises the second if the container is missing.
    return isinstance(error, FileNotFoundError) or type(error).__name__ == "ResourceNotFoundError"


def _is_client_error(error: BaseException) -> bool:
    return not isinstance(error, OSError) and type(error).__module__.partition(".")[0] in _CLIENTS
