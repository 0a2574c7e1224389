"""Measure what a run costs beside its images, by its number of rows: listing, manifest, planning, resume, end.

    python bench/scale.py --rows 10000,100000,1000000

Each step runs in a process of its own, on a local disk. Its figures are seconds, seconds of CPU (of the driver alone,
so that other work on the machine hardly changes them), and the growth of the driver's memory in MiB, each also for a
million of the rows that the step handles; and the driver's largest memory. Images are not scored: a stub stage takes
the place of decoding and scoring, and writes rows with random scores. Where the stub would take minutes, the files of
earlier steps are generated.

- list: a folder of empty files, into manifest rows; at most `--files` of them. Its prefixes hold a thousand files each.
- list-s3: at most 100,000 objects on an S3 server of this machine, which is slow: only the driver's seconds of CPU say
  something.
- manifest: from a Parquet table of URIs, of which a hundredth are duplicates.
- plan: from the start of Ray Data until the first block reaches the stub stage, for the first segment.
- stub: all rows through Ray Data, with the stub stage; only up to `--stub-rows`.
- resume10, resume90: which rows remain, with 10 % and 90 % done. Only the ids of the segment that was begun are read.
- commit: the end of all segments, and of the run: adds up what the tasks reported, and ranks the images.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from commands import integers, make_parser, options_from, words
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from ray.exceptions import RayTaskError

from stpm import storage
from stpm.cluster.connection import connected
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from stpm.scoring import pipeline
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import Manifest, Segment, read_manifest, write_manifest
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.options import ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.progress import show_scoring_progress
from stpm.scoring.ranked_rows import most_anomalous
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.run_state import RunState, ScoringConfig
from stpm.scoring.schema import OUTPUT
from stpm.scoring.scoring_run import ScoringRun
from stpm.scoring.written_rows import committed_summaries, finish_segment, take_over, unwritten_shards

_FILES_PER_PREFIX = 1000
_DUPLICATES = 100
# The driver's memory must not be that of making the names.
_NAMES_AT_ONCE = 100_000
_ROWS_PER_FILE = ScoreOptions.rows_per_file
# The S3 server's own.
_ACCOUNT = "123456789012"
_MAX_KEYS = 100_000
_TOP = 50
_STEPS = ("list", "list-s3", "manifest", "plan", "stub", "resume10", "resume90", "commit")


def image_name(number: int) -> str:
    return f"{number // _FILES_PER_PREFIX:06}/{number:09}.png"


def output_rows(rows: pa.Table) -> pa.Table:
    """Make rows of schema OUTPUT, with random scores."""
    rng = np.random.default_rng(int(rows["image_id"][0].as_py()) % 2**32)
    scores = rng.random((2, rows.num_rows), np.float32)
    values = {"score": scores[0], "threshold": scores[1], "is_anomalous": scores[0] > scores[1]}

    def column(field: pa.Field) -> pa.ChunkedArray:
        if field.name in rows.schema.names:
            return rows[field.name]
        if field.name in values:
            return pa.array(values[field.name], field.type)
        return pa.nulls(rows.num_rows, field.type) if field.nullable else pa.repeat("", rows.num_rows)

    return pa.table([column(field) for field in OUTPUT], schema=OUTPUT)


class FirstBlock(Exception):  # noqa: N818
    """Ends an execution once a block has reached the stub stage."""


class StubDecode:
    """Takes the place of `Decode`: makes output rows, or ends the execution at the first block."""

    def __init__(self, stop: bool, *_: object, **__: object) -> None:
        self._stop = stop

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._stop:
            raise FirstBlock
        return output_rows(batch)


class Identity:
    """Takes the place of `Scorer` and of `DrawHeatmaps`."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


