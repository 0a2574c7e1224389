"""Where images come from: folders, globs, tar archives, manifests, lists; as manifest rows, a chunk at a time."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from stpm import storage
from stpm.errors import ConfigError, DataError
from stpm.images import SUFFIXES
from stpm.scoring.schema import MANIFEST, table, taken, with_carried

STANDARD_INPUT = "-"
CHUNK = 10_000

_MANIFESTS = (".parquet", ".csv", ".jsonl", ".ndjson")
_ARCHIVE = ".tar"
_MEMBER = "#"
_GLOB = re.compile(r"[*?\[]")
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Categories:
    """Which category an image has, where its manifest does not say.

    Args:
        everywhere: the one of every image, or "".
        pattern: over the last parts of the path, such as `{category}/{date}/{name}`, or "".

    Raises:
        ConfigError: if the pattern names no category, or both are given.
    """

    everywhere: str = ""
    pattern: str = ""

    def __post_init__(self) -> None:
        if self.everywhere and self.pattern:
            raise ConfigError("--category and --category-from are both given; give one")
        names = _FIELD.findall(self.pattern)
        if self.pattern and (names.count("category") != 1 or len(set(names)) < len(names)):
            raise ConfigError(
                f"category-from is {self.pattern!r}; name {{category}} once, and no name twice, as in "
                "{category}/{date}/{name}"
            )

    def of(self, uri: str) -> str:
        """The category of an image, or "" if the pattern does not match its path."""
        if not self.pattern:
            return self.everywhere
        found = self._expression.search(uri)
        return found["category"] if found else ""

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        parts = _FIELD.split(self.pattern.strip("/"))
        literal, names = parts[::2], parts[1::2]
        text = re.escape(literal[0])
        for name, after in zip(names, literal[1:], strict=True):
            text += f"(?P<{name}>[^/]+)" + re.escape(after)
        return re.compile(f"(?:^|/){text}$")


@dataclass(frozen=True)
class Allowed:
    """What URIs of a manifest may name: a manifest is foreign data, and must not make a job read its host's files.

    Args:
        prefixes: URIs that are allowed, with all that is under them.
    """

    prefixes: tuple[str, ...]

    @classmethod
    def by(cls, manifest: str, prefixes: Sequence[str]) -> Allowed:
        """The given prefixes, or else the bucket of the manifest, or its folder if it is a local file."""
        if prefixes:
            return cls(tuple(storage.absolute(prefix) for prefix in prefixes))
        if storage.is_local(manifest):
            return cls((str(Path(storage.absolute(manifest)).parent),))
        scheme, _, path = manifest.partition("://")
        return cls((f"{scheme}://{path.split('/', 1)[0]}",))

    def refusal(self, uri: str) -> str:
        """Why a URI may not be read, or "" if it may."""
        if "::" in uri or ".." in uri.split("/") or not any(_under(uri, prefix) for prefix in self.prefixes):
            return f"the manifest may name only what is under {', '.join(self.prefixes)}; see --allow"
        return ""


def _under(uri: str, prefix: str) -> bool:
    return uri == prefix or uri.startswith(f"{prefix.rstrip('/')}/")


class Place(NamedTuple):
    """An image: its URI, and where in its tar archive it lies; a length of -1 is a file of its own."""

    uri: str
    offset: int = 0
    length: int = -1

    @property
    def path(self) -> str:
        """What a pattern over the path is matched with: within an archive, the member's own."""
        return self.uri if self.length < 0 else self.uri[len(archive_of(self.uri)) + len(_MEMBER) :]


def archive_of(uri: str) -> str:
    """The archive that a member's URI names: `shard.tar#dir/name.png` to `shard.tar`."""
    return uri[: uri.index(f"{_ARCHIVE}{_MEMBER}") + len(_ARCHIVE)]


def rows_of(
    sources: Sequence[str], categories: Categories, allow: Sequence[str] = (), lines: Iterable[str] = ()
) -> Iterator[pa.Table]:
    """Manifest rows of several sources, at most `CHUNK` at a time; ids are not yet there, nor doubles found.

    Args:
        sources: folders, prefixes, globs, tar archives, manifests (Parquet, CSV, JSON lines) or `-` for a list of URIs.
        categories: for images whose manifest does not name one.
        allow: prefixes that a manifest's URIs may have, if not those of the manifest itself.
        lines: the list, a URI per line.

    Raises:
        DataError: if a source has no image, or a manifest or an archive cannot be read.
        ConfigError: if a manifest has a column that scoring writes itself.
    """
    for source in sources:
        if source != STANDARD_INPUT and source.lower().endswith(_MANIFESTS) and not _GLOB.search(source):
            yield from _of_manifest(storage.absolute(source), categories, Allowed.by(source, allow))
            continue
        found = False
        for places in _chunks(_listed(source, lines)):
            found = True
            yield _table(places, [categories.of(place.path) for place in places], [""] * len(places))
        if not found:
            raise DataError(f"{source}: no images here (of {', '.join(SUFFIXES)}, or in {_ARCHIVE})")


