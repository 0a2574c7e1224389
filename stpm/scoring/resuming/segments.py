"""The segments of a run: each is committed by a summary of its rows, once all of them are written."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from pathlib import PurePosixPath

from stpm import storage
from stpm.errors import DataError, RunDamagedError
from stpm.scoring.inputs.manifest import Segment
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import blaming_damaged_file
from stpm.scoring.resuming.row_checkpoints import committed_checkpoints, summary_of, task_of
from stpm.scoring.row_summary import RowSummary

_SUMMARIES_AT_ONCE = 16


def committed_segments(output: RunOutput) -> dict[int, str]:
    """List the URI of the summary of each segment that is committed, by its number."""
    paths = {uri: PurePosixPath(uri) for uri in storage.files(output.segments)}
    return {int(path.stem): uri for uri, path in paths.items() if path.suffix == ".json" and path.stem.isdecimal()}


def committed_summaries(output: RunOutput) -> Iterator[RowSummary]:
    """Read the summaries of all segments that are committed, a few at a time: all of them may not fit the memory.

    Raises:
        RunDamagedError: if a summary is damaged.
    """
    uris = list(committed_segments(output).values())
    for start in range(0, len(uris), _SUMMARIES_AT_ONCE):
        yield from storage.in_parallel(_read, uris[start : start + _SUMMARIES_AT_ONCE])


def total_of_finished(output: RunOutput, rows: int, max_ranked: int = 0) -> RowSummary:
    """Add up the summaries of all segments of a run.

    Args:
        output: of the run.
        rows: number of the run's rows.
        max_ranked: number of the most anomalous images to name.

    Raises:
        RunDamagedError: if a summary is damaged, or the summaries are of another number of rows.
    """
    total = RowSummary.total(committed_summaries(output), max_ranked)
    if total.rows != rows:
        raise RunDamagedError(
            f"the summaries in {output.segments} are of {total.rows} rows, and the run has {rows}: some are missing"
        )
    return total


def commit_segment(output: RunOutput, options: OutputOptions, segment: Segment, max_ranked: int) -> RowSummary:
    """Add up the summaries of all tasks that wrote rows of a segment, and commit it if all of its rows are written.

    Args:
        output: of the run.
        options: whether its files are divided by category.
        segment: as in the manifest.
        max_ranked: number of the most anomalous images to name.

    Raises:
        RunDamagedError: if a summary or a file is damaged, there are more rows than images, or the files have another
            number of rows than the summaries.
    """
    checkpoints = output.segment_checkpoints(segment.number)
    committed = committed_checkpoints(checkpoints)
    summary = RowSummary.total(storage.in_parallel(_read, map(summary_of, committed)), max_ranked)
    if summary.rows > segment.rows:
        raise RunDamagedError(
            f"{summary.rows} rows in {output.scores} for {segment.rows} images of segment {segment.number}"
        )
    if summary.rows == segment.rows:
        # A power failure may have kept the ids of rows and lost their files.
        in_files = _count_rows_in_files(output, options, {task_of(uri) for uri in committed})
        if in_files != summary.rows:
            raise RunDamagedError(
                f"{in_files} rows in the files of {output.scores}, where {summary.rows} of segment {segment.number} "
                "were written"
            )
        # Other processes wrote the rows: they must not be lost if the summary survives a power failure.
        storage.sync(output.scores)
        storage.publish(output.segment_summary(segment.number), summary.to_json())
        storage.remove(checkpoints)
        storage.remove(output.segment_remaining(segment.number))
    return summary


def _count_rows_in_files(output: RunOutput, options: OutputOptions, tasks: Collection[str]) -> int:
    """Count the rows that tasks wrote, without listing those of other segments."""
    # Ray names the tasks of one execution alike, but for a number at the end.
    starts = sorted({f"{task.rpartition('_')[0]}_" for task in tasks})
    folders = [output.scores]
    if options.partition_by == "category" and storage.exists(output.scores):
        folders = [storage.join(output.scores, name) for name in storage.subfolders(output.scores)]
    listed = storage.in_parallel(lambda where: storage.files_starting(*where), product(folders, starts))
    files = [uri for uris in listed for uri in uris if task_of(uri) in tasks]
    with blaming_damaged_file(output, files):
        return sum(storage.in_parallel(_count_rows, files))


def _count_rows(uri: str) -> int:
    try:
        return storage.count_rows(uri)
    except DataError as error:
        raise RunDamagedError(str(error)) from error


def _read(uri: str) -> RowSummary:
    try:
        return RowSummary.from_json(storage.read(uri))
    except (ValueError, FileNotFoundError) as error:
        raise RunDamagedError(
            f"{uri} is damaged or missing, and with it the counts of written rows ({error})"
        ) from error
