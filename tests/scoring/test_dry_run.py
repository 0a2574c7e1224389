from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from stpm.scoring.dry_run import Forecast, evenly
from stpm.scoring.inputs import manifest
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.resuming.run_state import Counts


@pytest.mark.parametrize(("wanted", "expected"), [(5, [0, 6, 12, 17, 23]), (100, list(range(24)))])
def test_a_sample_is_spread_evenly_over_all_shards(tmp_path: Path, wanted: int, expected: list[int]) -> None:
    lists = [[f"{tmp_path}/{i:03}.png" for i in range(n, n + 8)] for n in (0, 8, 16)]
    chunks = [next(image_rows(["-"], CategoryRule("nut"), (), lines)) for lines in lists]
    folder = str(tmp_path / "manifest")
    assert manifest.write(chunks, folder).rows == 24
    sample = pa.concat_tables(evenly(folder, 24, wanted))
    assert [int(Path(uri).stem) for uri in sample["uri"].to_pylist()] == expected


def test_the_whole_is_predicted_in_proportion() -> None:
    counts = Counts(rows=200, anomalous=10, errors={"empty": 2})
    forecast = Forecast(100_000, counts, start=20.0, speed=50.0, sizes=[1000] * 201)
    assert forecast.seconds == 2020
    assert forecast.bytes == 100_500_000
    assert forecast.in_words() == (
        "all 100000 images: about 34 min on this cluster (50 images/s after 20 s of starting), 0.09 GiB in about "
        "100500 objects, 5000 anomalous, 1000 with an error"
    )
