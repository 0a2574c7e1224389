"""Listings: the files and folders under a URI."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from stpm.errors import ConfigError, DataError
from stpm.storage.retries import with_retries
from stpm.storage.uris import filesystem, is_local, uri_of

_THREADS = 16
# At the top of a disk; only the system may enter it.
_SYSTEM_FOLDER = "lost+found"
# Times that a prefix is divided.
_PREFIX_LEVELS = 4
# Values of a listing that are the time of modification; "created" is that of the bytes in stores that replace files.
_TIME_KEYS = ("mtime", "last_modified", "LastModified", "updated", "created")
# Values of a listing that change with a file's bytes. The checksum is first: it stays if the same bytes are written.
_VERSION_KEYS = ("md5Hash", "ETag", "etag", "mtime", "last_modified", "LastModified", "created")


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

    def keeps(self, name: str, modified: float, now: float) -> bool:
        """Return whether to list a file; the times are in seconds since 1970."""
        if abs(now - modified) >= self.seconds:
            return True
        self.left.append(name)
        return False


_ALL = Settle()


def subfolders(uri: str, *, links: bool = False) -> list[str]:
    """Return the names of the folders right under a folder, sorted, without hidden ones.

    Args:
        uri: of the folder.
        links: also of links to folders.

    Raises:
        DataError: if the folder does not exist.
    """
    fs, path = filesystem(uri)
    try:
        entries = with_retries(uri, lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{uri}: no such folder; check its name, and that its disk is mounted") from error
    names = [name_of(entry) for entry in entries if is_folder(fs, entry, links=links)]
    return sorted(name for name in names if not name.startswith("."))


def files(uri: str) -> list[str]:
    """Return the URI of every file under a folder, at any depth, sorted; none if it does not exist."""
    return [name for name, _ in _entries(uri)]


def file_sizes(uri: str) -> list[tuple[str, int]]:
    """Return (URI, size in bytes) of every file under a folder, as `files` lists them."""
    return [(name, int(info["size"] or 0)) for name, info in _entries(uri)]


def files_starting(uri: str, start: str) -> list[str]:
    """Return the URIs of the files right under a folder whose names begin with `start`, sorted.

    An object store lists no others; a disk reads the names of all, and nothing else of them.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        # The clouds' filesystems can list by a prefix; others have no such argument, or ignore it.
        arguments = {"prefix": start} if isinstance(fs, AsyncFileSystem) else {}
        found = [name.removeprefix(f"{uri.rstrip('/')}/") for name, _ in _entries(uri, **arguments)]
        names = [name for name in found if name.startswith(start) and "/" not in name]
    elif Path(path).is_dir():
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(start) and _is_local_file(entry)]
    else:
        names = []
    return [f"{uri.rstrip('/')}/{name}" for name in sorted(names)]


def file_versions(uri: str) -> list[tuple[str, str]]:
    """Return (URI, version) of every file under a folder, at any depth, sorted; none if it does not exist.

    The version is the size, with the checksum or tag in an object store, or with the time of modification on a disk.
    It changes when the bytes change; on a disk, and in some stores, also when the same bytes are written again. The
    listing has it: no more requests are made.
    """
    return [(name, _version(info)) for name, info in _entries(uri)]


def _entries(uri: str, **arguments: str) -> list[tuple[str, dict[str, Any]]]:
    fs, path = filesystem(uri)
    try:
        if isinstance(fs, LocalFileSystem):
            found = dict(_local_files(fs, path))
        else:
            found = with_retries(uri, lambda: fs.find(path, detail=True, **arguments))
    except FileNotFoundError:
        # Some stores raise it where the bucket does not exist.
        return []
    return sorted(((uri_of(fs, name, uri), info) for name, info in found.items()), key=lambda pair: pair[0])


