import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stpm import storage
from stpm.errors import RunDamagedError
from stpm.evaluation.category import ScoredCategory, read_scores
from stpm.line.night_record import read_rows
from stpm.scoring.output import RunOutput
from stpm.scoring.ranked_rows import most_anomalous
from tests.conftest import make_preprocessing
from tests.datasets import make_output, write_rows

READERS: dict[str, Callable[[RunOutput], Any]] = {
    "evaluation": lambda run: read_scores(ScoredCategory(run, "nut", make_preprocessing(32))),
    "line": lambda run: read_rows([run]),
    "triage": lambda run: most_anomalous(run, 50),
}


@pytest.mark.parametrize("damage", ["pages", "footer", "empty"])
@pytest.mark.parametrize("reader", READERS)
def test_an_error_names_the_damaged_file_of_several(tmp_path: Path, reader: str, damage: str) -> None:
    read = READERS[reader]
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


GOOD = make_output(3, category=["nut"] * 3, label=["good"] * 3, score=[*range(3)], threshold=[1.0] * 3)


def with_column(name: str, values: list[Any]) -> pa.Table:
    return GOOD.set_column(GOOD.schema.get_field_index(name), name, pa.array(values))


FOREIGN = {
    "no column image_id": pa.table({"epoch": [1]}),
    "no column category": GOOD.drop_columns(["category", "error_kind"]),
    "no column is_anomalous": GOOD.drop_columns(["is_anomalous"]),
    "a column image_id of type string, not int64": with_column("image_id", ["1", "2", "3"]),
    "a column category of type int64, not string": with_column("category", [1, 2, 3]),
    "a column score of type string, not float": with_column("score", ["a", "b", "c"]),
}


@pytest.mark.parametrize("number", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("problem", FOREIGN)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_other_columns_is_named(tmp_path: Path, reader: str, problem: str, number: int) -> None:
    output = RunOutput.single(str(tmp_path))
    for each in range(3):
        write_rows(output, FOREIGN[problem] if each == number else GOOD, each)
    file = re.escape(f"{output.scores}/scores_{number}.parquet")
    with pytest.raises(RunDamagedError, match=f"^{file} is not a file of rows: it has {problem}$"):
        READERS[reader](output)
