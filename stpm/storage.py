"""URIs and filesystems: whatever has a URI is opened here, on any fsspec filesystem.

Objects are published whole: a reader sees the old bytes or the new ones, never half of them.
"""

from __future__ import annotations

import contextlib
import errno
import glob as patterns
import hashlib
import os
import re
import stat
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import tenacity
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.implementations.local import LocalFileSystem

from stpm.errors import ConfigError, DataError, TooLongError, UriError

_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
}
_WINDOWS_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}
# What null is called in the name of a folder category=<name>.
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
# The last range stands for bytes that are not UTF-8.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]')
# What Python makes of bytes of a name that are no UTF-8.
_SURROGATE = re.compile(r"[\udc80-\udcff]")
_MAX_NAME = 128
_LISTERS = 16
# Seconds: a store that is away for longer is down.
_PATIENCE = 60.0
_LONGEST_PAUSE = 10.0

# What of a file's listing changes with its bytes, the surest first: an upload of the same bytes keeps their checksum.
_CHANGING = ("md5Hash", "ETag", "etag", "mtime", "last_modified", "LastModified", "created")

_CLIENTS = ("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3")
# What they raise where nothing says who asks.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
_UNFINISHED = ".part"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = ("file", "local")
# They read another filesystem, which a name would choose.
_LAYERED = ("generic", "reference")
# Bytes that are read of an object of any size: to look at its size first is one more request.
_UNSEEN = 32 * 2**20

T = TypeVar("T")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URI, and the URI's path on it.

    Credentials, endpoint and region come from the cloud's own chain (for S3 that includes `AWS_ENDPOINT_URL`).
    What fsspec would take for a chain of filesystems, such as `zip::file.zip`, is a name like any other.

    Raises:
        UriError: if no storage can have it.
        ConfigError: if the package for its scheme is not installed.
    """
    if "\0" in uri:
        raise UriError(f"{uri!r} holds a NUL, which no name has")
    scheme = _scheme(uri)
    try:
        kind = _filesystem_class(scheme)
        # A listing that is remembered would hide what other processes wrote since.
        return kind(use_listings_cache=False, **kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        hint = f"pip install 'stpm[{extra}]'" if extra else f"install the fsspec package for {scheme}://"
        raise ConfigError(f"{uri}: cannot open {scheme}:// here ({error}); {hint}") from error
    except (ValueError, TypeError) as error:
        raise UriError(f"{uri}: {error}; use a local path, s3://, gs:// or abfs://") from error


def _filesystem_class(scheme: str) -> Any:
    kind = fsspec.get_filesystem_class(scheme)
    if scheme in _LAYERED or issubclass(kind, ChainedFileSystem | AbstractArchiveFileSystem):
        raise ValueError(f"{scheme}:// is no storage of its own")
    return kind


def _scheme(uri: str) -> str:
    found = _SCHEME.match(uri)
    return found[1] if found else "file"


def is_local(uri: str) -> bool:
    return _scheme(uri) in _LOCAL


def absolute(uri: str) -> str:
    """A local path made absolute, so that other processes find it; any other URI unchanged."""
    if is_local(uri):
        # This expands `~` too, and leaves the name of no user as it is.
        return str(Path(LocalFileSystem._strip_protocol(uri)).absolute())
    return uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def output_folder(uri: str) -> str:
    """The absolute URI of a folder that a job is to write into.

    Raises:
        ConfigError: if it is a file or under one, if this user may not write there, or if it is in object storage and
            holds `*`, `?` or `[`: fsspec takes them for a pattern where it moves and removes.
    """
    uri = absolute(uri)
    if not is_local(uri):
        if patterns.has_magic(uri):
            raise ConfigError(f"{uri}: results cannot go to a URI with one of *?[ in it; rename it")
        return uri
    there = next(folder for folder in (Path(uri), *Path(uri).parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"{uri}: results go to a folder, and {there} is a file; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{uri}: this user may not write in {there}; name another folder")
    return uri


def as_utf8(name: str) -> str:
    """A name as it is, or where its bytes are no UTF-8, with those that are not as %XX."""
    return _SURROGATE.sub(lambda match: quote(match[0].encode("utf-8", "surrogateescape")), name)


def safe_name(name: str, what: str) -> str:
    """The name, if it may become part of a path on every filesystem.

    Raises:
        DataError: if it is empty, longer than 128 characters, starts with a dot, ends with a dot or a space, is
            reserved on Windows, is not UTF-8, or holds a control character or one of `<>:"/\\|?*`.
    """
    problem = None
    if not name or len(name) > _MAX_NAME:
        problem = f"has {len(name)} characters, 1 to {_MAX_NAME} are allowed"
    elif match := _UNSAFE.search(name):
        problem = f"holds the character {match.group()!r}"
    elif name.startswith(".") or name.endswith((".", " ")):
        problem = "starts with a dot, or ends with a dot or a space"
    elif name.split(".", maxsplit=1)[0].lower() in _WINDOWS_RESERVED:
        problem = "is a name that Windows reserves"
    elif name == HIVE_NULL:
        problem = "means null where tables are partitioned"
    if problem:
        raise DataError(f"{what} {name[:_MAX_NAME]!r} {problem}; rename it")
    return name


def is_utf8(name: str) -> bool:
    """Whether the name of a file was text: bytes that are not UTF-8 stand in it as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(_with_patience(uri, lambda: fs.exists(path)))


