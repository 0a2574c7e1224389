"""URIs and the filesystems that they name."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs as pafs
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.implementations.local import LocalFileSystem

from stpm.errors import ConfigError, UriError
from stpm.names import check_no_secret

# This package's extra that installs the client of a scheme.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = ("file", "local")
# Schemes whose URIs choose another filesystem to read from.
_WRAPPERS = ("generic", "reference")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of a URI, and the URI's path on it.

    Credentials, endpoint and region are those that the cloud's own tools find (for S3 also `AWS_ENDPOINT_URL`). A name
    that fsspec reads as a chain of filesystems, such as `zip::file.zip`, is a plain name here.

    Raises:
        UriError: if the URI holds a NUL, or its scheme is unknown or is not a storage.
        ConfigError: if the package for its scheme is not installed.
    """
    if "\0" in uri:
        raise UriError(f"{uri!r} holds a NUL, which no name can have; correct it")
    scheme = _scheme(uri)
    try:
        kind = _filesystem_class(scheme)
        # A cached listing would hide what other processes have written since.
        return kind(use_listings_cache=False, **kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        hint = f"pip install 'stpm[{extra}]'" if extra else f"install the fsspec package for {scheme}://"
        raise ConfigError(f"{uri}: cannot open {scheme}:// here ({error}); {hint}") from error
    except (ValueError, TypeError) as error:
        raise UriError(f"{uri}: {error}; use a local path, s3://, gs:// or abfs://") from error


def _filesystem_class(scheme: str) -> Any:
    kind = fsspec.get_filesystem_class(scheme)
    if scheme in _WRAPPERS or issubclass(kind, ChainedFileSystem | AbstractArchiveFileSystem):
        raise ValueError(f"{scheme}:// is not a storage")
    return kind


def _scheme(uri: str) -> str:
    match = _SCHEME.match(uri)
    return match[1] if match else "file"


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a URI for pyarrow and Ray, and the URI's path on it. Raises as `filesystem` does."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return pafs.LocalFileSystem(), path
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def is_local(uri: str) -> bool:
    """Return whether a URI is a path on this machine."""
    return _scheme(uri) in _LOCAL


def uri_of(fs: Any, path: str, under: str) -> str:
    """Make the URI of a path. Take scheme and account from the URI under which the path was found."""
    if isinstance(fs, LocalFileSystem):
        return path
    root = str(fs._strip_protocol(under)).rstrip("/")
    if path == root:
        return under
    return f"{under.rstrip('/')}/{path.removeprefix(root).removeprefix('/')}"


def absolute(uri: str) -> str:
    """Make a local path absolute, so that other processes find it; any other URI only loses trailing slashes.

    Raises:
        UriError: if the URI may hold a secret, or names a user with a NUL in it.
    """
    check_no_secret(uri)
    if is_local(uri):
        try:
            # This also expands `~`, unless no user has that name.
            path = str(Path(LocalFileSystem._strip_protocol(uri)).absolute())
            # Before `..` may stand a link to another folder.
            return os.path.realpath(path) if "/../" in f"{path}/" else path
        except ValueError as error:
            raise UriError(f"{uri!r}: {error}; correct it") from error
    return uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Append names to a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def output_folder(uri: str) -> str:
    """Return the absolute URI of a folder that a job is to write into.

    Raises:
        ConfigError: if it is a file or under one, if this user may not write there, or if it is in object storage and
            holds `*`, `?` or `[`: fsspec reads them as a pattern when it moves and removes.
    """
    uri = absolute(uri)
    if not is_local(uri):
        if glob.has_magic(uri):
            raise ConfigError(f"{uri}: results cannot go to a URI with one of *?[ in it; rename it")
        return uri
    existing = next(folder for folder in (Path(uri), *Path(uri).parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"{uri}: results go to a folder, and {existing} is a file; name another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{uri}: this user may not write in {existing}; name another folder")
    return uri
