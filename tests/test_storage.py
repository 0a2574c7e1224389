"""One object, tables and URIs, on local disks and against a server of S3; `tests/test_listing.py` has the listings."""

import errno
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import aiohttp
import fsspec
import pytest
import tenacity
from fsspec.implementations.memory import MemoryFileSystem

from stpm import storage
from stpm.errors import ConfigError, DataError, TooLongError, UriError
from tests.cluster.conftest import s3 as s3  # noqa: PLC0414  a fixture


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URI of an empty folder, on a local disk or in S3."""
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3")
    return f"s3://bucket/{tmp_path.name}"


def test_an_object_is_published_replaced_read_and_removed(root: str) -> None:
    uri, other = f"{root}/line[3]/b.bin", f"{root}/line3/b.bin"
    assert not storage.exists(uri)
    for data in (b"one", b"two", b""):
        storage.publish(uri, data)
        with storage.writing(other) as file:
            file.writelines([data[:1], data[1:]])
        assert storage.read(uri) == storage.read_at_most(uri, 3) == storage.read(other) == data
    storage.publish(other, b"12345")
    with pytest.raises((TypeError, AttributeError, OSError)):
        storage.publish(other, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError), storage.writing(other) as file:
        file.writelines([b"678", 9])  # type: ignore[list-item]
    assert storage.files(root) == sorted([other, uri])
    assert storage.read(other, 1, 3) == b"23"
    assert storage.read(other, 4, 4) == b""
    assert storage.read_at_most(other, 5) == b"12345"
    with pytest.raises(TooLongError, match="more than 4 bytes"):
        storage.read_at_most(other, 4)
    with pytest.raises(DataError, match=f"{re.escape(other)} is damaged"):
        storage.read_table(other)
    assert storage.exists(uri)
    # The name is no pattern, and removing what is not there is no error.
    for _ in range(2):
        storage.remove(f"{root}/line[3]")
        assert storage.files(root) == [other]
    storage.remove(other)
    assert not storage.exists(f"{root}/line3/b.bin")


def test_publish_syncs_the_bytes_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    sync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        sync(handle)

    def replaced(path: Path, target: Path) -> Path:
        done.append(("rename", path.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    storage.publish(str(tmp_path / "x"), b"new")
    (temporary,) = [name for what, name in done if what == "rename"]
    assert done == [("sync", temporary), ("rename", temporary), ("sync", tmp_path.name)]
    done.clear()
    storage.publish(str(tmp_path / "y"), b"new", durable=False)
    assert [what for what, _ in done] == ["rename"]


def test_a_published_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)):
            os.umask(umask)
            storage.publish(str(tmp_path / "x"), b"x")
            assert (tmp_path / "x").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_unfinished_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    storage.publish(str(tmp_path / "kept"), b"x")
    (tmp_path / "deeper").mkdir()
    for name in (f".{uuid.uuid4().hex}.part", "kept.part", f"deeper/.{uuid.uuid4().hex}.part"):
        (tmp_path / name).write_bytes(b"half")
    for folder in (tmp_path, tmp_path / "nothing"):
        storage.remove_unfinished(str(folder))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deeper", "kept", "kept.part"]


def test_a_disk_is_asked_first_and_its_failure_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(100 * 2**30)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TooLongError, match="more than 1,000 bytes"):
        storage.read_at_most(f"{tmp_path}/huge", 1000)
    for name in ("pipe", ""):
        with pytest.raises(FileNotFoundError):
            storage.read_at_most(f"{tmp_path}/{name}", 1000)
    for name, expected in (("huge", True), ("none", False), ("huge/x", False), ("x" * 300, False)):
        assert storage.exists(f"{tmp_path}/{name}") == expected
    monkeypatch.setattr(Path, "stat", Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
    with pytest.raises(OSError, match="Stale file handle"):
        storage.exists(f"{tmp_path}/huge")


def test_objects_that_are_not_removed_are_an_error(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.publish(f"{memory}/run/a", b"x")
    # As S3 answers, if the credentials may not delete.
    monkeypatch.setattr(MemoryFileSystem, "rm", lambda *_, **options: None)
    with pytest.raises(PermissionError, match=r"/run: not all of it could be removed; check that the credentials may"):
        storage.remove(f"{memory}/run")


def test_a_name_with_two_colons_is_not_a_chain_of_filesystems(root: str) -> None:
    storage.publish(f"{root}/secret", b"secret")
    uri = f"{root}/secret::z.png"
    with pytest.raises(FileNotFoundError):
        storage.read(uri)
    storage.publish(uri, b"its own")
    assert storage.read(uri) == b"its own"
    assert list(storage.iter_files(root)) == [f"{root}/secret", uri]
    assert storage.is_local("a::b.png")
    assert storage.absolute(f"{root}/memory::b.png") == f"{root}/memory::b.png"


@pytest.mark.parametrize(
    "uri", ["a\0b.png", "s3://bucket/a\0b.png", "nosuch://a.png", "zip://a.png", "simplecache://a"]
)
def test_the_error_for_an_invalid_uri_says_what_to_do(uri: str) -> None:
    with pytest.raises(UriError, match=r"which no name can have; correct it|use a local path, s3://, gs:// or abfs://"):
        storage.filesystem(uri)


def test_output_folder_refuses_files_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("file", "file/run", "file/a/b"):
        with pytest.raises(ConfigError, match=f"{tmp_path}/file is a file"):
            storage.output_folder(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"with one of \*\?\[ in it"):
        storage.output_folder("s3://bucket/line[3]")
    monkeypatch.chdir(tmp_path)
    # `..` is what stands above the folder that a link leads to.
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    assert storage.absolute("link/../x") == f"{tmp_path}/far/x"
    for make in (storage.output_folder, storage.absolute):
        for uri, expected in (("not/yet[1]", f"{tmp_path}/not/yet[1]"), (f"file://{tmp_path}/y", f"{tmp_path}/y")):
            assert make(uri) == expected
        assert make("s3://bucket/run/") == "s3://bucket/run"


class Flaky(MemoryFileSystem):
    """A filesystem that raises these errors first, and records the ranges that are read."""

    protocol = "flaky"
    errors: ClassVar[list[Exception]] = []
    ranges: ClassVar[list[tuple[int, int]]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.ranges.append((start or 0, 10**9 if end is None else end))
        if self.errors:
            raise self.errors.pop(0)
        return b"bytes"[start:end]


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr("stpm.storage.retries.MAX_PAUSE_SECONDS", 0.01)
    Flaky.errors, Flaky.ranges = [], []
    return Flaky


def client_error(name: str, message: str) -> Exception:
    """Make an exception as a cloud's client defines it: no OSError."""
    return type(name, (Exception,), {"__module__": "botocore.exceptions"})(message)  # type: ignore[no-any-return]


