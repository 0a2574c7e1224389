"""What a killed run left of its segments, and what the next one makes of it, without Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import PurePosixPath

import pyarrow as pa
import pytest

from stpm import storage
from stpm.data.image_files import ImageRef
from stpm.errors import CutOffError, RunDamagedError
from stpm.lease import Fence
from stpm.scoring.inputs.manifest import Segment, Shard, read_shard, write_manifest
from stpm.scoring.inputs.manifest_rows import ManifestRow, make_rows
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.resuming.remaining import write_remaining
from stpm.scoring.resuming.row_checkpoints import summary_of
from stpm.scoring.resuming.segments import (
    commit_segment,
    committed_segments,
    committed_summaries,
    remove_leftovers,
    total_of_finished,
)
from stpm.scoring.row_summary import COLUMNS, RowSummary
from stpm.scoring.schema import OUTPUT


@pytest.fixture
def output(memory: str) -> RunOutput:
    return RunOutput.single(memory)


@pytest.fixture
def segments(output: RunOutput) -> list[Segment]:
    """Two segments, of 8 and 2 images."""
    rows = make_rows([ManifestRow(ImageRef(f"{number}.png"), "nut") for number in range(10)])
    return write_manifest([rows], output.manifest, segment_rows=8).segments(output.manifest)


def write_task(
    output: RunOutput, segment: Segment, rows: slice, pending: bool = False, execution: str = "scores"
) -> None:
    """Leave what a task leaves that writes some rows of a segment, or is cut off before it commits them."""
    table = pa.concat_tables([storage.read_table(uri) for uri, _ in segment.shards])
    chosen = table.slice(rows.start, rows.stop - rows.start)
    values = {name: chosen[name] if name in chosen.schema.names else None for name in COLUMNS}
    columns = [pa.nulls(chosen.num_rows, OUTPUT.field(n).type) if v is None else v for n, v in values.items()]
    checkpoint = f"{output.segment_checkpoints(segment.number)}/{execution}_{rows.start}.parquet"
    storage.publish(f"{output.scores}/{execution}_{rows.start}-0.parquet", storage.encode_parquet(chosen))
    summary = RowSummary.of_rows(pa.table(dict(zip(COLUMNS, columns, strict=True))), f"{execution}_{rows.start}", 3)
    storage.publish(summary_of(checkpoint), summary.to_json())
    name = checkpoint.replace(".parquet", ".pending.parquet") if pending else checkpoint
    storage.publish(name, storage.encode_parquet(chosen.select(["image_id"])))


def remaining_uris(output: RunOutput, segment: Segment) -> list[str]:
    return [uri for shard, _ in take_over(output, segment) for uri in storage.read_table(shard)["uri"].to_pylist()]


def take_over(output: RunOutput, segment: Segment) -> tuple[Shard, ...]:
    """Let the next attempt take over what this one wrote of a segment."""
    return write_remaining(output, replace(output, attempt=output.attempt + 1), segment, 3)


def test_rows_that_tasks_committed_are_not_scored_again(output: RunOutput, segments: list[Segment]) -> None:
    first, second = segments
    write_task(output, first, slice(1, 3))
    write_task(output, first, slice(4, 5))
    write_task(output, first, slice(6, 8), pending=True)
    assert remaining_uris(output, first) == ["0.png", "3.png", "5.png", "6.png", "7.png"]
    assert take_over(output, second) == second.shards
    assert output.segments_with_checkpoints() == {0}


def test_a_segment_is_committed_once_all_of_its_rows_are_written(output: RunOutput, segments: list[Segment]) -> None:
    first, second = segments
    write_task(output, first, slice(0, 5))
    write_task(output, first, slice(5, 8), pending=True)
    assert commit_segment(output, OutputOptions(), first, 3).rows == 5
    assert committed_segments(output) == {}
    # The next run writes under other names.
    storage.remove(f"{output.segment_checkpoints(0)}/scores_5.pending.parquet")
    storage.remove(f"{output.scores}/scores_5-0.parquet")
    write_task(output, first, slice(5, 7))
    write_task(output, first, slice(7, 8))
    summary = commit_segment(output, OutputOptions(), first, 3)
    assert summary.rows == 8
    assert list(committed_summaries(output)) == [summary]
    storage.publish(f"{output.segments}/notes.json", b"not one of ours")
    assert list(committed_segments(output)) == [0]
    assert output.segments_with_checkpoints() == set()
    write_task(output, second, slice(0, 2))
    commit_segment(output, OutputOptions(), second, 3)
    assert total_of_finished(output, rows=10, max_ranked=3).rows == 10
    storage.remove(output.segment_summary(1))
    with pytest.raises(RunDamagedError, match=r"summaries in .*/segments are of 8 rows, and the run has 10: some are"):
        total_of_finished(output, rows=10, max_ranked=3)


def test_a_commit_lists_the_files_of_its_own_segment_alone(
    output: RunOutput, segments: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files at each commit would make the end of a run quadratic."""
    listed: list[str] = []

    def files_starting(*arguments: str) -> list[str]:
        found = list_files(*arguments)
        listed.extend(found)
        return found

    list_files = storage.files_starting
    monkeypatch.setattr(storage, "files_starting", files_starting)
    monkeypatch.setattr(RunOutput, "files", lambda _: pytest.fail("all files were listed"))
    write_task(output, segments[0], slice(0, 5), execution="scores_b_1")
    write_task(output, segments[0], slice(5, 8), execution="scores_b_2")
    write_task(output, segments[1], slice(0, 2), execution="scores_b_11")
    commit_segment(output, OutputOptions(), segments[0], 3)
    assert listed == [f"{output.scores}/scores_b_1_0-0.parquet", f"{output.scores}/scores_b_2_5-0.parquet"]


