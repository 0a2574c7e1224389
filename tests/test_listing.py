"""Listings, on local disks and against a server of S3."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from moto.s3.models import s3_backends
from s3fs import S3FileSystem

from stpm import storage
from stpm.errors import ConfigError, DataError
from stpm.storage import listing
from tests.cluster.conftest import s3 as s3  # noqa: PLC0414  a fixture
from tests.conftest import record_calls
from tests.test_storage import root as root  # noqa: PLC0414  a fixture

_NAMES = st.lists(st.sampled_from(["a", "b", "a b", "é", ""]), min_size=1, max_size=6).map("/".join)


def names(uris: list[str], under: str) -> list[str]:
    return [uri.removeprefix(f"{under}/") for uri in uris]


def test_listings_name_files_folders_sizes_and_beginnings(root: str) -> None:
    for name in ("z_1/c/3.txt", "a.txt", "z_1/2.txt", "z_2", "z_10", "c/z_3", ".hidden/1", "lost+found/1"):
        storage.publish(f"{root}/{name}", name.encode())
    assert [storage.read(uri).decode() for uri in storage.files(root)] == names(storage.files(root), root)
    assert storage.subfolders(root) == ["c", "z_1"]
    assert storage.file_sizes(f"{root}/z_1") == [(f"{root}/z_1/2.txt", 9), (f"{root}/z_1/c/3.txt", 11)]
    assert storage.glob(f"{root}/z_1*")[0] == [f"{root}/z_10"]
    nothing = f"{root}/nothing"
    assert storage.files(nothing) == list(storage.iter_files(nothing)) == []
    assert storage.files(f"{root}/z_2") == list(storage.iter_files(f"{root}/z_2")) == [f"{root}/z_2"]
    with pytest.raises(DataError, match=r"nothing: no such folder"):
        storage.subfolders(nothing)


def test_a_file_that_is_written_again_has_another_version_in_a_store_only_with_other_bytes(root: str) -> None:
    for name in ("a", "b/c"):
        storage.publish(f"{root}/{name}", b"123")
    before = storage.file_versions(root)
    if root.startswith("s3://"):
        storage.publish(f"{root}/a", b"123")
    assert before == storage.file_versions(root)
    assert [uri for uri, _ in before] == storage.files(root)
    storage.publish(f"{root}/b/c", b"321")
    assert [one == other for one, other in zip(storage.file_versions(root), before, strict=True)] == [True, False]


class Bucket(MemoryFileSystem):
    """Paths and URIs as a cloud's filesystem has them: several schemes, an account in a URI and in no path."""

    protocol = ("bkt", "bkta")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    root_marker = ""

    def __init__(self, account: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.account = account

    def ls(self, path: str, detail: bool = True) -> Any:
        """List without other arguments, such as a prefix."""
        return super().ls(path, detail)

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
    assert storage.glob(f"{root_uri}/2*") == (expected[:1], [])
    assert sorted(storage.iter_files(root_uri)) == expected
    assert storage.glob(f"{root_uri}/**/*.png") == (expected, [])
    assert list(storage.iter_files(expected[0])) == expected[:1]
    assert [storage.read(uri) for uri in expected] == [b"2.png", b"x/1.png"]


def test_files_are_yielded_before_all_folders_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(100):
        storage.publish(f"{tmp_path}/{i:03}/x.png", b"", durable=False)
    listed = record_calls(monkeypatch, os, "scandir")
    found = storage.iter_files(str(tmp_path))
    assert names([next(found), next(found)], str(tmp_path)) == ["000/x.png", "001/x.png"]
    assert len(listed) < 25
    assert names([*found], str(tmp_path)) == [f"{i:03}/x.png" for i in range(2, 100)]
    # The root is a folder as any other.
    file = SimpleNamespace(path="/a.png", is_file=lambda: True)
    monkeypatch.setattr(os, "scandir", lambda folder: nullcontext([file] if folder == "/" else []))
    assert list(storage.iter_files("/")) == storage.glob("/*")[0] == ["/a.png"]


def test_links_to_files_are_listed_and_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"a")
    links = tmp_path / "links"
    links.mkdir()
    # The others lead to no file: to a folder, in a circle, through a file, to nothing, and to a name that is too long.
    targets = ("real/a.png", "real", "links/circle.png", "real/a.png/x", "nowhere", "x" * 300)
    names = ("b.png", "back", "circle.png", "through.png", "lost.png", "long.png")
    for name, target in zip(names, targets, strict=True):
        (links / name).symlink_to(tmp_path / target)
    os.mkfifo(links / "pipe.png")
    good = [f"{links}/b.png"]
    assert list(storage.iter_files(str(links))) == good
    for pattern in ("*.png", "**/*.png", "**"):
        assert storage.glob(f"{links}/{pattern}") == (good, [])
    assert storage.glob(f"{links}/*") == (good, [f"{links}/back"])
    assert storage.glob(f"{links}/*/*") == ([f"{links}/back/a.png"], [])
    assert storage.subfolders(str(links)) == []
    assert storage.subfolders(str(links), links=True) == ["back"]
    # A fit reports the bad ones when it reads them. A link has the version of its target.
    before = storage.file_versions(str(links))
    os.utime(tmp_path / "real" / "a.png", (1, 1))
    assert sum(one != other for one, other in zip(storage.file_versions(str(links)), before, strict=True)) == 1
    assert len(before) == 7
    assert list(storage.iter_files(f"{links}/pipe.png")) == []