def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of an object, or a range of them. What may pass is tried again, with growing pauses.

    Raises:
        FileNotFoundError: if it is not there.
        OSError: if it cannot be read all the same.
    """
    if start is not None and end is not None and end <= start:
        # As an HTTP range this would mean the whole object.
        return b""
    fs, path = filesystem(uri)
    return _with_patience(uri, lambda: bytes(fs.cat_file(path, start=start, end=end)))


def read_at_most(uri: str, most: int) -> bytes:
    """The bytes of an object that has not more than so many; of a longer one only the first are fetched.

    Raises:
        TooLongError: if it has more.
        FileNotFoundError: if it is not there, or is not a file.
        OSError: if it cannot be read all the same.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return _read_local(path, most)
    return _with_patience(uri, lambda: _read_remote(fs, path, most))


def _read_local(path: str, most: int) -> bytes:
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        # A pipe or a device might never end.
        raise FileNotFoundError(f"{path}: not a file")
    _check_size(path, found.st_size, most)
    return Path(path).read_bytes()


def _read_remote(fs: fsspec.AbstractFileSystem, path: str, most: int) -> bytes:
    data = _first_bytes(fs, path, min(most, _UNSEEN) + 1)
    if len(data) > _UNSEEN:
        _check_size(path, fs.info(path)["size"] or 0, most)
        data = _first_bytes(fs, path, most + 1)
    _check_size(path, len(data), most)
    return data


def _first_bytes(fs: fsspec.AbstractFileSystem, path: str, number: int) -> bytes:
    try:
        return bytes(fs.cat_file(path, start=0, end=number))
    except (FileNotFoundError, PermissionError):
        raise
    except Exception:
        # Most stores have no range in an empty object.
        if _is_empty(fs, path):
            return b""
        raise


def _is_empty(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    with contextlib.suppress(Exception):
        return bool(fs.info(path)["size"] == 0)
    return False


def _check_size(path: str, size: int, most: int) -> None:
    if size > most:
        raise TooLongError(f"{path}: has more than {most:,} bytes")


def _with_patience(uri: str, act: Callable[[], T]) -> T:
    """Remote storage answers 500, 503 or nothing at times: trying again later is all that helps."""
    if is_local(uri):
        return act()
    patient = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=_LONGEST_PAUSE),
        stop=tenacity.stop_after_delay(_PATIENCE),
        reraise=True,
    )
    try:
        return patient(act)
    except Exception as error:
        if _is_clients_own(error):
            kind = FileNotFoundError if _is_missing(error) else OSError
            first_line, _, _ = str(error).partition("\n")
            raise kind(f"{type(error).__name__}: {first_line}") from error
        raise


def _may_pass(error: BaseException) -> bool:
    lasting = isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError) or _is_missing(error)
    lasting |= isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    lasting |= type(error).__name__ in _NO_CREDENTIALS
    return (isinstance(error, OSError) or _is_clients_own(error)) and not lasting


def _is_missing(error: BaseException) -> bool:
    """Also where it is a container that is missing, and Azure's client says so in its own way."""
    return isinstance(error, FileNotFoundError) or type(error).__name__ == "ResourceNotFoundError"


def _is_clients_own(error: BaseException) -> bool:
    """Where a connection breaks, a cloud's client raises what is no OSError."""
    return not isinstance(error, OSError) and type(error).__module__.partition(".")[0] in _CLIENTS


