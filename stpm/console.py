"""What a job says to the person who runs it: lines, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

Say = Callable[[str], None]

ALL_DONE = 0
USAGE = 1
SOME_FAILED = 2
NOTHING_DONE = 3


# Back to the start of the line, and clear it.
_REWRITE = "\r\x1b[K"


def say(line: str) -> None:
    """A line on standard output, at once; on a terminal it takes the place of what `show` wrote."""
    print(f"{_REWRITE}{line}" if watched() else line, flush=True)


def show(line: str) -> None:
    """On a terminal, a line that stays at the bottom until the next one."""
    print(f"{_REWRITE}{line}", end="", flush=True)


def watched() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def exit_code(good: int, failed: int) -> int:
    """The exit code of a job that did so many things and failed at so many."""
    if not failed:
        return ALL_DONE
    return SOME_FAILED if good else NOTHING_DONE


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
