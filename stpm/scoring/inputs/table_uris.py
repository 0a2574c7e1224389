"""The URIs that a user's table names: made absolute, and only under allowed prefixes, since it is foreign data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from stpm import storage
from stpm.errors import ImageError
from stpm.names import check_no_secret


def allowed_prefixes(table: str, prefixes: Sequence[str]) -> tuple[str, ...]:
    """Return the given prefixes, or if there are none, the table's own folder, or its bucket in object storage.

    A table may name only URIs under these prefixes, so that a job does not read other files.
    """
    if prefixes:
        return tuple(storage.absolute(prefix) for prefix in prefixes)
    if storage.is_local(table):
        return (str(Path(storage.absolute(table)).parent),)
    scheme, _, path = table.partition("://")
    return (f"{scheme}://{path.split('/', 1)[0]}",)


def check_allowed(uris: Iterable[str], prefixes: Sequence[str]) -> ImageError | None:
    """Return an error if one of the URIs is not under one of the prefixes. Empty URIs are ignored."""
    outside = next((uri for uri in uris if uri and not _is_allowed(uri, prefixes)), "")
    if not outside:
        return None
    folder = outside.rpartition("/")[0] or outside
    # Nothing allows a name that goes up.
    remedy = "see --allow" if ".." in folder.split("/") else f"to allow it, give --allow {folder}"
    return ImageError("not_allowed", f"the table may name only what is under {', '.join(prefixes)}; {remedy}")


def _is_allowed(uri: str, prefixes: Sequence[str]) -> bool:
    # A prefix itself may go up, as `--allow ../data` does.
    for prefix in prefixes:
        folder = f"{prefix.rstrip('/')}/"
        if uri == prefix or (uri.startswith(folder) and ".." not in uri[len(folder) :].split("/")):
            return True
    return False


def resolve(name: str, folder: str) -> str:
    """Return the absolute URI of a name in a table, "" of none; relative names are relative to the table's folder.

    Raises:
        UriError: if the URI may hold a secret.
    """
    if not name:
        return ""
    if "://" in name or name.startswith("/"):
        uri = storage.absolute(name) if storage.is_local(name) else name
    else:
        # Most names need no path, which would take as long as the rest of a row.
        is_odd = "//" in name or "./" in name or name.endswith(("/", "."))
        uri = f"{folder}/{PurePosixPath(name) if is_odd else name}"
    check_no_secret(uri)
    return uri
