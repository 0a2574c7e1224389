"""The segments of a run: each is committed by a summary of its rows, once all of them are written."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import chain, product

from stpm import storage
from stpm.errors import DataError, RunDamagedError
from stpm.lease import check
from stpm.scoring.inputs.manifest import Segment, read_manifest
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import blaming_damaged_file
from stpm.scoring.resuming.row_checkpoints import attempt_of, committed_checkpoints, read_summary, summary_of, task_of
from stpm.scoring.row_summary import RowSummary

_SUMMARIES_AT_ONCE = 16
_SUMMARY_NAME = re.compile(r"/(?P<segment>[0-9]+)-(?P<attempt>[0-9]+)\.json$")


def committed_segments(output: RunOutput, first_attempt: int | None = None) -> dict[int, str]:
    """List the URI of the summary of each segment that is committed, by its number.

    If several attempts committed a segment, the latest counts: a process that was suspended may commit it once more.

    Args:
        output: of the run.
        first_attempt: what earlier attempts committed is ignored, it belongs to another list of images; None: that of
            the run's list.
    """
    if first_attempt is None:
        manifest = read_manifest(output.manifest)
        first_attempt = manifest.attempt if manifest else 0
    found = {}
    for uri in storage.files(output.segments):
        if (name := _SUMMARY_NAME.search(uri)) and int(name["attempt"]) >= first_attempt:
            # They are sorted.
            found[int(name["segment"])] = uri
    return found


def committed_summaries(output: RunOutput, first_attempt: int | None = None) -> Iterator[RowSummary]:
    """Read the summaries of all segments that are committed, a few at a time: all of them may not fit the memory.

    Raises:
        RunDamagedError: if a summary is damaged.
    """
    uris = list(committed_segments(output, first_attempt).values())
    for start in range(0, len(uris), _SUMMARIES_AT_ONCE):
        yield from storage.in_parallel(read_summary, uris[start : start + _SUMMARIES_AT_ONCE])


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
    summary = RowSummary.total(_summaries_in(checkpoints), max_ranked)
    if summary.rows > segment.rows:
        raise RunDamagedError(
            f"{summary.rows} rows in {output.scores} for {segment.rows} images of segment {segment.number}"
        )
    if summary.rows == segment.rows:
        # A power failure may have kept the ids of rows and lost their files.
        in_files = _count_rows_in_files(output, options, set(summary.tasks))
        if in_files != summary.rows:
            raise RunDamagedError(
                f"{in_files} rows in the files of {output.scores}, where {summary.rows} of segment {segment.number} "
                "were written"
            )
        # Other processes wrote the rows: they must not be lost if the summary survives a power failure.
        storage.sync(output.scores)
        check(output.fence)
        storage.publish(output.segment_summary(segment.number), summary.to_json())
        storage.remove(checkpoints)
        storage.remove(output.segment_remaining(segment.number))
    return summary


def remove_leftovers(output: RunOutput, first_attempt: int | None = None) -> None:
    """Remove the rows that do not count, which killed or suspended processes left, and what earlier attempts left.

    Args:
        output: of the run. Every row that counts is in a committed segment, or in a checkpoint of its attempt.
        first_attempt: as for `committed_segments`.

    Raises:
        CutOffError: if another run has taken the lease.
    """
    folders = map(output.segment_checkpoints, output.segments_with_checkpoints())
    committed = committed_summaries(output, first_attempt)
    summaries = chain(committed, chain.from_iterable(map(_summaries_in, folders)))
    tasks = {task for summary in summaries for task in summary.tasks}
    leftovers = []
    for uri in output.files():
        attempt = attempt_of(task_of(uri), output.name)
        # Others may be the user's, or of a later attempt.
        if attempt is not None and attempt <= output.attempt and task_of(uri) not in tasks:
            leftovers.append(uri)
    # What did not count while this process held the lease will not count for any later attempt.
    check(output.fence)
    storage.in_parallel(storage.remove, leftovers)
    output.clear_attempts(output.attempt)


def _summaries_in(checkpoints: str) -> list[RowSummary]:
    """Read the summaries of the rows that are written, by the folder of their checkpoints."""
    return storage.in_parallel(read_summary, map(summary_of, committed_checkpoints(checkpoints)))


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
