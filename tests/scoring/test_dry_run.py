from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from stpm.scoring.dry_run import describe_estimate, sample_evenly
from stpm.scoring.inputs.manifest import write_manifest
from stpm.scoring.run_statistics import RunResult, RunStatistics
from tests.scoring.inputs.helpers import list_rows


@pytest.mark.parametrize(("size", "expected"), [(5, [0, 6, 12, 17, 23]), (100, list(range(24)))])
def test_a_sample_is_spread_evenly_over_all_shards(tmp_path: Path, size: int, expected: list[int]) -> None:
    lists = [[f"{tmp_path}/{i:03}.png" for i in range(n, n + 8)] for n in (0, 8, 16)]
    chunks = [list_rows(uris) for uris in lists]
    folder = str(tmp_path / "manifest")
    images = write_manifest(chunks, folder, segment_rows=10)
    assert images.rows == 24
    sample = pa.concat_tables(sample_evenly(images, folder, size))
    assert [int(Path(uri).stem) for uri in sample["uri"].to_pylist()] == expected


def test_the_estimate_is_in_proportion_to_the_sample() -> None:
    """200 images took 20 s of starting and then 4 s at 50 images/s: 100000 take 2020 s."""
    statistics = RunStatistics(images=200, steady_images_per_second=50.0)
    sample = RunResult(rows=200, anomalous=10, errors={"empty": 2}, seconds=24.0, statistics=statistics)
    assert describe_estimate(100_000, sample, file_sizes=[1000] * 201) == (
        "all 100000 images: about 34 min on this cluster (50 images/s after 20 s of starting), 0.09 GiB in about "
        "100500 objects, 5000 anomalous, 1000 with an error"
    )
