import sys

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from stpm.scoring.schema import table

PICTURES = pa.schema([pa.field("name", pa.string()), pa.field("png", pa.large_binary())])


@given(st.lists(st.none() | st.binary(max_size=20)), st.booleans())
def test_binary_columns_equal_those_that_arrow_makes(values: list[bytes | None], as_views: bool) -> None:
    given_values = [memoryview(value) if as_views and value is not None else value for value in values]
    made = table({"name": ["a"] * len(values), "png": given_values}, PICTURES)
    made.validate(full=True)
    assert made["png"].combine_chunks().equals(pa.array(values, pa.large_binary()))


def test_a_column_keeps_no_reference_to_its_values() -> None:
    pixels = np.zeros(1000, np.uint8)
    before = sys.getrefcount(pixels)
    for _ in range(10):
        table({"name": ["a"], "png": [pixels.data]}, PICTURES)
    assert sys.getrefcount(pixels) == before


def test_arrow_columns_are_not_copied() -> None:
    png = pa.chunked_array([pa.array([b"abc"], pa.large_binary())])
    made = table({"name": ["a"], "png": png}, PICTURES)
    assert made["png"].chunk(0).buffers()[2].address == png.chunk(0).buffers()[2].address