def measure(step: str, rows: int, act: Callable[[], object], handled: int = 0) -> None:
    """Print what a step takes, for a run with a number of rows of which it handles some, or all."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    act()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    costs = {"seconds": seconds, "cpu_seconds": cpu_seconds, "mib": (after.ru_maxrss - before.ru_maxrss) / 1024}
    millions = (handled or rows) / 1e6
    values = {"step": step, "rows": rows, "handled": handled or rows} | {name: round(costs[name], 2) for name in costs}
    values |= {f"{name}_per_million": round(cost / millions, 2) for name, cost in costs.items()}
    print(json.dumps(values | {"driver_mib": round(after.ru_maxrss / 1024)}), flush=True)


def list_files(folder: Path, rows: int) -> None:
    for number in range(rows):
        file = folder / "images" / image_name(number)
        if number % _FILES_PER_PREFIX == 0:
            file.parent.mkdir(parents=True)
        file.touch()
    measure("list", rows, lambda: count_rows(str(folder / "images")))


def count_rows(source: str) -> int:
    return sum(chunk.num_rows for chunk in image_rows([source], CategoryRule("nut")))


def serve_s3(keys: int, port: Connection) -> None:
    """Serve a bucket with this number of images, until the other end of the connection is closed."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    backend = s3_backends[_ACCOUNT]["aws"]
    backend.create_bucket("plant", "us-east-1")
    for number in range(keys):
        backend.put_object("plant", f"images/{image_name(number)}", b"")
    port.send(server.get_host_and_port()[1])
    with suppress(EOFError):
        port.recv()


def list_s3(keys: int) -> None:
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve_s3, args=(keys, there), daemon=True)
    server.start()
    there.close()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    os.environ |= dict.fromkeys(names, "any") | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{here.recv()}"}
    count_rows("s3://plant/images/000000")
    measure("list-s3", keys, lambda: count_rows("s3://plant/images"))
    here.close()


def measure_manifest(output: RunOutput, rows: int) -> None:
    source, distinct = storage.join(output.folder, "images.parquet"), rows - rows // _DUPLICATES
    Path(output.folder).mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(source, pa.schema([("uri", pa.string())])) as writer:
        for start in range(0, rows, _NAMES_AT_ONCE):
            numbers = range(start, min(rows, start + _NAMES_AT_ONCE))
            writer.write_table(pa.table({"uri": [image_name(number % distinct) for number in numbers]}))
    measure("manifest", rows, lambda: write_manifest(image_rows([source], CategoryRule("nut")), output.manifest))


def start(output: RunOutput) -> RunState:
    """Record the run, and that its first attempt counts."""
    state = output.state
    state.start(ScoringConfig((), ScoreOptions.false_alarm_rate))
    state.write(replace(state.record, attempt=output.attempt))
    return state


def run_stub(output: RunOutput, images: Manifest, segments: Sequence[Segment], step: str) -> None:
    """Score segments with the stub stage, to their end or to the first block."""
    stubs = {"Decode": partial(StubDecode, step == "plan"), "Scorer": Identity, "DrawHeatmaps": Identity}
    for name, stub in stubs.items():
        setattr(pipeline, name, stub)
    run = ScoringRun(
        rows=lambda: (),
        config=ScoringConfig((), ScoreOptions.false_alarm_rate),
        store=ModelStore(output.folder),
        options=ScoreOptions(),
        output=output,
        triage_images=_TOP,
        cluster=ClusterOptions(backend="pytorch"),
    )

    state = start(output)

    def score() -> None:
        for segment in segments:
            pipeline.score_shards(run, segment.shards, segment.number, {}, progress, state)
            finish_segment(output, segment)

    def to_first_block() -> None:
        with suppress(RayTaskError):
            score()

    rows = sum(segment.rows for segment in segments)
    with connected(), show_scoring_progress(rows, stop_on_failures=False) as progress:
        measure(step, images.rows, score if step == "stub" else to_first_block, rows)
    if step == "stub":
        measure("triage", rows, lambda: most_anomalous(output, _TOP))