def test_a_checkpoint_whose_rename_was_cut_off_counts_once(output: RunOutput, segments: list[Segment]) -> None:
    """A store without renames copies and then removes."""
    write_task(output, segments[0], slice(0, 8), pending=True)
    write_task(output, segments[0], slice(0, 8))
    assert remaining_uris(output, segments[0]) == []
    assert commit_segment(output, OutputOptions(), segments[0], 3).rows == 8


def test_rows_that_are_written_twice_are_an_error(output: RunOutput, segments: list[Segment]) -> None:
    for rows in (slice(0, 8), slice(7, 8)):
        write_task(output, segments[0], rows)
    with pytest.raises(RunDamagedError, match=r"9 rows in .* for 8 images of segment 0$"):
        commit_segment(output, OutputOptions(), segments[0], 3)


def test_rows_that_are_lost_or_left_over_are_an_error(output: RunOutput, segments: list[Segment]) -> None:
    """A power failure keeps the ids and loses the rows; an attempt that was cut off leaves rows of its own."""
    write_task(output, segments[0], slice(0, 3))
    write_task(output, segments[0], slice(3, 8))
    for content, found in ((None, 5), (8, 13)):
        file = f"{output.scores}/scores_0-0.parquet"
        storage.remove(file)
        if content:
            storage.publish(file, storage.encode_parquet(pa.table({"image_id": range(content)})))
        with pytest.raises(RunDamagedError, match=rf"{found} rows in the files of .*/scores, where 8 of segment 0 "):
            commit_segment(output, OutputOptions(), segments[0], 3)
    storage.publish(file, b"")
    with pytest.raises(RunDamagedError, match=r"scores_0-0\.parquet is damaged"):
        commit_segment(output, OutputOptions(), segments[0], 3)
    assert committed_segments(output) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", None, {"nut": {"0.5": "1"}}])
def test_an_error_names_a_damaged_summary(
    output: RunOutput, segments: list[Segment], content: bytes | dict[str, object] | None
) -> None:
    write_task(output, segments[0], slice(0, 8))
    uri = f"{output.segment_checkpoints(0)}/scores_0.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(storage.read(uri)) | {"p_values": content}).encode()
    if content is None:
        storage.remove(uri)
    else:
        storage.publish(uri, content)
    with pytest.raises(RunDamagedError, match=r"000000/scores_0\.json is damaged or missing, and with it .*$"):
        commit_segment(output, OutputOptions(), segments[0], 3)


def test_an_error_names_a_file_of_rows_whose_footer_is_damaged(output: RunOutput, segments: list[Segment]) -> None:
    write_task(output, segments[0], slice(0, 8))
    (uri,) = output.files()
    data = bytearray(storage.read(uri))
    # The footer ends with its length and the file's mark, which stay.
    data[-40:-8] = bytes([255]) * 32
    storage.publish(uri, bytes(data))
    with pytest.raises(RunDamagedError, match=rf"^{uri} is damaged: "):
        commit_segment(output, OutputOptions(), segments[0], 3)


def test_an_error_names_a_damaged_checkpoint(output: RunOutput, segments: list[Segment]) -> None:
    storage.publish(f"{output.segment_checkpoints(0)}/0.parquet", b"x")
    with pytest.raises(RunDamagedError, match=r"000000/0\.parquet is damaged"):
        take_over(output, segments[0])


OTHER_COLUMNS = [
    (pa.table({"x": [1]}), "has no column image_id"),
    (pa.table({"image_id": ["1"]}), "has a column image_id of type string"),
    (pa.table({"image_id": pa.array([None], pa.int64())}), "has a row without image_id"),
]


