"""The columns of each stage's rows. Every image of a run is one row from the manifest to the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stpm.errors import EXTERNAL_ERRORS, ImageError

# Ids of images, or numbers of rows.
Int64Array = npt.NDArray[np.int64]


def _field(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"description": description})


def _optional(name: str, kind: pa.DataType, description: str, null: str = "for a row with an error") -> pa.Field:
    return pa.field(name, kind, metadata={"description": f"{description}; null {null}"})


_ERROR = [
    _field("error_kind", pa.string(), 'kind of error that left the image without a score, "" if it has one'),
    _field("error_message", pa.string(), "message of that error"),
]

_ARCHIVE_POSITION = [
    _field("archive_start", pa.int64(), "start of the image in its archive: byte of a tar, row of a Parquet file"),
    _field("archive_length", pa.int64(), "length of the image in its archive, -1 if it is a file of its own"),
]

MANIFEST = pa.schema(
    [
        _field("image_id", pa.int64(), "hash of the URI"),
        _field("uri", pa.string(), "URI of the image"),
        _field("category", pa.string(), "category, whose model scores the image"),
        _field("label", pa.string(), 'ground truth: "good" or a defect type, "" if unknown'),
        _field("mask", pa.string(), 'URI of the ground-truth mask, "" if there is none'),
        _field("roi", pa.string(), 'URI of the region of interest of this image alone, "" if there is none'),
        *_ERROR,
        *_ARCHIVE_POSITION,
    ]
)

_NOT_DECODED = "if the image was not decoded"
_SIZE = [
    _optional("width", pa.int32(), "width of the original image, pixels", _NOT_DECODED),
    _optional("height", pa.int32(), "height of the original image, pixels", _NOT_DECODED),
    _optional("bytes", pa.int64(), "size of the file", _NOT_DECODED),
]

_STATISTICS = [
    _optional("brightness", pa.float32(), "mean luma of the original image, 0 to 255", _NOT_DECODED),
    _optional("contrast", pa.float32(), "standard deviation of the luma over its mean", _NOT_DECODED),
    _optional("sharpness", pa.float32(), "energy of the finest detail over that of coarser detail", _NOT_DECODED),
    _optional("red_to_green", pa.float32(), "mean of the red channel over that of the green channel", _NOT_DECODED),
    _optional("blue_to_green", pa.float32(), "mean of the blue channel over that of the green channel", _NOT_DECODED),
    _optional("position_x", pa.float32(), "centre of the content, 0 (left) to 1 (right)", _NOT_DECODED),
    _optional("position_y", pa.float32(), "centre of the content, 0 (top) to 1 (bottom)", _NOT_DECODED),
]

DECODED = pa.schema(
    [
        *MANIFEST,
        *_SIZE,
        *_STATISTICS,
        _field("pixels", pa.large_binary(), "uint8 RGB at model size, row by row"),
        _field("inspected", pa.large_binary(), "inspected pixels at model size, row by row, eight a byte; empty: all"),
    ]
)

_REGION = pa.struct(
    [(name, pa.int32()) for name in ("left", "top", "right", "bottom", "area")]
    + [("share", pa.float32()), ("score", pa.float32()), ("peak_x", pa.int32()), ("peak_y", pa.int32())]
)

_SCORE = [
    _optional("score", pa.float32(), "mean of the anomaly map's highest values; larger is more anomalous"),
    _optional("fine_score", pa.float32(), "what the fine view alone has there; null if the map is a product of levels"),
    _optional("coarse_score", pa.float32(), "what the coarse view alone has there; null if the model has none"),
    _optional("p_value", pa.float32(), "conformal p-value against held-out good images, 0 to 1"),
    _optional("is_anomalous", pa.bool_(), "score > threshold"),
    _optional(
        "threshold",
        pa.float32(),
        "score above which an image is called anomalous: what a person decided, or so that of good images on average "
        "at most the false-alarm rate or, if n calibration images are too few for it, 1/(n+1) are",
    ),
    _optional("peak_x", pa.int32(), "column of the anomaly map's maximum, original pixels"),
    _optional("peak_y", pa.int32(), "row of the anomaly map's maximum, original pixels"),
    _optional(
        "peak_features",
        pa.list_(pa.float32()),
        "64 numbers of length 1, near each other where anomalies look alike",
        "unless anomalous by a model with a memory",
    ),
    _optional("area", pa.float32(), "fraction of the inspected pixels that are in regions, 0 to 1"),
    _optional("pixel_threshold", pa.float32(), "anomaly above which pixels make regions, for the region rate"),
    _optional("region_count", pa.int32(), "number of regions: connected pixels above the pixel threshold"),
    _optional("regions", pa.list_(_REGION), "the 20 largest, largest first; boxes, areas and peaks in original pixels"),
    _optional("seed", pa.int32(), "seed of the model's recipe"),
    _field("model_id", pa.string(), 'category and digest of the model, "" for a row with an error'),
]

_RAW_MAP = _optional(
    "anomaly_map",
    pa.large_binary(),
    "float32 at model size without padding, row by row, NaN where a pixel is not inspected, if asked for",
)
_HEATMAP_LEVELS = _field(
    "heatmap_levels", pa.large_binary(), "uint8 grey levels at model size without padding, row by row"
)

_REGION_BITS = _optional("region_bits", pa.large_binary(), "mask of the regions, a bit a pixel", "if none is drawn")

SCORED = pa.schema([*DECODED, *_SCORE, _RAW_MAP, _HEATMAP_LEVELS, _REGION_BITS])

OUTPUT = pa.schema(
    [
        *(field for field in MANIFEST if field not in _ERROR),
        *_SCORE,
        *_SIZE,
        *_STATISTICS,
        _field("heatmap", pa.string(), 'palette PNG at model size, relative to the run folder, "" if none'),
        _field(
            "overlay", pa.string(), 'JPEG of the image under its heatmap, own proportions, path as above, "" if none'
        ),
        _field("region_mask", pa.string(), 'PNG of the regions, 0 and 255, size and path as the heatmap, "" if none'),
        *_ERROR,
        _optional("heatmap_png", pa.large_binary(), "the heatmap PNG, if asked for"),
        _optional("overlay_jpeg", pa.large_binary(), "the overlay JPEG, if asked for"),
        _optional("region_mask_png", pa.large_binary(), "the regions' PNG, if asked for", "if none"),
        _RAW_MAP,
    ]
)


# Columns of a user's table that scoring reads. All hold text.
INPUT_COLUMNS = ("uri", "category", "label", "mask", "roi")
_RESERVED = frozenset(name for schema in (MANIFEST, SCORED, OUTPUT) for name in schema.names)


def passthrough_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the user's own columns, which scoring copies to the output."""
    return [name for name in schema.names if name not in _RESERVED]


