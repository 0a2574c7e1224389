import json
import logging
import os
import pty
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from stpm import __version__
from stpm.console import ConsoleHandler, JsonHandler
from stpm.exit_codes import exit_code
from tests.conftest import REPOSITORY

_PROGRAM = """
import logging
from stpm.console import is_terminal, show_progress, start_logging
start_logging("fit", "text")
log = logging.getLogger("stpm.x")
log.info("one")
if is_terminal():
    show_progress("half way")
log.warning("two")
"""


def test_on_a_terminal_a_message_overwrites_the_progress_line_and_a_log_file_has_no_control_characters() -> None:
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", _PROGRAM], stdout=theirs, check=True)
    os.close(theirs)
    rewrite = "\r\x1b[K"
    shown = os.read(ours, 10_000).decode().replace("\r\n", "\n")
    os.close(ours)
    assert shown == f"{rewrite}one\n{rewrite}half way{rewrite}warning: two\n"
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, check=True)
    assert ran.stdout == b"one\nwarning: two\n"


# Clears the screen, in two ways, writes a line of its own, and shows gnp.exe as exe.png.
_EVIL = "\x1b[2J\x9b2J\nerror: all is lost \u202egnp.exe"
_SHOWN = r"\x1b[2J\x9b2J\nerror: all is lost \u202egnp.exe"


def test_no_name_of_a_file_acts_on_the_terminal(tmp_path: Path) -> None:
    table = tmp_path / f"{_EVIL}.csv"
    table.write_text("name\n")
    options = [f"--images={table}", f"--models={tmp_path}", f"--out={tmp_path}/out", "--category=nut"]
    ran = subprocess.run(
        [sys.executable, str(REPOSITORY / "jobs" / "score.py"), *options], capture_output=True, text=True, check=False
    )
    assert ran.stderr == f"error: {tmp_path}/{_SHOWN}.csv: this table has no rows\n"


def test_names_in_every_kind_of_message_are_made_visible() -> None:
    program = f"""
import logging
from stpm.console import log_lines, show_progress, start_logging
name = {_EVIL!r}
start_logging("fit", "text")
log_lines("size  name\\n   1  nut")
log = logging.getLogger("stpm.x")
log.warning("%s is odd", name)
show_progress(name)
try:
    raise ValueError(name)
except ValueError:
    log.exception("caught")
log.critical(name)
raise OSError(name)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    shown, errors = ran.stdout.decode(), ran.stderr.decode()
    progress = f"\r\x1b[K{_SHOWN}"
    assert shown == f"\nsize  name\n   1  nut\n\nwarning: {_SHOWN} is odd\n{progress}error: caught\n"
    # In a traceback a line break of a message is one.
    caught, critical, uncaught = (line for line in errors.splitlines() if r"\x1b[2J" in line)
    first = _SHOWN.partition(r"\n")[0]
    assert (caught, critical, uncaught) == (f"ValueError: {first}", f"error: {_SHOWN}", f"OSError: {first}")
    assert errors.replace("\n", "").isprintable()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_reader_of_the_log_that_ends_causes_no_traceback(log_format: str) -> None:
    program = f"""
import logging, sys
from stpm.console import start_logging
start_logging("fit", {log_format!r})
log = logging.getLogger("stpm.x")
try:
    while True:
        log.info("x" * 1000)
except OSError:
    # Where it may be taken for a failure of storage.
    sys.exit(9)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.wait(60) == 1
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize(("done", "failed", "code"), [(3, 0, 0), (0, 0, 0), (2, 1, 2), (0, 1, 3)])
def test_exit_codes(done: int, failed: int, code: int) -> None:
    assert exit_code(done, failed) == code


def test_a_json_line_has_time_level_run_job_and_category(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("x")
    log.addHandler(JsonHandler("fit"))
    log.info("a\nb\x1b.png")
    log.info("")
    log.warning("fitted", extra={"category": "nut"})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["message"] for line in lines] == ["a\nb\x1b.png", "fitted"]
    assert [line.get("category") for line in lines] == [None, "nut"]
    assert [line["level"] for line in lines] == ["info", "warning"]
    assert {(line["job"], line["run"]) for line in lines} == {("fit", lines[0]["run"])}
    assert datetime.fromisoformat(lines[0]["time"]).tzinfo


def test_any_level_and_any_character_can_be_logged(capsys: pytest.CaptureFixture[str]) -> None:
    for handler in (ConsoleHandler(), JsonHandler("fit")):
        log = logging.Logger("x")
        log.addHandler(handler)
        for level, message in ((25, "a\ud800b"), (35, "odd"), (logging.DEBUG, "small")):
            log.log(level, message)
    *text, first, second, third = capsys.readouterr().out.splitlines()
    assert text == ["a\\ud800b", "warning: odd", "small"]
    assert [json.loads(line)["level"] for line in (first, second, third)] == ["info", "warning", "info"]


def stopped(signal_name: str, *options: str, cleaning: str = "") -> subprocess.CompletedProcess[str]:
    """Run a job that a signal stops; `cleaning` runs while it cleans up."""
    program = f"""
import signal, sys
from stpm.cli import Job, run_job
def stop():
    signal.raise_signal(signal.{signal_name})
try:
    run_job(Job("x", "", {{}}, "__main__:stop", ""), {list(options)})
finally:
    {cleaning}
    print("cleaned up")
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_job_with_its_number_after_cleaning_up(name: str, code: int) -> None:
    text, as_json = stopped(name), stopped(name, "--log", "json")
    assert [(ran.returncode, ran.stderr) for ran in (text, as_json)] == [(code, "")] * 2
    message = f"stopped by {name}: finished work is kept; run the same command again to continue"
    assert text.stdout.splitlines() == [f"x of stpm {__version__} starts", message, "cleaned up"]
    *lines, last = as_json.stdout.splitlines()
    assert (json.loads(lines[-1])["message"], last) == (message, "cleaned up")


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_a_job_at_once(second: str) -> None:
    ran = stopped("SIGINT", cleaning=f"signal.raise_signal(signal.{second})")
    assert (ran.returncode, "cleaned up" in ran.stdout, ran.stderr) == (-signal.Signals[second], False, "")
