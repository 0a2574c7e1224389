"""Write small data sets in the MVTec AD layout, and rows as scoring writes them, to any filesystem."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from stpm import storage
from stpm.scoring.output import RunOutput
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.schema import OUTPUT, table

# Python reads sitecustomize.py at every start. With this one, decoding `crashing_image` crashes the process.
CRASHING_SITECUSTOMIZE = """
import os, signal
from PIL import ImageFile
load = ImageFile.ImageFile.load
def crash_or_load(image):
    if image.size == (31, 17):
        os.kill(os.getpid(), signal.SIGSEGV)
    return load(image)
ImageFile.ImageFile.load = crash_or_load
"""


def crashing_image() -> bytes:
    """Return a file that crashes the decoder of processes with CRASHING_SITECUSTOMIZE."""
    return encode_image(np.full((17, 31, 3), 100, np.uint8))


def encode_image(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Encode pixels as a file of any of Pillow's formats."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def make_category(
    root: str,
    name: str,
    *,
    train: int = 8,
    good: int = 4,
    defects: int = 4,
    masks: bool = True,
    grey: bool = False,
    kind: str = "PNG",
    shape: tuple[int, int] = (48, 40),
    seed: int = 0,
) -> None:
    """Write noise around a grey level; a defect is a bright square, its mask that square."""
    rng = np.random.default_rng(seed)
    suffix = {"PNG": "png", "JPEG": "jpg"}[kind]

    def normal() -> np.ndarray:
        size = shape if grey else (*shape, 3)
        return rng.integers(90, 130, size, dtype=np.uint8)

    def put(path: str, pixels: np.ndarray, as_kind: str = kind) -> None:
        storage.publish(storage.join(root, name, path), encode_image(pixels, as_kind))

    for i in range(train):
        put(f"train/good/{i:03}.{suffix}", normal())
    for i in range(good):
        put(f"test/good/{i:03}.{suffix}", normal())
    for i in range(defects):
        pixels, mask = normal(), np.zeros(shape, np.uint8)
        pixels[10:26, 8:24] = rng.integers(0, 255, pixels[10:26, 8:24].shape, dtype=np.uint8)
        mask[10:26, 8:24] = 255
        put(f"test/square/{i:03}.{suffix}", pixels)
        if masks:
            put(f"ground_truth/square/{i:03}_mask.png", mask, "PNG")


def fitted_categories(store: str) -> list[str]:
    """List the categories that have a model in a store, sorted."""
    return [name for name in storage.subfolders(store) if storage.exists(storage.join(store, name, "current.json"))]


def make_output(count: int, **columns: Any) -> pa.Table:
    """Make rows of schema OUTPUT; columns that are not given hold null, or "" where null is not allowed."""
    values: dict[str, Any] = {field.name: [None if field.nullable else ""] * count for field in OUTPUT}
    numbers = {"image_id": range(count), "archive_start": [0] * count, "archive_length": [-1] * count}
    numbers |= {"width": [40] * count, "height": [48] * count}
    return table(values | numbers | columns, OUTPUT)


def write_rows(output: RunOutput, rows: pa.Table, number: int = 0) -> None:
    """Write rows to a file of a run."""
    storage.publish(f"{output.scores}/{output.name}_{number}.parquet", storage.encode_parquet(rows), durable=False)


def write_task(output: RunOutput, rows: pa.Table, number: int = 0, segment: int = 0, *, summarized: bool = True) -> str:
    """Leave what a task leaves that writes rows, or is cut off before it ends; return its name."""
    task = f"{output.name}_{output.attempt:06}_{32 * 'a'}_{number:06}_{8 * 'c'}"
    storage.publish(f"{output.scores}/{task}.parquet", storage.encode_parquet(rows), durable=False)
    if summarized:
        summary = RowSummary.of_rows(rows, task).to_json()
        storage.publish(f"{output.task_summaries(segment)}/{task}.json", summary, durable=False)
    return task


def with_column(rows: pa.Table, name: str, values: Any) -> pa.Table:
    """Replace the values of a column."""
    index = rows.schema.get_field_index(name)
    return rows.set_column(index, rows.schema.field(index), pa.array(values, rows.schema.field(index).type))