def publish(uri: str, data: bytes, *, durable: bool = True) -> None:
    """Write an object so that no reader ever sees a part of it.

    Object stores are atomic per object; on a local disk the bytes go beside and are renamed.

    Args:
        uri: where to.
        data: the object.
        durable: it outlasts a power cut. Without it a local disk may lose what it was given in the last seconds.

    Raises:
        ConfigError: if its bucket is not there.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        _in_bucket(uri, lambda: fs.pipe_file(path, data))
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Opened as any new file is, so that its permissions are those that the umask leaves.
    beside = target.parent / f".{uuid.uuid4().hex}{_UNFINISHED}"
    try:
        with beside.open("xb") as file:
            file.write(data)
            if durable:
                # Else a disk may keep the new name and lose the bytes, which leaves an empty file.
                file.flush()
                os.fsync(file.fileno())
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Have a disk keep the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network filesystems cannot, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def settle(uri: str) -> None:
    """Wait until a local disk keeps all that it was given, also by others; nothing to do on an object store."""
    if is_local(uri):
        os.sync()


def create(uri: str, data: bytes) -> bool:
    """Write an object that is not there yet; returns False, and changes nothing, if it is.

    Of several that try at once one succeeds, on local disks and where the store has a conditional put (S3, Google and
    Azure have). On a local disk a reader may find the object before its bytes.

    Args:
        uri: where to.
        data: bytes that nobody else would write: an attempt of this call that came through unseen is recognised by it.

    Raises:
        ConfigError: if its bucket is not there.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with Path(path).open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def act() -> bool:
        try:
            fs.pipe_file(path, data, mode="create")
        except OSError as error:
            # s3fs says EINVAL of a condition that failed, where the server does not repeat which.
            if isinstance(error, FileExistsError) or error.errno == errno.EINVAL:
                return False
            raise
        return True

    return _in_bucket(uri, act) or read(uri) == data


def _in_bucket(uri: str, write: Callable[[], T]) -> T:
    """Write to an object store. Raises ConfigError if the bucket is not there."""
    try:
        return _with_patience(uri, write)
    except FileNotFoundError as error:
        raise ConfigError(f"{uri}: cannot be written, there is no such bucket or container; make it") from error


def sweep(uri: str) -> None:
    """Remove what writers that were killed left unfinished under a local folder; nobody may be writing there."""
    if is_local(uri):
        for left in Path(absolute(uri)).rglob(f".*{_UNFINISHED}"):
            left.unlink(missing_ok=True)


def remove(uri: str) -> None:
    """Remove a file or a whole folder; no error if there is none."""
    fs, path = filesystem(uri)

    def act() -> None:
        if isinstance(fs, LocalFileSystem) or not patterns.has_magic(path):
            if fs.exists(path):
                fs.rm(path, recursive=True)
        else:
            # `rm` would take the path for a pattern.
            for name in fs.find(path):
                fs.rm_file(name)

    _with_patience(uri, act)


