"""A long pass from S3 to S3: every image one row, and memory that does not grow.

    python bench/long_run.py --images 20000

Starts an S3 server, fills a bucket with PNG, JPEG and TIFF files of several sizes, some of them broken, fits a tiny
student, and scores them all. Prints, per quarter of the pass, images per second and the memory of the driver, of the
scorers, of the workers that fetch, decode and write, and of Ray's own processes, in MiB (proportional set size, the
mean over the quarter); and how the rows compare with the bucket. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from moto.server import ThreadedMotoServer
from PIL import Image

from stpm import storage

_ROOT = Path(__file__).resolve().parents[1]
_KINDS = ("PNG", "JPEG", "TIFF")
_SIZES = ((64, 64), (120, 90), (160, 200))
_BROKEN_EVERY = 500
_AT_ONCE = 500
_SAMPLE_SECONDS = 3.0
_PARTS = ("driver", "scorers", "stages", "ray")
_TINY = [
    *("--preset", "paper", "--teacher", "test_resnet", "--teacher-weights", "random"),
    *("--size", "64", "--batch-size", "4", "--epochs", "1"),
]
_DONE = re.compile(r"^(\d+)/(\d+) images")


def image(number: int) -> tuple[str, bytes]:
    """A file's name and bytes."""
    kind = _KINDS[number % len(_KINDS)]
    height, width = _SIZES[number // len(_KINDS) % len(_SIZES)]
    pixels = np.random.default_rng(number).integers(90, 130, (height, width, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    data = sink.getvalue()
    return f"{number // 1000:03}/{number:06}.{kind.lower()}", data[:40] if number % _BROKEN_EVERY == 0 else data


def fill(count: int) -> None:
    """The bucket: training images of one category, and the collection."""
    fs, _ = storage.filesystem("s3://bucket")
    fs.mkdir("bucket")
    for number in range(1, 11):
        fs.pipe_file(f"bucket/data/nut/train/good/{number}.png", image(number * len(_KINDS))[1])
    for start in range(0, count, _AT_ONCE):
        files = dict(image(number) for number in range(start, min(start + _AT_ONCE, count)))
        fs.pipe({f"bucket/images/{name}": data for name, data in files.items()})


def part_of(title: str) -> str:
    """Which part of the job a process of Ray is of, by the title that Ray gives it."""
    if "MapWorker" in title:
        return "scorers"
    # Between two tasks a worker is IDLE; the other titles that begin so are Ray's own actors and agents.
    return "stages" if title.startswith(("ray::Read", "ray::Map", "ray::IDLE")) else "ray"


def memory(driver: int) -> dict[str, float]:
    """MiB by part of the job."""
    sizes: Counter[str] = Counter()
    root = psutil.Process(driver)
    for process in [root, *root.children(recursive=True)]:
        try:
            words = " ".join(process.cmdline()[:2])
            size = process.memory_full_info().pss
        except psutil.Error:
            continue
        part = "driver" if process.pid == driver else part_of(words)
        sizes[part] += size / 2**20
    return dict(sizes)


def followed(command: list[str]) -> Iterator[tuple[float, int, dict[str, float]]]:
    """Seconds, images done and memory, again and again while the command runs; it must succeed."""
    start = time.perf_counter()
    told = start
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if (match := _DONE.match(line)) and time.perf_counter() - told >= _SAMPLE_SECONDS:
                told = time.perf_counter()
                yield told - start, int(match[1]), memory(process.pid)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines[-30:])}")


def quarters(samples: list[tuple[float, int, dict[str, float]]], count: int) -> Iterator[dict[str, float]]:
    """Speed and mean memory by quarter of the images."""
    for quarter in range(4):
        inside = [s for s in samples if quarter * count < 4 * s[1] <= (quarter + 1) * count]
        if len(inside) > 1:
            speed = (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])
            parts = {part: round(statistics.fmean(s[2].get(part, 0) for s in inside)) for part in _PARTS}
            yield {"quarter": quarter + 1, "images_per_second": round(speed, 1)} | parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    count = parser.parse_args().images
    # It would tell of every request.
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
    with tempfile.TemporaryDirectory() as folder:
        models = f"{folder}/models"
        fill(count)
        fit = [sys.executable, "jobs/fit.py", "--data", "s3://bucket/data", "--models", models, *_TINY]
        subprocess.run(fit, cwd=_ROOT, check=True, capture_output=True)
        options = [
            "--models",
            models,
            "--images",
            "s3://bucket/images",
            "--out",
            "s3://bucket/out",
            "--category",
            "nut",
        ]
        samples = list(followed([sys.executable, "jobs/score.py", *options, "--top", "0"]))
    for quarter in quarters(samples, count):
        print(json.dumps(quarter), flush=True)
    uris: Counter[str] = Counter()
    errors = 0
    for uri, _ in storage.files("s3://bucket/out/scores"):
        table = storage.read_table(uri)
        uris.update(table["uri"].to_pylist())
        errors += sum(map(bool, table["error_kind"].to_pylist()))
    asked = {f"s3://bucket/images/{image(number)[0]}" for number in range(count)}
    heatmaps = sum(uri.endswith(".png") for uri, _ in storage.files("s3://bucket/out/heatmaps"))
    result = {"images": count, "rows": uris.total(), "twice": sum(n > 1 for n in uris.values())}
    print(json.dumps(result | {"missing": len(asked - uris.keys()), "errors": errors, "heatmaps": heatmaps}))
    server.stop()


if __name__ == "__main__":
    main()
