"""The lease as a protocol: on several stores, with a simulated clock; and with real processes."""

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stpm import lease, storage
from stpm.commands import COMMANDS
from stpm.errors import ConfigError
from stpm.lease import TIMEOUT, Holder, Lease, hold_lease
from stpm.records import to_json
from tests import conftest
from tests.datasets import make_category
from tests.test_storage import root as root  # noqa: PLC0414  a fixture
from tests.test_storage import s3 as s3  # noqa: PLC0414  a fixture

OTHER_MACHINE = Holder(acquisition="a", host="far", machine="another boot", pid=7, start="1", command="stpm score")


class Clock(conftest.Clock):
    """A clock that moves on when somebody sleeps, and then calls each function of `meanwhile`."""

    def __init__(self) -> None:
        self.meanwhile: list[Callable[[], object]] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for act in self.meanwhile:
            act()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_lease(folder: str, clock: Clock, name: str = "b") -> Lease:
    return Lease(folder, dataclasses.replace(OTHER_MACHINE, acquisition=name), clock, clock.sleep)


@pytest.fixture
def first(root: str, clock: Clock) -> Lease:
    """A lease that is held."""
    held = make_lease(root, clock, "a")
    held.acquire(False)
    return held


def test_one_of_many_concurrent_creates_succeeds(root: str) -> None:
    created = storage.in_parallel(lambda i: storage.create(f"{root}/x", b"%d" % i), range(8))
    assert [b"%d" % i for i in range(8) if created[i]] == [storage.read(f"{root}/x")]


def test_a_renewing_holder_is_named_in_the_error(root: str, clock: Clock, first: Lease) -> None:
    clock.meanwhile.append(first.renew)
    with pytest.raises(ConfigError, match=r"is held by process 7 on far, since .*: stpm score\. .* --wait"):
        make_lease(root, clock).acquire(False)
    assert clock.now < TIMEOUT
    assert not first.why_lost()


def test_a_stalled_holder_stops_before_another_takes_over(root: str, clock: Clock, first: Lease) -> None:
    stopped: list[float] = []
    second = make_lease(root, clock)
    clock.meanwhile.append(lambda: stopped.append(clock.now) if first.why_lost() else None)
    second.acquire(False)
    assert stopped[0] < TIMEOUT <= clock.now
    assert "was not renewed for 70 s" in first.why_lost()
    before = storage.files(root), storage.read(f"{root}/.lease/1.json")
    first.renew()
    first.release()
    assert (storage.files(root), storage.read(f"{root}/.lease/1.json")) == before
    second.renew()
    assert not second.why_lost()


def test_one_of_two_watchers_gets_a_dead_holders_lease(root: str, clock: Clock, first: Lease) -> None:
    # Its clock is ahead: it has watched for longer.
    faster = make_lease(root, Clock())

    def meanwhile() -> None:
        if clock.now == TIMEOUT - 10:
            faster.acquire(False)
        elif clock.now > TIMEOUT - 10:
            faster.renew()

    clock.meanwhile.append(meanwhile)
    with pytest.raises(ConfigError, match="is held by"):
        make_lease(root, clock, "c").acquire(False)
    assert not faster.why_lost()


def test_a_holder_that_sees_a_higher_number_or_nothing_stops(root: str, clock: Clock, first: Lease) -> None:
    storage.create(f"{root}/.lease/1.json", to_json(dataclasses.replace(OTHER_MACHINE, host="new")))
    first.renew()
    assert "was taken over by process 7 on new" in first.why_lost()
    other = make_lease(f"{root}/other", clock)
    other.acquire(False)
    storage.remove(f"{root}/other")
    other.renew()
    assert "was removed" in other.why_lost()


def test_a_waiting_run_gets_the_lease_later(
    root: str, clock: Clock, first: Lease, caplog: pytest.LogCaptureFixture
) -> None:
    clock.meanwhile.append(lambda: first.release() if clock.now > 30 else first.renew())
    make_lease(root, clock).acquire(True)
    assert 30 < clock.now < TIMEOUT
    logged = [record.getMessage() for record in caplog.records if record.name == "stpm.lease"]
    assert [line.split("; ")[1] for line in logged] == ["waiting for its end"]
    assert [uri.rsplit("/", 1)[1] for uri in storage.files(root)] == ["1.json"]


@pytest.mark.parametrize("content", [b"", b'{"surprise": 1}'])
def test_an_invalid_lease_file_times_out_like_any_other(tmp_path: Path, clock: Clock, content: bytes) -> None:
    storage.create(f"{tmp_path}/.lease/4.json", content)
    make_lease(str(tmp_path), clock).acquire(False)
    assert clock.now >= TIMEOUT
    assert [path.name for path in (tmp_path / ".lease").iterdir()] == ["5.json"]


