"""The failures of Ray, which cut a job off: a lost node, a killed process, a bug in Ray itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from stpm import storage
from stpm.console import stop_signal
from stpm.errors import HOW_TO_CONTINUE, RunInterruptedError, last_line

log = logging.getLogger(__name__)


def is_ray_failure(error: Exception) -> bool:
    """Return whether Ray raised this error, or Ray Data, which marks an error of its own code by its cause."""
    # Where no pipeline runs, Ray Data need not be imported, which takes a second of every process.
    from ray.data.exceptions import ExecutionTimeoutError, SystemException

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


def how_to_continue(error: Exception, message: str) -> str:
    """Say what to do about a failure of Ray; log it with its traceback, unless a disk is full.

    Raises:
        KeyboardInterrupt: if a signal asked the job to end: it may have ended Ray's processes, too.
    """
    if stop_signal():
        raise KeyboardInterrupt from error
    if any(os.strerror(each) in str(error) for each in storage.FULL_DISK):
        return f"make room on that disk; {HOW_TO_CONTINUE}"
    log.exception(message)
    return HOW_TO_CONTINUE


@contextmanager
def interrupted_by_ray(work: str) -> Iterator[None]:
    """Raise a failure of Ray in the block as one line, see `how_to_continue`.

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
        remedy = how_to_continue(error, "Ray failed")
        raise RunInterruptedError(f"{work} was interrupted: {last_line(error)}; {remedy}") from error
