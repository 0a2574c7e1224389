from __future__ import annotations

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
from fsspec.implementations.memory import MemoryFileSystem

from stpm import storage
from stpm.errors import ConfigError, DataError, TooLongError, UriError
from stpm.storage.retries import with_retries


def test_a_published_object_reads_back_and_is_replaced(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    storage.publish(uri, b"one")
    storage.publish(uri, b"two")
    assert storage.read(uri) == b"two"
    assert [size for _, size in storage.file_sizes(root)] == [3]


def test_files_lists_uris_at_any_depth_that_can_be_read(root: str) -> None:
    for name in ("b/2.txt", "a.txt", "b/c/3.txt"):
        storage.publish(storage.join(root, name), name.encode())
    assert [storage.read(uri).decode() for uri in storage.files(root)] == ["a.txt", "b/2.txt", "b/c/3.txt"]
    assert storage.files(storage.join(root, "nothing")) == []


def test_files_starting_lists_files_right_under_a_folder_by_the_beginning_of_their_names(root: str) -> None:
    for name in ("b_1/2.txt", "a.txt", "b_2", "b_10", "c/b_3"):
        storage.publish(storage.join(root, name), b"x")
    assert storage.files_starting(f"{root}/", "b_1") == [f"{root}/b_10"]
    assert storage.files_starting(root, "b_2") == [f"{root}/b_2"]
    assert storage.files_starting(storage.join(root, "nothing"), "b") == []


def test_files_starting_needs_no_prefix_argument(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MemoryFileSystem.ls
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda self, path, detail=True: original(self, path, detail))
    storage.publish(f"{memory}/b_1", b"x")
    assert storage.files_starting(memory, "b") == [f"{memory}/b_1"]


def test_children_lists_folders_sorted_without_hidden_ones(root: str) -> None:
    for name in ("z/1", "a/1", ".hidden/1", "file"):
        storage.publish(storage.join(root, name), b"x")
    assert storage.subfolders(root) == ["a", "z"]
    with pytest.raises(DataError, match=r"nothing: no such folder"):
        storage.subfolders(storage.join(root, "nothing"))


def test_a_failed_publish_leaves_the_old_file_alone(tmp_path: Path) -> None:
    uri = str(tmp_path / "x")
    storage.publish(uri, b"old")
    with pytest.raises(TypeError):
        storage.publish(uri, "not bytes")  # type: ignore[arg-type]
    assert storage.read(uri) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_publish_syncs_the_bytes_before_the_name_and_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_file_that_is_written_again_has_another_version(root: str) -> None:
    for name in ("a", "b/c"):
        storage.publish(f"{root}/{name}", b"123")
    before = storage.file_versions(root)
    assert before == storage.file_versions(root)
    assert [uri for uri, _ in before] == storage.files(root)
    storage.publish(f"{root}/b/c", b"321")
    after = storage.file_versions(root)
    assert after[0] == before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_a_published_file_has_the_permissions_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        storage.publish(str(tmp_path / "x"), b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_remove_removes_a_folder_and_ignores_a_missing_one(root: str) -> None:
    storage.publish(storage.join(root, "d", "x"), b"")
    storage.remove(storage.join(root, "d"))
    storage.remove(storage.join(root, "d"))
    assert not storage.exists(storage.join(root, "d", "x"))


def test_a_name_with_two_colons_is_not_a_chain_of_filesystems(tmp_path: Path, memory: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    for root in (str(tmp_path), memory):
        uri = f"{root}/secret::z.png"
        with pytest.raises(FileNotFoundError):
            storage.read(uri)
        storage.publish(uri, b"its own")
        assert storage.read(uri) == b"its own"
    assert list(storage.iter_files(str(tmp_path))) == [f"{tmp_path}/secret", f"{tmp_path}/secret::z.png"]
    assert storage.is_local("a::b.png")
    assert storage.absolute(f"{tmp_path}/memory::b.png") == f"{tmp_path}/memory::b.png"


@pytest.mark.parametrize(
    "uri", ["a\0b.png", "s3://bucket/a\0b.png", "nosuch://a.png", "zip://a.png", "simplecache://a"]
)
def test_the_error_for_an_invalid_uri_says_what_to_do(uri: str) -> None:
    with pytest.raises(UriError, match=r"which no name can have; correct it|use a local path, s3://, gs:// or abfs://"):
        storage.filesystem(uri)


def test_read_at_most_does_not_read_longer_files_pipes_or_folders(tmp_path: Path, flaky: type[Flaky]) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(100 * 2**30)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(TooLongError, match="more than 1,000 bytes"):
        storage.read_at_most(str(tmp_path / "huge.png"), 1000)
    for name in ("pipe.png", ""):
        with pytest.raises(FileNotFoundError):
            storage.read_at_most(f"{tmp_path}/{name}", 1000)
    for uri in (str(tmp_path / "five"), "flaky://five"):
        storage.publish(str(tmp_path / "five"), b"bytes")
        assert storage.read_at_most(uri, 5) == b"bytes"
        with pytest.raises(TooLongError):
            storage.read_at_most(uri, 4)
    assert max(end - start for start, end in flaky.ranges) == 6


def test_reading_an_empty_range_makes_no_request(flaky: type[Flaky]) -> None:
    assert storage.read("flaky://a", 4, 4) == b""
    assert flaky.ranges == []


def test_absolute_changes_local_paths_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == str(tmp_path / "runs" / "x")
    assert storage.absolute(f"file://{tmp_path}/y") == str(tmp_path / "y")
    assert storage.absolute("s3://bucket/prefix/") == "s3://bucket/prefix"


def test_remove_does_not_read_a_name_as_a_pattern(root: str) -> None:
    for name in ("line3/x", "line[3]/x"):
        storage.publish(storage.join(root, name), b"x")
    storage.remove(storage.join(root, "line[3]"))
    assert storage.files(root) == [storage.join(root, "line3", "x")]


def test_output_folder_refuses_files_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("file", "file/run", "file/a/b"):
        with pytest.raises(ConfigError, match=f"{tmp_path}/file is a file"):
            storage.output_folder(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"with one of \*\?\[ in it"):
        storage.output_folder("s3://bucket/line[3]")
    assert storage.output_folder(f"{tmp_path}/not/there/yet[1]") == f"{tmp_path}/not/there/yet[1]"
    assert storage.output_folder("s3://bucket/run/") == "s3://bucket/run"


class Bucket(MemoryFileSystem):
    """Paths and URIs as a cloud's filesystem has them: several schemes, an account in a URI and in no path."""

    protocol = ("bkt", "bkta")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    root_marker = ""

    def __init__(self, account: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.account = account

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        where, _, key = path.partition("://")[2].partition("/") if "://" in path else ("", "", path)
        return MemoryFileSystem._strip_protocol(f"{where.partition('@')[0]}/{key}")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        account = path.partition("://")[2].partition("/")[0].partition("@")[2]
        return {"account": account} if account else {}


@pytest.mark.parametrize("root_uri", ["bkt://c/a b", "bkta://c/a", "bkta://c@account.host/a", "bkta://c"])
def test_listed_uris_keep_the_scheme_and_account_of_the_root(root_uri: str) -> None:
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    Bucket.store.clear()
    for name in ("x/1.png", "2.png"):
        storage.publish(f"{root_uri}/{name}", name.encode())
    expected = [f"{root_uri}/2.png", f"{root_uri}/x/1.png"]
    assert storage.files(root_uri) == expected
    assert storage.files_starting(root_uri, "2") == expected[:1]
    assert sorted(storage.iter_files(root_uri)) == expected
    assert storage.glob(f"{root_uri}/**/*.png") == (expected, [])
    assert list(storage.iter_files(expected[0])) == expected[:1]
    assert [storage.read(uri) for uri in expected] == [b"2.png", b"x/1.png"]


def test_a_damaged_table_is_named(root: str) -> None:
    uri = storage.join(root, "rows.parquet")
    storage.publish(uri, b"PAR1 damaged")
    with pytest.raises(DataError, match=f"{re.escape(uri)} is damaged"):
        storage.read_table(uri)


def test_unfinished_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    storage.publish(str(tmp_path / "kept"), b"x")
    (tmp_path / f".{uuid.uuid4().hex}.part").write_bytes(b"half")
    storage.remove_unfinished(str(tmp_path))
    storage.remove_unfinished(str(tmp_path / "nothing"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


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


def test_a_temporary_error_is_retried(flaky: type[Flaky]) -> None:
    flaky.errors = [OSError("503 Slow Down"), TimeoutError(), aiohttp.ServerDisconnectedError(), ConnectionResetError()]
    assert storage.read("flaky://a") == b"bytes"
    assert flaky.errors == []
    assert storage.read("flaky://a", 1, 3) == b"yt"


@pytest.mark.parametrize("error", [FileNotFoundError("a"), PermissionError("a"), TypeError("a bug")])
def test_a_lasting_error_is_raised_at_once(flaky: type[Flaky], error: Exception) -> None:
    flaky.errors = [error, OSError("never reached")]
    with pytest.raises(type(error)):
        storage.read("flaky://a")
    assert len(flaky.errors) == 1


def test_retries_end_and_a_clients_own_error_becomes_an_oserror(
    flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stpm.storage.retries.MAX_SECONDS", 0.05)
    flaky.errors = [aiohttp.ServerDisconnectedError() for _ in range(1000)]
    with pytest.raises(OSError, match=r"^flaky://a: ServerDisconnectedError: Server disconnected"):
        storage.read("flaky://a")


def test_stream_yields_before_the_listing_is_complete(tmp_path: Path) -> None:
    for i in range(5):
        storage.publish(f"{tmp_path}/deep/{i}/x.png", b"")
    found = storage.iter_files(str(tmp_path))
    assert next(found) == f"{tmp_path}/deep/0/x.png"
    assert len(list(found)) == 4
    assert list(storage.iter_files(str(tmp_path / "nothing"))) == []


def test_stream_lists_few_folders_before_their_names_are_needed(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(100):
        storage.publish(f"{memory}/{i:03}/x.png", b"")
    listed = []
    original = MemoryFileSystem.ls

    def ls(self: MemoryFileSystem, path: str, detail: bool = True) -> Any:
        listed.append(path)
        return original(self, path, detail)

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    found = storage.iter_files(memory)
    assert [next(found), next(found)] == [f"{memory}/000/x.png", f"{memory}/001/x.png"]
    assert len(listed) < 25
    assert list(found) == [f"{memory}/{i:03}/x.png" for i in range(2, 100)]


def test_links_to_files_are_listed_and_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"a")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "links" / "back").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "links" / "lost.png").symlink_to(tmp_path / "nowhere")
    assert list(storage.iter_files(str(tmp_path / "links"))) == [str(tmp_path / "links" / "b.png")]
    assert storage.glob(f"{tmp_path}/links/*.png") == ([str(tmp_path / "links" / "b.png")], [])


def test_a_glob_matches_as_fsspec_does_and_follows_links(root: str, tmp_path: Path) -> None:
    for name in ("a/1.png", "a/b/2.png", "ab/3.png", "ab/c/d/4.png", "[x]/5.png", "e.png"):
        storage.publish(f"{root}/{name}", b"")
    fs, path = storage.filesystem(root)
    for pattern in ("*", "a*/*", "*/?.png", "a/**/*.png", "**/*.png", "[[]x]/*", "*/[bc]", "a*/**", "none/*", "a/*/*"):
        found = fs.glob(f"{path}/{pattern}", detail=True)
        names = {kind: sorted(n for n, e in found.items() if e["type"] == kind) for kind in ("file", "directory")}
        files, folders = storage.glob(f"{root}/{pattern}")
        assert [storage.filesystem(uri)[1] for uri in files] == names["file"], pattern
        assert [storage.filesystem(uri)[1] for uri in folders] == names["directory"], pattern
    (tmp_path / "nas").mkdir()
    (tmp_path / "nas" / "5.png").touch()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "camera").symlink_to(tmp_path / "nas")
    assert storage.glob(f"{tmp_path}/links/*/*.png") == ([f"{tmp_path}/links/camera/5.png"], [])
    assert storage.glob(f"{tmp_path}/links/*") == ([], [f"{tmp_path}/links/camera"])
    assert storage.glob(f"{tmp_path}/links/**") == ([], [])


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/2.png"):
        storage.publish(f"{tmp_path}/{name}", b"")
    original = os.scandir

    def scandir(folder: str) -> Any:
        if str(folder).endswith("/b"):
            raise OSError(errno.EIO, "Input/output error", str(folder))
        return original(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    for call in (storage.files, lambda uri: storage.glob(f"{uri}/*/*.png"), lambda uri: storage.glob(f"{uri}/**")):
        with pytest.raises(OSError, match="Input/output error"):
            call(str(tmp_path))


def test_exists_does_not_take_a_failure_for_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for name, expected in (("file", True), ("none", False), ("file/x", False), ("x" * 300, False)):
        assert storage.exists(f"{tmp_path}/{name}") == expected
    monkeypatch.setattr(Path, "stat", Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
    with pytest.raises(OSError, match="Stale file handle"):
        storage.exists(f"{tmp_path}/file")


def test_objects_that_are_not_removed_are_an_error(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.publish(f"{memory}/run/a", b"x")
    # As S3 answers, if the credentials may not delete.
    monkeypatch.setattr(MemoryFileSystem, "rm", lambda *_, **options: None)
    with pytest.raises(PermissionError, match=r"/run: not all of it could be removed; check that the credentials may"):
        storage.remove(f"{memory}/run")


def test_a_link_has_the_version_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "original").write_bytes(b"123")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "original")
    before = storage.file_versions(str(tmp_path / "set"))
    os.utime(tmp_path / "original", (1, 1))
    assert storage.file_versions(str(tmp_path / "set")) != before


def test_who_may_list_only_under_a_prefix_lists_that_and_an_error_names_what_is_denied(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(self: object, *arguments: object, **more: object) -> None:
        raise PermissionError("Access Denied")

    storage.publish(f"{memory}/a.png", b"")
    monkeypatch.setattr(MemoryFileSystem, "info", deny)
    assert list(storage.iter_files(memory)) == [f"{memory}/a.png"]
    denied = f"{memory}/none: cannot be listed: Access Denied; check"
    with pytest.raises(ConfigError, match=denied):
        list(storage.iter_files(f"{memory}/none"))
    monkeypatch.setattr(MemoryFileSystem, "ls", deny)
    with pytest.raises(ConfigError, match=denied):
        list(storage.iter_files(f"{memory}/none"))


@pytest.mark.parametrize(
    "list_uri",
    [
        storage.exists,
        storage.files,
        storage.file_versions,
        storage.subfolders,
        storage.remove,
        lambda uri: list(storage.iter_files(uri)),
        lambda uri: storage.glob(f"{uri}/*"),
        lambda uri: storage.glob(f"{uri}/**/*.png"),
    ],
)
def test_listings_are_retried_and_raise_an_oserror(
    list_uri: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    class EndpointConnectionError(Exception):
        __module__ = "botocore.exceptions"

    calls: list[object] = []

    def down(self: object, *arguments: object, **more: object) -> None:
        calls.append(arguments)
        raise EndpointConnectionError("Could not connect to the endpoint URL")

    monkeypatch.setattr("stpm.storage.retries.MAX_SECONDS", 0.5)
    for name in ("exists", "find", "ls", "info", "isfile"):
        monkeypatch.setattr(MemoryFileSystem, name, down)
    with pytest.raises(OSError, match=r"memory://bucket/x.*: EndpointConnectionError: Could not connect"):
        list_uri("memory://bucket/x")
    assert len(calls) > 1


def test_an_invalid_bucket_name_is_not_tried_again() -> None:
    class ParamValidationError(Exception):
        __module__ = "botocore.exceptions"

    calls: list[int] = []

    def ask() -> None:
        calls.append(1)
        raise ParamValidationError('Parameter validation failed:\nInvalid bucket name "my bucket"')

    with pytest.raises(OSError, match=r"^s3://my bucket/x: ParamValidationError: Parameter validation failed: In"):
        with_retries("s3://my bucket/x", ask)
    assert len(calls) == 1