def test_a_dead_process_of_this_machine_is_recognised_at_once(tmp_path: Path, clock: Clock) -> None:
    script = f"from stpm.lease import *\nwith hold_lease({str(tmp_path)!r}, False): print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1)
    assert process.stdout
    process.stdout.readline()
    mine, file = Lease(str(tmp_path), Holder.this_process(), clock, clock.sleep), tmp_path / ".lease" / "0.json"
    with pytest.raises(ConfigError, match=f"is held by process {process.pid} on "):
        mine.acquire(False)
    assert clock.now == 0
    process.kill()
    # It is a zombie until its parent waits for it.
    while Holder.parse(file.read_bytes()).is_alive():
        time.sleep(0.01)
    mine.acquire(False)
    assert clock.now == lease._SHUTDOWN
    process.communicate()
    reused = dataclasses.replace(Holder.this_process(), start="1")
    assert [each.is_alive() for each in (reused, Holder.this_process(), OTHER_MACHINE)] == [False, True, None]


def test_held_takes_and_releases_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error does not show what a web URL may hide."""
    monkeypatch.setattr("sys.argv", ["nightly.py", "--webhook", "https://me:secret@hooks.example/T0", "s3://{date}"])
    folder, command = str(tmp_path), r"nightly\.py --webhook https://hooks\.example/\.\.\. 's3://\{date\}'"
    twice = pytest.raises(ConfigError, match=f"is held by process {os.getpid()} on .*: {command}\\. ")
    with hold_lease(folder, False), twice, hold_lease(folder, False):
        pytest.fail("held twice")
    with pytest.raises(KeyError), hold_lease(folder, False):
        raise KeyError
    with hold_lease(folder, False):
        (tmp_path / "file").touch()
    under_a_file = pytest.raises(ConfigError, match=r"file/run: cannot be written to: ")
    with under_a_file, hold_lease(f"{folder}/file/run", False):
        pytest.fail("no folder")
    # The command line says what to do about a full disk, and nothing that is half written is left.
    with pytest.raises(TypeError):
        storage.create(f"{folder}/new", "text")  # type: ignore[arg-type]
    assert not storage.exists(f"{folder}/new")
    monkeypatch.setattr(storage, "create", lambda *_: Path("/dev/full").write_bytes(b"x"))
    with pytest.raises(OSError, match="No space left"), hold_lease(folder, False):
        pytest.fail("no room")


WRITER = """
import sys, time
from stpm import lease, storage
from stpm.commands import COMMANDS
from stpm.cli import run_job

lease._RENEWAL = 0.1
# A slow machine is to notice that another took over before it could time out.
lease.TIMEOUT, lease._MARGIN = (60.0, 30.0) if sys.argv[3] else (4.0, 2.0)

def job(argv):
    folder, ignores_stop, other = argv
    if not other:
        del storage.publish
    with lease.hold_lease(folder, False):
        if other:
            storage.create(f"{folder}/.lease/1.json", other.encode())
        while True:
            try:
                open(f"{folder}/written", "a").write("x")
                time.sleep(0.01)
            except KeyboardInterrupt:
                if ignores_stop == "no":
                    raise

job.name = "writer"
run_job(job, sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("other", "ignores_stop", "message"),
    [
        (to_json(OTHER_MACHINE).decode(), "no", "was taken over by process 7 on far"),
        ("", "yes", "was not renewed for 2 s (AttributeError: "),
    ],
)
def test_a_process_that_lost_its_lease_stops_writing(
    tmp_path: Path, other: str, ignores_stop: str, message: str
) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path), ignores_stop, other]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "this run has stopped: finished work is kept; run the same command again to continue" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert (tmp_path / "written").read_text()
    if other:
        assert (tmp_path / ".lease" / "1.json").read_text() == other
        assert not Holder.parse((tmp_path / ".lease" / "0.json").read_bytes()).released


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("score", "--models m --images {data} --category nut --out {out}"),
        ("benchmark", "--data {data} --out {out}"),
        ("fit", "--data {data} --models {out} --teacher test_resnet --teacher-weights random"),
        ("fit", "--models {out} --add-good {data}/good.csv"),
        ("models", "--models {out} --categories nut --keep 1"),
    ],
)
def test_each_job_that_changes_a_folder_takes_its_lease(tmp_path: Path, name: str, options: str) -> None:
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    make_category(data, "nut")
    (tmp_path / "data" / "good.csv").write_text("uri,category,label\na.png,nut,good\n")
    argv = shlex.split(options.format(data=data, out=out))
    with hold_lease(out, False), pytest.raises(ConfigError, match=f"out is held by process {os.getpid()} on"):
        COMMANDS[name](argv)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lease"]


def test_a_number_of_earlier_leases_is_none(
    root: str, clock: Clock, first: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the slow run has listed the numbers, and before it creates the next one, two other runs take the lease."""
    slow, last = (make_lease(root, clock, name) for name in ("b", "d"))
    first.release()
    create = storage.create

    def paused(uri: str, data: bytes) -> bool:
        monkeypatch.setattr(storage, "create", create)
        between = make_lease(root, clock, "c")
        between.acquire(False)
        between.release()
        last.acquire(False)
        clock.meanwhile.append(last.renew)
        return create(uri, data)

    monkeypatch.setattr(storage, "create", paused)
    with pytest.raises(ConfigError, match="is held by"):
        slow.acquire(False)
    assert not last.why_lost()
