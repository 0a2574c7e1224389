"""Read images, also those inside archives: members of tar files, and rows of Parquet files."""

from __future__ import annotations

import errno
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stpm import storage
from stpm.data.decoding import MAX_BYTES, SUFFIXES
from stpm.data.shared_reads import SharedReads
from stpm.errors import DataError, ImageError, TooLongError, UriError
from stpm.names import as_utf8

TAR, PARQUET = ".tar", ".parquet"
# The end of an archive's own URI. Case is ignored by the pattern: "İ" in lower case is two characters, and would shift
# positions.
_ARCHIVE = re.compile(r"\.(?:tar#|parquet#(?=\d+\Z))", re.IGNORECASE)
# Names of a column that holds whole image files: bytes, or a struct of `bytes` and `path`.
IMAGE_COLUMNS = ("image", "bytes")

# Bytes of a tar that are fetched at a time for its headers. The clouds' clients would fetch 5 to 50 MB ahead: in most
# archives, everything between two headers.
_TAR_BYTES = 2**18

# Files up to this size are fetched side by side. A larger one is fetched when it is its turn to be decoded.
SMALL_BYTES = 16 * 2**20

# Errors of names that no file can have, or that lead to no file.
_NO_FILE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)


class ImageRef(NamedTuple):
    """The URI of an image, and its position if it is in an archive: `shard.tar#dir/name.png`, `shard.parquet#17`.

    In a tar, `start` and `length` are bytes; in a Parquet file `start` is the row and `length` 1. A length of -1 means
    that the image is a file of its own.
    """

    uri: str
    start: int = 0
    length: int = -1

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> ImageRef:
        """Return the image of a row of MANIFEST or OUTPUT."""
        return cls(row["uri"], row["archive_start"], row["archive_length"])

    @property
    def path(self) -> str:
        """The path that a category pattern is matched with: a tar member's own path, else that of the file."""
        if self.length < 0:
            return self.uri
        archive, member = split_uri(self.uri)
        return member if _is_tar(archive) else archive


def split_uri(uri: str) -> tuple[str, str]:
    """Split a URI into archive and member; ("", "") if it names no archive."""
    match = _ARCHIVE.search(uri)
    return (uri[: match.end() - 1], uri[match.end() :]) if match else ("", "")