def _listed(source: str, lines: Iterable[str]) -> Iterator[Place]:
    if source == STANDARD_INPUT:
        yield from (Place(storage.absolute(line.strip())) for line in lines if line.strip())
        return
    uri = storage.absolute(source)
    for name in storage.glob(uri) if _GLOB.search(uri) else storage.stream(uri):
        if name.lower().endswith(SUFFIXES):
            yield Place(name)
        elif name.endswith(_ARCHIVE):
            yield from _members(name)


def _members(uri: str) -> Iterator[Place]:
    """The images of a tar archive: headers are read, and images skipped."""
    fs, path = storage.filesystem(uri)
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    yield Place(f"{uri}{_MEMBER}{member.name}", member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{uri}: this archive cannot be read: {error}; write it without compression") from error


def _chunks(places: Iterator[Place]) -> Iterator[list[Place]]:
    while chunk := list(islice(places, CHUNK)):
        yield chunk


def _table(places: list[Place], categories: list[str], refusals: list[str], known: pa.Table | None = None) -> pa.Table:
    """Rows with a category and no refusal are good; `known` gives labels, masks and the user's own columns."""
    kinds, messages = [], []
    for category, refusal in zip(categories, refusals, strict=True):
        if refusal:
            kinds.append("not_allowed")
            messages.append(refusal)
        else:
            kinds.append("" if category else "no_model")
            messages.append("" if category else "the image has no category; see --category and --category-from")
    uris = [place.uri for place in places]
    known = pa.table({"uri": uris}) if known is None else known
    columns: dict[str, list[Any]] = {
        "image_id": [0] * len(uris),
        "uri": uris,
        "category": categories,
        "label": _texts(known, "label") or [""] * len(uris),
        "mask": _texts(known, "mask") or [""] * len(uris),
        "error_kind": kinds,
        "error_message": messages,
        "tar_offset": [place.offset for place in places],
        "tar_length": [place.length for place in places],
    }
    return with_carried(table(columns, MANIFEST), known)


def _texts(rows: pa.Table, name: str) -> list[str]:
    if name not in rows.schema.names:
        return []
    return [value or "" for value in rows[name].cast(pa.string()).to_pylist()]


def _of_manifest(uri: str, categories: Categories, allowed: Allowed) -> Iterator[pa.Table]:
    folder = uri.rsplit("/", 1)[0]
    empty = True
    for rows in _batches(uri):
        empty = False
        if "uri" not in rows.schema.names:
            raise DataError(f"{uri}: no column `uri`; its columns are {', '.join(rows.schema.names)}")
        if clash := taken(rows.schema):
            raise ConfigError(f"{uri}: column {clash[0]} is one that scoring writes itself; rename it")
        uris = [_resolved(name, folder) for name in _texts(rows, "uri")]
        named = _texts(rows, "category") or [""] * len(uris)
        chosen = [name or categories.of(image) for name, image in zip(named, uris, strict=True)]
        masks = [_resolved(mask, folder) if mask else "" for mask in _texts(rows, "mask")]
        refusals = [allowed.refusal(image) for image in uris]
        if masks:
            refusals = [r or (allowed.refusal(m) if m else "") for r, m in zip(refusals, masks, strict=True)]
        yield _table([Place(image) for image in uris], chosen, refusals, _with_masks(rows, masks))
    if empty:
        raise DataError(f"{uri}: this manifest has no rows")


def _with_masks(rows: pa.Table, masks: list[str]) -> pa.Table:
    if not masks:
        return rows
    return rows.set_column(rows.schema.get_field_index("mask"), "mask", pa.array(masks, pa.string()))


def _resolved(name: str, folder: str) -> str:
    """A URI of a manifest: itself, or under the manifest's folder if it is relative."""
    if "://" in name or name.startswith("/"):
        return storage.absolute(name) if storage.is_local(name) else name
    return f"{folder}/{PurePosixPath(name)}"


def _batches(uri: str) -> Iterator[pa.Table]:
    """A manifest's rows, some thousands at a time."""
    filesystem, path = storage.arrow_filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file:
            if uri.lower().endswith(".parquet"):
                batches: Iterable[pa.RecordBatch] = pq.ParquetFile(file).iter_batches(CHUNK)
            elif uri.lower().endswith(".csv"):
                batches = pa_csv.open_csv(file)
            else:
                batches = pa_json.open_json(file)
            for batch in batches:
                rows = pa.Table.from_batches([batch])
                for start in range(0, rows.num_rows, CHUNK):
                    yield rows.slice(start, CHUNK)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{uri}: this manifest cannot be read: {error}") from error