def make_up_rows(output: RunOutput, segment: Segment, fraction: float) -> None:
    """Leave what tasks write of a fraction of a segment's rows."""
    task = 0
    for uri, rows, _ in segment.shards:
        done = storage.read_table(uri).slice(0, round(rows * fraction))
        for start in range(0, done.num_rows, _ROWS_PER_FILE):
            name = f"{output.name}_{segment.number:06}_{task:012}_try"
            written = output_rows(done.slice(start, _ROWS_PER_FILE))
            storage.publish(
                storage.join(output.scores, f"{name}.parquet"), storage.encode_parquet(written), durable=False
            )
            summary = storage.join(output.task_summaries(segment.number), f"{name}.json")
            storage.publish(summary, RowSummary.of_rows(written, name).to_json(), durable=False)
            task += 1


def resume(output: RunOutput, images: Manifest, fraction: float) -> None:
    """Find the remaining rows of a run of which a fraction of the segments, and of the next one, is done."""
    segments = images.segments(output.manifest)
    state, done = start(output), int(len(segments) * fraction)
    begun = segments[done]
    make_up_rows(output, begun, len(segments) * fraction - done)
    summary = RowSummary.of_rows(output_rows(storage.read_table(begun.shards[0].uri)), "scores")
    for segment in segments[:done]:
        storage.publish(output.segment_summary(segment.number), summary.to_json())

    def act() -> None:
        written = take_over(output.with_attempt(1), state, images)
        unwritten_shards(output.with_attempt(1), begun, written.get(begun.number, RowSummary()))

    measure(f"resume{fraction * 100:.0f}", images.rows, act, begun.rows)


def commit(output: RunOutput, images: Manifest) -> None:
    segments = images.segments(output.manifest)
    start(output)
    for segment in segments:
        make_up_rows(output, segment, 1.0)

    def act() -> None:
        for segment in segments:
            finish_segment(output, segment)
        assert RowSummary.total(committed_summaries(output)).rows == images.rows

    measure("commit", images.rows, act)


def run_step(step: str, rows: int, max_files: int, max_stub_rows: int, folder: Path) -> None:
    output = RunOutput.single(str(folder))
    if step == "list":
        list_files(folder, min(rows, max_files))
    elif step == "list-s3":
        list_s3(min(rows, _MAX_KEYS))
    elif step == "manifest":
        measure_manifest(output, rows)
    else:
        images = read_manifest(output.manifest)
        assert images
        for leftover in (output.summaries, output.scores, output.state.uri):
            storage.remove(leftover)
        if step in ("plan", "stub"):
            segments = images.segments(output.manifest)
            if step == "plan" or images.rows <= max_stub_rows:
                run_stub(output, images, segments[:1] if step == "plan" else segments, step)
        elif step == "commit":
            commit(output, images)
        else:
            resume(output, images, int(step.removeprefix("resume")) / 100)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--rows", type=integers, default="10000,100000,1000000", help="numbers of rows, separated by commas"
    )
    parser.add_argument(
        "--steps",
        type=words,
        default=",".join(_STEPS),
        help="steps, separated by commas; manifest is needed by later ones",
    )
    parser.add_argument("--files", type=int, default=100_000, help="files to list, at most (default: 100000)")
    parser.add_argument(
        "--stub-rows", type=int, default=1_000_000, help="rows for the stub stage, at most (default: 1000000)"
    )
    # This program starts itself with --folder, one step and one number of rows, for a process of its own.
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.folder:
        (step,), (rows,) = parsed.steps, parsed.rows
        run_step(step, rows, parsed.files, parsed.stub_rows, Path(parsed.folder))
        return
    limits = {"files": parsed.files, "stub-rows": parsed.stub_rows}
    for rows in parsed.rows:
        with tempfile.TemporaryDirectory() as folder:
            for step in parsed.steps:
                options = options_from({"rows": rows, "steps": step, "folder": folder} | limits)
                subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
