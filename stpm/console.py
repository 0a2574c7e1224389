"""What a job says to the person who runs it: lines, and an exit code."""

from __future__ import annotations

import json
import signal
import sys
import threading
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from types import FrameType
from typing import NoReturn

Say = Callable[[str], None]

ALL_DONE = 0
USAGE = 1
SOME_FAILED = 2
NOTHING_DONE = 3
# And the number of the signal: what shells say of a process that a signal ended.
STOPPED = 128


# Back to the start of the line, and clear it.
_REWRITE = "\r\x1b[K"


class Stopped(KeyboardInterrupt):
    """A signal asked the job to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop_on_signals() -> None:
    """From now on SIGTERM and SIGINT end the job as `Stopped`, and a second one at once."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)


class Line(str):
    """A line about one category."""

    category: str

    def __new__(cls, text: str, category: str) -> Line:
        line = super().__new__(cls, text)
        line.category = category
        return line


class JsonLines:
    """Says each line as a JSON object, for programs that collect logs: time, run, job, category, message.

    Args:
        job: its name.
    """

    def __init__(self, job: str) -> None:
        self._names = {"run": uuid.uuid4().hex[:12], "job": job}

    def __call__(self, line: str) -> None:
        for text in filter(None, line.splitlines()):
            said = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **self._names}
            said |= {"category": line.category} if isinstance(line, Line) else {}
            print(json.dumps(said | {"message": text}, ensure_ascii=False), flush=True)


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
