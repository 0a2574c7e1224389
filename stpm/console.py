"""What a job says to the person who runs it: lines, and an exit code."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]

ALL_DONE = 0
USAGE = 1
SOME_FAILED = 2
NOTHING_DONE = 3


def say(line: str) -> None:
    """A line on standard output, at once."""
    print(line, flush=True)


def exit_code(good: int, failed: int) -> int:
    """The exit code of a job that did so many things and failed at so many."""
    if not failed:
        return ALL_DONE
    return SOME_FAILED if good else NOTHING_DONE