def _local_files(fs: LocalFileSystem, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and description of a file, or of every file under a folder. `find` would leave out what fails."""
    try:
        with os.scandir(path) as found:
            entries = list(found)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        yield path, fs.info(path)
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if entry.name != _SYSTEM_FOLDER:
                yield from _local_files(fs, entry.path)
        else:
            # Another process may have removed it.
            with suppress(FileNotFoundError):
                yield entry.path, fs.info(entry)


def _version(info: dict[str, Any]) -> str:
    if info.get("islink"):
        # The listing has the time of the link: take that of the file. A link to nothing is reported when it is read.
        with suppress(OSError):
            info = info | {"mtime": Path(info["name"]).stat().st_mtime}
    values = (info[key] for key in _VERSION_KEYS if info.get(key))
    return f"{int(info['size'] or 0)} {next(values, '')}"


def iter_files(uri: str, settle: Settle = _ALL) -> Iterator[str]:
    """Yield the URI of every file under a folder or prefix at any depth, or of the one file that the URI names.

    List folders, or prefixes of S3, in parallel, and hold a page of each. The order is the same each time. Yield
    nothing if there is no such folder. `settle` leaves out files that may still be being written.

    Raises:
        ConfigError: if the bucket does not exist, where the store reports it, or the credentials may not list it.
    """
    fs, path = filesystem(uri)
    denied: PermissionError | None = None
    try:
        # `fs.isfile` would return false for any failure.
        info = with_retries(uri, lambda: fs.info(path))
        is_file = info["type"] == "file"
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    except PermissionError as error:
        # Credentials that may list what is under a prefix may still not ask for the prefix itself.
        is_file, denied = False, error
    if is_file:
        names = iter(settled([info | {"name": path}], settle))
    elif not is_local(uri) and fs.protocol in ("s3", ("s3", "s3a")):
        names = _stream_s3(_without_times(fs), path, uri, settle)
    else:
        names = _stream_folders(fs, path, uri, settle)
    is_empty = True
    try:
        for name in names:
            is_empty = False
            yield uri_of(fs, name, uri)
        if is_empty and denied:
            raise denied
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(f"{uri}: cannot be listed: {error}; check the URI, and what the credentials allow") from error


def _without_times(fs: Any) -> Any:
    """Copy an S3 filesystem; the copy does not parse times, which takes more than half of the time of a listing."""
    # Only where s3fs is installed.
    from aiobotocore.session import AioSession

    session = AioSession(**fs.kwargs)
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    return type(fs)(*fs.storage_args, **fs.storage_options, session=session, skip_instance_cache=True)


def settled(
    entries: Iterable[dict[str, Any]], settle: Settle, name: str = "name", now: float | None = None
) -> list[str]:
    """Return the paths of files, by their entries in a listing, without those that may still be being written.

    Args:
        entries: of files.
        settle: which to leave out.
        name: key of a file's path in its entry.
        now: time of the disk or store, seconds since 1970; None: that of this process.
    """
    now = time.time() if now is None else now
    return [e[name] for e in entries if not settle.seconds or settle.keeps(e[name], _modified(e), now)]


def _modified(entry: dict[str, Any]) -> float:
    """Return when a file was modified, in seconds since 1970; 0 if the store does not say."""
    value = next((entry[key] for key in _TIME_KEYS if entry.get(key)), 0.0)
    if isinstance(value, str):
        # Python 3.10 does not read the Z.
        value = datetime.fromisoformat(value.replace("Z", "+00:00"))
    return value.timestamp() if isinstance(value, datetime) else float(value)


def _stream_s3(fs: Any, path: str, uri: str, settle: Settle = _ALL) -> Iterator[str]:
    """Yield the keys under a prefix.

    A listing is a chain of requests, so divide the prefix and list its parts in parallel. Take a page of each part in
    turn: the order does not depend on time.
    """
    bucket, _, key = path.partition("/")

    def list_page(prefix: str, **arguments: str) -> dict[str, Any]:
        request = partial(fs.call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix, **arguments)
        return cast("dict[str, Any]", with_retries(uri, request))

    with ThreadPoolExecutor(_THREADS) as pool:
        keys, prefixes = _divide_prefix(f"{key.rstrip('/')}/" if key else "", list_page, pool, settle)
        yield from (f"{bucket}/{name}" for name in keys)
        waiting = deque(prefixes)
        listed: deque[tuple[str, Future[dict[str, Any]]]] = deque()
        while waiting or listed:
            while waiting and len(listed) < _THREADS:
                prefix = waiting.popleft()
                listed.append((prefix, pool.submit(list_page, prefix)))
            prefix, future = listed.popleft()
            page = future.result()
            if page["IsTruncated"]:
                token = page["NextContinuationToken"]
                listed.append((prefix, pool.submit(list_page, prefix, ContinuationToken=token)))
            yield from (f"{bucket}/{name}" for name in _keys(page, settle))


def _divide_prefix(
    prefix: str, list_page: Callable[..., dict[str, Any]], pool: ThreadPoolExecutor, settle: Settle
) -> tuple[list[str], list[str]]:
    """Divide a prefix at slashes into enough parts to list in parallel. Return the keys in no part, and the parts."""
    keys: list[str] = []
    prefixes = [prefix]
    for _ in range(_PREFIX_LEVELS):
        if len(prefixes) >= _THREADS:
            break
        divided = []
        for whole, page in zip(prefixes, pool.map(lambda each: list_page(each, Delimiter="/"), prefixes), strict=True):
            if page["IsTruncated"]:
                # The parts are so many that to list each of them takes more requests than to list the whole.
                divided.append(whole)
            else:
                keys += _keys(page, settle)
                divided += [part["Prefix"] for part in page.get("CommonPrefixes", ())]
        if divided == prefixes:
            break
        prefixes = divided
    return keys, prefixes


def _keys(page: dict[str, Any], settle: Settle) -> list[str]:
    entries = (entry for entry in page.get("Contents", ()) if not entry["Key"].endswith("/"))
    date = page["ResponseMetadata"]["HTTPHeaders"].get("date") if settle.seconds else None
    return settled(entries, settle, "Key", parsedate_to_datetime(date).timestamp() if date else None)


def _stream_folders(fs: Any, path: str, uri: str, settle: Settle) -> Iterator[str]:
    def list_folder(folder: str) -> tuple[list[str], list[str]]:
        try:
            if isinstance(fs, LocalFileSystem):
                return _list_local(folder, settle)
            entries = with_retries(uri, lambda: fs.ls(folder, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        folders = sorted(
            e["name"] for e in entries if is_folder(fs, e, links=False) and e["name"].rstrip("/") != folder
        )
        return folders, sorted(settled((e for e in entries if is_file(fs, e)), settle))

    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = deque([path.rstrip("/") or path])
        listed: deque[Future[tuple[list[str], list[str]]]] = deque()
        while waiting or listed:
            # Names that are listed long before they are needed take memory.
            while waiting and len(listed) < _THREADS:
                listed.append(pool.submit(list_folder, waiting.popleft()))
            folders, names = listed.popleft().result()
            waiting.extend(folders)
            yield from names


def _list_local(folder: str, settle: Settle) -> tuple[list[str], list[str]]:
    """List the paths of folders and files in a folder. `LocalFileSystem.ls` would ask for the size of each file too."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.path)
    folders = [e.path for e in entries if e.is_dir(follow_symlinks=False) and e.name != _SYSTEM_FOLDER]
    files = [entry for entry in entries if _is_local_file(entry)]
    return folders, settled(_with_times(files), settle) if settle.seconds else [entry.path for entry in files]


def _with_times(files: Iterable[os.DirEntry[str]]) -> Iterator[dict[str, Any]]:
    for entry in files:
        # Whoever writes files may have renamed one since.
        with suppress(FileNotFoundError):
            yield {"name": entry.path, "mtime": entry.stat().st_mtime}


def _is_local_file(entry: os.DirEntry[str]) -> bool:
    """Return true for a file and a link to one."""
    try:
        return entry.is_file()
    except OSError:
        # A link in a circle, through a file, or into a folder that may not be entered.
        return False


def is_file(fs: Any, entry: dict[str, Any]) -> bool:
    """Return true for the entry of a file, and of a link to one."""
    return entry["type"] == "file" or bool(entry.get("islink") and fs.isfile(entry["name"]))


def is_folder(fs: Any, entry: dict[str, Any], *, links: bool) -> bool:
    """Return true for the entry of a folder, and if `links`, of a link to one."""
    if name_of(entry) == _SYSTEM_FOLDER:
        return False
    return entry["type"] == "directory" or (links and bool(entry.get("islink")) and bool(fs.isdir(entry["name"])))


def name_of(entry: dict[str, Any]) -> str:
    """Return the last part of the path of an entry."""
    return str(entry["name"].rstrip("/").rsplit("/", 1)[-1])
