"""What a Ray task evaluates, and the report, without Ray."""

from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray
from ray.exceptions import NodeDiedError

from stpm.errors import RunDamagedError, RunInterruptedError
from stpm.evaluation.evaluate import evaluate_categories, evaluate_category, publish_report
from stpm.evaluation.gate import Gate, Requirement
from stpm.evaluation.report import Report
from stpm.models.store import ModelStore
from stpm.scoring.output_rows import check_row_count
from stpm.scoring.run_state import RunState, ScoringConfig
from stpm.scoring.run_statistics import RunResult
from tests.datasets import write_rows
from tests.evaluation.runs import CALIBRATION, result, scored_run


def test_a_category_is_evaluated_published_and_gated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    category = scored_run(tmp_path / "scored")
    out = str(tmp_path / "report")
    found = evaluate_category(category.output, result("nut", 0, None, None).model, {}, CALIBRATION, "model")
    assert found.threshold[:3] == (1.0, 2, "2nd of 4 good")
    report = Report("data", [found])
    assert publish_report(report, out, Gate((), {})) == 0
    assert {path.name for path in Path(out).iterdir()} == {"report.html", *report.files()}
    gate = Gate((Requirement("nut", "pixel_auroc", 1.0),), {})
    assert publish_report(report, out, gate, "csv", [category.output]) == 2
    rows = {name: len(pd.read_csv(f"{out}/{name}.csv")) for name in ("report", "defects", "rows-seed-0")}
    assert rows == {"report": 1, "defects": 1, "rows-seed-0": 12}
    # Of an earlier report, none stays beside another.
    assert publish_report(report, out, Gate((), {}), "xlsx", [category.output]) == 0
    assert {path.name for path in Path(out).iterdir()} == {"report.html", "report.xlsx", *report.files()}
    assert any(line.startswith("falls short: nut.pixel_auroc is 0.") for line in caplog.messages)


@pytest.mark.parametrize("copies", [0, 0.5, 2])
def test_lost_and_doubled_rows_of_a_finished_run_are_not_evaluated(tmp_path: Path, copies: float) -> None:
    output = scored_run(tmp_path).output
    state = RunState(output.state_folder)
    state.start(ScoringConfig((), 0.01))
    (file,) = output.files()
    rows = pq.read_table(file)
    state.finish(RunResult(rows=rows.num_rows))
    check_row_count(output)
    if copies == 0:
        Path(file).unlink()
    elif copies == 2:
        write_rows(output, rows, 1)
    else:
        write_rows(output, rows.slice(0, rows.num_rows // 2))
    with pytest.raises(RunDamagedError, match=rf"^{int(copies * rows.num_rows)} rows in .*seed-0_\*, where the run wr"):
        evaluate_categories(output, [], ModelStore(str(tmp_path)), "model")


def test_a_node_lost_during_evaluation_cuts_it_off_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = scored_run(tmp_path).output
    monkeypatch.setattr(ray, "get", Mock(side_effect=NodeDiedError("its node died")))
    with pytest.raises(RunInterruptedError, match=r"^evaluation was interrupted: its node died; finished work is kept"):
        evaluate_categories(output, [], ModelStore(str(tmp_path)), "model")
