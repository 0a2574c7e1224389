"""The columns of a scored collection: one row per image, whatever became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa


def _field(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"description": description})


def _optional(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": f"{description}; null for a row with an error"})


_ERROR = [
    _field("error_kind", pa.string(), 'why the image could not be scored, "" if it was'),
    _field("error_message", pa.string(), "the same in words"),
]

_PLACE = [
    _field("archive_start", pa.int64(), "where in its archive the image begins: byte of a tar, row of a Parquet file"),
    _field("archive_length", pa.int64(), "how long it is there, -1 if the image is a file of its own"),
]

MANIFEST = pa.schema(
    [
        _field("image_id", pa.int64(), "hash of the URI"),
        _field("uri", pa.string(), "where the image is"),
        _field("category", pa.string(), "which model scores it"),
        _field("label", pa.string(), 'ground truth: "good" or a defect type, "" if unknown'),
        _field("mask", pa.string(), 'URI of the ground-truth mask, "" if there is none'),
        *_ERROR,
        *_PLACE,
    ]
)

_SIZE = [
    _optional("width", pa.int32(), "width of the original image, pixels"),
    _optional("height", pa.int32(), "height of the original image, pixels"),
    _optional("bytes", pa.int64(), "size of the file"),
]

DECODED = pa.schema([*MANIFEST, *_SIZE, _field("pixels", pa.large_binary(), "uint8 RGB at model size, row by row")])

_SCORE = [
    _optional("score", pa.float32(), "mean of the anomaly map's highest values; larger is more anomalous"),
    _optional("student_score", pa.float32(), "what the student adds to the score; null where scores are no sums"),
    _optional("memory_score", pa.float32(), "what the memory of normal features adds to the score; null as above"),
    _optional("p_value", pa.float32(), "conformal p-value against held-out normals, 0 to 1"),
    _optional("is_anomalous", pa.bool_(), "score > threshold"),
    _optional("threshold", pa.float32(), "score of the model that held-out normals exceed at the false-alarm rate"),
    _optional("peak_x", pa.int32(), "column of the largest anomaly, original pixels"),
    _optional("peak_y", pa.int32(), "row of the largest anomaly, original pixels"),
    _optional("area", pa.float32(), "share of pixels whose anomaly exceeds the threshold, 0 to 1"),
    _optional("seed", pa.int32(), "seed of the model's recipe"),
    _field("model_id", pa.string(), 'category and digest of the model, "" for a row with an error'),
]

_RAW_MAP = _optional(
    "anomaly_map", pa.large_binary(), "float32 at model size without padding, row by row, if asked for"
)

SCORED = pa.schema(
    [
        *DECODED,
        *_SCORE,
        _RAW_MAP,
        _field(
            "heat",
            pa.large_binary(),
            "uint8 grey levels at model size without padding, row by row",
        ),
    ]
)

OUTPUT = pa.schema(
    [
        *(field for field in MANIFEST if field not in (*_ERROR, *_PLACE)),
        *_SCORE,
        *_SIZE,
        _field("heatmap", pa.string(), 'palette PNG at model size, relative to the run folder, "" if none'),
        _field(
            "overlay",
            pa.string(),
            'image under its heatmap, in its own proportions, path as above, "" if none',
        ),
        *_ERROR,
        _optional("heatmap_png", pa.large_binary(), "the heatmap itself, if asked for"),
        _optional("overlay_png", pa.large_binary(), "the overlay itself, if asked for"),
        _RAW_MAP,
    ]
)


# Columns of a user's table that say what an image is. All of them are text.
GIVEN = ("uri", "category", "label", "mask")
# What each stage has of its own: a manifest may carry columns of any other name to the output.
_OWN = frozenset(name for schema in (MANIFEST, SCORED, OUTPUT) for name in schema.names)


def passthrough(schema: pa.Schema) -> list[str]:
    """Names of the columns that are the user's own."""
    return [name for name in schema.names if name not in _OWN]


def taken(names: Sequence[str]) -> list[str]:
    """Names of columns that a user's table may not have: those that scoring writes itself, in capitals too.

    Most programs that read tables take no notice of capitals.
    """
    return [name for name in names if name.lower() in _OWN and name not in GIVEN]


def with_passthrough(result: pa.Table, batch: pa.Table) -> pa.Table:
    """A stage's result with the user's own columns of the batch that it was made of."""
    for name in passthrough(batch.schema):
        result = result.append_column(batch.schema.field(name), batch[name])
    return result


def table(columns: Mapping[str, Sequence[Any] | pa.ChunkedArray], schema: pa.Schema) -> pa.Table:
    """Columns by name as a table of exactly this schema; those that are Arrow's already are not copied."""

    def column(field: pa.Field) -> pa.Array | pa.ChunkedArray:
        values = columns[field.name]
        if isinstance(values, pa.ChunkedArray):
            return values
        return _binary(values) if field.type == pa.large_binary() else pa.array(values, field.type)

    return pa.table([column(field) for field in schema], schema=schema)


def _binary(values: Sequence[bytes | memoryview | None]) -> pa.Array:
    """Bytes as an array of large_binary, copied once.

    `pa.array` keeps a reference to each memoryview for ever (pyarrow 16 to 26), and with it what the view shows.

    Args:
        values: views are of single bytes.
    """
    present = [value for value in values if value is not None]
    ends = np.cumsum([0, *(len(value or b"") for value in values)], dtype=np.int64)
    valid = pa.array([value is not None for value in values], pa.bool_())
    buffers = [valid.buffers()[1], pa.py_buffer(ends), pa.py_buffer(b"".join(present))]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)