def tar_images(uri: str) -> tuple[list[ImageRef], ImageError | None]:
    """List the images of a tar archive from its headers. Images longer than `_TAR_BYTES` are not read.

    Of several members with one name the last counts, as it would after unpacking. A hard link stands for the file that
    it points to. Bytes of a name that are not UTF-8 are written %XX. Return also an error if the archive is damaged
    behind the last image, or compressed. Raise DataError if storage does not give it.
    """
    fs, path = storage.filesystem(uri)
    files: dict[str, ImageRef] = {}
    error = None
    try:
        with (
            storage.as_os_errors(),
            fs.open(path, "rb", block_size=_TAR_BYTES, cache_type="readahead") as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            while member := archive.next():
                # The archive would keep all that it knows of each of its members.
                archive.members.clear()  # type: ignore[attr-defined]
                name = posixpath.normpath(member.name)
                link_target = files.get(posixpath.normpath(member.linkname))
                files.pop(name, None)
                member_uri = f"{uri}#{as_utf8(member.name)}"
                if member.isfile():
                    files[name] = ImageRef(member_uri, member.offset_data, member.size)
                elif member.islnk() and link_target:
                    files[name] = link_target._replace(uri=member_uri)
            # tarfile takes a header that is damaged or cut off for the end, which is a block of zeros.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a header nor the end at byte {archive.offset}")
    except (ValueError, tarfile.TarError) as problem:
        error = ImageError("damaged", f"this archive cannot be read to its end: {problem}; write it uncompressed")
    except OSError as problem:
        raise DataError(f"{uri}: this archive cannot be read: {problem}") from problem
    return [image for image in files.values() if image.uri.lower().endswith(SUFFIXES)], error


def image_column(schema: pa.Schema) -> str:
    """Return the name of the column that holds image files, or ""."""
    return next((name for name in IMAGE_COLUMNS if name in schema.names and _is_bytes(schema.field(name).type)), "")


@contextmanager
def _as_image_errors() -> Iterator[None]:
    """Raise any error of fetching an image as an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UriError as error:
        raise ImageError("bad_name", str(error)) from error
    except TooLongError as error:
        raise ImageError("too_large", str(error)) from error
    except FileNotFoundError as error:
        if error.filename and not Path(error.filename).parent.exists():
            # The disk may be mounted again.
            raise ImageError("unreadable", "no such folder; is its disk mounted?") from error
        raise ImageError("missing", "no such file") from error
    except pa.ArrowInvalid as error:
        raise ImageError("damaged", f"the file that holds it: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_FILE:
            raise ImageError("missing", str(error)) from error
        # Storage clients raise errors of any class.
        raise ImageError("unreadable", f"{type(error).__name__}: {error}") from error


@_as_image_errors()
def read(image: ImageRef, max_bytes: int = MAX_BYTES) -> bytes:
    """Read the file of an image; of one longer than `max_bytes`, only its beginning. Raise nothing but ImageError."""
    if image.length < 0:
        return storage.read_at_most(image.uri, max_bytes)
    archive, _ = split_uri(image.uri)
    if _is_tar(archive):
        storage.check_size(image.uri, image.length, max_bytes)
        return storage.read(archive, image.start, image.start + image.length)
    return _read_parquet_row(archive, image.start, max_bytes)


def read_small(image: ImageRef) -> bytes | None:
    """Read an image, or return None if its file is longer than SMALL_BYTES. Raises as `read` does."""
    try:
        return read(image, SMALL_BYTES)
    except ImageError as error:
        if error.kind != "too_large":
            raise
        return None


@_as_image_errors()
def read_uri(uri: str) -> bytes:
    """Read an image by its URI alone: a tar is searched for the member. Raises as `read` does."""
    archive, member = split_uri(uri)
    if not archive:
        return read(ImageRef(uri))
    if not _is_tar(archive):
        return _read_parquet_row(archive, int(member), MAX_BYTES)
    fs, path = storage.filesystem(archive)
    if image := _tar_members.get((archive, str(fs.ukey(path)))).get(uri):
        return read(image)
    raise ImageError("missing", f"{uri}: no such image in the archive")


def _read_parquet_row(uri: str, row: int, max_bytes: int) -> bytes:
    first = 0
    with _arrow_errors(uri):
        for group, rows in enumerate(_row_counts.get(uri)):
            if row < first + rows:
                data: bytes = _row_groups.get((uri, group))[row - first].as_py() or b""
                storage.check_size(uri, len(data), max_bytes)
                return data
            first += rows
    raise ImageError("missing", f"{uri}: has {first} rows, row {row} is wanted")


@contextmanager
def _arrow_errors(uri: str) -> Iterator[None]:
    """Tell damaged bytes and a missing file apart from failures of storage."""
    try:
        yield
    except FileNotFoundError as error:
        if storage.is_local(uri):
            # Arrow does not set it.
            error.filename = error.filename or storage.filesystem(uri)[1]
        elif storage.exists(uri):
            # Arrow takes any failure of a store for a missing file.
            raise OSError(f"{uri}: cannot be opened") from error
        raise
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            # Such as a connection that broke: it may be there again at the next request.
            raise
        # Of Arrow for bytes that it cannot decode, or of a store: then this fails, too.
        storage.read(uri, 0, 4)
        raise ImageError("damaged", f"the file that holds it: {' '.join(str(error).split())}") from error


def _read_row_counts(uri: str) -> tuple[int, ...]:
    filesystem, path = storage.arrow_filesystem(uri)
    metadata = pq.read_metadata(path, filesystem=filesystem)
    return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


def _read_row_group(uri_and_group: tuple[str, int]) -> pa.ChunkedArray:
    uri, group = uri_and_group
    filesystem, path = storage.arrow_filesystem(uri)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        name = image_column(file.schema_arrow)
        # All archives share Arrow's threads: a read that hangs must not block one of them.
        column = file.read_row_group(group, columns=[name], use_threads=False)[name]
    if pa.types.is_struct(column.type):
        return pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
    return column


# Of a tar, by its URI and a key that changes when its bytes do.
_tar_members = SharedReads[tuple[str, str], dict[str, ImageRef]](
    lambda version: {image.uri: image for image in tar_images(version[0])[0]}, max_results=2
)
_row_counts = SharedReads(_read_row_counts, max_results=64)
_row_groups = SharedReads(_read_row_group, max_results=2)


def _is_tar(archive: str) -> bool:
    return archive.lower().endswith(TAR)


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
