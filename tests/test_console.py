from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from stpm.console import exit_code

_PROGRAM = "from stpm.console import say, show, watched; say('one'); watched() and show('half way'); say('two')"


def test_on_a_terminal_the_line_at_the_bottom_is_replaced() -> None:
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", _PROGRAM], stdout=theirs, check=True)
    os.close(theirs)
    rewrite = "\r\x1b[K"
    said = os.read(ours, 10_000).decode().replace("\r\n", "\n")
    os.close(ours)
    assert said == f"{rewrite}one\n{rewrite}half way{rewrite}two\n"


def test_in_a_log_there_is_no_control_character() -> None:
    assert subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, check=True).stdout == b"one\ntwo\n"


@pytest.mark.parametrize(("good", "failed", "code"), [(3, 0, 0), (0, 0, 0), (2, 1, 2), (0, 1, 3)])
def test_exit_codes(good: int, failed: int, code: int) -> None:
    assert exit_code(good, failed) == code