def children(uri: str) -> list[str]:
    """Names of the folders right under a folder, sorted; hidden ones left out.

    Raises:
        DataError: if the folder does not exist.
    """
    fs, path = filesystem(uri)
    try:
        entries = _with_patience(uri, lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{uri}: no such folder") from error
    names = [e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory"]
    return sorted(name for name in names if not name.startswith("."))


def files(uri: str) -> list[tuple[str, int]]:
    """Every file under a folder, at any depth, as (URI, size in bytes), sorted by URI; none if it is missing."""
    return [(name, int(info["size"] or 0)) for name, info in _found(uri)]


def _found(uri: str) -> list[tuple[str, dict[str, Any]]]:
    fs, path = filesystem(uri)
    try:
        found = _with_patience(uri, lambda: fs.find(path, detail=True))
    except FileNotFoundError:
        # Some stores say so of a bucket that is missing.
        return []
    return sorted(((_uri(fs, name, uri), info) for name, info in found.items()), key=lambda pair: pair[0])


def versions(uri: str) -> list[tuple[str, str]]:
    """Every file under a folder, at any depth, as (URI, version), sorted by URI; none if it is missing.

    A file that is written anew has another version: its size with its checksum or tag in an object store, with its time
    of modification on a disk. All of it comes with the listing.
    """
    return [(name, _version(info)) for name, info in _found(uri)]


def _version(info: dict[str, Any]) -> str:
    if info.get("islink"):
        # What is listed of a link is its own time.
        info = info | {"mtime": Path(info["name"]).stat().st_mtime}
    marks = (info[name] for name in _CHANGING if info.get(name))
    return f"{int(info['size'] or 0)} {next(marks, '')}"


def stream(uri: str) -> Iterator[str]:
    """URIs of every file under a folder or prefix at any depth, or of the one file that it names; none if missing.

    A page of a listing at a time: what is listed is never held as a whole. Folders are listed side by side where the
    filesystem has folders; the order is the filesystem's.

    Raises:
        ConfigError: if its bucket is not there, where the store says so.
    """
    fs, path = filesystem(uri)
    if _with_patience(uri, lambda: fs.isfile(path)):
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
    page: dict[str, Any] = {"IsTruncated": True}
    prefix = f"{key.rstrip('/')}/" if key else ""
    while page["IsTruncated"]:
        token = page.get("NextContinuationToken")
        more = {"ContinuationToken": token} if token else {}
        ask = partial(fs.call_s3, "list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        page = _with_patience(uri, ask)
        yield from (f"{bucket}/{o['Key']}" for o in page.get("Contents", ()) if not o["Key"].endswith("/"))


def _stream_folders(fs: Any, path: str, uri: str) -> Iterator[str]:
    def listed(folder: str) -> tuple[list[str], list[str]]:
        try:
            entries = _with_patience(uri, lambda: fs.ls(folder, detail=True))
        except FileNotFoundError:
            return [], []
        folders = sorted(e["name"] for e in entries if e["type"] == "directory" and e["name"].rstrip("/") != folder)
        return folders, sorted(e["name"] for e in entries if _is_file(fs, e))

    with ThreadPoolExecutor(_LISTERS) as pool:
        waiting = deque([pool.submit(listed, path.rstrip("/"))])
        while waiting:
            folders, names = waiting.popleft().result()
            waiting.extend(pool.submit(listed, folder) for folder in folders)
            yield from names


def _is_file(fs: Any, entry: dict[str, Any]) -> bool:
    """Also where it is a link to one. Links to folders are not followed: they may lead back."""
    return entry["type"] == "file" or bool(entry.get("islink") and fs.isfile(entry["name"]))


def _uri(fs: Any, path: str, under: str) -> str:
    """URI of a path, with scheme and account of the URI that it was found under."""
    if isinstance(fs, LocalFileSystem):
        return path
    root = str(fs._strip_protocol(under)).rstrip("/")
    if path == root:
        return under
    return f"{under.rstrip('/')}/{path.removeprefix(root).lstrip('/')}"


def glob(uri: str) -> list[str]:
    """URIs of the files that a pattern names (`*`, `?`, `[…]`, and `**` for any depth), sorted.

    Raises:
        ConfigError: if it is no pattern.
    """
    fs, path = filesystem(uri)
    try:
        found = _with_patience(uri, lambda: fs.glob(path, detail=True))
    except (ValueError, re.error) as error:
        raise ConfigError(f"{uri}: {error}") from error
    plain = re.split(r"[*?\[]", uri, maxsplit=1)[0].rsplit("/", 1)[0]
    return sorted(_uri(fs, name, plain) for name, info in found.items() if _is_file(fs, info))


def parquet(table: pa.Table, row_group: int | None = None) -> bytes:
    """A table as the bytes of a Parquet file, in row groups of so many rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_table(uri: str) -> pa.Table:
    """A stored Parquet file as a table. Raises as `read` does."""
    return pq.read_table(pa.BufferReader(read(uri)))


def read_row_group(uri: str, number: int) -> pa.Table:
    """One row group of a stored Parquet file, without reading the others. Raises as `read` does."""
    fs, path = filesystem(uri)

    def act() -> pa.Table:
        with fs.open(path) as file:
            return pq.ParquetFile(file).read_row_group(number)

    return _with_patience(uri, act)


def count_rows(uri: str) -> int:
    """Rows of a stored Parquet file, from its end alone. Raises as `read` does."""
    fs, path = filesystem(uri)

    def act() -> int:
        with fs.open(path) as file:
            return int(pq.ParquetFile(file).metadata.num_rows)

    return _with_patience(uri, act)


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The same filesystem as pyarrow and Ray take it, and the URI's path on it."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return pafs.LocalFileSystem(), path
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
