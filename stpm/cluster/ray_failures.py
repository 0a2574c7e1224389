"""The failures of Ray, which cut a job off: a lost node, a killed process, a bug in Ray itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import RayError, RayTaskError

from stpm import storage
from stpm.errors import HOW_TO_CONTINUE, RunInterruptedError, last_line

log = logging.getLogger(__name__)


def is_ray_failure(error: Exception) -> bool:
    """Return whether Ray raised this error, or Ray Data, which marks an error of its own code by its cause."""
    return isinstance(error, RayError | ExecutionTimeoutError) or isinstance(error.__cause__, SystemException)


def results_of(tasks: Sequence[Any]) -> list[Any]:
    """Wait for Ray tasks, and return their results.

    What a task raised is raised here itself: the text of Ray's own error is a traceback.
    """
    try:
        results: list[Any] = ray.get(tasks)
    except RayTaskError as error:
        raise error.cause from error
    return results


@contextmanager
def interrupted_by_ray(work: str) -> Iterator[None]:
    """Log a failure of Ray in the block with its traceback, and raise it as one line.

    Args:
        work: what the block does, for the message, such as "scoring".

    Raises:
        RunInterruptedError: if Ray failed. Other errors stay as they are.
    """
    try:
        yield
    except Exception as error:
        if not is_ray_failure(error):
            raise
        if any(os.strerror(each) in str(error) for each in storage.FULL_DISK):
            raise RunInterruptedError(
                f"{work} was interrupted: {last_line(error)}; make room on that disk first, then run the same command "
                "again: finished work is kept"
            ) from error
        log.exception("Ray failed")
        raise RunInterruptedError(f"{work} was interrupted: {last_line(error)}; {HOW_TO_CONTINUE}") from error
