"""Score many images from S3 to S3: check that each has one row, and that memory does not grow.

    python bench/long_run.py --images 20000

Starts an S3 server, fills a bucket with PNG, JPEG and TIFF files of several sizes, some of them broken, fits a tiny
student, and scores them all. Prints for each quarter of the run the images per second and the memory in MiB
(proportional set size, mean over the quarter) of the driver, of the scorers, of the workers that fetch, decode and
write, and of Ray's own processes; then compares the rows with the bucket. Needs the extra `test`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections import Counter

from common import ROOT, by_quarter, job_command, make_image, make_parser, tiny_recipe, watch_score_job
from moto.server import ThreadedMotoServer

from stpm import storage

_FORMATS = ("PNG", "JPEG", "TIFF")
_SIZES = ((64, 64), (120, 90), (160, 200))
_BROKEN_EVERY = 500
_BROKEN_BYTES = 40
_FILES_PER_WRITE = 500


def image_file(number: int) -> tuple[str, bytes]:
    """Return a file's name and bytes."""
    file_format = _FORMATS[number % len(_FORMATS)]
    height, width = _SIZES[number // len(_FORMATS) % len(_SIZES)]
    data = make_image(number, height, width, file_format)
    name = f"{number // 1000:03}/{number:06}.{file_format.lower()}"
    return name, data[:_BROKEN_BYTES] if number % _BROKEN_EVERY == 0 else data


def fill_bucket(count: int) -> set[str]:
    """Write the training images of one category and `count` images to score; return the URIs of the latter."""
    fs, _ = storage.filesystem("s3://bucket")
    fs.mkdir("bucket")
    for number in range(1, 11):
        fs.pipe_file(f"bucket/data/nut/train/good/{number}.png", image_file(number * len(_FORMATS))[1])
    uris: set[str] = set()
    for start in range(0, count, _FILES_PER_WRITE):
        files = dict(image_file(number) for number in range(start, min(start + _FILES_PER_WRITE, count)))
        fs.pipe({f"bucket/images/{name}": data for name, data in files.items()})
        uris.update(f"s3://bucket/images/{name}" for name in files)
    return uris


def compare_rows(uris: set[str]) -> dict[str, int]:
    """Count rows, repeated and missing images, errors and heatmaps."""
    rows: Counter[str] = Counter()
    errors = 0
    for uri, _ in storage.files("s3://bucket/out/scores"):
        table = storage.read_table(uri)
        rows.update(table["uri"].to_pylist())
        errors += sum(map(bool, table["error_kind"].to_pylist()))
    return {
        "images": len(uris),
        "rows": rows.total(),
        "twice": sum(n > 1 for n in rows.values()),
        "missing": len(uris - rows.keys()),
        "errors": errors,
        "heatmaps": sum(uri.endswith(".png") for uri, _ in storage.files("s3://bucket/out/heatmaps")),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    count = parser.parse_args().images
    # The server would log every request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    uris = fill_bucket(count)
    with tempfile.TemporaryDirectory() as models:
        fit = job_command("fit", {"data": "s3://bucket/data", "models": models})
        subprocess.run([*fit, *tiny_recipe(64)], cwd=ROOT, check=True, capture_output=True)
        score = {"images": "s3://bucket/images", "out": "s3://bucket/out", "category": "nut", "top": 0}
        samples = watch_score_job({"models": models} | score)
    for quarter in by_quarter(samples, count):
        print(json.dumps(quarter), flush=True)
    print(json.dumps(compare_rows(uris)))
    server.stop()


if __name__ == "__main__":
    main()