@pytest.mark.parametrize(("rows", "problem"), OTHER_COLUMNS)
def test_an_error_names_a_checkpoint_or_a_shard_of_other_columns(
    output: RunOutput, segments: list[Segment], rows: pa.Table, problem: str
) -> None:
    checkpoint = f"{output.segment_checkpoints(0)}/0.parquet"
    storage.publish(checkpoint, storage.encode_parquet(rows))
    with pytest.raises(RunDamagedError, match=rf"000000/0\.parquet {problem}; the written rows are no longer known$"):
        take_over(output, segments[0])
    write_task(output, segments[0], slice(0, 3))
    storage.remove(checkpoint)
    storage.publish(segments[0].shards[0].uri, storage.encode_parquet(rows))
    with pytest.raises(RunDamagedError, match=rf"000000\.parquet, which lists images .* {problem}\)$"):
        take_over(output, segments[0])


def test_a_checkpoint_without_ids_counts_no_row(output: RunOutput, segments: list[Segment]) -> None:
    empty = pa.table({"image_id": pa.array([], pa.int64())})
    storage.publish(f"{output.segment_checkpoints(1)}/0.parquet", storage.encode_parquet(empty))
    storage.publish(f"{output.segment_checkpoints(1)}/0.json", RowSummary().to_json())
    assert remaining_uris(output, segments[1]) == ["8.png", "9.png"]


def test_other_digits_name_no_segment(output: RunOutput) -> None:
    storage.publish(f"{output.segments}/\N{SUPERSCRIPT TWO}.json", b"{}")
    storage.publish(f"{output.segments}/000001.json", b"{}")
    storage.publish(f"{output.segment_checkpoints(0)}\N{SUPERSCRIPT TWO}/0.parquet", b"")
    assert committed_segments(output) == {}
    assert output.segments_with_checkpoints() == set()


def test_what_a_suspended_attempt_writes_late_does_not_count(output: RunOutput, segments: list[Segment]) -> None:
    """The attempts 4 and 6 are cut off, and go on after the next one has begun."""
    first, _ = segments
    old, stale, new = (replace(output, attempt=n, fence=Fence(output.folder, n)) for n in (4, 6, 7))
    old_task, stale_task, new_task = (f"scores_{n:06}_{32 * 'a'}" for n in (4, 6, 7))

    def write(run: RunOutput, rows: slice, task: str) -> None:
        write_task(run, first, rows, execution=task)

    write(old, slice(0, 2), old_task)
    assert [rows for _, rows in write_remaining(old, stale, first, 3)] == [6]
    write(old, slice(2, 4), old_task)
    write(stale, slice(2, 5), stale_task)
    storage.publish(f"{output.folder}/.lease/7.json", b"")
    shards = write_remaining(stale, new, first, 3)
    assert [uri for shard, _ in shards for uri in storage.read_table(shard)["uri"].to_pylist()] == [
        f"{number}.png" for number in (5, 6, 7)
    ]
    write(stale, slice(5, 8), stale_task)
    storage.publish(f"{output.scores}/scores_of_mine.parquet", b"the user's")
    remove_leftovers(new)
    assert sorted(files(output)) == [f"{old_task}_0-0", f"{stale_task}_2-0", "scores_of_mine"]
    write(old, slice(5, 6), old_task)
    write(stale, slice(5, 8), stale_task)
    write(new, slice(5, 8), new_task)
    # The suspended process does what it does at its end.
    commit_segment(stale, OutputOptions(), first, 3)
    with pytest.raises(CutOffError, match="lease 6 is lost, the latest is 7"):
        remove_leftovers(stale)
    assert commit_segment(new, OutputOptions(), first, 3).rows == 8
    storage.publish(stale.segment_summary(0), b"late")
    (summary,) = committed_summaries(output)
    assert summary.tasks == [f"{old_task}_0", f"{stale_task}_2", f"{new_task}_5"]
    remove_leftovers(new)
    assert sorted(files(output)) == [f"{old_task}_0-0", f"{stale_task}_2-0", f"{new_task}_5-0", "scores_of_mine"]
    # A list of images that a later attempt made has nothing in common with these segments.
    assert committed_segments(output, first_attempt=8) == {}
    # By itself, it takes the attempt that wrote the list of images.
    storage.publish(f"{output.segments}/000005-000000.json", b"of a longer list, written late")
    assert {*committed_segments(output)} == {0, 5}
    write_manifest([read_shard(segments[0].shards[0].uri)], output.manifest, segment_rows=8, attempt=8)
    assert committed_segments(output) == {}


def files(output: RunOutput) -> list[str]:
    return [PurePosixPath(uri).stem for uri in output.files()]
