"""What killed and suspended runs left, and what the next one makes of it, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

import pyarrow as pa
import pytest

from stpm import storage
from stpm.data.image_files import ImageRef
from stpm.errors import RunDamagedError, RunInterruptedError
from stpm.lease import Fence
from stpm.scoring.inputs.manifest import (
    Manifest,
    ManifestRow,
    Segment,
    make_rows,
    read_manifest,
    read_shard,
    write_manifest,
)
from stpm.scoring.inputs.manifest_blocks import ManifestBlocks
from stpm.scoring.output import RunOutput
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.run_state import RunState, ScoringConfig
from stpm.scoring.written_rows import (
    committed_summaries,
    finish_segment,
    remove_leftovers,
    take_over,
    total_of_finished,
    unwritten_shards,
)
from tests.datasets import make_output, write_task


@pytest.fixture
def output(memory: str) -> RunOutput:
    """A run whose attempt 0 counts."""
    state = RunState(memory)
    state.start(ScoringConfig((), 0.01))
    state.write(replace(state.record, attempt=0))
    return RunOutput.single(memory)


@pytest.fixture
def segments(output: RunOutput) -> list[Segment]:
    """Two segments, of 8 and 2 images."""
    return list_images(output).segments(output.manifest)


def list_images(output: RunOutput, attempt: int = 0) -> Manifest:
    rows = make_rows([ManifestRow(ImageRef(f"{number}.png"), "nut") for number in range(10)])
    return write_manifest([rows], output.manifest, segment_rows=8, attempt=attempt)


def score(output: RunOutput, segment: Segment, rows: slice, *, summarized: bool = True) -> str:
    """Leave what a task leaves that writes some rows of a segment, see `write_task`."""
    images = pa.concat_tables([read_shard(shard.uri) for shard in segment.shards]).slice(rows.start)
    count = rows.stop - rows.start
    made = make_output(count, **{name: images[name].to_pylist()[:count] for name in ("image_id", "uri", "category")})
    return write_task(output, made, 10 * segment.number + rows.start, segment.number, summarized=summarized)


def uris_left(output: RunOutput) -> list[list[str]]:
    """Let an attempt take over, and return the images that it is to score of each segment."""
    manifest = read_manifest(output.manifest)
    assert manifest
    written = take_over(output, output.state, manifest)
    found = []
    for segment in manifest.segments(output.manifest):
        shards = unwritten_shards(output, segment, written.get(segment.number, RowSummary()))
        tasks = ManifestBlocks(shards).get_read_tasks(1)
        found.append([uri for task in tasks for rows in task.read_fn() for uri in rows["uri"].to_pylist()])
    return found


def names(output: RunOutput) -> list[str]:
    return [PurePosixPath(uri).stem for uri in output.files()]


def test_rows_that_are_written_are_not_scored_again(output: RunOutput, segments: list[Segment]) -> None:
    for rows in (slice(1, 3), slice(4, 5)):
        score(output, segments[0], rows)
    score(output, segments[0], slice(6, 8), summarized=False)
    first, second, third = (output.with_attempt(number) for number in (1, 2, 3))
    assert uris_left(first) == [["0.png", "3.png", "5.png", "6.png", "7.png"], ["8.png", "9.png"]]
    score(first, segments[0], slice(5, 8))
    assert uris_left(second) == [["0.png", "3.png"], ["8.png", "9.png"]]
    for task in (slice(0, 1), slice(3, 4)):
        score(second, segments[0], task)
    assert uris_left(third) == [[], ["8.png", "9.png"]]


def test_the_summaries_of_a_segment_become_one(output: RunOutput, segments: list[Segment]) -> None:
    first, second = segments
    score(output, first, slice(0, 5))
    assert finish_segment(output, first).rows == 5
    score(output, first, slice(5, 8))
    assert finish_segment(output, first).rows == 8
    score(output, second, slice(0, 2))
    summary = finish_segment(output, second)
    assert storage.files(output.summaries) == [output.segment_summary(0), output.segment_summary(1)]
    storage.publish(f"{output.summaries}/000000/notes.json", b"not one of ours")
    storage.publish(f"{output.summaries}/000000/00000\N{SUPERSCRIPT TWO}.json", b"nor this")
    assert list(committed_summaries(output))[1] == summary
    assert total_of_finished(output, rows=10).rows == 10
    storage.remove(output.segment_summary(1))
    with pytest.raises(RunDamagedError, match=r"summaries in .*/summaries are of 8 rows, and the run has 10: some are"):
        total_of_finished(output, rows=10)


def test_a_summary_counts_once_if_adding_up_was_cut_off(
    output: RunOutput, segments: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    score(output, segments[0], slice(0, 4))
    score(output, segments[0], slice(4, 7))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", lambda _: None)
        finish_segment(output, segments[0])
    score(output, segments[0], slice(7, 8))
    assert sum(summary.rows for summary in committed_summaries(output)) == 8
    assert finish_segment(output, segments[0]).rows == 8


def test_no_file_of_rows_is_listed_for_a_segment(
    output: RunOutput, segments: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files at each segment's end would make the end of a run quadratic."""
    score(output, segments[0], slice(0, 8))
    monkeypatch.setattr(RunOutput, "files", lambda _: pytest.fail("all files were listed"))
    assert finish_segment(output, segments[0]).rows == 8


def test_rows_that_are_written_twice_or_lost_are_an_error(output: RunOutput, segments: list[Segment]) -> None:
    for rows in (slice(0, 8), slice(7, 8)):
        score(output, segments[0], rows)
    with pytest.raises(RunDamagedError, match=r"9 rows in .* for 8 images of segment 0$"):
        finish_segment(output, segments[0])
    # The segment's one file.
    storage.remove(f"{output.scores}/{score(output, segments[1], slice(0, 2))}.parquet")
    with pytest.raises(RunDamagedError, match=r"/scores/.*\.parquet is missing, and with it rows of this run$"):
        finish_segment(output, segments[1])