def reserved_columns(names: Sequence[str]) -> list[str]:
    """Return the names, in any case, that a user's table may not have: scoring writes such columns itself."""
    return [name for name in names if name.lower() in _RESERVED and name not in INPUT_COLUMNS]


def with_passthrough(result: pa.Table, batch: pa.Table) -> pa.Table:
    """Append the user's own columns of a stage's input to the stage's result."""
    for name in passthrough_columns(batch.schema):
        result = result.append_column(batch.schema.field(name), batch[name])
    return result


def table(columns: Mapping[str, Sequence[Any] | pa.ChunkedArray], schema: pa.Schema) -> pa.Table:
    """Make a table of this schema from columns by name. Arrow columns are not copied."""

    def column(field: pa.Field) -> pa.Array | pa.ChunkedArray:
        values = columns[field.name]
        if isinstance(values, pa.ChunkedArray):
            return values
        return _binary(values) if field.type == pa.large_binary() else pa.array(values, field.type)

    return pa.table([column(field) for field in schema], schema=schema)


def error_columns(outcomes: Sequence[object]) -> dict[str, list[str]]:
    """Return the columns `error_kind` and `error_message`, "" for images whose outcome is not an ImageError."""
    errors = [outcome if isinstance(outcome, ImageError) else None for outcome in outcomes]
    return {
        "error_kind": [error.kind if error else "" for error in errors],
        "error_message": [str(error) if error else "" for error in errors],
    }


def external_errors(outcomes: Sequence[object]) -> list[str]:
    """Describe those outcomes of images that are errors, and may have a cause outside the image."""
    errors = [each for each in outcomes if isinstance(each, ImageError) and each.kind in EXTERNAL_ERRORS]
    return [f"{error.kind}: {error}" for error in errors]


def _binary(values: Sequence[bytes | memoryview | None]) -> pa.Array:
    """Copy bytes, or memoryviews of single bytes, into an array of large_binary.

    `pa.array` would leak a reference to each memoryview, and with it the memory viewed (pyarrow 16 to 26).
    """
    present = [value for value in values if value is not None]
    ends = np.cumsum([0, *(len(value or b"") for value in values)], dtype=np.int64)
    valid = pa.array([value is not None for value in values], pa.bool_())
    buffers = [valid.buffers()[1], pa.py_buffer(ends), pa.py_buffer(b"".join(present))]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)
