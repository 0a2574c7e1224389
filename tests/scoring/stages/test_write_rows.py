from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray.data._internal.datasource.parquet_datasink import ParquetDatasink

from stpm import storage
from stpm.errors import DataError, RunInterruptedError
from stpm.lease import hold_lease
from stpm.scoring import ranked_rows
from stpm.scoring.inputs.manifest import Segment, Shard
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from stpm.scoring.row_summary import task_of
from stpm.scoring.run_state import RunState, ScoringConfig
from stpm.scoring.stages.write_rows import RowWriter
from stpm.scoring.written_rows import finish_segment, remove_leftovers, total_of_finished
from tests.datasets import make_output


def output_rows(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    return make_output(
        len(numbers),
        image_id=numbers,
        uri=[f"{i}.png" for i in numbers],
        bytes=[1] * len(numbers),
        category=[("nut", "a b", "c/d")[i % 3] for i in numbers],
        threshold=[10.0] * len(numbers),
        score=[i * 37 % 100 for i in numbers],
        is_anomalous=[i * 37 % 100 > 10 for i in numbers],
        heatmap_png=[b"%d" % i for i in numbers],
    )


def write(
    output: RunOutput, options: OutputOptions, blocks: list[pa.Table], task: int = 7, rows_per_file: int = 1
) -> None:
    """Write rows as a task does."""
    writer = RowWriter(output, options, 0, rows_per_file, max_ranked=5)
    writer.write(blocks, SimpleNamespace(kwargs={"write_uuid": 32 * "a"}, task_idx=task))


def test_what_tasks_report_equals_a_scan_and_ranks_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, options = RunOutput.single(str(tmp_path)), OutputOptions()
    state = RunState(output.state_folder)
    state.start(ScoringConfig((), 0.01))
    state.write(replace(state.record, attempt=0))
    for task, bounds in enumerate([(0, 30), (30, 31), (31, 100)]):
        rows = output_rows(*bounds)
        write(output, options, [rows.slice(0, 20), rows.slice(20, 0), rows.slice(20)], task, rows_per_file=20)
    scanned = ranked_rows.scan_rows(output, max_ranked=5)
    assert finish_segment(output, Segment(0, (Shard("shard", 100),)), max_ranked=5) == scanned
    assert scanned.rows == 100
    with monkeypatch.context() as patch:
        patch.setattr(ranked_rows, "scan_rows", lambda *_: pytest.fail("all rows were read"))
        shown = ranked_rows.most_anomalous(output, 4)
    assert [(row["score"], row["category"]) for row in shown] == [
        (score, ("nut", "a b", "c/d")[image % 3]) for score, image in ((99.0, 27), (98.0, 54), (97.0, 81), (96.0, 8))
    ]
    assert [row["heatmap_png"] for row in shown] == [b"27", b"54", b"81", b"8"]
    # The tasks named five images each.
    assert [row["score"] for row in ranked_rows.most_anomalous(output, 7)][4:] == [95.0, 94.0, 93.0]
    for uri in storage.glob(f"{output.scores}/scores_000000_{32 * 'a'}_000000_*.parquet")[0]:
        storage.remove(uri)
    with pytest.raises(DataError, match=r"2 of the most anomalous images have no row in .*/scores"):
        ranked_rows.most_anomalous(output, 4)


@pytest.mark.parametrize("ended", [False, True])
def test_of_a_task_that_ray_repeats_a_try_counts(tmp_path: Path, ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, with fewer rows, is suspended until the second or the segment has ended; a third does nothing."""
    output, options = RunOutput.single(str(tmp_path)), OutputOptions()
    segment = Segment(0, (Shard("", 10),))
    publish = storage.publish

    def suspended(uri: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "publish", publish)
        write(output, options, [output_rows(0, 10)])
        if ended:
            assert finish_segment(output, segment, 5).rows == 10
        publish(uri, data)

    monkeypatch.setattr(storage, "publish", suspended)
    write(output, options, [output_rows(0, 9)])
    write(output, options, [output_rows(0, 4)])
    summary = finish_segment(output, segment, 5)
    files = [uri for uri in output.files() if task_of(uri) in summary.tasks]
    assert summary.rows == (10 if ended else open_rows(output, files=files).count_rows())
    remove_leftovers(output, total_of_finished(output, summary.rows).tasks)
    assert open_rows(output).count_rows() == summary.rows


def test_a_task_whose_run_lost_its_lease_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, options = str(tmp_path), OutputOptions()
    with hold_lease(folder, False) as fence:
        output = RunOutput.single(folder, fence)
        write(output, options, [output_rows(0, 9)], 0)
        before = storage.files(output.scores)
        write_file = ParquetDatasink.write

        def suspended(*arguments: Any) -> None:
            write_file(*arguments)
            assert len(storage.files(output.scores)) > len(before)
            storage.create(f"{folder}/.lease/1.json", b"another run")

        monkeypatch.setattr(ParquetDatasink, "write", suspended)
        for task in (1, 2):
            with pytest.raises(RunInterruptedError, match="lease 0 is lost, the latest is 1"):
                write(output, options, [output_rows(0, 9)], task)
            assert storage.files(output.scores) == before
        (summary,) = tmp_path.glob("summaries/**/*.json")
        assert summary.stem.startswith(f"scores_000000_{32 * 'a'}_000000_")
        storage.remove(f"{folder}/.lease/1.json")