@pytest.mark.parametrize("stop", [3, 7, 8])
@pytest.mark.parametrize("count", [0, 5])
def test_rows_that_are_lost_or_left_over_are_an_error(
    output: RunOutput, segments: list[Segment], stop: int, count: int
) -> None:
    """A power failure keeps a summary and loses rows. That is noticed whether all rows were written, or not."""
    file = f"{output.scores}/{score(output, segments[0], slice(0, 3))}.parquet"
    if stop > 3:
        score(output, segments[0], slice(3, stop))
    storage.remove(file)
    if count:
        storage.publish(file, storage.encode_parquet(make_output(count)))
    wrong = (
        rf"{stop + 2} rows in the files of .*/scores, where {stop} of segment 0 " if count else rf"{file} is missing"
    )
    with pytest.raises(RunDamagedError, match=wrong):
        uris_left(output.with_attempt(1))
    storage.publish(file, b"")
    with pytest.raises(RunDamagedError, match=rf"{file} is damaged"):
        uris_left(output.with_attempt(2))


@pytest.mark.parametrize("content", [b"", b'{"p_values": {"nut": {"0.5": "1"}}}'])
def test_an_error_names_a_damaged_summary(output: RunOutput, segments: list[Segment], content: bytes) -> None:
    task = score(output, segments[0], slice(0, 8))
    storage.publish(f"{output.task_summaries(0)}/{task}.json", content)
    with pytest.raises(RunDamagedError, match=rf"000000/{task}\.json is damaged or missing, and with it .*$"):
        finish_segment(output, segments[0])


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (pa.table({"x": [1]}), "has no column image_id"),
        (pa.table({"image_id": ["1"]}), "has a column image_id of type string"),
        (pa.table({"image_id": pa.array([None], pa.int64())}), "has a row without image_id"),
    ],
)
def test_an_error_names_a_shard_of_other_columns(
    output: RunOutput, segments: list[Segment], rows: pa.Table, problem: str
) -> None:
    score(output, segments[0], slice(0, 3))
    storage.publish(segments[0].shards[0].uri, storage.encode_parquet(rows))
    with pytest.raises(RunDamagedError, match=rf"000000\.parquet, which lists images .* {problem}\)$"):
        uris_left(output.with_attempt(1))


def test_what_a_suspended_attempt_writes_late_does_not_count(output: RunOutput, segments: list[Segment]) -> None:
    """The attempts 4 and 6 are cut off, and go on after the next one has begun."""
    first = segments[0]
    old, stale, new = (RunOutput.single(output.folder, Fence(output.folder, n)).with_attempt(n) for n in (4, 6, 7))

    def begin(run: RunOutput) -> list[str]:
        storage.publish(f"{output.folder}/.lease/{run.attempt}.json", b"")
        return uris_left(run)[0]

    begin(old)
    tasks = [score(old, first, slice(0, 2))]
    assert len(begin(stale)) == 6
    score(old, first, slice(2, 4))
    tasks.append(score(stale, first, slice(2, 5)))
    assert begin(new) == ["5.png", "6.png", "7.png"]
    score(stale, first, slice(5, 8))
    storage.publish(f"{output.scores}/scores_of_mine.parquet", b"the user's")
    remove_leftovers(new, tasks)
    assert sorted(names(output)) == [*tasks, "scores_of_mine"]
    score(old, first, slice(5, 6))
    score(stale, first, slice(5, 8))
    tasks.append(score(new, first, slice(5, 8)))
    # The suspended process does what it does at its end.
    with pytest.raises(RunInterruptedError, match="lease 6 is lost, the latest is 7"):
        finish_segment(stale, first)
    with pytest.raises(RunInterruptedError, match="lease 6 is lost, the latest is 7"):
        remove_leftovers(stale, [])
    storage.publish(stale.segment_summary(0), b"late")
    assert finish_segment(new, first).tasks == tasks
    assert [summary.tasks for summary in committed_summaries(output)] == [tasks]
    remove_leftovers(new, tasks)
    assert sorted(names(output)) == [*tasks, "scores_of_mine"]
    assert storage.files(output.summaries) == [new.segment_summary(0)]


def test_a_late_request_of_a_suspended_driver_removes_no_rows(output: RunOutput, segments: list[Segment]) -> None:
    """It replaces run.json by what was right for that driver: its attempt, whose summaries are removed."""
    suspended = RunState(output.state_folder)
    stale = suspended.record
    later = output.with_attempt(1)
    assert uris_left(later)
    for segment in segments:
        score(later, segment, slice(0, segment.rows))
        finish_segment(later, segment)
    suspended.write(stale)
    # What the earlier attempt removes is none of the later one's.
    remove_leftovers(output, [])
    remove_leftovers(later, total_of_finished(later, 10).tasks)
    assert len(later.files()) == 2


def test_a_run_that_starts_over_takes_no_rows_of_tasks_that_still_write(
    output: RunOutput, segments: list[Segment]
) -> None:
    """Also if the same process starts it over, under the same lease."""
    output.clear()
    assert not output.state.record.config
    state = output.state
    state.start(ScoringConfig((), 0.01))
    assert state.next_attempt() == 1
    manifest = list_images(output, attempt=1)
    score(output, manifest.segments(output.manifest)[0], slice(0, 8))
    later = output.with_attempt(1)
    assert take_over(later, state, manifest) == {}
    remove_leftovers(later, [])
    assert later.files() == []
