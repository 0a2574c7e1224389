from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stpm.data.image_statistics import COMPARED
from stpm.line import rows as rows_module
from stpm.line.rows import read_rows
from stpm.scoring.output import RunOutput
from tests.datasets import write_rows
from tests.line.nightly_runs import output_rows

KINDS = ("empty", "damaged", "no_model")


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Make rows of three categories, some with an error."""
    rng = np.random.default_rng(seed)
    uris = [f"s3://dump/{seed}/{number}.png" for number in range(count)]
    rows = output_rows(
        [
            {"image_id": int(rng.integers(-(2**62), 2**62)), "uri": uri, "category": f"c{rng.integers(3)}"}
            for uri in uris
        ]
    ).to_pylist()
    nulls = dict.fromkeys(("score", "p_value", "is_anomalous", *COMPARED))
    for row in rows:
        if rng.random() < 0.3:
            row.update(nulls, error_kind=str(rng.choice(KINDS)), error_message=row["uri"], model_id="")
        else:
            row["model_id"] = str(rng.choice(["old", "new", "new"]))
    return rows


def write(folder: Path, name: str, rows: list[dict[str, Any]], size: int) -> RunOutput:
    output, table = RunOutput.named(str(folder), name), pa.Table.from_pylist(rows, schema=output_rows([]).schema)
    for start in range(0, len(rows), size):
        write_rows(output, table.slice(start, size), start)
    return output


@pytest.mark.parametrize("batch", [7, 100_000])
def test_counts_and_samples_are_those_of_all_rows_in_any_order(
    tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_BATCH", batch)
    monkeypatch.setattr(rows_module, "SAMPLE", 20)
    first, second = make_rows(200, 0), make_rows(30, 1)
    categories, found = read_rows([write(tmp_path, "001", first, 13), write(tmp_path, "002", second, 30)])
    assert sorted(categories) == ["c0", "c1", "c2"]
    for name, counted in categories.items():
        own = [row for row in first + second if row["category"] == name]
        scored = sorted((row for row in own if not row["error_kind"]), key=lambda row: int(row["image_id"]))
        assert (counted.images, counted.alarms) == (len(own), sum(row["is_anomalous"] for row in scored))
        assert counted.errors == Counter(row["error_kind"] for row in own if row["error_kind"])
        assert counted.models == Counter(row["model_id"] for row in scored)
        p_values, statistics = counted.sample()
        np.testing.assert_array_equal(p_values, np.array([row["p_value"] for row in scored[:20]], np.float32))
        assert list(statistics) == list(COMPARED)
        for column, values in statistics.items():
            np.testing.assert_array_equal(values, np.array([row[column] for row in scored[:20]], np.float32))
    examples = Counter(example.kind for example in found)
    assert examples == dict.fromkeys(KINDS, 3)
    assert [example.kind for example in found] == sorted(examples.elements())
    assert read_rows([RunOutput.named(str(tmp_path), "003")]) == ({}, ())