def test_a_glob_matches_as_fsspec_does(root: str) -> None:
    for name in ("a/1.png", "a/b/2.png", "ab/3.png", "ab/c/d/4.png", "[x]/5.png", "e.png"):
        storage.publish(f"{root}/{name}", b"")
    fs, path = storage.filesystem(root)
    for pattern in ("*", "a*/*", "*/?.png", "a/**/*.png", "**/*.png", "[[]x]/*", "*/[bc]", "a*/**", "none/*", "a/*/*"):
        found = fs.glob(f"{path}/{pattern}", detail=True)
        expected = {kind: sorted(n for n, e in found.items() if e["type"] == kind) for kind in ("file", "directory")}
        files, folders = storage.glob(f"{root}/{pattern}")
        assert [storage.filesystem(uri)[1] for uri in files] == expected["file"], pattern
        assert [storage.filesystem(uri)[1] for uri in folders] == expected["directory"], pattern
    for pattern in ("s3://buck*/a", f"{root}/a**b"):
        with pytest.raises(ConfigError, match=r"cannot be in the name of a bucket; name it|can only be an entire path"):
            storage.glob(pattern)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/2.png"):
        storage.publish(f"{tmp_path}/{name}", b"")
    original = os.scandir

    def scandir(folder: str) -> Any:
        if str(folder).endswith("/b"):
            raise OSError(errno.EIO, "Input/output error", str(folder))
        return original(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    for pattern, call in (
        ("", storage.files),
        ("", lambda uri: list(storage.iter_files(uri))),
        ("/*/*.png", storage.glob),
        ("/**", storage.glob),
    ):
        with pytest.raises(OSError, match="Input/output error"):
            call(f"{tmp_path}{pattern}")


def test_a_prefix_is_listed_alone_and_an_error_names_what_is_denied(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(self: object, *arguments: object, **more: object) -> None:
        raise PermissionError("Access Denied")

    storage.publish(f"{memory}/a.png", b"")
    monkeypatch.setattr(MemoryFileSystem, "info", deny)
    assert list(storage.iter_files(memory)) == [f"{memory}/a.png"]
    denied = f"{memory}/none.*: cannot be listed: Access Denied; check"
    with pytest.raises(ConfigError, match=denied):
        list(storage.iter_files(f"{memory}/none"))
    monkeypatch.setattr(MemoryFileSystem, "ls", deny)
    for ask in (lambda uri: list(storage.iter_files(uri)), lambda uri: storage.glob(f"{uri}/*")):
        with pytest.raises(ConfigError, match=denied):
            ask(f"{memory}/none")


@pytest.fixture
def requests_of_s3(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Let S3 answer with pages of three entries, as some servers without a date; return the requests for them."""
    asked: list[dict[str, str]] = []
    call = S3FileSystem.call_s3

    def record(self: Any, method: str, *rest: Any, **more: Any) -> Any:
        asked.append(more)
        answer = call(self, method, *rest, **more)
        del answer["ResponseMetadata"]["HTTPHeaders"]["date"]
        return answer

    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    monkeypatch.setattr(S3FileSystem, "call_s3", record)
    # A session of its own for each listing takes most of the time of the test.
    monkeypatch.setattr(listing, "_without_times", lambda fs: fs)
    return asked


def put(folder: str, found: set[str]) -> None:
    """Put empty objects into the server's bucket, without requests."""
    for name in found:
        s3_backends["123456789012"]["aws"].put_object("bucket", f"{folder}/{name}", b"")


_FOLDERS = count()


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(found={"/".join(parts) for parts in product("xyz", repeat=4)})
@given(found=st.sets(_NAMES, min_size=5, max_size=30))
def test_parts_of_a_prefix_have_each_key_once_in_order(requests_of_s3: list[dict[str, str]], found: set[str]) -> None:
    folder = f"parts-{next(_FOLDERS)}"
    keys = {f"{name}.png" for name in found}
    put(folder, keys | {"", "a/"})
    put(f"{folder}-other", {"x.png"})
    listed = list(storage.iter_files(f"s3://bucket/{folder}"))
    assert sorted(listed) == sorted(f"s3://bucket/{folder}/{name}" for name in keys)
    assert listed == list(storage.iter_files(f"s3://bucket/{folder}"))


@pytest.mark.parametrize(("files", "requests"), [(2, 1), (30, 11)])
def test_a_folder_of_one_page_takes_one_request_and_a_large_one_as_many_as_its_pages(
    requests_of_s3: list[dict[str, str]], files: int, requests: int
) -> None:
    put(f"pages-{files}", {f"{number:02}.png" for number in range(files)})
    assert len(list(storage.iter_files(f"s3://bucket/pages-{files}"))) == files
    assert len(requests_of_s3) == requests


def test_a_listing_of_s3_keeps_the_options_of_the_session() -> None:
    fs = fsspec.filesystem("s3", profile="one", skip_instance_cache=True)
    assert listing._without_times(fs).session.get_config_variable("profile") == "one"


def set_age(uri: str, seconds: float) -> None:
    """Let a file have been modified this long ago."""
    then = datetime.fromtimestamp(time.time() - seconds, timezone.utc)
    fs, path = storage.filesystem(uri)
    if uri.startswith("s3://"):
        (backend,) = s3_backends["123456789012"].values()
        backend.buckets["bucket"].keys[path.removeprefix("bucket/")].last_modified = then.replace(tzinfo=None)
    elif uri.startswith("memory://"):
        fs.store[path].modified = fs.store[path].created = then
    else:
        os.utime(uri, (then.timestamp(), then.timestamp()))


@pytest.mark.parametrize("store", ["local", "memory", "s3"])
def test_files_that_may_still_be_being_written_are_left_out(
    store: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store == "s3":
        request.getfixturevalue("s3")
        # The store says what time it is.
        now = time.time()
        monkeypatch.setattr(listing, "time", SimpleNamespace(time=lambda: now + 3600))
    roots = {"local": str(tmp_path), "memory": "memory://root", "s3": f"s3://bucket/{tmp_path.name}"}
    folder = f"{roots[store]}/images"
    ages = {"deep/old.png": 600, "wrong-clock.png": -(10**6), "young.png": 5, "deep/younger.tar": -30}
    for name, seconds in ages.items():
        storage.publish(f"{folder}/{name}", b"x")
        set_age(f"{folder}/{name}", seconds)
    old = [f"{folder}/deep/old.png", f"{folder}/wrong-clock.png"]
    settle = storage.Settle(60)
    assert sorted(storage.iter_files(folder, settle)) == old
    assert sorted(name.rsplit("/", 1)[-1] for name in settle.left) == ["young.png", "younger.tar"]
    assert len(list(storage.iter_files(folder))) == len(ages)
    if store != "s3":
        assert storage.glob(f"{folder}/*.png", storage.Settle(60))[0] == old[1:]
        assert storage.glob(f"{folder}/**", storage.Settle(60))[0] == old
        assert list(storage.iter_files(f"{folder}/young.png", storage.Settle(60))) == []


def test_a_file_that_is_renamed_meanwhile_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.publish(f"{tmp_path}/old.png", b"x")
    set_age(f"{tmp_path}/old.png", 600)
    uploaded, scandir = tmp_path / "young.part", os.scandir
    uploaded.write_bytes(b"x")

    @contextmanager
    def rename_after(folder: str) -> Iterator[list[os.DirEntry[str]]]:
        yield list(scandir(folder))
        uploaded.rename(tmp_path / "young.png")

    monkeypatch.setattr(os, "scandir", rename_after)
    assert list(storage.iter_files(str(tmp_path), storage.Settle(60))) == [f"{tmp_path}/old.png"]
    assert not uploaded.exists()
