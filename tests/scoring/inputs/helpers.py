"""Manifest rows as dictionaries, and tables to make them from."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from stpm import storage
from stpm.data import image_files
from stpm.data.image_files import ImageRef
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import ManifestRow, make_rows
from stpm.scoring.inputs.sources import image_rows

NUT = CategoryRule("nut")


def rows(*sources: str, rule: CategoryRule = NUT, **options: Any) -> list[dict[str, Any]]:
    chunks = list(image_rows(sources, rule, **options))
    found: list[dict[str, Any]] = pa.concat_tables(chunks, promote_options="default").to_pylist()
    return found


def list_rows(uris: Iterable[str]) -> pa.Table:
    return make_rows([ManifestRow(ImageRef(uri), "nut") for uri in uris])


def read_row(row: Mapping[str, Any]) -> bytes:
    """Read the image of a manifest row."""
    return image_files.read(ImageRef.of_row(row))


def write_table(uri: str, records: Sequence[Mapping[str, object]]) -> None:
    kind = uri.rsplit(".", 1)[1]
    if kind == "parquet":
        data = storage.encode_parquet(pa.Table.from_pylist(records))
    elif kind == "csv":
        names = list(records[0])
        data = "\n".join([",".join(names), *(",".join(str(r[n]) for n in names) for r in records)]).encode()
    else:
        data = "\n".join(json.dumps(record) for record in records).encode()
    storage.publish(uri, data)
