"""A job's console: its log on standard output, a progress line, and signals."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
import uuid
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, NoReturn

from stpm.exit_codes import COULD_NOT_RUN

LogFormat = Literal["text", "json"]

log = logging.getLogger(__name__)

# Terminal codes: return to the start of the line, and clear it.
_REWRITE = "\r\x1b[K"


# Signals that asked the job to end. The exception cannot say: Ray replaces the handler's by one of its own.
_stop_signals: list[signal.Signals] = []


def stop_on_signals() -> None:
    """Raise KeyboardInterrupt in the main thread on SIGTERM and SIGINT, see `stop_signal`.

    A second signal of either ends the process at once.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        _stop_signals.append(signal.Signals(number))
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, stop)


def stop_signal() -> signal.Signals | None:
    """Return the signal that asked the job to end, if there was one."""
    return _stop_signals[-1] if _stop_signals else None


def start_logging(job: str, log_format: LogFormat) -> None:
    """Send the package's log to standard output.

    With `json` each line is an object with time, level, run, job, message, and the category that the message is about
    (`extra={"category": name}`).
    """
    package = logging.getLogger("stpm")
    package.setLevel(logging.INFO)
    package.handlers = [ConsoleHandler() if log_format == "text" else JsonHandler(job)]
    sys.excepthook = print_traceback


def _word(level: int) -> str:
    """Return the user's word for a level. A critical message is an error that ends the job."""
    if level >= logging.ERROR:
        return "error"
    return "warning" if level >= logging.WARNING else "info"


def visible(text: str) -> str:
    r"""Write each character that would act on a terminal, or that nobody sees, as in Python's literals.

    Names of files may hold any: codes that rewrite what is on the screen, line breaks, marks that reverse text.

    >>> print(visible("Größe \x1b[2J\u202e.png"))
    Größe \x1b[2J\u202e.png
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error with its traceback on standard error, a hook of Python for errors that nothing caught."""
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        print(visible(line), file=sys.stderr)


def log_lines(text: str) -> None:
    """Log a text of several lines, such as a table. In one message a line break would be shown as `\\n`."""
    for line in ("", *text.splitlines(), ""):
        log.info(line)


class ConsoleHandler(logging.Handler):
    """Print each message, warnings and errors with that word before them; on a terminal overwrite the progress line.

    Tracebacks go to standard error, and so does a critical message: an error that ends the job.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.print_message(record)
        except BrokenPipeError:
            # The program that reads the log has ended: end as well, and say nothing more.
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  it stays open to the end of the process
            raise SystemExit(COULD_NOT_RUN) from None
        if record.exc_info and record.exc_info[0]:
            print_traceback(*record.exc_info)

    def print_message(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.CRITICAL else sys.stdout
        word = _word(record.levelno)
        line = f"{'' if word == 'info' else f'{word}: '}{record.getMessage()}"
        print(f"{_REWRITE if stream.isatty() else ''}{visible(line)}", file=stream, flush=True)


class JsonHandler(ConsoleHandler):
    """Print each message but empty ones as a JSON object on standard output, for programs that collect logs."""

    def __init__(self, job: str) -> None:
        super().__init__()
        self.addFilter(lambda record: bool(record.getMessage()))
        self._names = {"run": uuid.uuid4().hex[:12], "job": job}

    def print_message(self, record: logging.LogRecord) -> None:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        category = {"category": record.category} if hasattr(record, "category") else {}
        fields = {"time": time, "level": _word(record.levelno), **self._names, **category}
        print(json.dumps(fields | {"message": record.getMessage()}), flush=True)


def show_progress(line: str) -> None:
    """Show a line at the bottom of the terminal until the next message or progress line."""
    print(f"{_REWRITE}{visible(line)}", end="", flush=True)


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout.isatty()
