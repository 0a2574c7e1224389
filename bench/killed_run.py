"""One large run that is killed three times at random, compared with one that nothing disturbed.

    python bench/killed_run.py [--images 200000] [--segment-rows 50000] [--seed 0] [--folder s3://BUCKET/FOLDER]

Fits a tiny student to the demo data, cuts small images out of it, every fiftieth of them broken, and scores them twice.
In the second run the driver and all processes below it are killed three times, each after a random number of rows and
up to two seconds more, and the same command is run again. Compares all rows, the names of the heatmap files, and the
summaries. Needs the extras `demo` and `test`; with `--folder s3://…` the extra `s3`, and credentials and endpoint as
the jobs take them from the environment.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
from camera_faults import open_image
from commands import kill_after, make_parser, run_job

from stpm import storage
from stpm.data import demo, mvtec
from stpm.data.encode import encode_jpeg
from stpm.errors import RunDamagedError
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.written_rows import committed_summaries

_KILLS = 3
_CATEGORY = "grass"
_FIT = {"categories": _CATEGORY, "teacher": "test_resnet", "teacher-weights": "random", "size": 64, "epochs": 2}
_SIDE = 64
_FILES_PER_FOLDER = 1000
_BROKEN = 50
_TOP = 50
_SAME = ["uri", "category", "is_anomalous", "error_kind", "model_id", "heatmap", "width", "height", "bytes"]
# Images are scored in other batches, which changes the last bits.
_TOLERANCE = 1e-4


def make_images(folder: str, data: str, count: int) -> None:
    """Cut images out of those of the demo data, and write them to a folder or URI."""
    rng = np.random.default_rng(0)
    category = mvtec.read_category(data, _CATEGORY)
    uris = [*(uri for uri, _ in category.train), *(image.uri for image in category.test)]
    wholes = [open_image(uri) for uri in uris]
    corners = rng.integers(0, demo.CROP - _SIDE + 1, (count, 2))

    def write(number: int) -> None:
        x, y = corners[number]
        file = encode_jpeg(wholes[number % len(wholes)].crop((x, y, x + _SIDE, y + _SIDE)))
        uri = f"{folder}/{number // _FILES_PER_FOLDER:04}/{number:07}.jpg"
        storage.publish(uri, file[:40] if number % _BROKEN == 0 else file, durable=False)

    storage.in_parallel(write, range(count))


def count_committed(output: RunOutput) -> int:
    """Count the rows of an unfinished run that no later run scores again."""
    return sum(summary.rows for summary in committed_summaries(output))


def has_rows(output: RunOutput, rows: int) -> bool:
    """Return whether a run that goes on has committed this number of rows."""
    with suppress(RunDamagedError):
        return count_committed(output) >= rows
    # Its summaries were added up meanwhile.
    return False


def read_rows(output: RunOutput) -> pa.Table:
    return open_rows(output).to_table(columns=[*_SAME, "image_id", "score"]).sort_by("image_id")


def compare(output: RunOutput, undisturbed: RunOutput, images: int) -> None:
    """Check that two runs have the same rows, heatmap files and summaries."""
    found, expected = read_rows(output), read_rows(undisturbed)
    assert len(set(expected["image_id"].to_pylist())) == expected.num_rows == images
    assert found.drop_columns("score").equals(expected.drop_columns("score"))
    np.testing.assert_allclose(found["score"].to_numpy(), expected["score"].to_numpy(), rtol=_TOLERANCE)
    for run in (output, undisturbed):
        written = {uri.removeprefix(f"{run.folder}/") for uri in storage.files(run.heatmaps)}
        heatmaps = set(expected["heatmap"].to_pylist()) - {""}
        assert written == heatmaps, sorted(written ^ heatmaps)[:5]
        counted = RowSummary.total(committed_summaries(run))
        assert counted == replace(RowSummary.of_rows(open_rows(run).to_table(), ""), tasks=counted.tasks)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=200_000, help="images to score (default: 200000)")
    parser.add_argument("--segment-rows", type=int, default=50_000, help="images of a segment (default: 50000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", help="empty folder or URI for the images and the runs (default: a temporary one)")
    parsed = parser.parse_args()
    rng = np.random.default_rng(parsed.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = storage.absolute(parsed.folder or folder)
        if storage.files(root):
            sys.exit(f"{root} is not empty: give another --folder")
        demo.make(f"{root}/data")
        run_job("fit", {"data": f"{root}/data", "models": f"{root}/models", "preset": "paper", **_FIT})
        make_images(f"{root}/images", f"{root}/data", parsed.images)
        options = {"models": f"{root}/models", "images": f"{root}/images", "category": _CATEGORY, "top": _TOP}
        options |= {"segment-rows": parsed.segment_rows, "max-error-rate": 1}
        undisturbed, output = (RunOutput.single(f"{root}/{name}") for name in ("undisturbed", "killed"))
        start = time.perf_counter()
        run_job("score", options | {"out": undisturbed.folder})
        seconds = time.perf_counter() - start
        print(f"{parsed.images} images, undisturbed: {seconds:.0f} s", flush=True)
        for share in sorted(rng.uniform(0, 0.9, _KILLS)):
            rows, after = share * parsed.images, rng.uniform(0, 2)
            if not kill_after("score", options | {"out": output.folder}, after, partial(has_rows, output, rows)):
                sys.exit("the run ended before it was killed: give more --images")
            print(f"killed {after:.1f} s after {rows:.0f} rows: {count_committed(output)} are committed", flush=True)
        start = time.perf_counter()
        run_job("score", options | {"out": output.folder})
        print(f"finished in {time.perf_counter() - start:.0f} s more", flush=True)
        compare(output, undisturbed, parsed.images)
        print(f"all {parsed.images} rows, their heatmaps and summaries are those of the undisturbed run")


if __name__ == "__main__":
    main()
