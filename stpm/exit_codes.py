"""The exit codes of the commands."""

from __future__ import annotations

from stpm.errors import DataError, ModelError, RunInterruptedError

ALL_DONE = 0
# An option, or something that the job needs to run, is missing or not valid.
COULD_NOT_RUN = 1
SOME_FAILED = 2
NOTHING_DONE = 3
# The signal's number is added, as shells do for a process that a signal ended.
STOPPED = 128


def exit_code(done: int, failed: int) -> int:
    """Choose the exit code of a job, from the number of things that it did and that failed."""
    if not failed:
        return ALL_DONE
    return SOME_FAILED if done else NOTHING_DONE


def exit_code_for(error: Exception) -> int:
    """Choose the exit code of a job that an error ended."""
    if isinstance(error, RunInterruptedError):
        return SOME_FAILED
    return NOTHING_DONE if isinstance(error, DataError | ModelError) else COULD_NOT_RUN
