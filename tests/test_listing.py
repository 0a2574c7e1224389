"""Listings of S3 in parts, against a plain implementation of its requests; `tests/cluster` has a real server."""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.s3.models import s3_backends
from s3fs import S3FileSystem

from stpm import storage
from stpm.storage import listing
from stpm.storage.uris import uri_of
from tests.cluster.conftest import s3 as s3  # noqa: PLC0414  a fixture

_KEY = st.lists(st.sampled_from(["a", "b", "a b", "é", ""]), min_size=1, max_size=6).map("/".join)


class Bucket:
    """Answers `list_objects_v2` with pages of three entries."""

    def __init__(self, keys: set[str]) -> None:
        self._keys = sorted(keys)
        self.requests = 0

    def call_s3(self, _: str, Prefix: str, Delimiter: str = "", ContinuationToken: str = "", **bucket: str) -> Any:  # noqa: N803
        assert bucket == {"Bucket": "bucket"}
        self.requests += 1
        entries: dict[str, dict[str, str]] = {}
        for key in self._keys:
            if key.startswith(Prefix):
                rest = key.removeprefix(Prefix)
                folder = rest.split("/")[0] + "/"
                is_folder = Delimiter and "/" in rest
                entries.setdefault(Prefix + folder if is_folder else key, {"Prefix" if is_folder else "Key": ""})
        page = sorted(entries)[int(ContinuationToken or 0) :][:3]
        end = int(ContinuationToken or 0) + len(page)
        return {
            "IsTruncated": end < len(entries),
            "NextContinuationToken": str(end),
            "Contents": [{"Key": name} for name in page if "Key" in entries[name]],
            "CommonPrefixes": [{"Prefix": name} for name in page if "Prefix" in entries[name]],
        }


@given(st.sets(_KEY, max_size=40))
def test_parts_of_a_prefix_have_each_key_once_and_in_the_same_order_again(names: set[str]) -> None:
    keys = {f"images/{name}.png" for name in names}
    bucket = Bucket(keys | {"images/", "images/a/", "other/x.png"})
    fs = SimpleNamespace(call_s3=bucket.call_s3)
    found = list(listing._stream_s3(fs, "bucket/images", "s3://bucket/images"))
    assert len(found) == len(keys)
    assert set(found) == {f"bucket/{key}" for key in keys}
    assert found == list(listing._stream_s3(fs, "bucket/images", "s3://bucket/images"))
    # Parts of a key may be empty.
    uris = [uri_of(S3FileSystem, name, "s3://bucket/images") for name in found]
    assert uris == [f"s3://{name}" for name in found]


def test_a_folder_of_one_page_takes_one_request_and_a_large_one_as_many_as_its_pages() -> None:
    for count, requests in ((2, 1), (30, 11)):
        bucket = Bucket({f"images/{number:02}.png" for number in range(count)})
        fs = SimpleNamespace(call_s3=bucket.call_s3)
        assert len(list(listing._stream_s3(fs, "bucket/images", "s3://bucket/images"))) == count
        assert bucket.requests == requests


def make_bad_links(folder: Path) -> None:
    """Make links that lead to no file: in a circle, through a file, to nothing, and to a name that is too long."""
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "through.png").symlink_to("good.png/x")
    (folder / "nowhere.png").symlink_to("missing.png")
    (folder / "long.png").symlink_to("x" * 300)


def test_links_that_lead_to_no_file_spoil_no_listing(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(b"x")
    make_bad_links(tmp_path)
    assert list(listing.iter_files(str(tmp_path))) == listing.files_starting(str(tmp_path), "") == [str(good)]
    # A fit reports the bad ones when it reads them.
    assert len(dict(listing.file_versions(str(tmp_path)))) == 5


def test_a_pipe_is_listed_as_no_file_and_the_root_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert list(listing.iter_files(str(tmp_path / "pipe.png"))) == []
    asked = []
    monkeypatch.setattr(listing, "_list_local", lambda folder, _: asked.append(folder) or ([], ["/a.png"]))
    assert list(listing.iter_files("/")) == ["/a.png"]
    assert asked == ["/"]


def test_a_listing_of_s3_keeps_the_options_of_the_session() -> None:
    fs = fsspec.filesystem("s3", profile="one", skip_instance_cache=True)
    assert listing._without_times(fs).session.get_config_variable("profile") == "one"


def set_age(uri: str, seconds: float) -> None:
    """Let a file have been modified this long ago."""
    then = time.time() - seconds
    fs, path = storage.filesystem(uri)
    if uri.startswith("s3://"):
        (backend,) = s3_backends["123456789012"].values()
        backend.buckets["bucket"].keys[path.removeprefix("bucket/")].last_modified = datetime.fromtimestamp(
            then, timezone.utc
        ).replace(tzinfo=None)
    elif uri.startswith("memory://"):
        fs.store[path].modified = fs.store[path].created = datetime.fromtimestamp(then, timezone.utc)
    else:
        os.utime(uri, (then, then))


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


def test_a_file_that_is_renamed_while_its_folder_is_listed_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish(f"{tmp_path}/old.png", b"x")
    set_age(f"{tmp_path}/old.png", 600)
    uploaded = tmp_path / "young.part"
    uploaded.write_bytes(b"x")
    is_file = listing._is_local_file

    def rename_and_tell(entry: os.DirEntry[str]) -> bool:
        found = is_file(entry)
        if entry.path == str(uploaded):
            uploaded.rename(tmp_path / "young.png")
        return found

    monkeypatch.setattr(listing, "_is_local_file", rename_and_tell)
    assert list(storage.iter_files(str(tmp_path), storage.Settle(60))) == [f"{tmp_path}/old.png"]
    assert not uploaded.exists()
