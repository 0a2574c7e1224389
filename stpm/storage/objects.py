"""One object: read, write, create, remove. A reader sees the old bytes or the new ones, never half of them."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, TypeVar

from fsspec.implementations.local import LocalFileSystem

from stpm.errors import ConfigError, TooLongError
from stpm.storage.retries import with_retries
from stpm.storage.uris import absolute, filesystem, is_local

_UNFINISHED = ".part"
# Bytes of an object to fetch before its size is asked for, which is one more request.
_FIRST_BYTES = 32 * 2**20

# Errors that say that a disk, or the user's share of it, is full.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# Errors that say that a path leads nowhere.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

T = TypeVar("T")


def exists(uri: str) -> bool:
    """Return whether there is a file or a folder.

    Raises:
        OSError: if storage does not say.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        # `fs.exists` would return false for any failure.
        try:
            Path(path).stat()
        except OSError as error:
            if error.errno in _NO_FILE:
                return False
            raise
        return True
    return bool(with_retries(uri, lambda: fs.exists(path)))


def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read an object, or its bytes from `start` to before `end`.

    Raises:
        FileNotFoundError: if it does not exist.
        OSError: if it cannot be read, after retries.
    """
    if start is not None and end is not None and end <= start:
        # As an HTTP range this would mean the whole object.
        return b""
    fs, path = filesystem(uri)
    return with_retries(uri, lambda: bytes(fs.cat_file(path, start=start, end=end)))


def read_at_most(uri: str, limit: int) -> bytes:
    """Read an object of at most `limit` bytes, without fetching all of a longer one.

    Raises:
        TooLongError: if it is longer.
        FileNotFoundError: if it does not exist, or is not a file.
        OSError: if it cannot be read, after retries.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            # Reading a pipe or a device might never end.
            raise FileNotFoundError(f"{path}: not a file")
        check_size(path, found.st_size, limit)
        return Path(path).read_bytes()

    def read_start(length: int) -> bytes:
        try:
            return bytes(fs.cat_file(path, start=0, end=length))
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:
            # Most stores refuse any range of an empty object.
            with suppress(Exception):
                if fs.info(path)["size"] == 0:
                    return b""
            raise

    data = with_retries(uri, lambda: read_start(min(limit, _FIRST_BYTES) + 1))
    if len(data) > _FIRST_BYTES:
        check_size(path, with_retries(uri, lambda: fs.info(path))["size"] or 0, limit)
        data = with_retries(uri, lambda: read_start(limit + 1))
    check_size(path, len(data), limit)
    return data


def check_size(path: str, size: int, limit: int) -> None:
    """Raise TooLongError if an object has more bytes than the limit."""
    if size > limit:
        raise TooLongError(f"{path}: has more than {limit:,} bytes")


def publish(uri: str, data: bytes, *, durable: bool = True) -> None:
    """Write an object so that no reader ever sees a part of it.

    Object stores are atomic per object. On a local disk, write a temporary file and rename it.

    Args:
        durable: wait until a local disk keeps it through a power cut.

    Raises:
        ConfigError: if its bucket does not exist.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with writing(uri, durable=durable) as file:
            file.write(data)
    else:
        _in_bucket(uri, lambda: fs.pipe_file(path, data))


@contextmanager
def writing(uri: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a file, and `publish` what is written to it once the block ends without an exception.

    For an object store it is a temporary file of this machine: nothing of it need be in memory.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        with NamedTemporaryFile() as file:
            yield file
            file.flush()
            _in_bucket(uri, lambda: fs.put_file(file.name, path))
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Open it as any new file: it gets the permissions that the umask leaves.
    temporary = target.parent / f".{uuid.uuid4().hex}{_UNFINISHED}"
    with _removed_if_unfinished(temporary, target):
        with temporary.open("xb") as file:
            yield file
            if durable:
                # Without this, a power cut may keep the new name and lose the bytes: the file is then empty.
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(target)
    if durable:
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            # Some network filesystems cannot, and need not.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(folder)


@contextmanager
def _removed_if_unfinished(file: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        file.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            # The system's own error does not say which disk it is.
            error.filename = str(target)
        raise


def create(uri: str, data: bytes) -> bool:
    """Write an object if it does not exist; return False, and change nothing, if it does.

    If several callers try at once, one succeeds: on local disks, and in stores with a conditional put (S3, Google and
    Azure). On a local disk a reader may find the object before its bytes.

    Args:
        data: bytes that no other caller writes. They show whose put succeeded if its answer was lost.

    Raises:
        ConfigError: if its bucket does not exist, or the store has no conditional put.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = target.open("xb")
        except FileExistsError:
            return False
        with _removed_if_unfinished(target, target), file:
            file.write(data)
        return True

    def act() -> bool:
        try:
            fs.pipe_file(path, data, mode="create")
        except OSError as error:
            # s3fs raises EINVAL for a condition that failed, where the server does not name it.
            if isinstance(error, FileExistsError) or error.errno == errno.EINVAL:
                return False
            if error.errno == errno.ENOSYS:
                raise ConfigError(
                    f"{uri}: this store answers 501 to a conditional write (If-None-Match: *), without which two runs "
                    "could write to one folder; name a folder in a store that has them, such as Amazon S3, Google "
                    "Cloud Storage or Azure, or on a disk"
                ) from error
            raise
        return True

    return _in_bucket(uri, act) or read(uri) == data


def _in_bucket(uri: str, write: Callable[[], T]) -> T:
    """Write to an object store, with retries. Raise ConfigError if the bucket does not exist."""
    try:
        return with_retries(uri, write)
    except FileNotFoundError as error:
        raise ConfigError(f"{uri}: cannot be written, there is no such bucket or container; make it") from error


def sync(uri: str) -> None:
    """Wait until the local disks keep everything written so far, by any process; an object store needs nothing."""
    if is_local(uri):
        os.sync()


def remove_unfinished(uri: str) -> None:
    """Remove the unfinished files of killed writers under a local folder; nobody may be writing there."""
    if is_local(uri):
        # No other hidden file is taken for one.
        for unfinished in Path(absolute(uri)).rglob(f".{32 * '[0-9a-f]'}{_UNFINISHED}"):
            unfinished.unlink(missing_ok=True)


def remove(uri: str) -> None:
    """Remove a file or a whole folder, if it exists.

    Raises:
        PermissionError: if it, or a part of it, is still there.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        if exists(uri):
            fs.rm(path, recursive=True)
        return

    def act() -> None:
        if glob.has_magic(path):
            # `rm` would take the path for a pattern.
            for name in fs.find(path):
                fs.rm_file(name)
        elif fs.exists(path):
            fs.rm(path, recursive=True)

    # S3 answers a request to delete many objects with 200, whatever became of each.
    for _ in range(2):
        with_retries(uri, act)
        if not exists(uri):
            return
    raise PermissionError(f"{uri}: not all of it could be removed; check that the credentials may delete")


def digest(data: bytes) -> str:
    """Return the SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
