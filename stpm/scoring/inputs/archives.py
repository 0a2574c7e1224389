"""Images that are not files of their own: members of tar archives, and rows of Parquet files."""

from __future__ import annotations

import errno
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stpm import storage
from stpm.data.images import MAX_BYTES, SUFFIXES
from stpm.errors import DataError, ImageError, TooLongError, UriError
from stpm.scoring.inputs.shared_reads import SharedReads

TAR, PARQUET = ".tar", ".parquet"
# Of a column that holds whole image files: bytes, or a struct of `bytes` and `path`.
IMAGE_COLUMNS = ("image", "bytes")

_MEMBER = "#"
# Names that no file can have, or that lead to none.
_NO_FILE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)


class ImageRef(NamedTuple):
    """An image: its URI, and where in its archive it lies.

    In a tar, `start` and `length` are bytes; in a Parquet file `start` is the row and `length` 1. A length of -1 is a
    file of its own.
    """

    uri: str
    start: int = 0
    length: int = -1

    @property
    def path(self) -> str:
        """What a pattern over the path is matched with: in a tar the member's own, else that of the file."""
        if self.length < 0:
            return self.uri
        archive, member = split(self.uri)
        return member if archive.lower().endswith(TAR) else archive


def split(uri: str) -> tuple[str, str]:
    """The archive and the member that a URI names: `shard.tar#dir/name.png`, `shard.parquet#17`; ("", "") if none."""
    for kind in (TAR, PARQUET):
        end = uri.lower().find(f"{kind}{_MEMBER}") + len(kind)
        if end >= len(kind):
            return uri[:end], uri[end + 1 :]
    return "", ""


def row_of(uri: str, row: int) -> ImageRef:
    """The image in a row of a Parquet file."""
    return ImageRef(f"{uri}{_MEMBER}{row}", row, 1)


def members(uri: str) -> Iterator[ImageRef]:
    """The images of a tar archive: headers are read, and images skipped.

    Of several members with one name the last counts, as where the archive is unpacked. A hard link is the file that it
    leads to. Bytes of a name that are no UTF-8 are written %XX.

    Raises:
        DataError: if it cannot be read.
    """
    fs, path = storage.filesystem(uri)
    files: dict[str, ImageRef] = {}
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = posixpath.normpath(member.name)
                linked = files.get(posixpath.normpath(member.linkname))
                files.pop(name, None)
                place = f"{uri}{_MEMBER}{storage.as_utf8(member.name)}"
                if member.isfile():
                    files[name] = ImageRef(place, member.offset_data, member.size)
                elif member.islnk() and linked:
                    files[name] = linked._replace(uri=place)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{uri}: this archive cannot be read: {error}; write it without compression") from error
    return (place for place in files.values() if place.uri.lower().endswith(SUFFIXES))


def image_column(schema: pa.Schema) -> str:
    """Name of the column that holds image files, or ""."""
    return next((name for name in IMAGE_COLUMNS if name in schema.names and _is_bytes(schema.field(name).type)), "")


@contextmanager
def _reading_errors() -> Iterator[None]:
    """Raise whatever goes wrong while an image is fetched as an ImageError."""
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
            # It may come back with its disk.
            raise ImageError("unreadable", "no such folder; is its disk mounted?") from error
        raise ImageError("missing", "no such file") from error
    except pa.ArrowInvalid as error:
        raise ImageError("damaged", f"its archive: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_FILE:
            raise ImageError("missing", str(error)) from error
        # Whatever a client of some storage raises.
        raise ImageError("unreadable", f"{type(error).__name__}: {error}") from error


@_reading_errors()
def read(place: ImageRef, most: int = MAX_BYTES) -> bytes:
    """The bytes of an image.

    Args:
        place: where it is.
        most: bytes that it may have; of a longer file only the first are fetched.

    Raises:
        ImageError: whatever goes wrong, nothing else is raised.
    """
    if place.length < 0:
        return storage.read_at_most(place.uri, most)
    archive, _ = split(place.uri)
    if archive.lower().endswith(TAR):
        _check_size(place.uri, place.length, most)
        return storage.read(archive, place.start, place.start + place.length)
    return _row(archive, place.start, most)


@_reading_errors()
def read_uri(uri: str) -> bytes:
    """The bytes of an image of which only the URI is known: in a tar, it is searched for. Raises as `read` does."""
    archive, member = split(uri)
    if not archive:
        return read(ImageRef(uri))
    if archive.lower().endswith(PARQUET):
        return _row(archive, int(member), MAX_BYTES)
    for place in members(archive):
        if place.uri == uri:
            return read(place)
    raise ImageError("missing", f"{uri}: no such image in the archive")


def _row(uri: str, row: int, most: int) -> bytes:
    first = 0
    for number, rows in enumerate(_row_counts.get(uri)):
        if row < first + rows:
            found: bytes = _images.get((uri, number))[row - first].as_py() or b""
            _check_size(uri, len(found), most)
            return found
        first += rows
    raise ImageError("missing", f"{uri}: has {first} rows, row {row} is wanted")


def _check_size(uri: str, size: int, most: int) -> None:
    if size > most:
        raise TooLongError(f"{uri}: has more than {most:,} bytes")


def _read_row_counts(uri: str) -> tuple[int, ...]:
    filesystem, path = storage.arrow_filesystem(uri)
    metadata = pq.read_metadata(path, filesystem=filesystem)
    return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


def _read_images(row_group: tuple[str, int]) -> pa.ChunkedArray:
    uri, number = row_group
    filesystem, path = storage.arrow_filesystem(uri)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        name = image_column(file.schema_arrow)
        # Threads of Arrow's, which all archives share, must not wait for one that hangs.
        column = file.read_row_group(number, columns=[name], use_threads=False)[name]
    if pa.types.is_struct(column.type):
        return pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
    return column


_row_counts = SharedReads(_read_row_counts, kept=64)
_images = SharedReads(_read_images, kept=2)


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
