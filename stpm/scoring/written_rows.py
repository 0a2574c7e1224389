"""Which rows of a run are written: those of which a summary is in the folder of the attempt that counts.

    summaries/<attempt>/<segment>/<task>_<try>.json    of the rows that one task wrote
    summaries/<attempt>/<segment>.json                 the sum of several: their tasks do not count again

A task writes its files of rows first, and then their summary. Ray may repeat a task while the first try still writes:
each try has files and a summary of its own, and one of them counts. `run.json` names the attempt whose folder counts.
Each attempt first adds up, in a folder of its own, what the one before it has written until then, and has itself
recorded. What a process of an earlier attempt writes after that, one that was suspended and wakes up, is in a folder
that nobody reads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import PurePosixPath

import numpy as np

from stpm import storage
from stpm.errors import RunDamagedError
from stpm.lease import check
from stpm.scoring.inputs.manifest import Manifest, Segment, Shard, contains, read_shard
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import count_rows, read_ids
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.run_state import RunState

_SUMMARY = re.compile(r"/([0-9]{6,})(?:/[^/]+)?\.json$", re.ASCII)
# The end of the name of a task that writes rows, after the name of the run: attempt, execution, number, try.
_TASK = re.compile(r"(\d+)_[0-9a-f]{32}_\d+_[0-9a-f]{8}")


def summaries_by_segment(output: RunOutput) -> dict[int, list[str]]:
    """List the URIs of the summaries in the folder of this attempt, by segment; a sum of several comes first."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for uri in storage.files(output.attempt_summaries):
        if name := _SUMMARY.match(uri, len(output.attempt_summaries)):
            found[int(name[1])].append(uri)
    return dict(found)


def read_summaries(uris: Sequence[str]) -> Iterator[RowSummary]:
    """Read the summaries of one segment, one for each task, without those that its sum has.

    Raises:
        RunDamagedError: if a summary is damaged.
    """
    added_up: set[str] = set()
    for summary in storage.in_parallel(_read_summary, uris):
        tasks = {name.rpartition("_")[0] for name in summary.tasks}
        if not added_up.issuperset(tasks):
            added_up |= tasks
            yield summary


def _read_summary(uri: str) -> RowSummary:
    try:
        return RowSummary.from_json(storage.read(uri))
    except (ValueError, FileNotFoundError) as error:
        raise RunDamagedError(
            f"{uri} is damaged or missing, and with it the counts of written rows ({error})"
        ) from error


def committed_summaries(output: RunOutput) -> Iterator[RowSummary]:
    """Read the summaries of all rows that count, by run.json."""
    return _summaries_of(output.with_attempt(output.state.record.attempt))


def _summaries_of(output: RunOutput) -> Iterator[RowSummary]:
    # Not by run.json: a late request of a suspended process may have written that.
    return chain.from_iterable(map(read_summaries, summaries_by_segment(output).values()))


def total_of_finished(output: RunOutput, rows: int) -> RowSummary:
    """Add up the summaries of an attempt at a run that has this number of rows.

    Raises:
        RunDamagedError: if a summary is damaged, or the summaries are of another number of rows.
    """
    total = RowSummary.total(_summaries_of(output))
    if total.rows != rows:
        raise RunDamagedError(
            f"the summaries in {output.summaries} are of {total.rows} rows, and the run has {rows}: some are missing"
        )
    return total


def take_over(output: RunOutput, state: RunState, manifest: Manifest) -> dict[int, RowSummary]:
    """Add up what the attempt that counts has written, and record that from now on this attempt counts.

    An attempt before that which wrote the manifest had another list of images.

    Returns:
        The sum for each segment of which rows are written, by its number.

    Raises:
        RunDamagedError: as `add_up` does.
    """
    counted = state.record.attempt
    earlier = summaries_by_segment(output.with_attempt(counted)) if counted >= manifest.attempt else {}
    begun = [segment for segment in manifest.segments(output.manifest) if segment.number in earlier]
    sums = {each.number: add_up(output, each, earlier[each.number]) for each in begun}
    state.write(replace(state.record, attempt=output.attempt))
    return sums


def finish_segment(output: RunOutput, segment: Segment) -> RowSummary:
    """Add up the summaries that tasks left of a segment's rows, and remove them.

    Raises:
        RunDamagedError: as `add_up` does.
    """
    uris = summaries_by_segment(output).get(segment.number, [])
    summary = add_up(output, segment, uris)
    storage.remove(output.task_summaries(segment.number))
    return summary


def add_up(output: RunOutput, segment: Segment, uris: Sequence[str]) -> RowSummary:
    """Add up summaries of a segment's rows in one file of this attempt. If that is all rows, check that they are there.

    Raises:
        RunDamagedError: if a summary or a file is damaged, there are more rows than images, or the files have another
            number of rows than the summaries.
    """
    summary = RowSummary.total(read_summaries(uris))
    if summary.rows > segment.rows:
        raise RunDamagedError(
            f"{summary.rows} rows in {output.scores} for {segment.rows} images of segment {segment.number}"
        )
    is_sum_alone = [uri.rsplit("/", 1)[-1] for uri in uris] == [f"{segment.number:06}.json"]
    if summary.rows == segment.rows and not is_sum_alone:
        _check_count(output, segment, summary, count_rows(output, output.files_of(summary.tasks)))
        # Other processes wrote the rows: they must not be lost if the summary survives a power failure.
        storage.sync(output.scores)
    check(output.fence)
    storage.publish(output.segment_summary(segment.number), summary.to_json())
    return summary


def unwritten_shards(output: RunOutput, segment: Segment, written: RowSummary) -> list[Shard]:
    """List the shards of a segment that have rows to score, without the rows that are written.

    Raises:
        RunDamagedError: if a shard or a file of rows is damaged, or the files have another number of rows than their
            summary.
    """
    if not written.rows:
        return list(segment.shards)
    ids = read_ids(output, output.files_of(written.tasks))
    _check_count(output, segment, written, len(ids))

    def without_written(shard: Shard) -> Shard:
        rows = read_shard(shard.uri)["image_id"].to_numpy()
        done = np.sort(rows[contains(ids, rows)])
        return Shard(shard.uri, shard.rows - len(done), done if len(done) else None)

    return [shard for shard in storage.in_parallel(without_written, segment.shards) if shard.rows]


def remove_leftovers(output: RunOutput, tasks: Iterable[str]) -> None:
    """Remove the rows that do not count, which killed or suspended processes left, and what earlier attempts left.

    Args:
        output: of the run, with the attempt that counts.
        tasks: names of those whose rows count.

    Raises:
        RunInterruptedError: if another run has taken the lease.
    """
    counting, leftovers = set(tasks), []
    for uri in output.files():
        task = PurePosixPath(uri).stem
        name = _TASK.fullmatch(task.removeprefix(f"{output.name}_"))
        # Others may be the user's, or of a later attempt.
        if name and int(name[1]) <= output.attempt and task not in counting:
            leftovers.append(uri)
    # What did not count while this process held the lease will not count for any later attempt.
    check(output.fence)
    storage.in_parallel(storage.remove, leftovers)
    output.remove_earlier_attempts()


def _check_count(output: RunOutput, segment: Segment, summary: RowSummary, in_files: int) -> None:
    """Raise RunDamagedError if files were lost: a power failure may keep the summary of rows and lose the rows."""
    if in_files != summary.rows:
        raise RunDamagedError(
            f"{in_files} rows in the files of {output.scores}, where {summary.rows} of segment {segment.number} were "
            "written"
        )
