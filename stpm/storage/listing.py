"""Listings: the files and folders under a URI, or those that match a pattern."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from stpm.errors import ConfigError, DataError
from stpm.storage.retries import THREADS, with_retries
from stpm.storage.uris import filesystem, is_local, uri_of

T = TypeVar("T")

# At the top of a disk; only the system may enter it.
_SYSTEM_FOLDER = ("folder", "lost+found")
# Times that a prefix is divided.
_PREFIX_LEVELS = 4
_ANY_DEPTH = "**"
_MAGIC = re.compile(r"[*?\[]")
# Values of a listing that are the time of modification; "created" is that of the bytes in stores that replace files.
_TIME_KEYS = ("mtime", "last_modified", "LastModified", "updated", "created")
# Values of a listing that change with a file's bytes. The checksum is first: it stays if the same bytes are written.
_VERSION_KEYS = ("md5Hash", "ETag", "etag", "mtime", "last_modified", "LastModified", "created")


class _Entry(NamedTuple):
    """A file or folder in a listing: its path on the filesystem, and what a store says about it; a disk says nothing.

    A link to a file is a file, and "link" is one to a folder; "other" is a pipe, a device or a link to nothing.
    """

    path: str
    kind: Literal["file", "folder", "link", "other"]
    info: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]


# A part of a listing, and when it was made in seconds since 1970: by the store's clock, if it says.
_Page = tuple[list[_Entry], float]


@dataclass(frozen=True)
class Settle:
    """Leaves files out of a listing that may still be being written: those that were modified in the last seconds.

    S3 says what time it is there. Elsewhere the clock of this process is compared with that of the disk or store: they
    should differ by less than `seconds`. A time that is further in the future is taken for a wrong clock, and the file
    is listed.

    Args:
        seconds: that a file must have been left alone for; 0: list all.
        left: URIs or paths of the files that were left out so far.
    """

    seconds: float = 0.0
    left: list[str] = field(default_factory=list)

    def keeps(self, entry: _Entry, now: float) -> bool:
        """Return whether to list a file, at this time in seconds since 1970."""
        try:
            if not self.seconds or abs(now - _modified(entry)) >= self.seconds:
                return True
        except FileNotFoundError:
            # Whoever writes files may have renamed one since.
            return False
        self.left.append(entry.path)
        return False


_ALL = Settle()


def subfolders(uri: str, *, links: bool = False) -> list[str]:
    """Return the names of the folders right under a folder, sorted, without hidden ones; `links`: also linked ones.

    Raises:
        DataError: if the folder does not exist.
    """
    fs, path = filesystem(uri)
    try:
        entries = _list_folder(fs, uri, path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{uri}: no such folder; check its name, and that its disk is mounted") from error
    kinds = ("folder", "link") if links else ("folder",)
    return sorted(entry.name for entry in entries if entry.kind in kinds and not entry.name.startswith("."))


def files(uri: str) -> list[str]:
    """Return the URI of every file under a folder, at any depth, sorted; none if it does not exist.

    Links to folders, and those that lead nowhere, count as files: they are reported when they are read.
    """
    return [name for name, _ in _all_files(uri)]


def file_sizes(uri: str) -> list[tuple[str, int]]:
    """Return (URI, size in bytes) of every file under a folder, as `files` lists them."""
    return [(name, int(info["size"] or 0)) for name, info in _all_files(uri)]


def file_versions(uri: str) -> list[tuple[str, str]]:
    """Return (URI, version) of every file under a folder, as `files` lists them.

    The version is the size, with the checksum or tag in an object store, or with the time of modification on a disk.
    It changes when the bytes change; on a disk, and in some stores, also when the same bytes are written again. The
    listing has it: no more requests are made.
    """
    return [(name, f"{int(info['size'] or 0)} {_first(info, _VERSION_KEYS, '')}") for name, info in _all_files(uri)]


def _all_files(uri: str) -> list[tuple[str, dict[str, Any]]]:
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        # `find` would leave out what fails.
        names = [each.path for entries, _ in _walk(fs, uri, path) for each in entries if each.kind != "folder"]
        found = {}
        for name in names if Path(path).is_dir() else [path]:
            # Another process may have removed it.
            with suppress(FileNotFoundError, NotADirectoryError):
                found[name] = _stat(name)
    else:
        try:
            found = with_retries(uri, lambda: fs.find(path, detail=True))
        except FileNotFoundError:
            # Some stores raise it where the bucket does not exist.
            return []
    return sorted((uri_of(fs, name, uri), info) for name, info in found.items())


def _stat(path: str) -> dict[str, float]:
    try:
        found = os.stat(path)  # noqa: PTH116  a million files take seconds less than with Path
    except OSError:
        # A link to nothing.
        found = os.lstat(path)
    return {"size": found.st_size, "mtime": found.st_mtime}


def iter_files(uri: str, settle: Settle = _ALL) -> Iterator[str]:
    """Yield the URI of every file under a folder or prefix at any depth, or of the one file that the URI names.

    List folders, or prefixes of S3, in parallel, and hold a page of each. The order is the same each time. Yield
    nothing if there is no such folder. `settle` leaves out files that may still be being written.

    Raises:
        ConfigError: if the bucket does not exist, where the store reports it, or the credentials may not list it.
    """
    fs, path = filesystem(uri)
    kind, denied = "", None
    try:
        # `fs.isfile` would return false for any failure.
        info = with_retries(uri, lambda: fs.info(path))
        kind = info["type"]
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError as error:
        # Credentials that may list what is under a prefix may still not ask for the prefix itself.
        denied = error
    if kind == "file":
        pages = iter([([_Entry(path, "file", info)], time.time())])
    elif not is_local(uri) and fs.protocol in ("s3", ("s3", "s3a")):
        pages = _walk_s3(_without_times(fs), uri, path)
    else:
        pages = _walk(fs, uri, path)
    try:
        for entries, now in pages:
            for entry in entries:
                if entry.kind == "file" and settle.keeps(entry, now):
                    denied = None
                    yield uri_of(fs, entry.path, uri)
        if denied:
            raise denied
    except (FileNotFoundError, PermissionError) as error:
        raise _cannot_be_listed(uri, error) from error


def _cannot_be_listed(uri: str, error: OSError) -> ConfigError:
    return ConfigError(f"{uri}: cannot be listed: {error}; check the URI, and what the credentials allow")


def glob(uri: str, settle: Settle = _ALL) -> tuple[list[str], list[str]]:
    """Return the URIs of the files, and of the folders, that match a pattern, each sorted.

    A pattern has `*`, `?`, `[…]`, and `**` for any depth. Links to folders are followed, except by `**`.
    `settle` leaves out files that may still be being written.

    Raises:
        ConfigError: if the pattern is malformed, or a folder may not be listed.
        OSError: if a folder cannot be listed, after retries.
    """
    fs, path = filesystem(uri)
    try:
        if _ANY_DEPTH in path and not isinstance(fs, LocalFileSystem):
            # One listing, where folder by folder would take a request for each.
            entries = [*map(_stored_entry, with_retries(uri, lambda: fs.glob(path, detail=True)).values())]
        else:
            entries = _match(fs, uri, path)
    except (ValueError, re.error) as error:
        raise ConfigError(f"{uri}: {error}") from error
    except PermissionError as error:
        raise _cannot_be_listed(uri, error) from error
    under = _MAGIC.split(uri, maxsplit=1)[0].rpartition("/")[0]
    now = time.time()
    files = [entry.path for entry in entries if entry.kind == "file" and settle.keeps(entry, now)]
    # At any depth, links may form a circle.
    kinds = ("folder",) if _ANY_DEPTH in path else ("folder", "link")
    folders = [entry.path for entry in entries if entry.kind in kinds]
    return sorted(uri_of(fs, name, under) for name in files), sorted(uri_of(fs, name, under) for name in folders)


def _match(fs: Any, uri: str, path: str) -> list[_Entry]:
    """List what matches a pattern, level by level. fsspec's `glob` leaves out folders that it cannot list."""
    parts = path.split("/")
    depth = next((number for number, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    if not depth:
        raise ValueError("a pattern cannot be in the name of a bucket; name it")
    whole = re.compile(glob_translate(path))
    beginnings = [re.compile(glob_translate("/".join(parts[: n + 1]))) for n in range(len(parts))]

    def enters(entry: _Entry) -> bool:
        level = entry.path.count("/")
        if _ANY_DEPTH in parts[: level + 1]:
            return entry.kind == "folder"
        is_inner = level + 1 < len(parts) and entry.kind in ("folder", "link")
        return is_inner and bool(beginnings[level].match(entry.path))

    def start_in(folder: str) -> str:
        below = folder.rstrip("/").count("/") + 1
        return "" if _ANY_DEPTH in parts[: below + 1] else _MAGIC.split(parts[below], maxsplit=1)[0]

    pages = _walk(fs, uri, "/".join(parts[:depth]) or "/", enters, start_in)
    # The pattern `folder/**` matches the folder, too.
    slash = {"folder": "/"} if path.endswith(f"/{_ANY_DEPTH}") else {}
    return [each for entries, _ in pages for each in entries if whole.match(each.path + slash.get(each.kind, ""))]


def _in_turn(first: T, list_page: Callable[[T, int], tuple[_Page, list[T]]]) -> Iterator[_Page]:
    """List something, and all that its listing names, in parallel and in an order that does not depend on time.

    `list_page` also gets the largest number of listings that waited until now.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        waiting, most_waiting = deque([first]), 1
        listed: deque[Future[tuple[_Page, list[T]]]] = deque()
        while waiting or listed:
            # Names that are listed long before they are needed take memory.
            while waiting and len(listed) < THREADS:
                listed.append(pool.submit(list_page, waiting.popleft(), most_waiting))
            page, more = listed.popleft().result()
            waiting.extend(more)
            most_waiting = max(most_waiting, len(waiting) + len(listed))
            yield page


def _walk(
    fs: Any,
    uri: str,
    path: str,
    enters: Callable[[_Entry], bool] = lambda entry: entry.kind == "folder",
    start_in: Callable[[str], str] = lambda folder: "",
) -> Iterator[_Page]:
    """List a folder and those in it that it `enters`, of each the names that begin with `start_in` of its path."""

    def list_page(folder: str, _: int) -> tuple[_Page, list[str]]:
        try:
            entries = _list_folder(fs, uri, folder, start_in(folder))
        except (FileNotFoundError, NotADirectoryError):
            entries = []
        return (entries, time.time()), [entry.path for entry in entries if enters(entry)]

    return _in_turn(path.rstrip("/") or path, list_page)


def _list_folder(fs: Any, uri: str, folder: str, start: str = "") -> list[_Entry]:
    """List the entries right in a folder whose names begin with `start`, sorted."""
    if isinstance(fs, LocalFileSystem):
        # `LocalFileSystem.ls` would ask for the size of each file, too.
        with os.scandir(folder) as found:
            entries = [_Entry(entry.path, _local_kind(entry), {}) for entry in found]
    else:
        # The clouds' filesystems can list by a prefix; others have no such argument, or ignore it.
        if start and isinstance(fs, AsyncFileSystem):
            find = partial(fs.find, folder, maxdepth=1, withdirs=True, detail=True, prefix=start)
            infos = with_retries(uri, find).values()
        else:
            infos = with_retries(uri, partial(fs.ls, folder, detail=True))
        # A store may list the folder itself, too.
        entries = [entry for entry in map(_stored_entry, infos) if entry.path.rstrip("/") != folder.rstrip("/")]
    listed = (each for each in entries if each.name.startswith(start) and (each.kind, each.name) != _SYSTEM_FOLDER)
    return sorted(listed, key=lambda entry: entry.path)


def _local_kind(entry: os.DirEntry[str]) -> Literal["file", "folder", "link", "other"]:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
    except OSError:
        # A link in a circle, through a file, or into a folder that may not be entered.
        pass
    return "other"


def _stored_entry(info: dict[str, Any]) -> _Entry:
    if info["type"] == "directory":
        return _Entry(info["name"].rstrip("/"), "folder", info)
    return _Entry(info["name"], "file" if info["type"] == "file" else "other", info)


def _modified(entry: _Entry) -> float:
    """Return when a file was modified, in seconds since 1970; 0 if the store does not say."""
    if not entry.info:
        return Path(entry.path).stat().st_mtime
    value = _first(entry.info, _TIME_KEYS, 0.0)
    if isinstance(value, str):
        # Python 3.10 does not read the Z.
        value = datetime.fromisoformat(value.replace("Z", "+00:00"))
    return value.timestamp() if isinstance(value, datetime) else float(value)


def _first(info: dict[str, Any], keys: tuple[str, ...], default: Any) -> Any:
    return next((info[key] for key in keys if info.get(key)), default)


def _without_times(fs: Any) -> Any:
    """Copy an S3 filesystem; the copy does not parse times, which takes more than half of the time of a listing."""
    # Only where s3fs is installed.
    from aiobotocore.session import AioSession

    session = AioSession(**fs.kwargs)
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    return type(fs)(*fs.storage_args, **fs.storage_options, session=session, skip_instance_cache=True)


def _walk_s3(fs: Any, uri: str, path: str) -> Iterator[_Page]:
    """List the keys under a prefix.

    A listing is a chain of requests, so divide the prefix at slashes into enough parts to list in parallel.
    """
    bucket, _, key = path.partition("/")

    def list_page(part: tuple[str, int, str], most_waiting: int) -> tuple[_Page, list[tuple[str, int, str]]]:
        prefix, level, token = part
        divides = not token and level < _PREFIX_LEVELS and most_waiting < THREADS
        arguments = {"Delimiter": "/"} if divides else {"ContinuationToken": token} if token else {}
        request = partial(fs.call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix, **arguments)
        answer: dict[str, Any] = with_retries(uri, request)
        if divides and answer["IsTruncated"]:
            # The parts are so many that to list each of them takes more requests than to list the whole.
            return ([], 0.0), [(prefix, _PREFIX_LEVELS, "")]
        found = (each for each in answer.get("Contents", ()) if not each["Key"].endswith("/"))
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(date).timestamp() if date else time.time()
        page = [_Entry(f"{bucket}/{each['Key']}", "file", each) for each in found], now
        if answer["IsTruncated"]:
            return page, [(prefix, level, answer["NextContinuationToken"])]
        return page, [(each["Prefix"], level + 1, "") for each in answer.get("CommonPrefixes", ())]

    return _in_turn((f"{key.rstrip('/')}/" if key else "", 0, ""), list_page)
