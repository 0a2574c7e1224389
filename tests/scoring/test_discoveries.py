from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stpm.scoring.discoveries import count_p_values
from stpm.scoring.output import RunOutput
from stpm.scoring.schema import OUTPUT, table


def test_p_values_are_counted_over_all_files_without_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected: dict[str, Counter[float]] = {}
    (tmp_path / "scores").mkdir()
    for number in range(3):
        names = rng.choice(["nut", "bolt", "broken"], 500).tolist()
        p_values = [None if name == "broken" else float(np.float32(rng.integers(1, 9) / 9)) for name in names]
        columns: dict[str, list[Any]] = {field.name: [None if field.nullable else ""] * 500 for field in OUTPUT}
        columns |= {"image_id": list(range(500)), "category": names, "p_value": p_values}
        pq.write_table(table(columns, OUTPUT), tmp_path / "scores" / f"scores_{number}.parquet", row_group_size=64)
        for name, p_value in zip(names, p_values, strict=True):
            if p_value is not None:
                expected.setdefault(name, Counter())[p_value] += 1
    assert count_p_values(RunOutput.single(str(tmp_path))) == expected


def test_a_run_without_rows_has_no_p_values(tmp_path: Path) -> None:
    assert count_p_values(RunOutput.single(str(tmp_path))) == {}
