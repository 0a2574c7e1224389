from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from ray.data._internal.execution.interfaces import TaskContext

from stpm import storage
from stpm.errors import RunInterruptedError
from stpm.lease import hold_lease
from stpm.scoring.inputs.manifest import Segment, Shard
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from stpm.scoring.ranked_rows import most_anomalous
from stpm.scoring.row_summary import RowSummary
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


def write(writer: RowWriter, *blocks: pa.Table, task: int = 7) -> None:
    """Write rows as a task does."""
    writer.write(blocks, TaskContext(task, "write"))


def test_what_tasks_report_equals_a_scan_and_the_most_anomalous_rows_are_found(tmp_path: Path) -> None:
    output = RunOutput.single(str(tmp_path))
    writer = RowWriter(output, OutputOptions(), 0, 20)
    assert writer.min_rows_per_write == 20
    assert RowWriter(output, OutputOptions(raw_maps=True), 0, 512).min_rows_per_write == 64
    for task, bounds in enumerate([(0, 30), (30, 31), (31, 100)]):
        rows = output_rows(*bounds)
        write(writer, rows.slice(0, 20), rows.slice(20, 0), rows.slice(20), task=task)
    summary = finish_segment(output, Segment(0, (Shard("shard", 100),)))
    assert summary == replace(RowSummary.of_rows(open_rows(output).to_table(), ""), tasks=summary.tasks)
    assert (summary.rows, len(summary.tasks)) == (100, 3)
    shown = most_anomalous(output, 4)
    assert [(row["score"], row["category"]) for row in shown] == [
        (score, ("nut", "a b", "c/d")[image % 3]) for score, image in ((99.0, 27), (98.0, 54), (97.0, 81), (96.0, 8))
    ]
    assert [row["heatmap_png"] for row in shown] == [b"27", b"54", b"81", b"8"]


@pytest.mark.parametrize("ended", [False, True])
def test_of_a_task_that_ray_repeats_one_try_counts(
    tmp_path: Path, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, with fewer rows, is suspended until the second or the segment has ended; the third comes last."""
    output = RunOutput.single(str(tmp_path))
    writer = RowWriter(output, OutputOptions(), 0, 1)
    segment = Segment(0, (Shard("", 10),))
    publish = storage.publish

    def suspended(uri: str, data: bytes, **options: bool) -> None:
        if uri.endswith(".json"):
            monkeypatch.setattr(storage, "publish", publish)
            write(writer, output_rows(0, 10))
            if ended:
                assert finish_segment(output, segment).rows == 10
        publish(uri, data, **options)

    monkeypatch.setattr(storage, "publish", suspended)
    write(writer, output_rows(0, 9))
    write(writer, output_rows(0, 4))
    summary = finish_segment(output, segment)
    assert summary.rows == (10 if ended else open_rows(output, files=output.files_of(summary.tasks)).count_rows())
    remove_leftovers(output, total_of_finished(output, summary.rows).tasks)
    assert open_rows(output).count_rows() == summary.rows


def test_a_task_whose_run_lost_its_lease_meanwhile_leaves_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    with hold_lease(folder, False) as fence:
        output = RunOutput.single(folder, fence)
        writer = RowWriter(output, OutputOptions(), 0, 1)
        write(writer, output_rows(0, 9), task=0)
        (before,) = storage.files(output.scores)
        publish = storage.publish

        def suspended(uri: str, data: bytes, **options: bool) -> None:
            publish(uri, data, **options)
            assert len(storage.files(output.scores)) == 2
            storage.create(f"{folder}/.lease/1.json", b"another run")

        monkeypatch.setattr(storage, "publish", suspended)
        for task in (1, 2):
            with pytest.raises(RunInterruptedError, match="lease 0 is lost, the latest is 1"):
                write(writer, output_rows(0, 9), task=task)
            assert storage.files(output.scores) == [before]
        monkeypatch.undo()
        (summary,) = tmp_path.glob("summaries/**/*.json")
        assert re.fullmatch(r"scores_000000_[0-9a-f]{32}_000000_[0-9a-f]{8}", summary.stem)
        assert output.files_of([summary.stem]) == [before]
        storage.remove(f"{folder}/.lease/1.json")
