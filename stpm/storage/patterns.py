"""Glob patterns: the files and folders that match one."""

from __future__ import annotations

import re
from glob import has_magic
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from stpm.errors import ConfigError
from stpm.storage.listing import is_file
from stpm.storage.parallel import in_parallel
from stpm.storage.retries import with_retries
from stpm.storage.uris import filesystem, uri_of

_ANY_DEPTH = "**"


def glob(uri: str) -> tuple[list[str], list[str]]:
    """Return the URIs of the files, and of the folders, that match a pattern, each sorted.

    A pattern has `*`, `?`, `[…]`, and `**` for any depth. Links to folders are followed, except by `**`.

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
    files = [name for name, entry in found.items() if is_file(fs, entry)]
    folders = [name for name, entry in found.items() if _is_folder(fs, entry, links=_ANY_DEPTH not in path)]
    return sorted(uri_of(fs, name, under) for name in files), sorted(uri_of(fs, name, under) for name in folders)


def _match(fs: Any, path: str, uri: str) -> dict[str, dict[str, Any]]:
    """Find the entries that match a pattern, level by level. fsspec's `glob` leaves out folders that it cannot list."""
    parts = path.split("/")
    depth = next((number for number, part in enumerate(parts) if has_magic(part)), len(parts) - 1)
    whole = re.compile(glob_translate(path))

    def list_folder(folder: str) -> list[dict[str, Any]]:
        try:
            entries: list[dict[str, Any]] = with_retries(uri, lambda: fs.ls(folder, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        # A store may list the folder itself, too.
        return [entry for entry in entries if entry["name"].rstrip("/") != folder.rstrip("/")]

    folders = ["/".join(parts[:depth]) or ("/" if path.startswith("/") else "")]
    found: dict[str, dict[str, Any]] = {}
    while folders:
        depth += 1
        any_depth = _ANY_DEPTH in parts[:depth]
        beginning = re.compile(glob_translate("/".join(parts[:depth])))
        entries = [entry for listed in in_parallel(list_folder, folders) for entry in listed]
        # The pattern `folder/**` matches the folder, too.
        slash = {"directory": "/"} if path.endswith("/**") else {}
        found |= {
            name: entry
            for entry in entries
            if whole.match((name := entry["name"].rstrip("/")) + slash.get(entry["type"], ""))
        }
        folders = [
            entry["name"].rstrip("/")
            for entry in entries
            if (any_depth or (depth < len(parts) and beginning.match(entry["name"].rstrip("/"))))
            and _is_folder(fs, entry, links=not any_depth)
        ]
    return found


def _is_folder(fs: Any, entry: dict[str, Any], *, links: bool) -> bool:
    """Return true for the entry of a folder, and if `links`, of a link to one: at any depth they may form a circle."""
    return entry["type"] == "directory" or (links and bool(entry.get("islink")) and bool(fs.isdir(entry["name"])))
