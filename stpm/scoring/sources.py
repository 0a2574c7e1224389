"""Where images come from: folders, prefixes, globs, manifests, a list of URIs; as manifest rows, a chunk at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

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

    @property
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


def rows_of(
    sources: Sequence[str], categories: Categories, allow: Sequence[str] = (), lines: Iterable[str] = ()
) -> Iterator[pa.Table]:
    """Manifest rows of several sources, at most `CHUNK` at a time; ids are not yet there, nor doubles found.

    Args:
        sources: folders, prefixes, globs, manifests (Parquet, CSV, JSON lines) or `-` for a list of URIs.
        categories: for images whose manifest does not name one.
        allow: prefixes that a manifest's URIs may have, if not those of the manifest itself.
        lines: the list, a URI per line.

    Raises:
        DataError: if a source has no image, or a manifest cannot be read.
        ConfigError: if a manifest has a column that scoring writes itself.
    """
    for source in sources:
        if source != STANDARD_INPUT and source.lower().endswith(_MANIFESTS) and not _GLOB.search(source):
            yield from _of_manifest(storage.absolute(source), categories, Allowed.by(source, allow))
            continue
        found = False
        for uris in _chunks(_listed(source, lines)):
            found = True
            yield _table(uris, [categories.of(uri) for uri in uris], [""] * len(uris))
        if not found:
            raise DataError(f"{source}: no images here (of {', '.join(SUFFIXES)})")


def _listed(source: str, lines: Iterable[str]) -> Iterator[str]:
    if source == STANDARD_INPUT:
        yield from (storage.absolute(line.strip()) for line in lines if line.strip())
        return
    uri = storage.absolute(source)
    found = storage.glob(uri) if _GLOB.search(uri) else storage.stream(uri)
    yield from (name for name in found if name.lower().endswith(SUFFIXES))


def _chunks(uris: Iterator[str]) -> Iterator[list[str]]:
    while chunk := list(islice(uris, CHUNK)):
        yield chunk


def _table(uris: list[str], categories: list[str], refusals: list[str], known: pa.Table | None = None) -> pa.Table:
    """Rows with a category and no refusal are good; `known` gives labels, masks and the user's own columns."""
    kinds, messages = [], []
    for category, refusal in zip(categories, refusals, strict=True):
        if refusal:
            kinds.append("not_allowed")
            messages.append(refusal)
        else:
            kinds.append("" if category else "no_model")
            messages.append("" if category else "the image has no category; see --category and --category-from")
    known = pa.table({"uri": uris}) if known is None else known
    columns: dict[str, list[Any]] = {
        "image_id": [0] * len(uris),
        "uri": uris,
        "category": categories,
        "label": _texts(known, "label") or [""] * len(uris),
        "mask": _texts(known, "mask") or [""] * len(uris),
        "error_kind": kinds,
        "error_message": messages,
    }
    return with_carried(table(columns, MANIFEST), known)


def _texts(rows: pa.Table, name: str) -> list[str]:
    if name not in rows.schema.names:
        return []
    return [value or "" for value in rows[name].cast(pa.string()).to_pylist()]


def _of_manifest(uri: str, categories: Categories, allowed: Allowed) -> Iterator[pa.Table]:
    folder = uri.rsplit("/", 1)[0]
    for rows in _batches(uri):
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
        yield _table(uris, chosen, refusals, _with_masks(rows, masks))


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
