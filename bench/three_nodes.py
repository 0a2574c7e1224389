"""Score many images on a cluster of three nodes: each has one row, the driver does not grow, time is linear.

    python bench/three_nodes.py --images 10000,100000

Starts a head that takes no work and three nodes of one CPU, all of them processes on this machine, packs tiny images
into tar archives, fits a tiny student, and scores each number of images in turn. Prints for each quarter of a run the
images per second and the driver's memory in MiB, and how the rows compare with the images. Needs the extra `test`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from common import ROOT, by_quarter, job_command, make_image, make_parser, tiny_recipe, watch_score_job
from ray.cluster_utils import Cluster

from stpm.scoring.output import RunOutput
from stpm.scoring.resuming.run_state import RunState

_NODES = 3
_IMAGES_PER_ARCHIVE = 5000
_DISTINCT_IMAGES = 1000
_SIDE = 16
_STORE_BYTES = 2**29


def write_archives(folder: Path, count: int) -> None:
    """Write `count` images to tar archives."""
    folder.mkdir()
    images = [make_image(number, _SIDE, _SIDE) for number in range(_DISTINCT_IMAGES)]
    for start in range(0, count, _IMAGES_PER_ARCHIVE):
        with tarfile.open(folder / f"{start:07}.tar", "w") as archive:
            for number in range(start, min(start + _IMAGES_PER_ARCHIVE, count)):
                member = tarfile.TarInfo(f"{number:07}.png")
                data = images[number % _DISTINCT_IMAGES]
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def measure(root: Path, count: int) -> None:
    """Score `count` images and print the measurements."""
    images, out = root / f"images-{count}", root / f"out-{count}"
    write_archives(images, count)
    options = {"models": root / "models", "images": images, "out": out, "category": "nut"}
    start = time.perf_counter()
    samples = watch_score_job(options | {"mounted": root, "heatmaps": "none", "top": 0})
    seconds = time.perf_counter() - start
    for quarter in by_quarter(samples, count):
        print(json.dumps({k: quarter[k] for k in ("quarter", "images_per_second", "driver")}), flush=True)
    table = RunOutput.single(str(out)).dataset().to_table(columns=["uri", "error_kind"])
    uris = table["uri"].to_pylist()
    result = {
        "images": count,
        "rows": len(uris),
        "twice": len(uris) - len(set(uris)),
        "errors": sum(map(bool, table["error_kind"].to_pylist())),
        "seconds": round(seconds, 1),
        "steady_images_per_second": RunState(str(out)).summary().statistics.steady_images_per_second,
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", default="10000,100000", help="numbers of images, separated by commas")
    counts = [int(count) for count in parser.parse_args().images.split(",")]
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for number in range(_NODES):
        cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number + 2}", object_store_memory=_STORE_BYTES)
    os.environ["RAY_ADDRESS"] = cluster.address
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        good = root / "data" / "nut" / "train" / "good"
        good.mkdir(parents=True)
        for number in range(10):
            (good / f"{number}.png").write_bytes(make_image(number, _SIDE, _SIDE))
        fit = job_command("fit", {"data": root / "data", "models": root / "models", "mounted": root})
        subprocess.run([*fit, *tiny_recipe(32)], cwd=ROOT, check=True, capture_output=True)
        for count in counts:
            measure(root, count)
    cluster.shutdown()


if __name__ == "__main__":
    main()
