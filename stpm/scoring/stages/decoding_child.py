"""Decode an image in a child process: an image that crashes the decoder ends the child, and becomes an error.

Ray repeats a task whose process has ended. Without this, a file that crashes the decoder would end one process after
another, and none of the images around it would get a row.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

from stpm.data import decoding
from stpm.errors import ImageError
from stpm.method.preprocessing import Preprocessing
from stpm.records import from_json, to_json

# Other signals come from outside, such as SIGKILL when memory is short.
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}


def timeout_error(step: str, seconds: float) -> ImageError:
    """Return the error of an image whose step, `fetch` or `decode`, took longer than its limit."""
    return ImageError(f"{step}_timeout", f"took more than {seconds:g} s; see --image-seconds")


def check_in_child(data: bytes, preprocessing: Preprocessing, seconds: float) -> None:
    """Decode an image in a child process, and discard the result. Do nothing if no process can be started.

    Args:
        preprocessing: of the image's model.
        seconds: after which the child is killed.

    Raises:
        ImageError: if decoding crashes the child, or takes longer.
    """
    try:
        ran = subprocess.run(  # noqa: S603  no shell, and no other program than this one
            [sys.executable, "-m", __name__, to_json(preprocessing, indent=None).decode()],
            input=data,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise timeout_error("decode", seconds) from error
    except OSError:
        return
    if -ran.returncode in _CRASHES:
        name = signal.Signals(-ran.returncode).name
        raise ImageError("unforeseen", f"decoding it crashes the process with {name}; repair or remove the file")


if __name__ == "__main__":
    with suppress(ImageError):
        decoding.decode(sys.stdin.buffer.read(), from_json(Preprocessing, sys.argv[1].encode()))
