"""Listings: the files and folders under a URI."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from stpm.errors import ConfigError, DataError
from stpm.storage.retries import with_retries
from stpm.storage.uris import filesystem, is_local

_THREADS = 16
# Entries of a listing that change with a file's bytes. A checksum is first: uploading the same bytes again keeps it.
_VERSION_KEYS = ("md5Hash", "ETag", "etag", "mtime", "last_modified", "LastModified", "created")


def children(uri: str) -> list[str]:
    """Return the names of the folders right under a folder, sorted, without hidden ones.

    Raises:
        DataError: if the folder does not exist.
    """
    fs, path = filesystem(uri)
    try:
        entries = with_retries(uri, lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{uri}: no such folder") from error
    names = [e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory"]
    return sorted(name for name in names if not name.startswith("."))


def files(uri: str) -> list[tuple[str, int]]:
    """Return (URI, size in bytes) of every file under a folder, at any depth, sorted; none if it does not exist."""
    return [(name, int(info["size"] or 0)) for name, info in _entries(uri)]


def versions(uri: str) -> list[tuple[str, str]]:
    """Return (URI, version) of every file under a folder, at any depth, sorted; none if it does not exist.

    The version changes when the file's bytes do; on a disk, and in some object stores, also when the same bytes are
    written again: it is the size with the checksum or tag in an object store, and with the time of modification on a
    disk. It costs no request beside the listing.
    """
    return [(name, _version(info)) for name, info in _entries(uri)]


def _entries(uri: str) -> list[tuple[str, dict[str, Any]]]:
    fs, path = filesystem(uri)
    try:
        found = with_retries(uri, lambda: fs.find(path, detail=True))
    except FileNotFoundError:
        # Some stores raise it where the bucket does not exist.
        return []
    return sorted(((_uri(fs, name, uri), info) for name, info in found.items()), key=lambda pair: pair[0])


def _version(info: dict[str, Any]) -> str:
    if info.get("islink"):
        # The listing has the time of the link, not of the file that it points to.
        info = info | {"mtime": Path(info["name"]).stat().st_mtime}
    values = (info[key] for key in _VERSION_KEYS if info.get(key))
    return f"{int(info['size'] or 0)} {next(values, '')}"


def stream(uri: str) -> Iterator[str]:
    """Yield the URI of every file under a folder or prefix at any depth, or of the one file that the URI names.

    Holds a page of the listing at a time. Lists folders in parallel where the filesystem has folders; the order is the
    filesystem's. Yields nothing if there is no such folder.

    Raises:
        ConfigError: if the bucket does not exist, where the store reports it.
    """
    fs, path = filesystem(uri)
    if with_retries(uri, lambda: fs.isfile(path)):
        names = iter([path])
    elif not is_local(uri) and fs.protocol in ("s3", ("s3", "s3a")):
        names = _stream_s3(fs, path, uri)
    else:
        names = _stream_folders(fs, path, uri)
    try:
        yield from (_uri(fs, name, uri) for name in names)
    except FileNotFoundError as error:
        raise ConfigError(f"{uri}: cannot be listed: {error}") from error


def _stream_s3(fs: Any, path: str, uri: str) -> Iterator[str]:
    bucket, _, key = path.partition("/")
    prefix = f"{key.rstrip('/')}/" if key else ""
    request = partial(fs.call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix)
    page: dict[str, Any] = with_retries(uri, request)
    while True:
        yield from (f"{bucket}/{o['Key']}" for o in page.get("Contents", ()) if not o["Key"].endswith("/"))
        if not page["IsTruncated"]:
            return
        page = with_retries(uri, partial(request, ContinuationToken=page["NextContinuationToken"]))


def _stream_folders(fs: Any, path: str, uri: str) -> Iterator[str]:
    def list_folder(folder: str) -> tuple[list[str], list[str]]:
        try:
            entries = with_retries(uri, lambda: fs.ls(folder, detail=True))
        except FileNotFoundError:
            return [], []
        folders = sorted(e["name"] for e in entries if e["type"] == "directory" and e["name"].rstrip("/") != folder)
        return folders, sorted(e["name"] for e in entries if _is_file(fs, e))

    with ThreadPoolExecutor(_THREADS) as pool:
        pending = deque([pool.submit(list_folder, path.rstrip("/"))])
        while pending:
            folders, names = pending.popleft().result()
            pending.extend(pool.submit(list_folder, folder) for folder in folders)
            yield from names


def glob(uri: str) -> list[str]:
    """Return the URIs of the files that match a pattern (`*`, `?`, `[…]`, and `**` for any depth), sorted.

    Raises:
        ConfigError: if the pattern is malformed.
    """
    fs, path = filesystem(uri)
    try:
        found = with_retries(uri, lambda: fs.glob(path, detail=True))
    except (ValueError, re.error) as error:
        raise ConfigError(f"{uri}: {error}") from error
    folder = re.split(r"[*?\[]", uri, maxsplit=1)[0].rsplit("/", 1)[0]
    return sorted(_uri(fs, name, folder) for name, info in found.items() if _is_file(fs, info))


def _is_file(fs: Any, entry: dict[str, Any]) -> bool:
    """Return true for a file and a link to one. Links to folders are not followed: they may form a circle."""
    return entry["type"] == "file" or bool(entry.get("islink") and fs.isfile(entry["name"]))


def _uri(fs: Any, path: str, under: str) -> str:
    """Make the URI of a path, with the scheme and account of the URI that it was found under."""
    if isinstance(fs, LocalFileSystem):
        return path
    root = str(fs._strip_protocol(under)).rstrip("/")
    if path == root:
        return under
    return f"{under.rstrip('/')}/{path.removeprefix(root).lstrip('/')}"
