"""Glob patterns: the files and folders that match one."""

from __future__ import annotations

import re
from functools import partial
from glob import has_magic
from typing import Any

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from stpm.errors import ConfigError
from stpm.storage.listing import Settle, is_file, is_folder, settled
from stpm.storage.parallel import in_parallel
from stpm.storage.retries import with_retries
from stpm.storage.uris import filesystem, uri_of

_ANY_DEPTH = "**"


def glob(uri: str, settle: Settle | None = None) -> tuple[list[str], list[str]]:
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
            found = with_retries(uri, lambda: fs.glob(path, detail=True))
        else:
            found = _match(fs, path, uri)
    except (ValueError, re.error) as error:
        raise ConfigError(f"{uri}: {error}") from error
    except PermissionError as error:
        raise ConfigError(f"{uri}: cannot be listed: {error}; check the URI, and what the credentials allow") from error
    under = re.split(r"[*?\[]", uri, maxsplit=1)[0].rsplit("/", 1)[0]
    files = settled((entry for entry in found.values() if is_file(fs, entry)), settle or Settle())
    folders = [name for name, entry in found.items() if is_folder(fs, entry, links=_ANY_DEPTH not in path)]
    return sorted(uri_of(fs, name, under) for name in files), sorted(uri_of(fs, name, under) for name in folders)


def _match(fs: Any, path: str, uri: str) -> dict[str, dict[str, Any]]:
    """Find the entries that match a pattern, level by level. fsspec's `glob` leaves out folders that it cannot list."""
    parts = path.split("/")
    depth = next((number for number, part in enumerate(parts) if has_magic(part)), len(parts) - 1)
    if not depth:
        raise ValueError("a pattern cannot be in the name of a bucket; name it")
    whole = re.compile(glob_translate(path))
    # The pattern `folder/**` matches the folder, too.
    slash = {"directory": "/"} if path.endswith("/**") else {}
    folders = ["/".join(parts[:depth]) or "/"]
    found: dict[str, dict[str, Any]] = {}
    while folders:
        start = re.split(r"[*?\[]", parts[depth], maxsplit=1)[0] if depth < len(parts) else ""
        depth += 1
        any_depth = _ANY_DEPTH in parts[:depth]
        beginning = re.compile(glob_translate("/".join(parts[:depth])))
        list_start = partial(_list_folder, fs, uri, start="" if any_depth else start)
        entries = {name: entry for listed in in_parallel(list_start, folders) for name, entry in listed.items()}
        found |= {name: e for name, e in entries.items() if whole.match(name + slash.get(e["type"], ""))}
        folders = [
            name
            for name, entry in entries.items()
            if (any_depth or (depth < len(parts) and beginning.match(name)))
            # At any depth, links may form a circle.
            and is_folder(fs, entry, links=not any_depth)
        ]
    return found


def _list_folder(fs: Any, uri: str, folder: str, start: str) -> dict[str, dict[str, Any]]:
    """Return the entries of a folder, by path; a store lists only those whose names begin with `start`."""
    if start and isinstance(fs, AsyncFileSystem):
        list_entries = partial(fs.find, folder, maxdepth=1, withdirs=True, detail=True, prefix=start)
        entries = with_retries(uri, list_entries).values()
    else:
        try:
            entries = with_retries(uri, partial(fs.ls, folder, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return {}
    # A store may list the folder itself, too.
    paths = {entry["name"].rstrip("/"): entry for entry in entries}
    return {path: entry for path, entry in paths.items() if path != folder.rstrip("/")}
