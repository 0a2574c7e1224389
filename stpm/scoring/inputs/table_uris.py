"""The URIs that a user's table names: made absolute, and only under allowed prefixes, since it is foreign data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stpm import storage
from stpm.errors import ImageError
from stpm.names import check_no_secret, is_utf8

# Neither empty, nor `.` or `..`.
_SEGMENT = r"(?:[^/.]|\.[^/.]|\.\.[^/])[^/]*"
# `resolve` leaves such URIs as they are. They hold no secret: the pattern allows no password.
_PLAIN = rf"\A(?:(?:s3a?|gs|gcs|abfss?|az|memory)://[^/?#:.][^/?#:]*)?(?:/{_SEGMENT})+\z"


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
    if all(_is_allowed(uri, prefixes) for uri in uris if uri):
        return None
    return ImageError("not_allowed", f"the table may name only what is under {', '.join(prefixes)}; see --allow")


def _is_allowed(uri: str, prefixes: Sequence[str]) -> bool:
    below = [uri.removeprefix(_as_folder(prefix)) for prefix in prefixes if uri.startswith(_as_folder(prefix))]
    # A prefix itself may go up, as `--allow ../data` does.
    return uri in prefixes or any(".." not in path.split("/") for path in below)


def _as_folder(prefix: str) -> str:
    return f"{prefix.rstrip('/')}/"


def resolve(name: str, folder: str) -> str:
    """Return the absolute URI of a name in a table; relative names are relative to the table's folder.

    Raises:
        UriError: if the URI may hold a secret.
    """
    if "://" in name or name.startswith("/"):
        uri = storage.absolute(name) if storage.is_local(name) else name
    else:
        uri = f"{folder}/{PurePosixPath(name)}" if name else ""
    check_no_secret(uri)
    return uri


def resolve_plain(
    names: pa.ChunkedArray, folder: str, prefixes: Sequence[str]
) -> tuple[pa.ChunkedArray, npt.NDArray[np.bool_]]:
    """Resolve all names at once that are plain paths and allowed, as `resolve` and `check_allowed` do one by one.

    Args:
        names: string, without nulls.
        folder: URI of the table's folder, in UTF-8.
        prefixes: that are allowed.

    Returns:
        The URI of each name, string; and whether that URI is valid. Where it is not, call `resolve`.
    """
    is_empty = pc.equal(names, "")
    stays = pc.or_(is_empty, pc.or_(pc.match_substring(names, "://"), pc.starts_with(names, "/")))
    uris = pc.if_else(stays, names, pc.binary_join_element_wise(folder, names, "/"))
    folders = [_as_folder(prefix) for prefix in prefixes if is_utf8(prefix)]
    is_valid = pc.match_substring_regex(uris, _PLAIN).to_numpy()
    is_valid &= np.any([pc.starts_with(uris, each).to_numpy() for each in folders], axis=0)
    return uris, is_valid | is_empty.to_numpy()