def test_a_temporary_error_is_retried(flaky: type[Flaky]) -> None:
    flaky.errors = [OSError("503 Slow Down"), TimeoutError(), aiohttp.ServerDisconnectedError(), ConnectionResetError()]
    assert storage.read("flaky://a") == b"bytes"
    assert flaky.errors == []
    flaky.ranges.clear()
    assert storage.read("flaky://a", 4, 4) == b""
    assert storage.read_at_most("flaky://a", 5) == b"bytes"
    # As an HTTP range, an empty one would mean the whole object; and of a long object little is read.
    assert flaky.ranges == [(0, 6)]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (FileNotFoundError("a"), FileNotFoundError, "^a$"),
        (PermissionError("a"), PermissionError, "^a$"),
        (TypeError("a bug"), TypeError, "^a bug$"),
        (client_error("ParamValidationError", 'No:\n "a"'), OSError, '^flaky://a: ParamValidationError: No: "a"$'),
    ],
)
def test_a_lasting_error_is_raised_at_once(flaky: type[Flaky], error: Exception, kind: type, message: str) -> None:
    flaky.errors = [error, OSError("never reached")]
    with pytest.raises(kind, match=message):
        storage.read("flaky://a")
    assert len(flaky.errors) == 1


@pytest.mark.parametrize(
    "ask",
    [
        storage.read,
        storage.exists,
        storage.files,
        storage.subfolders,
        storage.remove,
        lambda uri: list(storage.iter_files(uri)),
        lambda uri: storage.glob(f"{uri}/*"),
        lambda uri: storage.glob(f"{uri}/**/*.png"),
    ],
)
def test_retries_end_and_a_clients_own_error_becomes_an_oserror(
    ask: Callable[[str], object], flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    down = Mock(side_effect=client_error("EndpointConnectionError", "Could not connect to the endpoint URL"))
    # However slow the machine is, there is time for a second try.
    after_delay, second = tenacity.stop_after_delay, tenacity.stop_after_attempt(2)
    monkeypatch.setattr(tenacity, "stop_after_delay", lambda seconds: tenacity.stop_all(after_delay(seconds), second))
    monkeypatch.setattr("stpm.storage.retries.MAX_SECONDS", 0.0)
    for name in ("cat_file", "exists", "find", "ls", "info", "isfile"):
        monkeypatch.setattr(Flaky, name, down)
    with pytest.raises(OSError, match=r"^flaky://x.*: EndpointConnectionError: Could not connect"):
        ask("flaky://x")
    assert down.call_count > 1
