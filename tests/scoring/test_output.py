from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stpm import storage
from stpm.errors import RunDamagedError
from stpm.evaluation.category import ScoredCategory, read_scores
from stpm.monitoring.rows import read_rows
from stpm.scoring.output import RunOutput
from stpm.scoring.resuming.segments import scan_rows
from stpm.scoring.triage import most_anomalous
from tests.conftest import make_preprocessing
from tests.datasets import make_output, write_rows


def evaluate(output: RunOutput) -> Any:
    return read_scores(ScoredCategory(output, "nut", make_preprocessing(32)))


@pytest.mark.parametrize("damage", ["pages", "footer", "empty"])
@pytest.mark.parametrize(
    "read", [evaluate, lambda run: read_rows([run]), lambda run: scan_rows(run, 5), lambda run: most_anomalous(run, 50)]
)
def test_an_error_names_the_damaged_file_of_several(
    tmp_path: Path, read: Callable[[RunOutput], Any], damage: str
) -> None:
    output = RunOutput.single(str(tmp_path))
    rows = make_output(90, category=["nut"] * 90, score=[*range(90)], threshold=[1.0] * 90)
    for number in range(3):
        write_rows(output, rows.slice(30 * number, 30), number)
    read(output)
    _, damaged, _ = output.files()
    data = storage.read(damaged)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    pages = b"\xff" * (len(data) - footer - 4)
    changed = {"pages": data[:4] + pages + data[-footer:], "footer": data[:-20], "empty": b""}
    storage.publish(damaged, changed[damage], durable=False)
    with pytest.raises(RunDamagedError, match=rf"^{re.escape(damaged)} is damaged: .*$"):
        read(output)


def test_rows_of_another_schema_are_reported(tmp_path: Path) -> None:
    output = RunOutput.single(str(tmp_path))
    write_rows(output, make_output(3).drop_columns(["score", "error_kind", "p_value"]))
    with pytest.raises(RunDamagedError, match=r"scores: a file of rows is damaged: .*"):
        read_rows([output])
